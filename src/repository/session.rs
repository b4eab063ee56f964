//! A running backup, as far as the repository is concerned.
//!
//! Backups of many machines write at the same time, and chunks may be deleted by a prune meanwhile. Nobody locks
//! anything; instead
//!
//! 1. a session makes itself known (`sessions/ID`) *before* it looks at anything that it will rely on, and keeps a
//!    sign of life;
//! 2. a prune first publishes what it would delete (the *condemned* chunks), *then* lists the sessions, and waits for
//!    those that may not have seen that;
//! 3. a session that has seen the list does not rely on a condemned chunk, unless it *holds* it: it writes the hold
//!    into its session object first, then looks whether the prune is deleting already. The prune says that it is
//!    deleting first, then reads the holds. Whatever the order, one sees the other. The index of the backup that an
//!    incremental one stands on is held in the same way.
//!
//! `docs/format.md` describes the protocol, `protocol_test.rs` plays it out of order.

use super::{
    RepositoryError,
    chunk::ChunkId,
    manifest::Manifest,
    plan::{Plan, PlanState},
    process::Process,
    repository::{Repository, chunk_name},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};
use tokio::sync::Mutex;

/// Between two signs of life.
const HEARTBEAT: Duration = Duration::from_secs(60);
/// Without a sign of life for this long a session counts as dead.
pub(super) const LEASE: Duration = Duration::from_secs(30 * 60);
/// A session whose last sign of life is older does not commit. Far below [`LEASE`]: the clocks of two machines differ.
pub(super) const COMMIT_LIMIT_SECONDS: i64 = 10 * 60;
/// How long a session waits for the end of a deletion that it must not meet.
const SWEEP_LIMIT: Duration = Duration::from_secs(15 * 60);
/// A session that needs more condemned chunks than these holds all: each hold writes the object anew, with all of them.
const MAX_HOLDS: usize = 64;
/// Largest session object, in bytes.
const MAX_SESSION: u64 = 80 << 20;

/// A session as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct SessionObject {
    pub(super) id: String,
    pub(super) process: Process,
    pub(super) started: Timestamp,
    /// Condemned chunks that it relies on.
    pub(super) holds: Vec<String>,
    /// Relies on any number of them: nothing of the list is to be deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) holds_all: bool,
    /// Indexes that it relies on with all that hangs on them, though their backups may be forgotten meanwhile.
    #[serde(default)]
    pub(super) bases: Vec<HeldIndex>,
}

/// The index of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HeldIndex {
    pub(super) root: String,
    /// Bytes of the volume.
    pub(super) size: u64,
}

/// A backup under way. One that is dropped without [`RepositorySession::end`] counts as dead when its last sign of
/// life is too old.
#[derive(Debug)]
pub struct RepositorySession {
    pub(super) repository: Arc<Repository>,
    pub(super) inner: Arc<Inner>,
    heartbeat: tokio::task::JoinHandle<()>,
    runtime: tokio::runtime::Handle,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) name: String,
    state: Mutex<State>,
    /// Seconds of `CLOCK_BOOTTIME` (which goes on while the machine sleeps) at the last sign of life.
    pub(super) last_sign: AtomicI64,
}

#[derive(Debug)]
struct State {
    object: SessionObject,
    /// The prune whose list was seen when the session began.
    plan: Option<Plan>,
    condemned: HashSet<ChunkId>,
}

