//! How a session makes its point in time.

use super::SessionError;
use crate::qmp::Capabilities;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What makes the point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// One transaction of `blockdev-backup sync=none` over all disks: atomic while the guest runs.
    Job,
    /// `copy-before-write` filters put on the devices while the CPUs stand still for some milliseconds.
    Filter,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Job => "job",
            Self::Filter => "filter",
        })
    }
}

/// What is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum View {
    /// A `snapshot-access` node on the filter: reads of a broken snapshot fail.
    SnapshotAccess,
    /// The fleece itself, a qcow2 image over the disk. A broken snapshot reads as new data without an error: the
    /// detector has to find it.
    Overlay,
}

/// The engine that a session uses, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineChoice {
    /// The engine.
    pub engine: Engine,
    /// What is read.
    pub view: View,
    /// A fleece that fails breaks the snapshot (`on-cbw-error`), not the guest.
    pub guest_safe: bool,
    /// What was read can be discarded from the snapshot.
    pub discards: bool,
    /// For people.
    pub why: String,
}

/// Chooses; `requested` overrides as far as this QEMU allows.
pub fn choose(requested: Option<Engine>, capabilities: &Capabilities) -> Result<EngineChoice, SessionError> {
    let view = match capabilities.snapshot_access {
        None => View::SnapshotAccess,
        Some(_) => View::Overlay,
    };
    let filter = match (&capabilities.copy_before_write, &capabilities.snapshot_access) {
        (Some(why), _) | (None, Some(why)) => Err(why.clone()),
        (None, None) => Ok(EngineChoice {
            engine: Engine::Filter,
            view: View::SnapshotAccess,
            guest_safe: true,
            discards: capabilities.snapshot_discard,
            why: "blockdev-backup has no on-cbw-error here, and the filter drivers are allowed".into(),
        }),
    };
    let job = EngineChoice {
        engine: Engine::Job,
        view,
        guest_safe: capabilities.backup_on_cbw_error,
        discards: view == View::SnapshotAccess && capabilities.snapshot_discard,
        why: if capabilities.backup_on_cbw_error {
            "blockdev-backup has on-cbw-error".into()
        } else {
            "blockdev-backup has no on-cbw-error and the filter drivers are not allowed: the fleece is watched closely"
                .into()
        },
    };
    match requested {
        Some(Engine::Job) => Ok(EngineChoice { why: "requested".into(), ..job }),
        Some(Engine::Filter) => match filter {
            Ok(filter) => Ok(EngineChoice { why: "requested".into(), ..filter }),
            Err(why) => Err(SessionError::EngineUnavailable { engine: "filter", why }),
        },
        None if capabilities.backup_on_cbw_error => Ok(job),
        None => Ok(filter.unwrap_or(job)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capabilities(on_cbw_error: bool, drivers: bool) -> Capabilities {
        let refused = (!drivers).then(|| "not whitelisted".to_owned());
        Capabilities {
            version: serde_json::from_str(r#"{"qemu":{"major":10,"minor":0,"micro":2},"package":""}"#).unwrap(),
            backup_on_cbw_error: on_cbw_error,
            snapshot_discard: true,
            copy_before_write: refused.clone(),
            snapshot_access: refused,
        }
    }

    #[test]
    fn the_choice_follows_what_qemu_can_do() {
        let cases = [
            ((true, true), (Engine::Job, View::SnapshotAccess, true)),
            ((true, false), (Engine::Job, View::Overlay, true)),
            ((false, true), (Engine::Filter, View::SnapshotAccess, true)),
            ((false, false), (Engine::Job, View::Overlay, false)),
        ];
        for ((on_cbw_error, drivers), (engine, view, guest_safe)) in cases {
            let choice = choose(None, &capabilities(on_cbw_error, drivers)).unwrap();
            assert_eq!((choice.engine, choice.view, choice.guest_safe), (engine, view, guest_safe));
            assert_eq!(choice.discards, view == View::SnapshotAccess, "a qcow2 fleece is never trimmed");
        }
    }

    #[test]
    fn the_filter_engine_is_refused_where_its_drivers_are() {
        assert!(choose(Some(Engine::Filter), &capabilities(true, false)).is_err());
        assert_eq!(choose(Some(Engine::Filter), &capabilities(true, true)).unwrap().engine, Engine::Filter);
    }
}
