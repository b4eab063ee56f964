//! From the content of chunks to objects: name it, look whether it is there, pack and seal it, send it.
//!
//! In a directory one thread does all of that for a chunk; a bounded number of such threads runs. Elsewhere sending
//! takes time and no processor: each chunk is a task of the runtime. Either way a bounded number of chunks is under
//! way, so that memory is bounded whatever the disk's size and the storage's pace.

use super::{
    RepositoryError,
    chunk::{ChunkId, is_zero},
    directory::ObjectDirectory,
    repository::{Repository, chunk_name},
    session::RepositorySession,
    workbench::{Workbench, Workbenches},
    workers::Workers,
};
use bytes::Bytes;
use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
};

/// Bytes of chunks that are under way at once, over all volumes; each is held up to three times (as it came, plain or
/// sealed on a workbench, sent), so this is about a third of the memory.
const IN_FLIGHT_BYTES: u64 = 48 << 20;
/// More requests at once do not make a storage faster.
const MAX_IN_FLIGHT: u64 = 48;
/// Threads that write to a directory: more than processors, because one that is on a network makes them wait.
const MAX_WORKERS: u64 = 8;

/// What all volumes of a backup share.
pub struct ChunkPipeline {
    session: Arc<RepositorySession>,
    /// Chunks under way.
    in_flight: Arc<Semaphore>,
    limit: u32,
    /// Processors at work.
    processors: Semaphore,
    /// zstd's level; 0: not compressed.
    level: i32,
    /// Chunks that are being looked for or sent, so that two of the same content are sent once.
    in_transit: Mutex<HashSet<ChunkId>>,
    workbenches: Workbenches,
    /// For a directory.
    workers: Option<Workers<Job>>,
}

impl std::fmt::Debug for ChunkPipeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkPipeline").field("level", &self.level).finish_non_exhaustive()
    }
}

/// Of content, in bytes.
#[derive(Debug, Default)]
#[allow(clippy::struct_field_names, reason = "the names of the summary")]
pub(super) struct Counters {
    pub(super) data_bytes: AtomicU64,
    pub(super) zero_bytes: AtomicU64,
    pub(super) new_bytes: AtomicU64,
    pub(super) stored_bytes: AtomicU64,
}

/// Who wants to know what becomes of a chunk. One that is dropped without an answer takes it for lost: its worker died.
pub(super) trait Outcome: Send + 'static {
    /// The id that the content is stored under, or why it is not.
    fn settle(&mut self, stored: Result<ChunkId, RepositoryError>);
}

/// A chunk to store.
struct Job {
    pieces: Vec<Bytes>,
    known: Option<ChunkId>,
    counters: Arc<Counters>,
    outcome: Box<dyn Outcome>,
    /// Held as long as the chunk is under way: the last thing that it gives up.
    _place: OwnedSemaphorePermit,
}

impl ChunkPipeline {
    /// For a session. `level` is zstd's, 0 does not compress.
    pub fn new(session: Arc<RepositorySession>, level: i32) -> Arc<Self> {
        let most = (IN_FLIGHT_BYTES / session.repository().chunk_size()).clamp(4, MAX_IN_FLIGHT);
        let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let is_directory = session.repository().storage().objects().is_some();
        // More would only grow cold in the processors' caches.
        let workers = most.min(MAX_WORKERS.max(processors as u64));
        let limit = if is_directory { most.min(2 * workers) } else { most } as u32;
        Arc::new_cyclic(|this: &std::sync::Weak<Self>| {
            let this = this.clone();
            let store = move |job: Job| {
                if let Some(pipeline) = this.upgrade() {
                    pipeline.store_here(job);
                }
            };
            Self {
                session,
                in_flight: Arc::new(Semaphore::new(limit as usize)),
                limit,
                processors: Semaphore::new(processors),
                level,
                in_transit: Mutex::default(),
                workbenches: Workbenches::default(),
                workers: is_directory.then(|| Workers::new(workers as usize, "chunk", store)),
            }
        })
    }

    pub(super) fn repository(&self) -> &Arc<Repository> {
        self.session.repository()
    }

    /// The session's runtime.
    pub(super) fn runtime(&self) -> &Handle {
        self.session.runtime()
    }

    /// Stores content unless the repository has it, at some time. `known`: this id is stored for certain. Blocks until
    /// there is room.
    pub(super) fn dispatch(
        self: &Arc<Self>,
        pieces: Vec<Bytes>,
        known: Option<ChunkId>,
        counters: &Arc<Counters>,
        outcome: impl Outcome,
    ) -> Result<(), RepositoryError> {
        let place = self.runtime().block_on(Arc::clone(&self.in_flight).acquire_owned());
        let place = place.map_err(|_| RepositoryError::WorkerDied)?;
        let counters = Arc::clone(counters);
        let job = Job { pieces, known, counters, outcome: Box::new(outcome), _place: place };
        if let Some(workers) = &self.workers {
            return workers.add(job).map_err(RepositoryError::local("start a thread"));
        }
        self.runtime().spawn(Arc::clone(self).store_there(job));
        Ok(())
    }

    /// Waits for all that was dispatched.
    pub(super) fn drain(&self) -> Result<(), RepositoryError> {
        let all = self.runtime().block_on(self.in_flight.acquire_many(self.limit));
        all.map(drop).map_err(|_| RepositoryError::WorkerDied)
    }

    /// Stores content, from a thread that may block; its id.
    pub(super) fn store_now(
        self: &Arc<Self>,
        content: Vec<u8>,
        counters: &Counters,
    ) -> Result<ChunkId, RepositoryError> {
        let pieces = vec![content.into()];
        match self.repository().storage().objects() {
            Some(objects) => self.put_if_missing(objects, pieces, None, counters),
            None => self.runtime().block_on(self.store(pieces, None, counters)),
        }
    }

