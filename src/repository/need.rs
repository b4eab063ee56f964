//! What backups and sessions need, and so what nobody does.

use super::{
    RepositoryError,
    chunk::ChunkId,
    index::Shape,
    manifest::Manifest,
    prune::{PruneProgress, PruneSummary},
    reader::VolumeReader,
    repository::{Repository, chunk_of_name},
};
use futures::{TryStreamExt, stream};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, atomic::Ordering},
};

/// Backups whose indexes are read at once.
const PARALLEL_INDEXES: usize = 4;

impl Repository {
    /// Chunks that no backup needs, and the bytes of their objects.
    pub(super) async fn unneeded(
        self: &Arc<Self>,
        progress: &PruneProgress,
        summary: &mut PruneSummary,
    ) -> Result<(Vec<ChunkId>, u64), RepositoryError> {
        // In this order: a chunk that appears later is not on the list, and a backup that appears later is read again
        // before anything is deleted.
        let mut chunks: HashMap<ChunkId, u64> = HashMap::new();
        let mut listed = self.storage().list("chunks");
        while let Some(object) = listed.try_next().await? {
            if let Some(id) = chunk_of_name(&object.name) {
                chunks.insert(id, object.size);
            }
        }
        summary.chunks = chunks.len() as u64;
        let needed = self.needed(Some(progress)).await?;
        chunks.retain(|id, _| !needed.contains(id));
        let bytes = chunks.values().sum();
        Ok((chunks.into_keys().collect(), bytes))
    }

    /// What sessions hold.
    pub(super) async fn held(self: &Arc<Self>) -> Result<Held, RepositoryError> {
        let mut held = Needed::default();
        for (_, _, session) in self.running_sessions().await? {
            // One that cannot be read knew the list, or it would have been waited for, and cannot commit.
            let Some(session) = session else { continue };
            if session.holds_all {
                return Ok(Held::Everything);
            }
            held.chunks.extend(session.holds.iter().filter_map(|hold| ChunkId::from_hex(hold)));
            for base in session.bases {
                let Some(root) = ChunkId::from_hex(&base.root) else { continue };
                let shape = Shape { size: base.size, chunk_size: self.chunk_size() };
                let mut reader = VolumeReader::at(Arc::clone(self), shape, root);
                reader.walk(&mut |level, id| held.enter(level, id)).await?;
            }
        }
        Ok(Held::Chunks(held.chunks))
    }

    /// All chunks that backups need, pages of indexes included.
    pub(super) async fn needed(
        self: &Arc<Self>,
        progress: Option<&PruneProgress>,
    ) -> Result<HashSet<ChunkId>, RepositoryError> {
        let names = self.manifest_names(None).await?;
        if let Some(progress) = progress {
            progress.backups.store(names.len() as u64, Ordering::Relaxed);
        }
        let needed = Arc::new(Mutex::new(Needed::default()));
        stream::iter(names.into_iter().map(Ok))
            .try_for_each_concurrent(PARALLEL_INDEXES, |name| {
                let (this, needed) = (Arc::clone(self), Arc::clone(&needed));
                async move {
                    match this.read_manifest(&name).await {
                        Ok(manifest) => this.add_needed(&manifest, &needed).await?,
                        // Forgotten since it was listed.
                        Err(_) if !this.storage().exists(&name.object).await? => {}
                        Err(error) => return Err(error),
                    }
                    if let Some(progress) = progress {
                        progress.backups_read.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                }
            })
            .await?;
        let needed = std::mem::take(&mut *needed.lock().map_err(|_| RepositoryError::WorkerDied)?);
        Ok(needed.chunks)
    }

    async fn add_needed(self: &Arc<Self>, manifest: &Manifest, needed: &Mutex<Needed>) -> Result<(), RepositoryError> {
        for volume in &manifest.volumes {
            let mut reader = VolumeReader::new(Arc::clone(self), volume)?;
            let mut enter = |level, id| needed.lock().is_ok_and(|mut needed| needed.enter(level, id));
            reader.walk(&mut enter).await?;
        }
        Ok(())
    }
}

/// What sessions hold of the condemned chunks.
#[derive(Debug)]
pub(super) enum Held {
    /// All of them.
    Everything,
    /// These.
    Chunks(HashSet<ChunkId>),
}

/// What backups need.
#[derive(Debug, Default)]
struct Needed {
    chunks: HashSet<ChunkId>,
    /// Pages by level. Not by id alone: a guest may hold the bytes of a page as data, and what hangs on that page would
    /// not be looked at.
    pages: HashSet<(u32, ChunkId)>,
}

impl Needed {
    /// Adds an id; whether what hangs on it has to be looked at. Backups share most of their pages.
    fn enter(&mut self, level: u32, id: ChunkId) -> bool {
        if id.is_zero() {
            return false;
        }
        self.chunks.insert(id);
        level > 0 && self.pages.insert((level, id))
    }
}
