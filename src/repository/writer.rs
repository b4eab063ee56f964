//! From the pieces of a disk to chunks in a repository.
//!
//! The pieces come from a thread that may block; a chunk that is complete becomes a task: name it, look whether it is
//! there, pack and seal it, send it. A bounded number of tasks runs, so that memory is bounded whatever the disk's size
//! and the storage's pace.

use super::{
    RepositoryError,
    chunk::ChunkId,
    index::{FANOUT, IndexReader, Shape, page_bytes},
    repository::{Repository, chunk_name},
    session::RepositorySession,
};
use crate::{
    extent::{ByteRange, Piece},
    image::{ForeignError, ImageError, ImageSink, SinkSummary},
};
use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::{runtime::Handle, sync::Semaphore};

/// Bytes of chunks that are under way at once, over all volumes; each is held up to three times (plain, packed and
/// sealed, sent), so this is about a third of the memory.
const IN_FLIGHT_BYTES: u64 = 48 << 20;
/// More requests at once do not make a storage faster.
const MAX_IN_FLIGHT: u64 = 48;

/// What all volumes of a backup share.
pub struct ChunkPipeline {
    session: Arc<RepositorySession>,
    /// Chunks under way.
    in_flight: Arc<Semaphore>,
    limit: u32,
    /// Processors at work.
    processors: Arc<Semaphore>,
    /// zstd's level; 0: not compressed.
    level: i32,
    /// Chunks that are being looked for or sent, so that two of the same content are sent once.
    in_transit: Mutex<HashSet<ChunkId>>,
    /// zstd contexts: making one costs more than compressing a small chunk.
    compressors: Mutex<Vec<zstd::bulk::Compressor<'static>>>,
}

impl std::fmt::Debug for ChunkPipeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkPipeline").field("level", &self.level).finish_non_exhaustive()
    }
}

impl ChunkPipeline {
    /// For a session. `level` is zstd's, 0 does not compress.
    pub fn new(session: Arc<RepositorySession>, level: i32) -> Arc<Self> {
        let limit = (IN_FLIGHT_BYTES / session.repository().chunk_size()).clamp(4, MAX_IN_FLIGHT) as u32;
        let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Arc::new(Self {
            session,
            in_flight: Arc::new(Semaphore::new(limit as usize)),
            limit,
            processors: Arc::new(Semaphore::new(processors)),
            level,
            in_transit: Mutex::default(),
            compressors: Mutex::default(),
        })
    }

    fn repository(&self) -> &Arc<Repository> {
        self.session.repository()
    }

    /// Stores content unless the repository has it; its id. `known`: this id is stored for certain.
    async fn store(
        self: &Arc<Self>,
        content: Vec<u8>,
        known: Option<ChunkId>,
        counters: &Counters,
    ) -> Result<ChunkId, RepositoryError> {
        let died = |_| RepositoryError::WorkerDied;
        let length = content.len() as u64;
        let (id, content) = {
            let _processor = self.processors.acquire().await;
            let repository = Arc::clone(self.repository());
            tokio::task::spawn_blocking(move || (repository.chunk_id(&content), content)).await.map_err(died)?
        };
        if id.is_zero() {
            counters.zero_bytes.fetch_add(length, Ordering::Relaxed);
            return Ok(id);
        }
        counters.data_bytes.fetch_add(length, Ordering::Relaxed);
        // A second one of the same content need not wait for the first: when sending that fails, the whole backup does.
        if known == Some(id) || !self.in_transit.lock().is_ok_and(|mut ids| ids.insert(id)) {
            return Ok(id);
        }
        let sent = self.send_if_missing(id, content, counters).await;
        if let Ok(mut ids) = self.in_transit.lock() {
            ids.remove(&id);
        }
        sent.map(|()| id)
    }

    /// Stores content, as [`Self::store`] does.
    #[cfg(test)]
    pub(super) async fn store_plain(
        self: &Arc<Self>,
        content: Vec<u8>,
        known: Option<ChunkId>,
    ) -> Result<ChunkId, RepositoryError> {
        self.store(content, known, &Counters::default()).await
    }

    async fn send_if_missing(
        self: &Arc<Self>,
        id: ChunkId,
        content: Vec<u8>,
        counters: &Counters,
    ) -> Result<(), RepositoryError> {
        if !self.session.is_missing(id).await? {
            return Ok(());
        }
        let length = content.len() as u64;
        let sealed = {
            let _processor = self.processors.acquire().await;
            let this = Arc::clone(self);
            tokio::task::spawn_blocking(move || this.seal(id, &content))
                .await
                .map_err(|_| RepositoryError::WorkerDied)??
        };
        counters.new_bytes.fetch_add(length, Ordering::Relaxed);
        counters.stored_bytes.fetch_add(sealed.len() as u64, Ordering::Relaxed);
        self.repository().storage().put(&chunk_name(id), sealed.into()).await
    }

