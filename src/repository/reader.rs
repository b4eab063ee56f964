//! From chunks back to a disk.

use super::{
    RepositoryError,
    chunk::ChunkId,
    index::{FANOUT, IndexReader, Shape},
    manifest::StoredVolume,
    repository::Repository,
};
use crate::extent::{ByteRange, Piece};
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use std::sync::Arc;

/// Bytes of chunks that are read ahead.
const AHEAD_BYTES: u64 = 48 << 20;
const MAX_AHEAD: u64 = 32;

/// Chunks that are read ahead.
pub(super) fn chunks_ahead(chunk_size: u64) -> usize {
    (AHEAD_BYTES / chunk_size).clamp(4, MAX_AHEAD) as usize
}

/// Reads one volume of a backup.
#[derive(Debug)]
pub struct VolumeReader {
    repository: Arc<Repository>,
    index: IndexReader,
    root: ChunkId,
}

impl VolumeReader {
    /// For a volume of a manifest of this repository.
    pub fn new(repository: Arc<Repository>, volume: &StoredVolume) -> Result<Self, RepositoryError> {
        let root = Self::root_of(volume)?;
        let shape = volume.shape(&repository);
        Ok(Self::at(repository, shape, root))
    }

    /// For an index.
    pub(super) fn at(repository: Arc<Repository>, shape: Shape, root: ChunkId) -> Self {
        Self { repository, index: IndexReader::new(shape, root), root }
    }

    /// Root of a volume's index.
    pub(super) fn root_of(volume: &StoredVolume) -> Result<ChunkId, RepositoryError> {
        volume.root().ok_or_else(|| {
            RepositoryError::damaged(format!("volume `{}`", volume.name), "its index has no usable root")
        })
    }

    /// Form of the volume.
    pub fn shape(&self) -> Shape {
        self.index.shape()
    }

    /// The repository.
    pub fn repository(&self) -> &Arc<Repository> {
        &self.repository
    }

    /// The id of a chunk.
    pub async fn chunk_id(&mut self, chunk: u64) -> Result<ChunkId, RepositoryError> {
        self.index.id(&self.repository, 0, chunk).await
    }

    /// The ids of all chunks, as runs of one leaf each: number of the first chunk, and ids. Leaves of zeroes come as one
    /// run without ids.
    pub fn leaves(&self) -> impl Stream<Item = Result<LeafRun, RepositoryError>> + Send + 'static {
        let repository = Arc::clone(&self.repository);
        let shape = self.shape();
        let index = IndexReader::new(shape, self.root);
        stream::try_unfold((index, 0), move |(mut index, leaf)| {
            let repository = Arc::clone(&repository);
            async move {
                if leaf >= shape.ids(1) {
                    return Ok(None);
                }
                let first = leaf * FANOUT;
                let run = if index.id(&repository, 1, leaf).await?.is_zero() {
                    LeafRun { first, chunks: shape.page_length(1, leaf), ids: Vec::new() }
                } else {
                    let ids = index.page_ids(&repository, 1, leaf).await?;
                    LeafRun { first, chunks: ids.len() as u64, ids }
                };
                Ok(Some((run, (index, leaf + 1))))
            }
        })
    }

    /// Shows every id of the index to `enter`, from the root down: level (0 are chunks) and id. What hangs on a page is
    /// shown only when `enter` answers yes.
    pub(super) async fn walk(
        &mut self,
        enter: &mut (dyn FnMut(u32, ChunkId) -> bool + Send),
    ) -> Result<(), RepositoryError> {
        let shape = self.shape();
        if !enter(shape.levels(), self.root) {
            return Ok(());
        }
        let mut open = vec![(shape.levels(), 0)];
        while let Some((level, page)) = open.pop() {
            let ids = self.index.page_ids(&self.repository, level, page).await?;
            for (number, id) in (page * FANOUT..).zip(ids) {
                if enter(level - 1, id) && level > 1 {
                    open.push((level - 1, number));
                }
            }
        }
        Ok(())
    }

    /// The whole content in ascending order, read ahead in parallel; every chunk is proved before it comes.
    pub fn pieces(&self) -> impl Stream<Item = Result<Piece, RepositoryError>> + Send + 'static {
        let repository = Arc::clone(&self.repository);
        let shape = self.shape();
        self.leaves()
            .map_ok(move |run| stream::iter(wanted(shape, run).into_iter().map(Ok)))
            .try_flatten()
            .map(move |wanted: Result<Wanted, RepositoryError>| {
                let repository = Arc::clone(&repository);
                async move {
                    match wanted? {
                        Wanted::Zero(range) => Ok(Piece::Zero(range)),
                        Wanted::Chunk { offset, length, id } => {
                            let bytes = Bytes::from(repository.read_chunk(id, length).await?);
                            Ok(Piece::Data { offset, bytes })
                        }
                    }
                }
            })
            .buffered(chunks_ahead(shape.chunk_size))
    }
}

/// Chunks that follow each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafRun {
    /// Number of the first.
    pub first: u64,
    /// How many.
    pub chunks: u64,
    /// Their ids; empty when all are zero.
    pub ids: Vec<ChunkId>,
}

/// What has to be done about a part of a volume.
#[derive(Debug)]
pub(super) enum Wanted {
    Zero(ByteRange),
    Chunk { offset: u64, length: u64, id: ChunkId },
}

/// What has to be read of a run; zeroes that follow each other are one.
pub(super) fn wanted(shape: Shape, run: LeafRun) -> Vec<Wanted> {
    let offset = |chunk: u64| (chunk * shape.chunk_size).min(shape.size);
    let mut all = Vec::new();
    let mut zero_from = run.first;
    for (chunk, id) in (run.first..).zip(run.ids) {
        if !id.is_zero() {
            all.extend(ByteRange::new(offset(zero_from), offset(chunk)).map(Wanted::Zero));
            all.push(Wanted::Chunk { offset: offset(chunk), length: shape.length(chunk), id });
            zero_from = chunk + 1;
        }
    }
    let end = run.first + run.chunks;
    all.extend(ByteRange::new(offset(zero_from.min(end)), offset(end)).map(Wanted::Zero));
    all
}