impl RepositorySession {
    /// Makes a session known, then looks for a prune.
    pub async fn start(repository: Arc<Repository>) -> Result<Self, RepositoryError> {
        let mut id = [0; 8];
        super::key::random(&mut id)?;
        let id = super::key::hex(&id);
        let object = SessionObject {
            id: id.clone(),
            process: Process::current(),
            started: Timestamp::now(),
            holds: Vec::new(),
            holds_all: false,
            bases: Vec::new(),
        };
        let inner = Arc::new(Inner {
            name: format!("sessions/{id}"),
            state: Mutex::new(State { object, plan: None, condemned: HashSet::new() }),
            last_sign: AtomicI64::new(0),
        });
        inner.sign(&repository).await?;
        let loaded = async {
            let plan = Plan::load(&repository).await?.filter(|plan| plan.state != PlanState::Marking);
            let Some(plan) = plan else { return Ok((None, HashSet::new())) };
            // A prune that ended just now. Every one to come waits for this session.
            let Some(condemned) = plan.condemned(&repository).await? else { return Ok((None, HashSet::new())) };
            Ok((Some(plan), condemned))
        };
        match loaded.await {
            Ok((plan, condemned)) => {
                let mut state = inner.state.lock().await;
                (state.plan, state.condemned) = (plan, condemned);
            }
            Err(error) => {
                let _ = repository.storage().delete(&inner.name).await;
                return Err(error);
            }
        }
        let heartbeat = tokio::spawn({
            let (repository, inner) = (Arc::clone(&repository), Arc::clone(&inner));
            async move {
                loop {
                    tokio::time::sleep(HEARTBEAT).await;
                    if let Err(error) = inner.sign(&repository).await {
                        tracing::warn!(error = &error as &dyn std::error::Error, "no sign of life could be written");
                    }
                }
            }
        });
        Ok(Self { repository, inner, heartbeat, runtime: tokio::runtime::Handle::current() })
    }

    /// Name of its object.
    #[cfg(test)]
    pub(super) fn name(&self) -> &str {
        &self.inner.name
    }

    /// The runtime that it was started in.
    pub(super) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// The repository.
    pub fn repository(&self) -> &Arc<Repository> {
        &self.repository
    }

    /// Whether a chunk has to be sent: it is not there, or may not be relied on. When the answer is no, no prune
    /// removes it before this session ends.
    pub async fn is_missing(&self, id: ChunkId) -> Result<bool, RepositoryError> {
        let mut state = self.inner.state.lock().await;
        if state.condemned.contains(&id) && self.inner.hold(&self.repository, &mut state, id).await? {
            return Ok(false);
        }
        drop(state);
        Ok(!self.repository.storage().exists(&chunk_name(id)).await?)
    }

    /// The same from a thread that may block, where the objects are in a directory; `None` when only
    /// [`Self::is_missing`] can tell.
    pub(super) fn is_missing_here(&self, id: ChunkId) -> Option<Result<bool, RepositoryError>> {
        let objects = self.repository.storage().objects()?;
        let condemned = self.inner.state.blocking_lock().condemned.contains(&id);
        (!condemned).then(|| Ok(!objects.exists(&chunk_name(id))?))
    }

    /// The newest backup of a VM, to stand on.
    pub async fn newest(&self, vm: &str) -> Result<Option<Manifest>, RepositoryError> {
        loop {
            let Some(newest) = self.repository.latest(vm).await? else { return Ok(None) };
            if self.adopt(&newest).await? {
                return Ok(Some(newest));
            }
        }
    }

    /// Relies on a backup that was found in this session: on everything that it names, should it be forgotten meanwhile.
    /// `false`: it is gone already; look for another one.
    ///
    /// A prune whose list this session knows does not wait for it, and may have condemned chunks that this backup came
    /// to need only later. So the indexes are held like single chunks are.
    pub async fn adopt(&self, manifest: &Manifest) -> Result<bool, RepositoryError> {
        let mut state = self.inner.state.lock().await;
        if state.plan.is_none() {
            // Every prune to come waits for this session.
            return Ok(true);
        }
        let bases =
            manifest.volumes.iter().map(|volume| HeldIndex { root: volume.root.clone(), size: volume.virtual_size });
        state.object.bases = bases.collect();
        if self.inner.announce(&self.repository, &mut state).await? {
            return Ok(true);
        }
        self.repository.has_backup(&manifest.backup.vm, &manifest.backup.id).await
    }

    /// Ends the session; what it stored stays until a prune.
    pub async fn end(&self) {
        self.heartbeat.abort();
        if let Err(error) = self.repository.storage().delete(&self.inner.name).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the session stays listed in the repository until its sign of life is too old"
            );
        }
    }
}

impl Drop for RepositorySession {
    /// A session that nobody ends any more must not go on saying that it is alive.
    fn drop(&mut self) {
        self.heartbeat.abort();
    }
}

