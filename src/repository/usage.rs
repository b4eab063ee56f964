//! What a repository holds, counted by listing it.

use super::{
    RepositoryError,
    repository::{Repository, chunk_of_name},
};
use futures::{StreamExt, TryStreamExt, stream};
use std::collections::HashSet;

/// Directories of chunks: two hex digits.
const PARTS: u32 = 256;
/// Directories that are listed at once.
const PARALLEL_LISTS: usize = 16;

/// Chunks as they are stored, pages of indexes among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChunkUsage {
    /// How many objects.
    pub objects: u64,
    /// Their bytes, compressed and sealed.
    pub bytes: u64,
}

impl Repository {
    /// Counts all chunks. `seen` is told after each part: parts done, parts in all, what was counted so far.
    pub async fn chunk_usage(&self, mut seen: impl FnMut(u64, u64, ChunkUsage)) -> Result<ChunkUsage, RepositoryError> {
        let mut parts = stream::iter(0..PARTS)
            .map(|part| {
                // Part by part, since no storage says beforehand how long a list is.
                let listed = self.storage().list(&format!("chunks/{part:02x}"));
                listed.try_fold(ChunkUsage::default(), |mut usage, object| async move {
                    if chunk_of_name(&object.name).is_some() {
                        usage.objects += 1;
                        usage.bytes += object.size;
                    }
                    Ok(usage)
                })
            })
            .buffer_unordered(PARALLEL_LISTS);
        let (mut all, mut done) = (ChunkUsage::default(), 0);
        while let Some(part) = parts.try_next().await? {
            all.objects += part.objects;
            all.bytes += part.bytes;
            done += 1;
            seen(done, PARTS.into(), all);
        }
        Ok(all)
    }

    /// How many VMs have backups, damaged ones included.
    pub async fn count_vms(&self) -> Result<usize, RepositoryError> {
        let names = self.manifest_names(None).await?;
        let tags: HashSet<_> = names.iter().filter_map(|name| name.object.split('/').nth(1)).collect();
        Ok(tags.len())
    }
}
