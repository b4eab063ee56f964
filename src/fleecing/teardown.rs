//! Taking everything of ours out of QEMU again, from what is there now.
//!
//! The same code ends a session, gives one up, and cleans up behind a process that was killed: it looks at QEMU and
//! removes what carries our names, top down, until nothing is left. Nothing foreign is touched.

use super::{
    SessionError,
    disk::BlockGraph,
    names::{self, JobKind, Slot},
};
use crate::{
    chain::{BitmapAction, BitmapName, settle},
    fleecing::Disks,
    qmp::{Qmp, QmpError, command::*},
};
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// How long QEMU may take to let go of everything.
const LIMIT: Duration = Duration::from_secs(30);

/// What of ours is in QEMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observation {
    /// Exports.
    pub exports: Vec<String>,
    /// Exports of others.
    pub foreign_exports: usize,
    /// Jobs: id and status.
    pub jobs: Vec<(String, String)>,
    /// Nodes, top first.
    pub nodes: Vec<String>,
    /// Descriptor sets.
    pub fdsets: Vec<i64>,
}

impl Observation {
    /// Looks.
    pub async fn take(qmp: &Qmp) -> Result<Self, QmpError> {
        let exports = qmp.execute(&QueryBlockExports {}).await?;
        let jobs = qmp.execute(&QueryJobs {}).await?;
        let mut nodes: Vec<String> = qmp
            .execute(&QueryNamedBlockNodes { flat: Some(true) })
            .await?
            .into_iter()
            .map(|node| node.node_name)
            .filter(|name| names::node_slot(name).is_some())
            .collect();
        nodes.sort_by_key(|name| names::node_slot(name).map(|(slot, rank)| (rank, slot)));
        let fdsets = qmp.execute(&QueryFdsets {}).await?;
        Ok(Self {
            foreign_exports: exports.iter().filter(|export| !names::is_export(&export.id)).count(),
            exports: exports.into_iter().map(|export| export.id).filter(|id| names::is_export(id)).collect(),
            jobs: jobs
                .into_iter()
                .filter(|job| names::job(&job.id).is_some())
                .map(|job| (job.id, job.status))
                .collect(),
            nodes,
            fdsets: fdsets
                .into_iter()
                .filter(|set| set.fds.iter().any(|fd| fd.opaque.as_deref() == Some(names::FDSET_OPAQUE)))
                .map(|set| set.fdset_id)
                .collect(),
        })
    }

    /// Nothing of ours is left.
    pub fn is_clean(&self) -> bool {
        self.exports.is_empty() && self.jobs.is_empty() && self.nodes.is_empty() && self.fdsets.is_empty()
    }

    /// For people.
    pub fn describe(&self) -> String {
        let mut parts = Vec::new();
        for (what, items) in [
            ("exports", self.exports.clone()),
            ("jobs", self.jobs.iter().map(|(id, _)| id.clone()).collect()),
            ("nodes", self.nodes.clone()),
            ("descriptor sets", self.fdsets.iter().map(ToString::to_string).collect()),
        ] {
            if !items.is_empty() {
                parts.push(format!("{what} {}", items.join(", ")));
            }
        }
        if parts.is_empty() { "nothing".into() } else { parts.join("; ") }
    }
}

/// Removes all of ours but the bitmaps. `nbd_server`: the server was started by us, so it ends with our exports.
pub async fn remove_all(qmp: &Qmp, nbd_server: bool) -> Result<(), SessionError> {
    let deadline = Instant::now() + LIMIT;
    let failed = || SessionError::qmp("looking for what is left in QEMU");
    let mut nbd_server = nbd_server;
    loop {
        let before = Observation::take(qmp).await.map_err(failed())?;
        one_pass(qmp, &before, &mut nbd_server).await?;
        let after = Observation::take(qmp).await.map_err(failed())?;
        if after.is_clean() {
            // A descriptor that the server never took; none is the usual case.
            let _ = qmp.execute(&CloseFd { fdname: names::LISTENER_FD.into() }).await;
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(SessionError::LeftBehind { left: after.describe() });
        }
        sleep(Duration::from_millis(if after == before { 100 } else { 5 })).await;
    }
}

/// Tries every removal once, top down: exports, snapshots, jobs or filters, fleeces, descriptors. A refusal (something
/// is still in use) is left to the next pass.
async fn one_pass(qmp: &Qmp, seen: &Observation, nbd_server: &mut bool) -> Result<(), SessionError> {
    for id in &seen.exports {
        attempt(qmp.execute(&BlockExportDel { id: id.clone(), mode: "hard" }).await)?;
    }
    if !seen.exports.is_empty() && !wait_for_exports(qmp).await? {
        return Ok(());
    }
    if *nbd_server && seen.foreign_exports == 0 {
        attempt(qmp.execute(&NbdServerStop {}).await)?;
        *nbd_server = false;
    }
    for (id, status) in &seen.jobs {
        if names::job(id).is_some_and(|(_, kind)| kind != JobKind::Fleece) {
            end_job(qmp, id, status).await?;
        }
    }
    for node in seen.nodes.iter().filter(|node| is_kind(node, Slot::snapshot)) {
        attempt(qmp.execute(&BlockdevDel { node_name: node.clone() }).await)?;
    }
    for (id, status) in &seen.jobs {
        if names::job(id).is_some_and(|(_, kind)| kind == JobKind::Fleece) {
            end_job(qmp, id, status).await?;
        }
    }
    let owned_by_job = |node: &str| {
        names::node_slot(node)
            .is_some_and(|(slot, _)| seen.jobs.iter().any(|(id, _)| names::job(id) == Some((slot, JobKind::Fleece))))
    };
    let filters: Vec<_> =
        seen.nodes.iter().filter(|node| is_kind(node, Slot::filter) && !owned_by_job(node)).cloned().collect();
    if !filters.is_empty() {
        take_off_filters(qmp, &filters).await?;
    }
    for node in seen.nodes.iter().filter(|node| !is_kind(node, Slot::snapshot) && !is_kind(node, Slot::filter)) {
        attempt(qmp.execute(&BlockdevDel { node_name: node.clone() }).await)?;
    }
    for fdset_id in &seen.fdsets {
        attempt(qmp.execute(&RemoveFd { fdset_id: *fdset_id }).await)?;
    }
    Ok(())
}

