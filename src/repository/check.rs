//! Finding damage before it is needed.

use super::{
    RepositoryError,
    chunk::ChunkId,
    manifest::Manifest,
    reader::VolumeReader,
    repository::{Repository, chunk_name, chunk_of_name},
};
use crate::backup::BackupId;
use futures::{StreamExt, TryStreamExt, stream};
use std::{
    collections::{HashMap, HashSet},
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// Chunks that are read at once.
const PARALLEL_READS: usize = 16;
/// Problems that are named for each backup; the rest is counted.
const NAMED: usize = 10;

/// What to check.
#[derive(Debug, Clone)]
pub struct CheckOptions {
    /// Only backups of this VM.
    pub vm: Option<String>,
    /// Only this backup, or `latest`.
    pub backup: Option<String>,
    /// Percentage of the chunks whose content is read and proved, from 0 to 100; chosen at random each time. All others
    /// are looked for. Pages of indexes are always read.
    pub read_percent: u8,
}

/// How far a check is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct CheckProgress {
    /// Bytes to read; grows as indexes are read.
    pub total: AtomicU64,
    /// Bytes read.
    pub read: AtomicU64,
}

/// What was found about one backup.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct CheckedBackup {
    /// VM.
    pub vm: String,
    /// The backup.
    pub id: BackupId,
    /// What is wrong; empty: it can be restored, as far as was looked.
    pub problems: Vec<String>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct CheckSummary {
    /// The backups.
    pub backups: Vec<CheckedBackup>,
    /// Manifests that cannot be read.
    pub unreadable: Vec<String>,
    /// Chunks that backups need.
    pub needed_chunks: u64,
    /// Of these, whose content was read.
    pub read_chunks: u64,
    /// Chunks that no backup needs: `repository prune` removes them.
    pub unneeded_chunks: u64,
}

impl CheckSummary {
    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.unreadable.is_empty() && self.backups.iter().all(|backup| backup.problems.is_empty())
    }
}

/// What is known of a chunk, over all backups.
#[derive(Debug, Default)]
struct Known {
    /// By id: bytes of the object.
    stored: HashMap<ChunkId, u64>,
    /// Chunks that were looked at, and what is wrong with the bad ones.
    looked_at: HashMap<ChunkId, Option<String>>,
    /// Pages that were read, with what is wrong below them.
    pages: HashSet<(u32, ChunkId)>,
    read: u64,
}

impl Repository {
    /// Checks backups: every manifest and index, that every chunk is there, and the content of as many as was asked for.
    pub async fn check(
        self: &Arc<Self>,
        options: &CheckOptions,
        progress: &CheckProgress,
        cancelled: &AtomicBool,
    ) -> Result<CheckSummary, RepositoryError> {
        let mut summary = CheckSummary::default();
        let manifests = if let Some(backup) = &options.backup {
            vec![self.find(options.vm.as_deref(), backup).await?]
        } else {
            let catalogue = self.catalogue(options.vm.as_deref()).await?;
            summary.unreadable = catalogue.damaged.iter().map(with_causes).collect();
            catalogue.manifests
        };
        let mut known = Known::default();
        let mut listed = self.storage().list("chunks");
        while let Some(object) = listed.try_next().await? {
            if let Some(id) = chunk_of_name(&object.name) {
                known.stored.insert(id, object.size);
            }
        }
        for manifest in &manifests {
            let problems = self.check_backup(manifest, options.read_percent, &mut known, progress, cancelled).await?;
            let (vm, id) = (manifest.backup.vm.clone(), manifest.backup.id.clone());
            summary.backups.push(CheckedBackup { vm, id, problems });
        }
        summary.needed_chunks = known.looked_at.len() as u64;
        summary.read_chunks = known.read;
        let everything = options.vm.is_none() && options.backup.is_none();
        if everything {
            let unneeded = known.stored.keys().filter(|id| !known.looked_at.contains_key(id));
            summary.unneeded_chunks = unneeded.count() as u64;
        }
        Ok(summary)
    }