    fn seal(&self, id: ChunkId, content: &[u8]) -> Result<Vec<u8>, RepositoryError> {
        let mut compressor = self.compressors.lock().ok().and_then(|mut all| all.pop());
        let sealed = self.repository().seal_chunk(id, content, self.level, &mut compressor);
        if let (Some(compressor), Ok(mut all)) = (compressor, self.compressors.lock()) {
            all.push(compressor);
        }
        sealed
    }
}

/// Of content, in bytes.
#[derive(Debug, Default)]
#[allow(clippy::struct_field_names, reason = "the names of the summary")]
struct Counters {
    data_bytes: AtomicU64,
    zero_bytes: AtomicU64,
    new_bytes: AtomicU64,
    stored_bytes: AtomicU64,
}

/// Below a new backup: the index of the one before, which the session has adopted ([`RepositorySession::adopt`]).
#[derive(Debug, Clone, Copy)]
pub struct Base {
    /// Form of its index.
    pub shape: Shape,
    /// Its root.
    pub root: ChunkId,
    /// What no piece covers is as it was there; otherwise the whole volume comes, and the index only tells which
    /// chunks are stored.
    pub unchanged_is_inherited: bool,
}

/// Writes one volume. An [`ImageSink`]: its calls block, and must not come from a thread of the runtime.
#[derive(Debug)]
pub struct VolumeWriter {
    pipeline: Arc<ChunkPipeline>,
    runtime: Handle,
    shape: Shape,
    base: Option<(Base, IndexReader)>,
    /// Number of the leaf that is being filled, and what its chunks will be.
    leaf: Option<(u64, Leaf)>,
    /// Ids of the leaves so far, by number.
    leaves: Vec<ChunkId>,
    /// The chunk that is being filled.
    open: Option<(u64, Vec<u8>)>,
    /// Bytes of the disk taken so far.
    position: u64,
    counters: Arc<Counters>,
    /// Why a task failed.
    failure: Arc<Mutex<Option<RepositoryError>>>,
}

#[derive(Debug, Clone)]
struct Leaf {
    ids: Arc<Mutex<Vec<ChunkId>>>,
    /// The same leaf of the base.
    known: Option<Arc<Vec<ChunkId>>>,
}

impl VolumeWriter {
    /// For a volume of `size` bytes. To be called within the runtime.
    pub fn new(pipeline: Arc<ChunkPipeline>, size: u64, base: Option<Base>) -> Self {
        let shape = Shape { size, chunk_size: pipeline.repository().chunk_size() };
        Self {
            pipeline,
            runtime: Handle::current(),
            shape,
            base: base.map(|base| (base, IndexReader::new(base.shape, base.root))),
            leaf: None,
            leaves: Vec::new(),
            open: None,
            position: 0,
            counters: Arc::default(),
            failure: Arc::default(),
        }
    }

    fn take(&mut self, piece: Piece) -> Result<(), RepositoryError> {
        let bad = |offset| RepositoryError::Invalid(format!("content out of order at {offset}"));
        let Some(range) = piece.range() else { return Ok(()) };
        if range.start() < self.position || range.end() > self.shape.size {
            return Err(bad(range.start()));
        }
        self.position = range.end();
        match piece {
            Piece::Zero(range) => self.zero(range),
            Piece::Data { offset, bytes } => {
                let (mut at, mut rest) = (offset, bytes.as_ref());
                while !rest.is_empty() {
                    let chunk = at / self.shape.chunk_size;
                    let begin = chunk * self.shape.chunk_size;
                    let length = self.shape.length(chunk);
                    if self.open.is_none() {
                        if at != begin {
                            return Err(bad(at));
                        }
                        self.open = Some((chunk, Vec::with_capacity(length as usize)));
                    }
                    let Some((_, content)) = self
                        .open
                        .as_mut()
                        .filter(|(open, content)| *open == chunk && content.len() as u64 == at - begin)
                    else {
                        return Err(bad(at));
                    };
                    let (now, later) = rest.split_at(rest.len().min((length - (at - begin)) as usize));
                    content.extend_from_slice(now);
                    (at, rest) = (at + now.len() as u64, later);
                    if content.len() as u64 == length
                        && let Some((chunk, content)) = self.open.take()
                    {
                        self.dispatch(chunk, content)?;
                    }
                }
                Ok(())
            }
        }
    }

