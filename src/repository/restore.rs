//! Restoring from a repository.

use super::{RepositoryError, index::Shape, reader::VolumeReader, repository::Repository, scatter::Scatter};
use crate::{
    extent::Piece,
    image::{ForeignError, ImageError, PieceSource, Take},
};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};
use tokio::runtime::Handle;

/// Chunks of an image in place that are looked at at once.
const PARALLEL_CHUNKS: usize = 8;

/// A volume as a source for [`crate::image::restore_source`]. Its calls block: they must come from a thread that does not
/// belong to the runtime's workers.
pub struct RepositorySource {
    runtime: Handle,
    scatter: Scatter,
    shape: Shape,
    pieces: BoxStream<'static, Result<Piece, RepositoryError>>,
}

impl std::fmt::Debug for RepositorySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RepositorySource").field("shape", &self.shape).finish_non_exhaustive()
    }
}

impl RepositorySource {
    /// To be called within the runtime.
    pub fn new(reader: &VolumeReader) -> Self {
        let (runtime, scatter) = (Handle::current(), Scatter::new(reader));
        Self { runtime, scatter, shape: reader.shape(), pieces: reader.pieces().boxed() }
    }
}

impl PieceSource for RepositorySource {
    fn size(&self) -> u64 {
        self.shape.size
    }

    fn next_piece(&mut self) -> Result<Option<Piece>, ImageError> {
        let next = self.runtime.block_on(self.pieces.next());
        next.transpose().map_err(ForeignError::new).map_err(ImageError::Foreign)
    }

    fn scatter(&mut self, take: Take<'_>) -> Option<Result<(), ImageError>> {
        Some(self.scatter.run(&self.runtime, take))
    }
}

/// What a restore in place did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct InPlaceSummary {
    /// Bytes of the image that were as in the backup.
    pub same_bytes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
}

/// Makes an image that exists equal to the backup: what is equal already is neither fetched nor written. Should it be
/// interrupted, the image is a mixture; running it again completes it. The file must have the volume's size at least.
pub async fn restore_in_place(
    reader: &VolumeReader,
    file: Arc<File>,
    progress: &AtomicU64,
    cancelled: &AtomicBool,
) -> Result<InPlaceSummary, RepositoryError> {
    let shape = reader.shape();
    let repository = reader.repository();
    let (same, written) = (AtomicU64::new(0), AtomicU64::new(0));
    let mut leaves = Box::pin(reader.leaves());
    while let Some(run) = leaves.try_next().await? {
        let ids = (run.first..run.first + run.chunks).enumerate();
        let chunks = ids.map(|(at, chunk)| Ok((chunk, run.ids.get(at).copied().unwrap_or(super::ChunkId::ZERO))));
        futures::stream::iter(chunks)
            .try_for_each_concurrent(PARALLEL_CHUNKS, |(chunk, id)| {
                let (file, same, written) = (Arc::clone(&file), &same, &written);
                async move {
                    if cancelled.load(Ordering::Relaxed) {
                        return Err(RepositoryError::Interrupted);
                    }
                    let (offset, length) = (chunk * shape.chunk_size, shape.length(chunk));
                    if id_in_file(repository, Arc::clone(&file), offset, length).await? == id {
                        same.fetch_add(length, Ordering::Relaxed);
                    } else {
                        let content = if id.is_zero() {
                            vec![0; length as usize]
                        } else {
                            repository.read_chunk(id, length).await?
                        };
                        let put = move || file.write_all_at(&content, offset);
                        blocking("write the image", put).await?;
                        written.fetch_add(length, Ordering::Relaxed);
                    }
                    progress.fetch_add(length, Ordering::Relaxed);
                    Ok(())
                }
            })
            .await?;
    }
    blocking("make the image durable", move || file.sync_all()).await?;
    Ok(InPlaceSummary { same_bytes: same.into_inner(), written_bytes: written.into_inner() })
}

async fn id_in_file(
    repository: &Arc<Repository>,
    file: Arc<File>,
    offset: u64,
    length: u64,
) -> Result<super::ChunkId, RepositoryError> {
    let repository = Arc::clone(repository);
    blocking("read the image", move || {
        let mut content = vec![0; length as usize];
        file.read_exact_at(&mut content, offset)?;
        Ok(repository.chunk_id(&content))
    })
    .await
}

async fn blocking<T: Send + 'static>(
    attempt: &'static str,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, RepositoryError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|_| RepositoryError::WorkerDied)?;
    done.map_err(RepositoryError::local(attempt))
}