    async fn check_backup(
        self: &Arc<Self>,
        manifest: &Manifest,
        percent: u8,
        known: &mut Known,
        progress: &CheckProgress,
        cancelled: &AtomicBool,
    ) -> Result<Vec<String>, RepositoryError> {
        let mut problems = Vec::new();
        let mut more = 0_u64;
        for volume in &manifest.volumes {
            let mut add = |problem: String| {
                if problems.len() < NAMED {
                    problems.push(format!("volume `{}`: {problem}", volume.name));
                } else {
                    more += 1;
                }
            };
            let reader = VolumeReader::new(Arc::clone(self), volume)?;
            let shape = reader.shape();
            let mut leaves = Box::pin(reader.leaves());
            loop {
                if cancelled.load(Ordering::Relaxed) {
                    return Err(RepositoryError::Interrupted);
                }
                let run = match leaves.try_next().await {
                    Ok(Some(run)) => run,
                    Ok(None) => break,
                    Err(error) if error.is_integrity() => {
                        add(with_causes(&error));
                        break;
                    }
                    Err(error) => return Err(error),
                };
                let chunks = (run.first..).zip(&run.ids).filter(|(_, id)| !id.is_zero());
                let chunks: Vec<_> = chunks.map(|(chunk, id)| (shape.length(chunk), *id)).collect();
                self.look_at(&chunks, percent, known, progress).await?;
                for (_, id) in chunks {
                    if let Some(Some(problem)) = known.looked_at.get(&id) {
                        add(problem.clone());
                    }
                }
            }
            self.note_pages(volume, known).await;
        }
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        Ok(problems)
    }

    /// Counts the pages of an index as needed; they were read already.
    async fn note_pages(self: &Arc<Self>, volume: &super::StoredVolume, known: &mut Known) {
        let Ok(mut reader) = VolumeReader::new(Arc::clone(self), volume) else { return };
        let mut enter = |level, id: ChunkId| {
            if level == 0 || id.is_zero() {
                return false;
            }
            known.looked_at.entry(id).or_insert(None);
            known.pages.insert((level, id)) && level > 1
        };
        // What is damaged was reported.
        let _ = reader.walk(&mut enter).await;
    }

    async fn look_at(
        self: &Arc<Self>,
        chunks: &[(u64, ChunkId)],
        percent: u8,
        known: &mut Known,
        progress: &CheckProgress,
    ) -> Result<(), RepositoryError> {
        let mut wanted = Vec::new();
        for (length, id) in chunks {
            if known.looked_at.contains_key(id) {
                continue;
            }
            if !known.stored.contains_key(id) {
                known.looked_at.insert(*id, Some(format!("{} is damaged: it is missing", chunk_name(*id))));
                continue;
            }
            known.looked_at.insert(*id, None);
            if is_chosen(percent)? {
                progress.total.fetch_add(*length, Ordering::Relaxed);
                wanted.push((*length, *id));
            }
        }
        known.read += wanted.len() as u64;
        let mut read = stream::iter(wanted)
            .map(|(length, id)| {
                let this = Arc::clone(self);
                async move { (id, length, this.read_chunk(id, length).await) }
            })
            .buffer_unordered(PARALLEL_READS);
        while let Some((id, length, result)) = read.next().await {
            progress.read.fetch_add(length, Ordering::Relaxed);
            match result {
                Ok(_) => {}
                Err(error) if error.is_integrity() => {
                    known.looked_at.insert(id, Some(with_causes(&error)));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether a chunk is one of so many of a hundred.
fn is_chosen(percent: u8) -> Result<bool, RepositoryError> {
    if percent == 0 || percent >= 100 {
        return Ok(percent != 0);
    }
    let mut bytes = [0; 4];
    super::key::random(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes) % 100 < u32::from(percent))
}

fn with_causes(error: &RepositoryError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