impl Inner {
    /// Writes the session object. Only ever called with the newest state.
    async fn sign(&self, repository: &Repository) -> Result<(), RepositoryError> {
        let state = self.state.lock().await;
        self.write(repository, &state).await
    }

    async fn write(&self, repository: &Repository, state: &State) -> Result<(), RepositoryError> {
        // The time before: it is certain that the sign is not older.
        let before = boot_seconds();
        let document = serde_json::to_vec(&state.object).unwrap_or_default();
        let object = repository.sessions().seal(self.name.as_bytes(), &document)?;
        let storage = repository.storage();
        let last = self.last_sign.load(Ordering::Acquire);
        if last == 0 {
            storage.put_durably(&self.name, object.into()).await?;
        } else {
            if before - last > COMMIT_LIMIT_SECONDS || !storage.exists(&self.name).await? {
                // Whoever took the session for dead must not see it come back.
                return Err(RepositoryError::SessionLost { why: "it was taken for dead".into() });
            }
            storage.put_durably(&self.name, object.into()).await?;
        }
        self.last_sign.store(before, Ordering::Release);
        Ok(())
    }

    /// Holds a condemned chunk; `false`: the prune is over, and the chunk has to be looked for like any other.
    async fn hold(&self, repository: &Repository, state: &mut State, id: ChunkId) -> Result<bool, RepositoryError> {
        if state.object.holds.len() < MAX_HOLDS {
            state.object.holds.push(id.to_hex());
        } else {
            state.object.holds_all = true;
        }
        let held = self.announce(repository, state).await?;
        if held && state.object.holds_all {
            state.condemned.clear();
        } else if held {
            state.condemned.remove(&id);
        }
        Ok(held)
    }

    /// Writes what is held, then looks whether the prune respects it: `true`, it has not begun to delete, and will read
    /// this first. `false`: it is over.
    async fn announce(&self, repository: &Repository, state: &mut State) -> Result<bool, RepositoryError> {
        self.write(repository, state).await?;
        let begun = tokio::time::Instant::now();
        loop {
            let now = Plan::load(repository).await?;
            let same = now.filter(|now| state.plan.as_ref().is_some_and(|plan| plan.id == now.id));
            match same {
                None => {
                    state.plan = None;
                    state.condemned.clear();
                    return Ok(false);
                }
                Some(plan) if plan.state == PlanState::Sweeping => {
                    if begun.elapsed() > SWEEP_LIMIT {
                        let holder =
                            format!("{}; if it died, `virt-fleece repository prune` finishes its work", plan.process);
                        return Err(RepositoryError::Busy { what: "a prune", holder });
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    // The heartbeat waits for the state, which is held here.
                    let silent = boot_seconds() - self.last_sign.load(Ordering::Acquire);
                    if silent >= HEARTBEAT.as_secs().cast_signed() {
                        self.write(repository, state).await?;
                    }
                }
                Some(_) => return Ok(true),
            }
        }
    }
}

impl Repository {
    /// The sessions that are known, with the time of their last sign of life by the clock of the storage.
    pub(super) async fn running_sessions(
        &self,
    ) -> Result<Vec<(String, Timestamp, Option<SessionObject>)>, RepositoryError> {
        let mut sessions = Vec::new();
        for object in self.storage().list_all("sessions").await? {
            let Some(bytes) = self.storage().get(&object.name, MAX_SESSION).await? else { continue };
            // One that cannot be read counts as running until it is too old.
            let opened = self.sessions().open(object.name.as_bytes(), &bytes, &object.name).ok();
            let session = opened.and_then(|bytes| serde_json::from_slice(&bytes).ok());
            sessions.push((object.name, object.last_modified, session));
        }
        Ok(sessions)
    }
}

/// Seconds since boot, those included in which the machine slept.
#[cfg(not(test))]
pub(super) fn boot_seconds() -> i64 {
    rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec
}

/// The same by the clock that a test lets run.
#[cfg(test)]
pub(super) fn boot_seconds() -> i64 {
    static BOOT: std::sync::LazyLock<std::time::Instant> = std::sync::LazyLock::new(std::time::Instant::now);
    let boot = *BOOT;
    tokio::time::Instant::now().into_std().saturating_duration_since(boot).as_secs().cast_signed() + 1
}
