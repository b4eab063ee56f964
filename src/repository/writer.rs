//! From the pieces of a disk to chunks in a repository, and to the index that names them.
//!
//! The pieces come from a thread that may block; a chunk that is complete goes to the [`ChunkPipeline`].

use super::{
    RepositoryError,
    chunk::ChunkId,
    index::{FANOUT, IndexReader, Shape, page_bytes},
    pipeline::{ChunkPipeline, Counters, Outcome},
};
use crate::{
    extent::{ByteRange, Piece},
    image::{ForeignError, ImageError, ImageSink, SinkSummary},
};
use bytes::Bytes;
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

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
    shape: Shape,
    base: Option<(Base, IndexReader)>,
    /// Number of the leaf that is being filled, and what its chunks will be.
    leaf: Option<(u64, Leaf)>,
    /// Ids of the leaves so far, by number.
    leaves: Vec<ChunkId>,
    /// The chunk that is being filled.
    open: Option<OpenChunk>,
    /// Bytes of the disk taken so far.
    position: u64,
    counters: Arc<Counters>,
    /// Why a task failed.
    failure: Arc<Mutex<Option<RepositoryError>>>,
}

/// A chunk that is being filled.
#[derive(Debug)]
struct OpenChunk {
    number: u64,
    pieces: Vec<Bytes>,
    /// Bytes of them.
    length: u64,
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
            Piece::Data { offset, mut bytes } => {
                let mut at = offset;
                while !bytes.is_empty() {
                    let number = at / self.shape.chunk_size;
                    let (begin, length) = (number * self.shape.chunk_size, self.shape.length(number));
                    let open = self.open.get_or_insert(OpenChunk { number, pieces: Vec::new(), length: 0 });
                    if open.number != number || open.length != at - begin {
                        return Err(bad(at));
                    }
                    let piece = bytes.split_to(bytes.len().min((length - open.length) as usize));
                    at += piece.len() as u64;
                    open.length += piece.len() as u64;
                    open.pieces.push(piece);
                    if open.length == length
                        && let Some(open) = self.open.take()
                    {
                        self.dispatch(open)?;
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

    fn dispatch(&mut self, chunk: OpenChunk) -> Result<(), RepositoryError> {
        let OpenChunk { number, pieces, .. } = chunk;
        let leaf = self.leaf(number)?;
        let known = leaf.known.as_ref().and_then(|known| known.get((number % FANOUT) as usize).copied());
        let outcome = Place { ids: leaf.ids, chunk: number, failure: Arc::clone(&self.failure), settled: false };
        self.pipeline.dispatch(pieces, known, &self.counters, outcome)?;
        self.check()
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
        let ids = self.pipeline.runtime().block_on(index.page_ids(repository, 1, number));
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
            let mut content = self.pipeline.runtime().block_on(self.pipeline.repository().read_chunk(*old, length))?;
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
                        self.pipeline.runtime().block_on(index.id(self.pipeline.repository(), 1, leaf))?
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
        self.pipeline.drain()?;
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
        let id = self.pipeline.store_now(content, &counters)?;
        // It is not content of the disk that was read, but it is sent.
        self.counters.stored_bytes.fetch_add(counters.stored_bytes.into_inner(), Ordering::Relaxed);
        Ok(id)
    }

    fn complete(&mut self) -> Result<SinkSummary, RepositoryError> {
        if let Some(OpenChunk { number, .. }) = &self.open {
            return Err(RepositoryError::Invalid(format!("chunk {number} was not completed")));
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

/// Where the id of a chunk belongs.
struct Place {
    ids: Arc<Mutex<Vec<ChunkId>>>,
    chunk: u64,
    failure: Arc<Mutex<Option<RepositoryError>>>,
    settled: bool,
}

impl Outcome for Place {
    fn settle(&mut self, stored: Result<ChunkId, RepositoryError>) {
        self.settled = true;
        match stored {
            Ok(id) => set(&self.ids, self.chunk, id),
            Err(error) => {
                if let Ok(mut failure) = self.failure.lock() {
                    failure.get_or_insert(error);
                }
            }
        }
    }
}

impl Drop for Place {
    /// Nobody may take a chunk that got lost for zeroes.
    fn drop(&mut self) {
        if !self.settled {
            self.settle(Err(RepositoryError::WorkerDied));
        }
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
