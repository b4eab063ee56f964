//! Conditions: the standard type, and the kinds that we use.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition as MetaCondition, Time};

/// `metav1.Condition`.
pub type Condition = MetaCondition;

/// Kinds of conditions.
pub mod kinds {
    /// The object is what it should be; for a backup: it is complete.
    pub const READY: &str = "Ready";
    /// Work on the object goes on (kstatus: in progress).
    pub const RECONCILING: &str = "Reconciling";
    /// The object will not become ready by itself (kstatus: failed).
    pub const STALLED: &str = "Stalled";
    /// The backup is complete: every byte was read and durably stored.
    pub const COMPLETE: &str = "Complete";
    /// The backup failed for good.
    pub const FAILED: &str = "Failed";
    /// The guest's file systems were frozen at the point in time.
    pub const QUIESCED: &str = "Quiesced";
    /// The repository answered when it was last asked.
    pub const REACHABLE: &str = "Reachable";
}

/// Value of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConditionStatus {
    /// `True`
    True,
    /// `False`
    False,
    /// `Unknown`
    Unknown,
}

impl ConditionStatus {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// Sets a condition. The time of transition stays when the value stays, so that setting the same again changes nothing.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    kind: &str,
    status: ConditionStatus,
    reason: &str,
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) {
    let known = conditions.iter_mut().find(|condition| condition.type_ == kind);
    let since = match &known {
        Some(known) if known.status == status.as_str() => known.last_transition_time.clone(),
        _ => Time(now),
    };
    let condition = Condition {
        type_: kind.into(),
        status: status.as_str().into(),
        reason: reason.into(),
        message: message.into(),
        observed_generation: generation,
        last_transition_time: since,
    };
    match known {
        Some(known) => *known = condition,
        None => conditions.push(condition),
    }
}

/// The condition of this kind.
pub fn find_condition<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == kind)
}
