//! Reading a volume anywhere, from many places at once: what serving it needs.

use super::{
    RepositoryError, VolumeReader,
    cache::ChunkCache,
    chunk::ChunkId,
    index::{FANOUT, Shape},
    manifest::StoredVolume,
    repository::Repository,
};
use crate::extent::{ByteRange, Piece, Run};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

/// Chunks of one request that are read at the same time.
const AT_ONCE: usize = 8;
/// Readers that go forward and are remembered.
const STREAMS: usize = 8;
/// Chunks that are read ahead at most, and how large a part of the cache they may be.
const MAX_AHEAD: u64 = 16;
const AHEAD_SHARE: u64 = 4;
/// Requests of one reader arrive out of order by so many chunks.
const DISORDER: u64 = 8;

/// A part of a volume cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the volume cannot be read at {offset}")]
pub struct Unreadable {
    /// The first byte that cannot.
    pub offset: u64,
    /// Why.
    #[source]
    pub source: RepositoryError,
}

/// Reads any part of a volume of a backup. Chunks and pages of the index come from a cache of bounded size, and are
/// read ahead for readers that go forward.
#[derive(Debug)]
pub struct RandomReader {
    cache: ChunkCache,
    shape: Shape,
    root: ChunkId,
    streams: Mutex<VecDeque<Forward>>,
    max_ahead: u64,
}

/// A reader that goes forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Forward {
    /// The furthest chunk that it asked for.
    at: u64,
    /// How many chunks are read ahead of it.
    ahead: u64,
    /// The first chunk that was not read ahead.
    next: u64,
}

impl RandomReader {
    /// For a volume of a manifest of this repository; keeps up to `capacity` bytes of chunks (a few chunks in any case).
    pub fn new(
        repository: Arc<Repository>,
        volume: &StoredVolume,
        capacity: u64,
    ) -> Result<Arc<Self>, RepositoryError> {
        let root = VolumeReader::root_of(volume)?;
        let shape = volume.shape(&repository);
        let cache = ChunkCache::new(repository, capacity);
        let max_ahead = (cache.capacity() / AHEAD_SHARE / shape.chunk_size).clamp(1, MAX_AHEAD);
        Ok(Arc::new(Self { cache, shape, root, streams: Mutex::default(), max_ahead }))
    }

    /// Form of the volume.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The content of a range, in order and without gaps. A range that exceeds the volume is cut off.
    pub async fn read(self: &Arc<Self>, range: ByteRange) -> Result<Vec<Piece>, Unreadable> {
        let Some(range) = self.within(range) else { return Ok(Vec::new()) };
        self.read_ahead(range);
        let read: Vec<Option<Piece>> = stream::iter(self.chunks(range))
            .map(|chunk| {
                let this = Arc::clone(self);
                async move {
                    let Some(part) = this.extent(chunk).and_then(|extent| extent.intersection(range)) else {
                        return Ok(None);
                    };
                    let piece = this.piece(chunk, part).await;
                    piece.map(Some).map_err(|source| Unreadable { offset: part.start(), source })
                }
            })
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        Ok(read.into_iter().flatten().collect())
    }

    /// What reads as zeroes from the start of the range on, in at most `most` runs: not all of the range, but something
    /// of it.
    pub async fn zeroes(self: &Arc<Self>, range: ByteRange, most: usize) -> Result<Vec<Run>, Unreadable> {
        let mut runs: Vec<Run> = Vec::new();
        let Some(range) = self.within(range) else { return Ok(runs) };
        let mut at = range.start();
        while at < range.end() {
            let found = self.zero_at(at / self.shape.chunk_size).await;
            let (zero, chunks) = found.map_err(|source| Unreadable { offset: at, source })?;
            let first = at / self.shape.chunk_size;
            let end = ((first + chunks) * self.shape.chunk_size).min(range.end());
            let full = runs.len() >= most;
            match runs.last_mut() {
                Some(run) if run.set == zero => run.length += end - at,
                _ if full => break,
                _ => runs.push(Run { length: end - at, set: zero }),
            }
            at = end;
        }
        Ok(runs)
    }

    /// Whether a chunk is zero, and for how many chunks from it on the same page of the index says so.
    async fn zero_at(&self, chunk: u64) -> Result<(bool, u64), RepositoryError> {
        let below = match self.page_of(chunk).await? {
            Found::Zero { chunks } => return Ok((true, chunks)),
            Found::Leaf(page) => page,
        };
        let ids = &below.as_chunks::<32>().0[(chunk % FANOUT) as usize..];
        let zero = ids.first().is_some_and(|id| ChunkId::from_bytes(*id).is_zero());
        let same = ids.iter().take_while(|id| ChunkId::from_bytes(**id).is_zero() == zero).count();
        Ok((zero, same.max(1) as u64))
    }

