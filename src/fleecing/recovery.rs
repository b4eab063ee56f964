//! Finishing what a killed session left.

use super::{Journal, Leftover, SessionError, teardown};
use crate::{
    guest_agent::GuestAgent,
    qmp::{
        Qmp,
        command::{Cont, QueryStatus},
    },
};
use serde::Serialize;
use std::time::Duration;

/// What was found and done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Recovered {
    /// Backup whose session had been cut short.
    pub backup: Option<String>,
    /// What of it was still in QEMU.
    pub removed: Option<String>,
    /// The CPUs had been left stopped.
    pub continued: bool,
    /// The guest had perhaps been left frozen, and was thawed.
    pub thawed: bool,
    /// Bitmaps that were put in order.
    pub bitmaps: usize,
}

/// The newest complete backup of a VM at a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Head {
    /// Its id; none: there is no backup.
    pub backup: Option<String>,
    /// The volumes that it has; none: all.
    pub volumes: Option<Vec<String>>,
}

impl Head {
    fn of(&self, volume: &str) -> Option<String> {
        let has = self.volumes.as_ref().is_none_or(|volumes| volumes.iter().any(|name| name == volume));
        self.backup.clone().filter(|_| has)
    }
}

impl Recovered {
    /// There was nothing to do.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Takes everything of an earlier session out of QEMU, releases the guest, and puts the bitmaps in order. `head` names,
/// for the target directory and VM of that session and a volume, the newest complete backup there: it decides whether
/// the session's bitmaps are kept or merged back. Where it answers `None` (the target cannot be reached) the bitmaps
/// are left as they are: the next backup to that target puts them in order.
pub async fn recover(
    qmp: &Qmp,
    journal: &mut Journal,
    agent: Option<&mut Box<dyn GuestAgent>>,
    head: impl AsyncFnOnce(&Leftover) -> Option<Head>,
) -> Result<Recovered, SessionError> {
    let leftover = journal.leftover().map_err(SessionError::local("reading the journal of an earlier session"))?;
    let mut recovered = Recovered::default();
    // The guest first: everything else can wait.
    if let Some(leftover) = &leftover {
        recovered.backup = Some(leftover.begin.backup.clone());
        if leftover.is_stopped() {
            let status = qmp.execute(&QueryStatus {}).await.map_err(SessionError::qmp("reading the VM's state"))?;
            if status.status == "paused" {
                qmp.execute(&Cont {}).await.map_err(SessionError::qmp("continuing the CPUs"))?;
                recovered.continued = true;
            }
        }
        if leftover.is_frozen()
            && let Some(agent) = agent
        {
            match agent.thaw(Duration::from_secs(10)).await {
                Ok(()) => recovered.thawed = true,
                Err(error) => tracing::warn!(%error, "the guest may still be frozen"),
            }
        }
    }
    let seen = teardown::Observation::take(qmp).await.map_err(SessionError::qmp("looking for what is left in QEMU"))?;
    let nbd_server = leftover.as_ref().is_some_and(Leftover::has_nbd_server);
    if !seen.is_clean() {
        recovered.removed = Some(seen.describe());
    }
    if !seen.is_clean() || nbd_server {
        teardown::remove_all(qmp, nbd_server).await?;
    }
    if let Some(leftover) = &leftover {
        let line = &leftover.begin.bitmap_line;
        if let Some(head) = head(leftover).await {
            recovered.bitmaps = teardown::settle_bitmaps(qmp, line, |volume| head.of(volume)).await?;
        }
        let _ = std::fs::remove_file(journal.path().with_extension("nbd"));
        journal.close().map_err(SessionError::local("closing the journal"))?;
    }
    Ok(recovered)
}