    /// Whole chunks of zeroes.
    fn zero(&mut self, range: ByteRange) -> Result<(), RepositoryError> {
        let size = self.shape.chunk_size;
        let ends_well = range.end().is_multiple_of(size) || range.end() == self.shape.size;
        if self.open.is_some() || !range.start().is_multiple_of(size) || !ends_well {
            return Err(RepositoryError::Invalid(format!("zeroes off a chunk's border at {}", range.start())));
        }
        self.counters.zero_bytes.fetch_add(range.len(), Ordering::Relaxed);
        for chunk in range.start() / size..range.end().div_ceil(size) {
            let leaf = self.leaf(chunk)?;
            set(&leaf.ids, chunk, ChunkId::ZERO);
        }
        Ok(())
    }

    fn dispatch(&mut self, chunk: u64, content: Vec<u8>) -> Result<(), RepositoryError> {
        let leaf = self.leaf(chunk)?;
        let in_flight = Arc::clone(&self.pipeline.in_flight);
        let permit = self.runtime.block_on(in_flight.acquire_owned()).map_err(|_| RepositoryError::WorkerDied)?;
        self.check()?;
        let known = leaf.known.as_ref().and_then(|known| known.get((chunk % FANOUT) as usize).copied());
        let (pipeline, counters) = (Arc::clone(&self.pipeline), Arc::clone(&self.counters));
        let failure = Arc::clone(&self.failure);
        self.runtime.spawn(async move {
            match pipeline.store(content, known, &counters).await {
                Ok(id) => set(&leaf.ids, chunk, id),
                Err(error) => {
                    if let Ok(mut failure) = failure.lock() {
                        failure.get_or_insert(error);
                    }
                }
            }
            drop(permit);
        });
        Ok(())
    }

    /// The leaf of a chunk; the one before is completed.
    fn leaf(&mut self, chunk: u64) -> Result<Leaf, RepositoryError> {
        let number = chunk / FANOUT;
        if let Some((open, leaf)) = &self.leaf
            && *open == number
        {
            return Ok(leaf.clone());
        }
        self.close_leaf()?;
        self.skip_to(number)?;
        let known = self.base_leaf(number)?;
        let inherited = self.base.as_ref().is_some_and(|(base, _)| base.unchanged_is_inherited);
        let mut ids = if inherited { known.clone().unwrap_or_default() } else { Vec::new() };
        // The volume may have grown, or shrunk.
        ids.resize(self.shape.page_length(1, number) as usize, ChunkId::ZERO);
        let leaf = Leaf { ids: Arc::new(Mutex::new(ids)), known: known.map(Arc::new) };
        self.leaf = Some((number, leaf.clone()));
        Ok(leaf)
    }

