//! The agent's loop: sees backups, takes runs, and stops them.

use super::{
    AgentConfig, Order, decide,
    kubelet::{self},
    leftovers::clean_up_all,
    metrics::AgentMetrics,
    publish::{Subject, apply, publish},
    report::{self, Ending},
    work::{Work, carry_out},
};
use crate::{
    api::{AgentClaim, Assignment, RunState, VirtualMachineBackup},
    fleecing::{FleeceDirectory, SessionError},
    operator::{Health, Metrics},
    run::{RunStatus, Stop},
};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{
    Api, Client, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use std::{collections::HashMap, io, sync::Arc, time::Duration};
use tokio::sync::{mpsc, watch};

/// Between two attempts to clean up behind an earlier process.
const CLEAN_UP_EVERY: Duration = Duration::from_secs(5);
/// Between two signs of life of the loop.
const BEAT: Duration = Duration::from_secs(5);
/// How long runs may take to undo what they did when the agent is told to end. Kubernetes kills it later
/// (`terminationGracePeriodSeconds`).
const END_LIMIT: Duration = Duration::from_secs(25);

/// Why an agent cannot work.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The kubelet's directory is not there.
    #[error("{path} does not hold the pods of a kubelet; see --kubelet-dir")]
    Kubelet {
        /// The directory.
        path: std::path::PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The fleece directory is unusable.
    #[error(transparent)]
    Fleece(#[from] SessionError),
    /// No randomness.
    #[error("no random instance id could be made")]
    Random(#[source] io::Error),
}

/// A node's agent.
pub struct Agent {
    config: Arc<AgentConfig>,
    client: Client,
    instance: String,
    /// Runs of this process, by the backup's UID.
    runs: HashMap<String, Going>,
    /// Backups that this node has to do with, by UID.
    seen: HashMap<String, VirtualMachineBackup>,
    ended: mpsc::UnboundedSender<String>,
    metrics: AgentMetrics,
    health: Arc<Health>,
    fleeces: FleeceDirectory,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("config", &self.config).field("instance", &self.instance).finish_non_exhaustive()
    }
}

/// A run of this process.
#[derive(Debug)]
struct Going {
    attempt: i64,
    stop: watch::Sender<Option<Stop>>,
}

impl Agent {
    /// Checks the node's directories.
    pub fn new(
        config: AgentConfig,
        client: Client,
        metrics: &Metrics,
        health: Arc<Health>,
    ) -> Result<(Self, mpsc::UnboundedReceiver<String>), AgentError> {
        let path = config.kubelet_directory.clone();
        kubelet::check(&path).map_err(|source| AgentError::Kubelet { path, source })?;
        let fleeces = FleeceDirectory::open(&config.fleece_directory)?;
        if let Some(kind) = fleeces.network_file_system() {
            tracing::warn!("the fleece directory is on {kind}: when that stalls, VMs stall; use a local disk");
        }
        let random = getrandom::u64().map_err(|error| AgentError::Random(io::Error::other(error)))?;
        let (ended, endings) = mpsc::unbounded_channel();
        let agent = Self {
            config: Arc::new(config),
            client,
            instance: format!("{random:016x}"),
            runs: HashMap::new(),
            seen: HashMap::new(),
            ended,
            metrics: AgentMetrics::new(metrics),
            health,
            fleeces,
        };
        Ok((agent, endings))
    }

    /// Works until it is told to end, then gives up every run and undoes what it did.
    pub async fn run(mut self, mut endings: mpsc::UnboundedReceiver<String>, shutdown: impl Future<Output = ()>) {
        let mut shutdown = std::pin::pin!(shutdown);
        // VMs first: they need no API server.
        while !clean_up_all(&self.config).await {
            self.beat();
            tokio::select! {
                () = tokio::time::sleep(CLEAN_UP_EVERY) => {}
                () = &mut shutdown => return,
            }
        }
        let api: Api<VirtualMachineBackup> = Api::all(self.client.clone());
        let selected = watcher::Config::default().fields(&format!("status.activeNode={}", self.config.node_name));
        let mut events = std::pin::pin!(watcher(api, selected).default_backoff());
        tracing::info!(node = self.config.node_name, instance = self.instance, "the agent is at work");
        self.health.set_unready(None);
        let mut beats = tokio::time::interval(BEAT);
        loop {
            tokio::select! {
                _ = beats.tick() => self.beat(),
                Some(event) = events.next() => match event {
                    Ok(event) => self.take(event).await,
                    Err(error) => tracing::warn!(%error, "backups cannot be watched; runs go on meanwhile"),
                },
                Some(uid) = endings.recv() => self.end(&uid).await,
                () = &mut shutdown => break,
            }
        }
        self.give_up(&mut endings).await;
    }

    fn beat(&self) {
        self.health.beat();
        self.metrics.sessions.set(i64::try_from(self.runs.len()).unwrap_or(i64::MAX));
        if let Ok(available) = self.fleeces.available() {
            self.metrics.fleece_available.set(i64::try_from(available).unwrap_or(i64::MAX));
        }
    }

    async fn take(&mut self, event: watcher::Event<VirtualMachineBackup>) {
        match event {
            watcher::Event::Apply(backup) | watcher::Event::InitApply(backup) => {
                let Some(uid) = backup.uid() else { return };
                self.seen.insert(uid.clone(), backup);
                self.look(&uid).await;
            }
            watcher::Event::Delete(backup) => {
                let Some(uid) = backup.uid() else { return };
                self.seen.remove(&uid);
                if let Some(going) = self.runs.get(&uid) {
                    let message = "the controller called the backup off, or it was deleted";
                    going
                        .stop
                        .send_replace(Some(Stop { reason: "AssignmentWithdrawn".into(), message: message.into() }));
                }
            }
            watcher::Event::Init | watcher::Event::InitDone => {}
        }
    }

    /// Looks at a backup: at a new state of it, or because there is room for a run now.
    async fn look(&mut self, uid: &str) {
        let Some(backup) = self.seen.get(uid) else { return };
        let mine = self.runs.get(uid).map(|going| going.attempt);
        match decide(backup, &self.config.node_name, &self.instance, mine) {
            Order::Nothing => {}
            Order::Claim(assignment) if self.runs.len() < self.config.max_sessions => {
                self.claim(backup.clone(), assignment).await;
            }
            Order::Claim(_) => tracing::info!(backup = backup.name_any(), "waits for another session to end"),
            Order::Stop { reason, message } => {
                if let Some(going) = self.runs.get(uid) {
                    going.stop.send_replace(Some(Stop { reason, message }));
                }
            }
            Order::TakeOver(assignment) => {
                let message = "the agent was restarted in the middle of the backup; the VM was cleaned up";
                let ending =
                    Ending::Failed { reason: "AgentRestarted".into(), message: message.into(), retryable: true };
                self.settle(backup.clone(), &assignment, ending).await;
            }
            Order::Decline(assignment) => {
                let abort = assignment.abort.clone();
                let (reason, message) = abort.map(|abort| (abort.reason, abort.message)).unwrap_or_default();
                self.settle(backup.clone(), &assignment, Ending::Aborted { reason, message }).await;
            }
        }
    }

    fn subject(&self, backup: &VirtualMachineBackup, assignment: &Assignment) -> Subject {
        Subject {
            name: backup.name_any(),
            uid: backup.uid().unwrap_or_default(),
            attempt: assignment.attempt,
            agent: AgentClaim {
                instance: self.instance.clone(),
                node_name: self.config.node_name.clone(),
                claimed: Some(Time(Timestamp::now())),
            },
        }
    }

    fn api_of(&self, backup: &VirtualMachineBackup) -> Api<VirtualMachineBackup> {
        Api::namespaced(self.client.clone(), &backup.namespace().unwrap_or_default())
    }

    /// Ends a run that nobody carries out.
    async fn settle(&self, backup: VirtualMachineBackup, assignment: &Assignment, ending: Ending) {
        let subject = self.subject(&backup, assignment);
        let run = report::run(subject.attempt, &subject.agent, &RunStatus::default(), Some(&ending), Timestamp::now());
        // Unless it changed meanwhile: then there is another event.
        let version = backup.resource_version();
        if let Err(error) = apply(&self.api_of(&backup), &subject, &run, version.as_deref()).await {
            tracing::debug!(%error, backup = subject.name, "the run could not be settled");
        }
    }

    async fn claim(&mut self, backup: VirtualMachineBackup, assignment: Assignment) {
        let subject = self.subject(&backup, &assignment);
        let api = self.api_of(&backup);
        let mut run = report::run(subject.attempt, &subject.agent, &RunStatus::default(), None, Timestamp::now());
        run.state = RunState::Claimed;
        let version = backup.resource_version();
        if let Err(error) = apply(&api, &subject, &run, version.as_deref()).await {
            tracing::debug!(%error, backup = subject.name, "the run could not be claimed");
            return;
        }
        let (stop, stops) = watch::channel(None);
        self.runs.insert(subject.uid.clone(), Going { attempt: subject.attempt, stop });
        let (config, client, ended) = (Arc::clone(&self.config), self.client.clone(), self.ended.clone());
        let (fleece_limit, metrics) = (self.fleece_limit(), self.metrics.clone());
        tokio::spawn(async move {
            let span = tracing::info_span!(
                "run",
                backup = format!("{}/{}", backup.namespace().unwrap_or_default(), subject.name),
                backup_uid = subject.uid,
                attempt = subject.attempt
            );
            let uid = subject.uid.clone();
            let work = Work { backup, assignment, fleece_limit };
            let run = Box::pin(one_run(config, client, api, subject, work, stops, metrics));
            tracing::Instrument::instrument(run, span).await;
            let _ = ended.send(uid);
        });
    }

    /// What one more session may take of the node's budget: an equal part of it.
    fn fleece_limit(&self) -> Option<u64> {
        let parts = u64::try_from(self.config.max_sessions.max(1)).unwrap_or(u64::MAX);
        self.config.fleece_budget.map(|budget| budget / parts)
    }

    async fn end(&mut self, uid: &str) {
        self.runs.remove(uid);
        // Somebody may wait for the room.
        for waiting in self.seen.keys().cloned().collect::<Vec<_>>() {
            self.look(&waiting).await;
        }
    }

    async fn give_up(&mut self, endings: &mut mpsc::UnboundedReceiver<String>) {
        for going in self.runs.values() {
            let message = "the agent of the node is being restarted";
            going.stop.send_replace(Some(Stop { reason: "AgentRestarted".into(), message: message.into() }));
        }
        let all = async {
            while !self.runs.is_empty() {
                let Some(uid) = endings.recv().await else { return };
                self.runs.remove(&uid);
            }
        };
        if tokio::time::timeout(END_LIMIT, all).await.is_err() {
            tracing::warn!("runs are left to the next agent of this node");
        }
    }
}

async fn one_run(
    config: Arc<AgentConfig>,
    client: Client,
    api: Api<VirtualMachineBackup>,
    subject: Subject,
    work: Work,
    stops: watch::Receiver<Option<Stop>>,
    metrics: AgentMetrics,
) {
    let begun = tokio::time::Instant::now();
    let (status, shown) = watch::channel(RunStatus::default());
    let (ending, ended) = watch::channel(None);
    let telling = tokio::spawn(tracing::Instrument::in_current_span(publish(api, subject, shown, ended)));
    let how = Box::pin(carry_out(&config, &client, &work, &status, stops)).await;
    metrics.ended(&how, &status.borrow(), begun.elapsed());
    ending.send_replace(Some(how));
    // The room is free for the next run although the API server may be away for long.
    drop(telling);
}
