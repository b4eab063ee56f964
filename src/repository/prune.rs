//! Removing chunks that no backup needs any more.
//!
//! Two phases, so that backups may run all the time: *mark* publishes a list of chunks that nobody needs, *sweep*
//! deletes them once every session that may not have seen the list has ended. `session.rs` describes the protocol. A
//! prune that dies leaves its plan; the next one takes it up where it was.

use super::{
    RepositoryError,
    need::Held,
    plan::{PLAN, Plan, PlanState},
    process::Process,
    repository::{Repository, chunk_name},
    session::{LEASE, boot_seconds},
    storage::{StorageLock, Version},
};
use futures::{StreamExt, stream};
use jiff::Timestamp;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// In a directory: the lock of the only prune.
const LOCK: &str = "prune.lock";
/// Objects that are deleted at once.
const PARALLEL_DELETES: usize = 32;
/// Between two looks at the sessions that are waited for.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Between two signs of life while it deletes, in seconds.
const SIGN_EVERY: i64 = 30;
/// Without a sign of life for this long it deletes no more, in seconds: far below [`LEASE`], after which another prune
/// may take over.
const SWEEP_LIMIT: i64 = 5 * 60;

/// How to prune.
#[derive(Debug, Clone, Copy)]
pub struct PruneOptions {
    /// Only say what would be deleted.
    pub dry_run: bool,
    /// How long to wait for sessions that run. When they take longer, the list stays published and the next prune
    /// deletes.
    pub wait: Duration,
}

/// How far a prune is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct PruneProgress {
    /// Backups in all.
    pub backups: AtomicU64,
    /// Backups whose index was read.
    pub backups_read: AtomicU64,
    /// Chunks to delete.
    pub condemned: AtomicU64,
    /// Chunks deleted.
    pub deleted: AtomicU64,
}

/// What a prune did.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct PruneSummary {
    /// Chunks in the repository before.
    pub chunks: u64,
    /// Chunks on the list.
    pub condemned_chunks: u64,
    /// Bytes of their objects.
    pub condemned_bytes: u64,
    /// Chunks that were deleted.
    pub deleted_chunks: u64,
    /// Chunks on the list that a backup needed again meanwhile.
    pub rescued_chunks: u64,
    /// Sessions that have to end before anything is deleted, as text; then run it again.
    pub waits_for: Vec<String>,
    /// The list of an earlier prune, which had not come to an end, was taken up.
    pub resumed: bool,
}

impl Repository {
    /// Removes what no backup needs. A backup that cannot be read stops it before anything is deleted: nobody knows
    /// what that one needs.
    pub async fn prune(
        self: &Arc<Self>,
        options: PruneOptions,
        progress: &PruneProgress,
    ) -> Result<PruneSummary, RepositoryError> {
        let mut summary = PruneSummary::default();
        if options.dry_run {
            let (condemned, bytes) = self.unneeded(progress, &mut summary).await?;
            (summary.condemned_chunks, summary.condemned_bytes) = (condemned.len() as u64, bytes);
            return Ok(summary);
        }
        let mut prune = self.claim(&mut summary).await?;
        if prune.plan.state == PlanState::Marking {
            prune.mark(progress, &mut summary).await?;
        }
        (summary.condemned_chunks, summary.condemned_bytes) = (prune.plan.condemned, prune.plan.bytes);
        progress.condemned.store(prune.plan.condemned, Ordering::Relaxed);
        if prune.plan.state == PlanState::Marked {
            summary.waits_for = prune.wait_for_sessions(options.wait).await?;
            if !summary.waits_for.is_empty() {
                return Ok(summary);
            }
            prune.plan.state = PlanState::Sweeping;
            prune.sign().await?;
        }
        prune.sweep(progress, &mut summary).await?;
        Ok(summary)
    }