    fn base_leaf(&mut self, number: u64) -> Result<Option<Vec<ChunkId>>, RepositoryError> {
        let Some((base, index)) = &mut self.base else { return Ok(None) };
        if number >= base.shape.ids(1) {
            return Ok(None);
        }
        let repository = self.pipeline.repository();
        let ids = self.runtime.block_on(index.page_ids(repository, 1, number));
        match ids {
            Ok(ids) => Ok(Some(ids)),
            // Of what only saves work nothing is demanded.
            Err(_) if !base.unchanged_is_inherited => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Gives the chunk at the seam, where the leaf still has it from the base, the length that it has here.
    fn fit(&self, number: u64, known: &[ChunkId], ids: &mut [ChunkId]) -> Result<(), RepositoryError> {
        let Some((seam, length)) = self.seam().filter(|(seam, _)| seam / FANOUT == number) else { return Ok(()) };
        let position = (seam % FANOUT) as usize;
        // Content of another length has another id: the same one was inherited.
        if let (Some(old), Some(id)) = (known.get(position), ids.get_mut(position))
            && old == id
            && !id.is_zero()
        {
            let mut content = self.runtime.block_on(self.pipeline.repository().read_chunk(*old, length))?;
            content.resize(self.shape.length(seam) as usize, 0);
            *id = self.store_aside(content)?;
        }
        Ok(())
    }

    /// The chunk that has another length than in the base, which must not be inherited as it is, and its length there.
    fn seam(&self) -> Option<(u64, u64)> {
        let (base, _) = self.base.as_ref().filter(|(base, _)| base.shape.size != self.shape.size)?;
        let seam = (base.shape.size.min(self.shape.size)).checked_sub(1)? / self.shape.chunk_size;
        let length = base.shape.length(seam);
        (length != self.shape.length(seam)).then_some((seam, length))
    }

    /// Leaves that no piece touched, up to this one.
    fn skip_to(&mut self, number: u64) -> Result<(), RepositoryError> {
        let seam = self.seam();
        while (self.leaves.len() as u64) < number {
            let leaf = self.leaves.len() as u64;
            let id = match &mut self.base {
                Some((base, index)) if base.unchanged_is_inherited && leaf < base.shape.ids(1) => {
                    // A last leaf that was shorter is another page, and so is one whose last chunk was shorter.
                    if base.shape.page_length(1, leaf) == self.shape.page_length(1, leaf)
                        && seam.is_none_or(|(chunk, _)| chunk / FANOUT != leaf)
                    {
                        self.runtime.block_on(index.id(self.pipeline.repository(), 1, leaf))?
                    } else {
                        self.leaf_of_base(leaf)?
                    }
                }
                _ => ChunkId::ZERO,
            };
            self.leaves.push(id);
        }
        Ok(())
    }

    fn leaf_of_base(&mut self, number: u64) -> Result<ChunkId, RepositoryError> {
        let known = self.base_leaf(number)?.unwrap_or_default();
        let mut ids = known.clone();
        ids.resize(self.shape.page_length(1, number) as usize, ChunkId::ZERO);
        self.fit(number, &known, &mut ids)?;
        self.store_page(&ids)
    }

    fn close_leaf(&mut self) -> Result<(), RepositoryError> {
        let Some((number, leaf)) = self.leaf.take() else { return Ok(()) };
        self.drain()?;
        let mut ids = leaf.ids.lock().map_err(|_| RepositoryError::WorkerDied)?.clone();
        if let Some(known) = &leaf.known {
            self.fit(number, known, &mut ids)?;
        }
        let page = self.store_page(&ids)?;
        self.leaves.push(page);
        Ok(())
    }

    /// Waits for all chunks of this volume (and others that are under way).
    fn drain(&self) -> Result<(), RepositoryError> {
        let all = self.runtime.block_on(self.pipeline.in_flight.acquire_many(self.pipeline.limit));
        drop(all.map_err(|_| RepositoryError::WorkerDied)?);
        self.check()
    }

    fn check(&self) -> Result<(), RepositoryError> {
        let mut failure = self.failure.lock().map_err(|_| RepositoryError::WorkerDied)?;
        failure.take().map_or(Ok(()), Err)
    }

    fn store_page(&self, ids: &[ChunkId]) -> Result<ChunkId, RepositoryError> {
        self.store_aside(page_bytes(ids))
    }

    /// Stores what the caller did not send.
    fn store_aside(&self, content: Vec<u8>) -> Result<ChunkId, RepositoryError> {
        let counters = Counters::default();
        let id = self.runtime.block_on(self.pipeline.store(content, None, &counters))?;
        // It is not content of the disk that was read, but it is sent.
        self.counters.stored_bytes.fetch_add(counters.stored_bytes.into_inner(), Ordering::Relaxed);
        Ok(id)
    }

    fn complete(&mut self) -> Result<SinkSummary, RepositoryError> {
        if let Some((chunk, _)) = &self.open {
            return Err(RepositoryError::Invalid(format!("chunk {chunk} was not completed")));
        }
        self.close_leaf()?;
        self.skip_to(self.shape.ids(1))?;
        let root = self.root()?;
        self.drain()?;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(SinkSummary {
            data_bytes: read(&self.counters.data_bytes),
            zero_bytes: read(&self.counters.zero_bytes),
            new_bytes: read(&self.counters.new_bytes),
            stored_bytes: read(&self.counters.stored_bytes),
            content: Some(root.to_hex()),
        })
    }

    /// The levels above the leaves.
    fn root(&mut self) -> Result<ChunkId, RepositoryError> {
        let mut ids = std::mem::take(&mut self.leaves);
        while ids.len() > 1 {
            ids = ids.chunks(FANOUT as usize).map(|page| self.store_page(page)).collect::<Result<_, _>>()?;
        }
        Ok(ids.first().copied().unwrap_or(ChunkId::ZERO))
    }
}

fn set(ids: &Mutex<Vec<ChunkId>>, chunk: u64, id: ChunkId) {
    if let Ok(mut ids) = ids.lock() {
        ids[(chunk % FANOUT) as usize] = id;
    }
}

impl ImageSink for VolumeWriter {
    fn write(&mut self, piece: Piece) -> Result<(), ImageError> {
        self.take(piece).map_err(ForeignError::new).map_err(ImageError::Foreign)
    }

    /// All chunks are sent; they are durable, and the backup is one, only after
    /// [`RepositorySession::commit`].
    fn finish(mut self: Box<Self>) -> Result<SinkSummary, ImageError> {
        self.complete().map_err(ForeignError::new).map_err(ImageError::Foreign)
    }
}