fn is_kind(node: &str, kind: fn(Slot) -> String) -> bool {
    names::node_slot(node).is_some_and(|(slot, _)| kind(slot) == node)
}

/// Devices get back what their filter stands on *now*: somebody may have taken a snapshot underneath.
async fn take_off_filters(qmp: &Qmp, filters: &[String]) -> Result<(), SessionError> {
    let graph = BlockGraph::query(qmp).await?;
    let devices = qmp.execute(&QueryBlock {}).await.map_err(SessionError::qmp("listing the disks"))?;
    for filter in filters {
        for device in &devices {
            let drive = device.inserted.as_ref().and_then(|inserted| inserted.node_name.as_deref());
            let (Some(drive), Some(qdev)) = (drive, &device.qdev) else { continue };
            let below = graph.filtered_child(filter);
            // `drive` was read a moment ago and is the filter, so the new value differs: setting the same node aborts QEMU.
            if let (true, Some(below)) = (drive == filter, below) {
                let set = QomSet { path: qdev.clone(), property: "drive".into(), value: below.into() };
                attempt(qmp.execute(&set).await)?;
            }
        }
        attempt(qmp.execute(&BlockdevDel { node_name: filter.clone() }).await)?;
    }
    Ok(())
}

async fn end_job(qmp: &Qmp, id: &str, status: &str) -> Result<(), SessionError> {
    if status != "concluded" {
        attempt(qmp.execute(&JobCancel { id: id.to_owned() }).await)?;
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let jobs = qmp.execute(&QueryJobs {}).await.map_err(SessionError::qmp("waiting for a job"))?;
            match jobs.iter().find(|job| job.id == id) {
                None => return Ok(()),
                Some(job) if job.status == "concluded" => break,
                Some(_) if Instant::now() > deadline => return Ok(()),
                Some(_) => sleep(Duration::from_millis(5)).await,
            }
        }
    }
    attempt(qmp.execute(&JobDismiss { id: id.to_owned() }).await)
}

async fn wait_for_exports(qmp: &Qmp) -> Result<bool, SessionError> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let exports = qmp.execute(&QueryBlockExports {}).await.map_err(SessionError::qmp("waiting for an export"))?;
        if !exports.iter().any(|export| names::is_export(&export.id)) {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// A refusal is no error here: the next look shows whether anything is left.
fn attempt<T>(result: Result<T, QmpError>) -> Result<(), SessionError> {
    match result {
        Ok(_) => Ok(()),
        Err(QmpError::Refused { command, description, .. }) => {
            tracing::debug!(command, description, "refused during teardown");
            Ok(())
        }
        Err(source) => Err(SessionError::Qmp { attempt: "cleaning up in QEMU".into(), source }),
    }
}

/// Puts the bitmaps of one line in order on every volume, so that the next backup can go on. `head` names, for a
/// volume, the newest complete backup that has it.
pub async fn settle_bitmaps(
    qmp: &Qmp,
    line: &str,
    head: impl Fn(&str) -> Option<String>,
) -> Result<usize, SessionError> {
    let disks = Disks::discover(qmp).await?;
    let mut done = 0;
    for volume in &disks.volumes {
        let on_node = |name: String| BitmapRef { node: volume.format_node.clone(), name };
        for action in settle(line, head(&volume.name).as_deref(), &volume.bitmaps) {
            // An end mark goes with its bitmap and is not counted beside it.
            let counts =
                !matches!(&action, BitmapAction::Remove { name } if BitmapName::parse_end_mark(name).is_some());
            let actions = match action {
                BitmapAction::RollBack { from, into } => vec![
                    TransactionAction::BlockDirtyBitmapEnable(on_node(into.clone())),
                    TransactionAction::BlockDirtyBitmapMerge(BitmapMerge {
                        node: volume.format_node.clone(),
                        target: into,
                        bitmaps: vec![on_node(from.clone())],
                    }),
                    TransactionAction::BlockDirtyBitmapRemove(on_node(from)),
                ],
                BitmapAction::Remove { name } => vec![TransactionAction::BlockDirtyBitmapRemove(on_node(name))],
            };
            let attempt = format!("putting the bitmaps of volume `{}` in order", volume.name);
            qmp.execute(&Transaction { actions }).await.map_err(SessionError::qmp(attempt))?;
            done += usize::from(counts);
        }
    }
    Ok(done)
}