    /// Becomes the only prune.
    async fn claim(self: &Arc<Self>, summary: &mut PruneSummary) -> Result<Prune, RepositoryError> {
        let busy = |holder: String| RepositoryError::Busy { what: "another prune", holder };
        let lock = self.storage().lock(LOCK)?.ok_or_else(|| busy("on this directory".into()))?;
        let mut id = [0; 8];
        super::key::random(&mut id)?;
        let fresh = Plan {
            id: super::key::hex(&id),
            process: Process::current(),
            started: Timestamp::now(),
            state: PlanState::Marking,
            parts: 0,
            condemned: 0,
            bytes: 0,
            waits_for: None,
        };
        let begun = boot_seconds();
        self.storage().create(PLAN, fresh.sealed(self)?.into()).await?;
        let loaded = Plan::load_with_version(self).await?;
        let (mut plan, version) = loaded.ok_or_else(|| busy("it just ended".into()))?;
        if plan.id != fresh.id {
            let ended = plan.process.has_ended();
            // One that waits for sessions may be taken over at any time: it finds that out before it deletes.
            if ended != Some(true) && plan.state != PlanState::Marked {
                let now = self.now().await?;
                let last_sign = self.storage().written(PLAN).await?.unwrap_or(now);
                if is_within_lease(last_sign, now) {
                    return Err(busy(plan.process.to_string()));
                }
            }
            if plan.state == PlanState::Marking || self.is_list_damaged(&plan).await? {
                // It published nothing that counts; the list is made anew. So is one that cannot be used: who held
                // something of it finds another plan, and looks for each chunk.
                plan = fresh;
            } else {
                summary.resumed = true;
            }
            plan.process = Process::current();
        }
        let mut prune = Prune { repository: Arc::clone(self), plan, version, last_sign: begun, _lock: lock };
        prune.sign().await?;
        // Its own plan is the only one from here on.
        self.remove_strays(&prune.plan).await?;
        Ok(prune)
    }

