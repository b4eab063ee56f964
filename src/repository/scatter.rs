//! Reading a whole volume as fast as the processors allow: several threads, each of which reads, opens and hands on one
//! chunk after the other, in memory that it uses again.

use super::{
    RepositoryError,
    index::Shape,
    reader::{LeafRun, VolumeReader, Wanted, chunks_ahead, wanted},
    repository::{Repository, chunk_name},
    seal::OVERHEAD,
    workbench::Workbench,
};
use crate::image::{ForeignError, ImageError, Part, Take};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{runtime::Handle, sync::oneshot};

/// Threads that read a directory: some more than processors, because a disk makes them wait.
const THREADS: std::ops::RangeInclusive<usize> = 4..=8;

/// A volume that is to be read once.
pub(super) struct Scatter {
    repository: Arc<Repository>,
    shape: Shape,
    /// What comes next; `None` when a thread failed, or when all is read.
    work: Mutex<Option<Work>>,
}

struct Work {
    leaves: BoxStream<'static, Result<LeafRun, RepositoryError>>,
    wanted: VecDeque<Wanted>,
}

impl Scatter {
    pub(super) fn new(reader: &VolumeReader) -> Self {
        let (repository, shape) = (Arc::clone(reader.repository()), reader.shape());
        let work = Work { leaves: reader.leaves().boxed(), wanted: VecDeque::new() };
        Self { repository, shape, work: Mutex::new(Some(work)) }
    }

    /// Shows every part to `take`, from several threads; every chunk is proved before. Blocks: not for a thread of the
    /// runtime.
    pub(super) fn run(&self, runtime: &Handle, take: Take<'_>) -> Result<(), ImageError> {
        let ahead = chunks_ahead(self.shape.chunk_size);
        let threads = match self.repository.storage().objects() {
            Some(_) => {
                let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
                processors.clamp(*THREADS.start(), *THREADS.end()).min(ahead)
            }
            None => ahead,
        };
        let results: Vec<_> = std::thread::scope(|scope| {
            let start = |_| scope.spawn(|| self.read(runtime, take));
            let threads: Vec<_> = (0..threads).map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(died()))).collect()
        });
        results.into_iter().collect()
    }

    /// One of the threads.
    fn read(&self, runtime: &Handle, take: Take<'_>) -> Result<(), ImageError> {
        let mut workbench = Workbench::default();
        loop {
            let one = self.next(runtime).map_err(foreign).and_then(|next| match next {
                None => Ok(false),
                Some(Wanted::Zero(range)) => take(Part::Zero(range)).map(|()| true),
                Some(Wanted::Chunk { offset, length, id }) => {
                    let name = chunk_name(id);
                    self.fetch(runtime, &name, length + 1 + OVERHEAD as u64, workbench.object()).map_err(foreign)?;
                    let bytes = workbench.open(&self.repository, id, length).map_err(foreign)?;
                    take(Part::Data { offset, bytes }).map(|()| true)
                }
            });
            match one {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => {
                    // The others need not go on.
                    *self.work.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    return Err(error);
                }
            }
        }
    }

    fn next(&self, runtime: &Handle) -> Result<Option<Wanted>, RepositoryError> {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Work { leaves, wanted: waiting }) = work.as_mut() else { return Ok(None) };
        loop {
            if let Some(next) = waiting.pop_front() {
                return Ok(Some(next));
            }
            let Some(run) = runtime.block_on(leaves.try_next())? else { return Ok(None) };
            waiting.extend(wanted(self.shape, run));
        }
    }

    /// An object of at most `limit` bytes, into a buffer.
    fn fetch(&self, runtime: &Handle, name: &str, limit: u64, buffer: &mut Vec<u8>) -> Result<(), RepositoryError> {
        let storage = self.repository.storage();
        if let Some(objects) = storage.objects() {
            return objects.read(name, limit, buffer);
        }
        let (sender, object) = oneshot::channel();
        let (storage, wanted) = (storage.clone(), name.to_owned());
        // Not on this thread, which the runtime does not know: each wakeup would be one of the whole operating system.
        runtime.spawn(async move { sender.send(storage.require(&wanted, limit).await) });
        let object = object.blocking_recv().map_err(|_| RepositoryError::WorkerDied)??;
        buffer.clear();
        buffer.extend_from_slice(&object);
        Ok(())
    }
}

fn foreign(error: RepositoryError) -> ImageError {
    ImageError::Foreign(ForeignError::new(error))
}

fn died() -> ImageError {
    foreign(RepositoryError::WorkerDied)
}
