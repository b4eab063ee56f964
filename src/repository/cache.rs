//! Chunks that were read lately: bounded by bytes, the longest unused ones go first. Whoever asks for a chunk that is
//! on its way waits for it instead of reading it again.

use super::{RepositoryError, chunk::ChunkId, repository::Repository};
use bytes::Bytes;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{OnceCell, Semaphore};

/// Chunks that are read at the same time hold at most so many bytes besides the cache.
const IN_FLIGHT_BYTES: u64 = 48 << 20;
const MAX_IN_FLIGHT: u64 = 32;

/// The chunks of one repository, through a cache.
#[derive(Debug)]
pub(super) struct ChunkCache {
    repository: Arc<Repository>,
    cache: Cache,
    /// Reads that may run at the same time.
    reads: Semaphore,
    /// Of these, what reading ahead may take: somebody waits for the others.
    ahead: Semaphore,
}

#[derive(Debug)]
struct Cache(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    capacity: u64,
    bytes: u64,
    chunks: HashMap<ChunkId, (Bytes, u64)>,
    /// By last use.
    order: BTreeMap<u64, ChunkId>,
    uses: u64,
    /// On their way, with the number of those who wait.
    coming: HashMap<ChunkId, (Arc<OnceCell<Bytes>>, usize)>,
}

impl Kept {
    fn get(&mut self, id: ChunkId) -> Option<Bytes> {
        let (bytes, used) = self.chunks.get_mut(&id)?;
        self.uses += 1;
        self.order.remove(used);
        self.order.insert(self.uses, id);
        *used = self.uses;
        Some(bytes.clone())
    }

    fn insert(&mut self, id: ChunkId, bytes: Bytes) {
        self.uses += 1;
        self.bytes += bytes.len() as u64;
        self.order.insert(self.uses, id);
        if let Some((old, used)) = self.chunks.insert(id, (bytes, self.uses)) {
            self.bytes -= old.len() as u64;
            self.order.remove(&used);
        }
        while self.bytes > self.capacity
            && let Some((_, oldest)) = self.order.pop_first()
        {
            if let Some((bytes, _)) = self.chunks.remove(&oldest) {
                self.bytes -= bytes.len() as u64;
            }
        }
    }
}

/// A place among those who wait for a chunk; given up in any case, also when the request is.
struct Waiting<'a> {
    cache: &'a Cache,
    id: ChunkId,
    cell: Arc<OnceCell<Bytes>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut kept = self.cache.kept();
        if let Some((_, waiting)) = kept.coming.get_mut(&self.id) {
            *waiting -= 1;
            if *waiting == 0 {
                kept.coming.remove(&self.id);
            }
        }
    }
}

impl Cache {
    fn new(capacity: u64) -> Self {
        Self(Mutex::new(Kept { capacity, ..Kept::default() }))
    }

    /// No panic happens while it is held.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A chunk: kept, on its way, or by `read`.
    async fn get_or_read(
        &self,
        id: ChunkId,
        read: impl Future<Output = Result<Bytes, RepositoryError>>,
    ) -> Result<Bytes, RepositoryError> {
        let waiting = {
            let mut kept = self.kept();
            if let Some(bytes) = kept.get(id) {
                return Ok(bytes);
            }
            let (cell, waiting) = kept.coming.entry(id).or_default();
            *waiting += 1;
            Waiting { cache: self, id, cell: Arc::clone(cell) }
        };
        let read = async {
            let bytes = read.await?;
            self.kept().insert(id, bytes.clone());
            Ok(bytes)
        };
        // When the one who reads fails or gives up, the next one reads.
        waiting.cell.get_or_try_init(|| read).await.cloned()
    }
}

impl ChunkCache {
    /// Keeps chunks of at most `capacity` bytes; less than some chunks would help nobody.
    pub(super) fn new(repository: Arc<Repository>, capacity: u64) -> Self {
        let chunk_size = repository.chunk_size();
        let reads = (IN_FLIGHT_BYTES / chunk_size).clamp(4, MAX_IN_FLIGHT) as usize;
        let cache = Cache::new(capacity.max(4 * chunk_size));
        Self { repository, cache, reads: Semaphore::new(reads), ahead: Semaphore::new(reads / 2) }
    }

    /// Bytes that are kept.
    pub(super) fn capacity(&self) -> u64 {
        self.cache.kept().capacity
    }