    async fn is_list_damaged(&self, plan: &Plan) -> Result<bool, RepositoryError> {
        match plan.condemned(self).await {
            Ok(_) => Ok(false),
            Err(RepositoryError::Damaged { object, detail }) => {
                tracing::warn!(object, detail, "the list of an earlier prune is made anew");
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }
}

pub(super) fn is_within_lease(written: Timestamp, now: Timestamp) -> bool {
    now.duration_since(written) < jiff::SignedDuration::try_from(LEASE).unwrap_or(jiff::SignedDuration::MAX)
}

/// Whether a prune whose last sign of life was then may go on.
fn check_silence(last_sign: i64) -> Result<(), RepositoryError> {
    let silent = boot_seconds() - last_sign;
    if silent > SWEEP_LIMIT {
        return Err(RepositoryError::SessionLost { why: format!("this prune stood still for {silent} seconds") });
    }
    Ok(())
}

struct Prune {
    repository: Arc<Repository>,
    plan: Plan,
    /// Of the plan's object: a prune that was taken over finds another one there.
    version: Version,
    /// Seconds since boot.
    last_sign: i64,
    _lock: StorageLock,
}

impl Prune {
    /// Writes the plan, which is the sign of life, too.
    async fn sign(&mut self) -> Result<(), RepositoryError> {
        let before = boot_seconds();
        self.check_alive()?;
        let object = self.plan.sealed(&self.repository)?;
        let replaced = self.repository.storage().replace(PLAN, object.into(), &self.version).await?;
        let lost = || RepositoryError::SessionLost { why: "another prune took over".into() };
        self.version = replaced.ok_or_else(lost)?;
        self.last_sign = before;
        Ok(())
    }

    /// Goes on giving signs of life while something takes its time.
    async fn while_signing<T>(
        &mut self,
        work: impl Future<Output = Result<T, RepositoryError>>,
    ) -> Result<T, RepositoryError> {
        let mut work = std::pin::pin!(work);
        loop {
            let pause = tokio::time::sleep(Duration::from_secs(SIGN_EVERY.cast_unsigned()));
            tokio::select! {
                done = &mut work => return done,
                () = pause => self.sign().await?,
            }
        }
    }

    /// After a long pause it may have been taken for dead.
    fn check_alive(&self) -> Result<(), RepositoryError> {
        check_silence(self.last_sign)
    }

    async fn mark(&mut self, progress: &PruneProgress, summary: &mut PruneSummary) -> Result<(), RepositoryError> {
        let repository = Arc::clone(&self.repository);
        let found = self.while_signing(repository.unneeded(progress, summary)).await;
        let (condemned, bytes) = match found {
            Ok(found) => found,
            Err(error) => {
                // Unless it is the plan of a prune that took over.
                if self.sign().await.is_ok() {
                    self.repository.storage().delete(PLAN).await?;
                }
                return Err(error);
            }
        };
        self.plan.bytes = bytes;
        self.plan.write_list(&self.repository, &condemned).await?;
        self.plan.state = PlanState::Marked;
        self.sign().await
    }

    /// Waits for the sessions that may not know the list; those that are left after `limit`.
    async fn wait_for_sessions(&mut self, limit: Duration) -> Result<Vec<String>, RepositoryError> {
        let begun = tokio::time::Instant::now();
        // After the list is there for all to see: who comes later knows it. Not before it is published, and again when
        // whoever published it did not get this far.
        let waits_for = if let Some(known) = &self.plan.waits_for {
            known.clone()
        } else {
            let running = self.repository.running_sessions().await?;
            let names: Vec<_> = running.into_iter().map(|(name, ..)| name).collect();
            self.plan.waits_for = Some(names.clone());
            self.sign().await?;
            names
        };
        loop {
            let mut left = Vec::new();
            let now = self.repository.now().await?;
            for (name, last_sign, session) in self.repository.running_sessions().await? {
                if !waits_for.contains(&name) {
                    continue;
                }
                let ended = session.as_ref().and_then(|session| session.process.has_ended());
                if ended == Some(true) || !is_within_lease(last_sign, now) {
                    // It cannot commit any more: it looks for this object first.
                    self.repository.storage().delete(&name).await?;
                    continue;
                }
                left.push(match session {
                    Some(session) => format!("{} since {}", session.process, session.started.strftime("%F %T UTC")),
                    None => name,
                });
            }
            if left.is_empty() || begun.elapsed() >= limit {
                return Ok(left);
            }
            if boot_seconds() - self.last_sign > SIGN_EVERY {
                self.sign().await?;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn sweep(&mut self, progress: &PruneProgress, summary: &mut PruneSummary) -> Result<(), RepositoryError> {
        let repository = Arc::clone(&self.repository);
        let lost = || RepositoryError::SessionLost { why: "another prune took over".into() };
        let mut condemned = self.plan.condemned(&repository).await?.ok_or_else(lost)?;
        let all = condemned.len() as u64;
        // Holds first, backups then: a session that ends in between has committed before its hold went away.
        match self.while_signing(repository.held()).await? {
            Held::Everything => condemned.clear(),
            Held::Chunks(held) => condemned.retain(|id| !held.contains(id)),
        }
        if !condemned.is_empty() {
            let needed = self.while_signing(repository.needed(None)).await?;
            condemned.retain(|id| !needed.contains(id));
            // A backup that was forgotten just now must not come back with a power cut when its chunks are gone.
            self.while_signing(repository.storage().flush()).await?;
        }
        summary.rescued_chunks = all - condemned.len() as u64;
        progress.condemned.store(condemned.len() as u64, Ordering::Relaxed);
        let condemned: Vec<_> = condemned.into_iter().collect();
        for batch in condemned.chunks(PARALLEL_DELETES * 8) {
            self.check_alive()?;
            if boot_seconds() - self.last_sign > SIGN_EVERY {
                self.sign().await?;
            }
            let last_sign = self.last_sign;
            let mut deletes = stream::iter(batch.to_vec())
                .map(|id| {
                    let repository = Arc::clone(&repository);
                    async move {
                        // Each, not each batch: a process that was stopped goes on in the middle of one.
                        check_silence(last_sign)?;
                        repository.storage().delete(&chunk_name(id)).await
                    }
                })
                .buffer_unordered(PARALLEL_DELETES);
            while let Some(deleted) = deletes.next().await {
                deleted?;
                summary.deleted_chunks += 1;
                progress.deleted.fetch_add(1, Ordering::Relaxed);
            }
        }
        // Not the plan of one that took over.
        self.sign().await?;
        // The plan first: a list that has a hole while its plan is there is damaged.
        repository.storage().delete(PLAN).await?;
        for part in 0..self.plan.parts {
            repository.storage().delete(&self.plan.part_name(part)).await?;
        }
        Ok(())
    }
}
