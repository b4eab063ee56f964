//! Telling the API server of a run: not too often, and without waiting for it.

use super::report::{self, Ending};
use crate::{
    api::{AGENT_MANAGER, AgentClaim, Run, VirtualMachineBackup, api_version},
    run::RunStatus,
};
use jiff::Timestamp;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::json;
use std::time::Duration;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

/// Between two reports, unless the state changed.
const EVERY: Duration = Duration::from_secs(2);
/// A report is due so often even if nothing moves: it is the sign of life.
const SIGN_OF_LIFE: Duration = Duration::from_secs(20);
/// Between two attempts to reach an API server that does not answer, at most.
const MAX_DELAY: Duration = Duration::from_secs(10);
/// One attempt.
const REQUEST_LIMIT: Duration = Duration::from_secs(15);

/// Which run of which backup.
#[derive(Debug, Clone)]
pub(super) struct Subject {
    /// Name of the backup.
    pub name: String,
    /// Its UID: a new object of the same name is another one.
    pub uid: String,
    /// The attempt.
    pub attempt: i64,
    /// Who carries it out.
    pub agent: AgentClaim,
}

/// Writes `status.run`. With a resource version only if the object is still the one that was seen.
pub(super) async fn apply(
    api: &Api<VirtualMachineBackup>,
    subject: &Subject,
    run: &Run,
    resource_version: Option<&str>,
) -> Result<(), kube::Error> {
    // The UID makes the server refuse an object that was made anew.
    let mut metadata = json!({ "name": subject.name, "uid": subject.uid });
    if let Some(version) = resource_version {
        metadata["resourceVersion"] = version.into();
    }
    let document = json!({
        "apiVersion": api_version(),
        "kind": "VirtualMachineBackup",
        "metadata": metadata,
        "status": { "run": run },
    });
    let parameters = PatchParams::apply(AGENT_MANAGER).force();
    let patch = Patch::Apply(&document);
    match tokio::time::timeout(REQUEST_LIMIT, api.patch_status(&subject.name, &parameters, &patch)).await {
        Ok(result) => result.map(drop),
        Err(_) => Err(kube::Error::Service("the API server does not answer".into())),
    }
}

/// Reports a run until it has ended and that was told. `ending` is set when it has. Returns early when the object is
/// gone, or is not this one any more.
pub(super) async fn publish(
    api: Api<VirtualMachineBackup>,
    subject: Subject,
    mut status: watch::Receiver<RunStatus>,
    mut ending: watch::Receiver<Option<Ending>>,
) {
    let mut told = Told { state: None, at: Instant::now() };
    loop {
        let ended = ending.borrow_and_update().clone();
        let now = status.borrow_and_update().clone();
        if ended.is_some() || told.is_due(&now) {
            told.state = Some(now.state);
            told.at = Instant::now();
            let run = report::run(subject.attempt, &subject.agent, &now, ended.as_ref(), Timestamp::now());
            let result = match &ended {
                None => apply(&api, &subject, &run, None).await,
                Some(_) => insist(&api, &subject, &run).await,
            };
            match result {
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {
                    tracing::warn!("the backup was deleted: nobody is told of its run any more");
                    return;
                }
                Err(error) => tracing::warn!(%error, "the API server could not be told how far the backup is"),
                Ok(()) => {}
            }
        }
        if ended.is_some() {
            return;
        }
        let due = told.at + EVERY;
        tokio::select! {
            _ = ending.changed() => {}
            changed = status.changed() => if changed.is_err() {
                // Its sender is gone: the ending comes next.
                sleep(Duration::from_millis(50)).await;
            } else if status.borrow().state == told.state.unwrap_or_default() {
                tokio::select! {
                    () = sleep_until(due) => {}
                    _ = ending.changed() => {}
                }
            },
            () = sleep(SIGN_OF_LIFE) => told.state = None,
        }
    }
}

struct Told {
    state: Option<crate::run::RunState>,
    at: Instant,
}

impl Told {
    fn is_due(&self, now: &RunStatus) -> bool {
        self.state != Some(now.state) || self.at.elapsed() >= EVERY
    }
}

/// The last word has to arrive, however long the API server is away.
async fn insist(api: &Api<VirtualMachineBackup>, subject: &Subject, run: &Run) -> Result<(), kube::Error> {
    let mut delay = Duration::from_millis(200);
    loop {
        match apply(api, subject, run, None).await {
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {
                return Err(kube::Error::Api(status));
            }
            Err(error) => {
                tracing::warn!(%error, "the API server could not be told how the backup ended; trying again");
                sleep(delay).await;
                delay = (delay * 2).min(MAX_DELAY);
            }
            Ok(()) => return Ok(()),
        }
    }
}