    /// A chunk of exactly `length` bytes.
    pub(super) async fn read(&self, id: ChunkId, length: u64) -> Result<Bytes, RepositoryError> {
        let read = async {
            let _read = self.reads.acquire().await.map_err(|_| RepositoryError::WorkerDied)?;
            self.repository.read_chunk(id, length).await.map(Bytes::from)
        };
        let bytes = self.cache.get_or_read(id, read).await?;
        if bytes.len() as u64 == length {
            return Ok(bytes);
        }
        // One content has one length: an index that says otherwise is wrong.
        let detail = format!("it holds {} bytes, not {length}", bytes.len());
        Err(RepositoryError::damaged(super::repository::chunk_name(id), detail))
    }

    /// Reads a chunk that may be wanted soon, unless there is more urgent work. A failure is for the one who wants it.
    pub(super) async fn read_ahead(&self, id: ChunkId, length: u64) {
        if let Ok(_ahead) = self.ahead.try_acquire() {
            let _ = self.read(id, length).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn id(number: u8) -> ChunkId {
        ChunkId::from_bytes([number; 32])
    }

    fn kept(capacity: u64) -> Kept {
        Kept { capacity, ..Kept::default() }
    }

    #[tokio::test]
    async fn many_who_want_one_chunk_read_it_once() {
        let cache = Cache::new(100);
        let reads = AtomicUsize::new(0);
        let wanted = (0..20).map(|_| {
            cache.get_or_read(id(1), async {
                tokio::task::yield_now().await;
                reads.fetch_add(1, Ordering::Relaxed);
                Ok(Bytes::from_static(b"content"))
            })
        });
        for bytes in futures::future::join_all(wanted).await {
            assert_eq!(bytes.unwrap(), b"content".as_slice());
        }
        assert_eq!(reads.load(Ordering::Relaxed), 1);
        assert!(cache.kept().coming.is_empty());
    }

    #[tokio::test]
    async fn a_failure_or_a_reader_that_gives_up_is_not_kept() {
        let cache = Cache::new(100);
        let failing = || async {
            tokio::task::yield_now().await;
            Err(RepositoryError::WorkerDied)
        };
        let (first, second) = tokio::join!(
            cache.get_or_read(id(1), failing()),
            cache.get_or_read(id(1), async { Ok(Bytes::from_static(b"at last")) })
        );
        assert!(first.is_err());
        assert_eq!(second.unwrap(), b"at last".as_slice());

        let mut given_up = Box::pin(cache.get_or_read(id(2), std::future::pending()));
        assert!(futures::poll!(&mut given_up).is_pending());
        let waiting = cache.get_or_read(id(2), async { Ok(Bytes::from_static(b"instead")) });
        let mut waiting = Box::pin(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(given_up);
        assert_eq!(waiting.await.unwrap(), b"instead".as_slice());
        assert!(cache.kept().coming.is_empty());
    }

    #[test]
    fn the_longest_unused_go_first() {
        let mut kept = kept(30);
        (1..=3).for_each(|number| kept.insert(id(number), Bytes::from(vec![number; 10])));
        assert!(kept.get(id(1)).is_some());
        kept.insert(id(4), Bytes::from(vec![4; 10]));
        assert!(kept.get(id(2)).is_none(), "it was not used again");
        assert_eq!([1, 3, 4].map(|number| kept.get(id(number)).map(|bytes| bytes[0])), [Some(1), Some(3), Some(4)]);
        assert_eq!((kept.bytes, kept.order.len()), (30, 3));
    }

    #[test]
    fn it_stays_within_its_bounds() {
        let mut kept = kept(100);
        for round in 0..1000_u32 {
            let number = (round * 7 % 50) as u8;
            if round % 3 == 0 {
                kept.get(id(number));
            } else {
                kept.insert(id(number), Bytes::from(vec![number; 1 + round as usize % 60]));
            }
            let held: usize = kept.chunks.values().map(|(bytes, _)| bytes.len()).sum();
            assert_eq!((held as u64, kept.order.len()), (kept.bytes, kept.chunks.len()));
            assert!(held <= 100);
        }
        kept.insert(id(99), Bytes::from(vec![0; 101]));
        assert_eq!((kept.bytes, kept.chunks.len()), (0, 0), "what is too large is not kept");
    }
}
