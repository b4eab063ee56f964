//! Freezing the guest's file systems around the cut.

use super::{SessionError, guardian::Guardian};
use crate::guest_agent::GuestAgent;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How long the guest may take to freeze. Windows gives its writers 10 s; some need longer to get there.
const FREEZE_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take to thaw.
const THAW_LIMIT: Duration = Duration::from_secs(10);

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wish {
    /// Freeze where an agent answers; say so where not.
    #[default]
    IfPossible,
    /// No backup without it.
    Required,
    /// Crash-consistent.
    Never,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum QuiesceOutcome {
    /// The file systems were frozen at the point in time.
    Frozen {
        /// How many.
        file_systems: u64,
        /// From the request to the thaw, in microseconds.
        microseconds: u64,
    },
    /// They were not.
    NotFrozen {
        /// Why.
        why: String,
    },
}

/// Freezing of one session.
#[derive(Debug)]
pub struct Quiesce {
    wish: Wish,
    agent: Option<Box<dyn GuestAgent>>,
    outcome: QuiesceOutcome,
    begun: Option<Instant>,
}

impl Quiesce {
    /// Finds out whether freezing is possible. `running`: the guest's CPUs run; a paused guest cannot answer, and
    /// writes nothing either.
    pub async fn prepare(
        wish: Wish,
        agent: Result<Option<Box<dyn GuestAgent>>, String>,
        running: bool,
    ) -> Result<Self, SessionError> {
        let (agent, why) = match (wish, running, agent) {
            (Wish::Never, ..) => (None, "not asked for".to_owned()),
            (_, false, _) => (None, "the VM is paused: nothing is being written".to_owned()),
            (_, _, Err(why)) => (None, why),
            (_, _, Ok(None)) => (None, "no guest agent was named (--guest-agent)".to_owned()),
            (_, _, Ok(Some(mut agent))) => match agent.ping().await {
                Ok(()) => (Some(agent), String::new()),
                Err(error) => (None, error.to_string()),
            },
        };
        if wish == Wish::Required && running && agent.is_none() {
            return Err(SessionError::Quiesce { detail: why });
        }
        Ok(Self { wish, agent, outcome: QuiesceOutcome::NotFrozen { why }, begun: None })
    }

    /// Whether [`Quiesce::freeze`] is to be called.
    pub fn is_wanted(&self) -> bool {
        self.agent.is_some()
    }

    /// What became of it so far.
    pub fn outcome(&self) -> QuiesceOutcome {
        self.outcome.clone()
    }

    /// The connection that a guardian needs to thaw.
    pub fn duplicate_fd(&self) -> Option<std::os::fd::OwnedFd> {
        self.agent.as_ref()?.duplicate_fd()
    }

    /// Freezes. An error only if freezing was required; whatever it answers, [`Quiesce::thaw`] must follow.
    pub async fn freeze(&mut self, guardian: &mut Guardian) -> Result<(), SessionError> {
        let Some(agent) = &mut self.agent else { return Ok(()) };
        guardian.watch_freeze();
        self.begun = Some(Instant::now());
        match agent.freeze(FREEZE_LIMIT).await {
            Ok(file_systems) => {
                self.outcome = QuiesceOutcome::Frozen { file_systems, microseconds: 0 };
                Ok(())
            }
            Err(error) => {
                let why = error.to_string();
                self.outcome = QuiesceOutcome::NotFrozen { why: why.clone() };
                if self.wish == Wish::Required { Err(SessionError::Quiesce { detail: why }) } else { Ok(()) }
            }
        }
    }

    /// Thaws, also after a freeze that failed: it may have taken effect in the guest.
    pub async fn thaw(&mut self, guardian: &mut Guardian) -> QuiesceOutcome {
        let Some(agent) = &mut self.agent else { return self.outcome.clone() };
        let thawed = match agent.thaw(THAW_LIMIT).await {
            Err(error) => {
                tracing::warn!(%error, "thawing failed: trying once more");
                agent.thaw(THAW_LIMIT).await
            }
            thawed => thawed,
        };
        match thawed {
            Ok(()) => guardian.freeze_ended(),
            // The guardian tries on its own, by its own deadline.
            Err(error) => tracing::error!(%error, "the guest's file systems may still be frozen"),
        }
        if let (QuiesceOutcome::Frozen { microseconds, .. }, Some(begun)) = (&mut self.outcome, self.begun) {
            *microseconds = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        }
        self.outcome.clone()
    }
}