    /// Stores content, as the rest of the crate does.
    #[cfg(test)]
    pub(super) async fn store_plain(
        self: &Arc<Self>,
        content: Vec<u8>,
        known: Option<ChunkId>,
    ) -> Result<ChunkId, RepositoryError> {
        self.store(vec![content.into()], known, &Counters::default()).await
    }

    /// Stores content unless the repository has it; its id. `known`: this id is stored for certain.
    async fn store(
        self: &Arc<Self>,
        pieces: Vec<Bytes>,
        known: Option<ChunkId>,
        counters: &Counters,
    ) -> Result<ChunkId, RepositoryError> {
        let length = pieces.iter().map(|piece| piece.len() as u64).sum();
        let (id, workbench) = self.work(move |this| this.name(&pieces)).await?;
        let Some(workbench) = workbench else {
            counters.zero_bytes.fetch_add(length, Ordering::Relaxed);
            return Ok(id);
        };
        counters.data_bytes.fetch_add(length, Ordering::Relaxed);
        let transit = self.transit(id, known);
        if transit.is_none() || !self.session.is_missing(id).await? {
            self.workbenches.give(workbench);
        } else {
            let sealed = self.work(move |this| this.sealed(workbench, id)).await??;
            counters.new_bytes.fetch_add(length, Ordering::Relaxed);
            counters.stored_bytes.fetch_add(sealed.len() as u64, Ordering::Relaxed);
            self.repository().storage().put(&chunk_name(id), sealed).await?;
        }
        Ok(id)
    }

    /// Something for a processor.
    async fn work<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, RepositoryError> {
        let _processor = self.processors.acquire().await;
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&this)).await.map_err(|_| RepositoryError::WorkerDied)
    }

    /// The id of content, and a workbench that holds it, unless it is zero.
    fn name(&self, pieces: &[Bytes]) -> (ChunkId, Option<Workbench>) {
        if pieces.iter().all(|piece| is_zero(piece)) {
            return (ChunkId::ZERO, None);
        }
        let mut workbench = self.workbenches.take();
        workbench.put(pieces);
        (self.repository().chunk_id(workbench.content()), Some(workbench))
    }

    fn sealed(&self, mut workbench: Workbench, id: ChunkId) -> Result<Bytes, RepositoryError> {
        let sealed = workbench.seal(self.repository(), id, self.level).map(Bytes::copy_from_slice);
        self.workbenches.give(workbench);
        sealed
    }

    /// Notes that a chunk is looked for and sent; `None` when it need not be. Whoever comes second need not wait for
    /// the first: when sending that fails, the whole backup does.
    fn transit(&self, id: ChunkId, known: Option<ChunkId>) -> Option<Transit<'_>> {
        let is_new = known != Some(id) && self.in_transit.lock().is_ok_and(|mut ids| ids.insert(id));
        is_new.then_some(Transit { pipeline: self, id })
    }

    /// Stores a chunk where sending takes time. A function, not a block: that would capture, and keep, only those parts
    /// of the job that it names.
    async fn store_there(self: Arc<Self>, mut job: Job) {
        let stored = self.store(std::mem::take(&mut job.pieces), job.known, &job.counters).await;
        job.outcome.settle(stored);
    }

    /// Stores a chunk in a directory, on a thread that may block.
    fn store_here(&self, mut job: Job) {
        let Some(objects) = self.repository().storage().objects() else { return };
        let stored = self.put_if_missing(objects, std::mem::take(&mut job.pieces), job.known, &job.counters);
        job.outcome.settle(stored);
    }

    fn put_if_missing(
        &self,
        objects: &ObjectDirectory,
        pieces: Vec<Bytes>,
        known: Option<ChunkId>,
        counters: &Counters,
    ) -> Result<ChunkId, RepositoryError> {
        let processor = self.runtime().block_on(self.processors.acquire());
        let length = pieces.iter().map(|piece| piece.len() as u64).sum();
        let (id, workbench) = self.name(&pieces);
        drop(pieces);
        let Some(mut workbench) = workbench else {
            counters.zero_bytes.fetch_add(length, Ordering::Relaxed);
            return Ok(id);
        };
        counters.data_bytes.fetch_add(length, Ordering::Relaxed);
        if let Some(_transit) = self.transit(id, known)
            && self.is_missing(id)?
        {
            let sealed = workbench.seal(self.repository(), id, self.level)?;
            drop(processor);
            objects.put(&chunk_name(id), sealed)?;
            counters.new_bytes.fetch_add(length, Ordering::Relaxed);
            counters.stored_bytes.fetch_add(sealed.len() as u64, Ordering::Relaxed);
        }
        self.workbenches.give(workbench);
        Ok(id)
    }

    fn is_missing(&self, id: ChunkId) -> Result<bool, RepositoryError> {
        if let Some(missing) = self.session.is_missing_here(id) {
            return missing;
        }
        // Not on this thread: it may outlive the runtime.
        let (sender, missing) = oneshot::channel();
        let session = Arc::clone(&self.session);
        self.runtime().spawn(async move { sender.send(session.is_missing(id).await) });
        missing.blocking_recv().map_err(|_| RepositoryError::WorkerDied)?
    }
}

/// A chunk that is being looked for or sent.
struct Transit<'a> {
    pipeline: &'a ChunkPipeline,
    id: ChunkId,
}

impl Drop for Transit<'_> {
    fn drop(&mut self) {
        if let Ok(mut ids) = self.pipeline.in_transit.lock() {
            ids.remove(&self.id);
        }
    }
}