    /// The leaf of the index that names a chunk. Pages are chunks, and kept like those.
    async fn page_of(&self, chunk: u64) -> Result<Found, RepositoryError> {
        let mut id = self.root;
        for level in (1..=self.shape.levels()).rev() {
            let span = FANOUT.pow(level);
            let page = chunk / span;
            if id.is_zero() {
                return Ok(Found::Zero { chunks: ((page + 1) * span).min(self.shape.chunks()) - chunk });
            }
            let bytes = self.cache.read(id, self.shape.page_length(level, page) * ChunkId::LENGTH as u64).await?;
            if level == 1 {
                return Ok(Found::Leaf(bytes));
            }
            let position = chunk / FANOUT.pow(level - 1) % FANOUT;
            id = ChunkId::from_bytes(bytes.as_chunks::<32>().0[position as usize]);
        }
        // There is at least one level.
        Err(RepositoryError::Invalid("an index without pages".into()))
    }

    async fn id(&self, chunk: u64) -> Result<ChunkId, RepositoryError> {
        Ok(match self.page_of(chunk).await? {
            Found::Zero { .. } => ChunkId::ZERO,
            Found::Leaf(page) => ChunkId::from_bytes(page.as_chunks::<32>().0[(chunk % FANOUT) as usize]),
        })
    }

    async fn piece(&self, chunk: u64, part: ByteRange) -> Result<Piece, RepositoryError> {
        let id = self.id(chunk).await?;
        if id.is_zero() {
            return Ok(Piece::Zero(part));
        }
        let bytes = self.cache.read(id, self.shape.length(chunk)).await?;
        let from = (part.start() - chunk * self.shape.chunk_size) as usize;
        let taken = bytes.slice(from..from + part.len() as usize);
        // A small part of a chunk must not keep all of it in memory for as long as a client takes to receive it.
        let bytes = if taken.len() * 2 > bytes.len() { taken } else { Bytes::copy_from_slice(&taken) };
        Ok(Piece::Data { offset: part.start(), bytes })
    }

    fn within(&self, range: ByteRange) -> Option<ByteRange> {
        ByteRange::new(0, self.shape.size).and_then(|all| all.intersection(range))
    }

    fn chunks(&self, range: ByteRange) -> std::ops::Range<u64> {
        range.start() / self.shape.chunk_size..range.end().div_ceil(self.shape.chunk_size)
    }

    fn extent(&self, chunk: u64) -> Option<ByteRange> {
        ByteRange::with_length(chunk * self.shape.chunk_size, self.shape.length(chunk))
    }

    /// Starts to read what the reader of this range will want next, if it goes forward.
    fn read_ahead(self: &Arc<Self>, range: ByteRange) {
        let chunks = self.chunks(range);
        let wanted = {
            let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
            ahead(&mut streams, chunks.end - 1, self.max_ahead)
        };
        for chunk in wanted.start..wanted.end.min(self.shape.chunks()) {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                match this.id(chunk).await {
                    Ok(id) if !id.is_zero() => this.cache.read_ahead(id, this.shape.length(chunk)).await,
                    _ => {}
                }
            });
        }
    }
}

enum Found {
    /// So many chunks from this one on are zero.
    Zero { chunks: u64 },
    /// The ids of the leaf.
    Leaf(Bytes),
}

/// The chunks to read ahead when this one is asked for. The distance doubles while a reader goes on.
fn ahead(streams: &mut VecDeque<Forward>, chunk: u64, max: u64) -> std::ops::Range<u64> {
    let near = |stream: &Forward| chunk + DISORDER > stream.at && chunk <= stream.at + DISORDER;
    let Some(known) = streams.iter().position(near).and_then(|position| streams.remove(position)) else {
        streams.truncate(STREAMS - 1);
        streams.push_front(Forward { at: chunk, ahead: 1, next: chunk + 1 });
        return 0..0;
    };
    if chunk <= known.at {
        streams.push_front(known);
        return 0..0;
    }
    let distance = (known.ahead * 2).min(max);
    let from = known.next.max(chunk + 1);
    let to = (chunk + 1 + distance).max(from);
    streams.push_front(Forward { at: chunk, ahead: distance, next: to });
    from..to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_goes_forward_is_read_ahead_of_once() {
        let mut streams = VecDeque::new();
        let mut read = Vec::new();
        for chunk in 10..30 {
            // Several requests for each chunk.
            for _ in 0..3 {
                read.extend(ahead(&mut streams, chunk, 4));
            }
        }
        assert_eq!(read, (12..34).collect::<Vec<_>>());
    }

    #[test]
    fn whoever_jumps_is_not() {
        let mut streams = VecDeque::new();
        for number in 0..1000 {
            assert!(ahead(&mut streams, number * 7919 % 1_000_003, 16).is_empty());
        }
        assert!(streams.len() <= STREAMS);
    }

    #[test]
    fn requests_out_of_order_are_one_reader() {
        let mut streams = VecDeque::new();
        let mut read = 0;
        for chunk in [0, 2, 1, 3, 5, 4, 6] {
            read += ahead(&mut streams, chunk, 4).count();
        }
        assert_eq!(streams.len(), 1);
        assert!(read >= 6, "{read}");
    }
}
