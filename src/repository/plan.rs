//! The state of a prune, as it is stored: there is at most one.

use super::{
    RepositoryError, chunk::ChunkId, index::page_bytes, process::Process, repository::Repository, storage::Version,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// The object whose creation makes a prune the only one.
pub(super) const PLAN: &str = "prune/plan";
const MAX_PLAN: u64 = 16 << 20;
/// Ids in one object of the list: 1 MiB.
const PART: usize = 32 << 10;
const MAX_PART: u64 = 2 << 20;

/// How far a prune is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PlanState {
    /// It looks for chunks that nobody needs.
    Marking,
    /// Its list is published, and nothing is deleted yet.
    Marked,
    /// It deletes.
    Sweeping,
}

/// A prune.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) id: String,
    pub(super) process: Process,
    pub(super) started: Timestamp,
    pub(super) state: PlanState,
    /// Objects that hold the list.
    pub(super) parts: usize,
    /// Chunks on the list.
    pub(super) condemned: u64,
    /// Bytes of their objects.
    pub(super) bytes: u64,
    /// Sessions that may not have seen the list; `None` until they were looked for, which is after it was published.
    pub(super) waits_for: Option<Vec<String>>,
}

impl Plan {
    pub(super) async fn load(repository: &Repository) -> Result<Option<Self>, RepositoryError> {
        Ok(Self::load_with_version(repository).await?.map(|(plan, _)| plan))
    }

    pub(super) async fn load_with_version(repository: &Repository) -> Result<Option<(Self, Version)>, RepositoryError> {
        let Some((object, version)) = repository.storage().get_with_version(PLAN, MAX_PLAN).await? else {
            return Ok(None);
        };
        let document = repository.prunes().open(PLAN.as_bytes(), &object, PLAN)?;
        let plan = serde_json::from_slice(&document)
            .map_err(|error| RepositoryError::damaged(PLAN, format!("it is no plan: {error}")))?;
        Ok(Some((plan, version)))
    }

    pub(super) fn sealed(&self, repository: &Repository) -> Result<Vec<u8>, RepositoryError> {
        repository.prunes().seal(PLAN.as_bytes(), &serde_json::to_vec(self).unwrap_or_default())
    }

    /// Name of an object with a part of the list.
    pub(super) fn part_name(&self, part: usize) -> String {
        format!("prune/{}/{part}", self.id)
    }

    /// Writes the list.
    pub(super) async fn write_list(
        &mut self,
        repository: &Repository,
        condemned: &[ChunkId],
    ) -> Result<(), RepositoryError> {
        self.parts = 0;
        for part in condemned.chunks(PART) {
            let name = self.part_name(self.parts);
            let object = repository.prunes().seal(name.as_bytes(), &page_bytes(part))?;
            repository.storage().put_durably(&name, object.into()).await?;
            self.parts += 1;
        }
        self.condemned = condemned.len() as u64;
        Ok(())
    }

    /// Reads the list; `None`: the prune ended meanwhile, and with it the list.
    pub(super) async fn condemned(&self, repository: &Repository) -> Result<Option<HashSet<ChunkId>>, RepositoryError> {
        let damaged = |name: &str, what: &str| {
            RepositoryError::damaged(name, format!("{what}; `virt-fleece repository prune` makes a new list"))
        };
        let mut condemned = HashSet::new();
        for part in 0..self.parts {
            let name = self.part_name(part);
            let Some(object) = repository.storage().get(&name, MAX_PART).await? else {
                // The plan goes before its parts. Whoever took a list with a hole for the whole would rely on chunks
                // that are about to be deleted.
                return match Self::load(repository).await? {
                    Some(now) if now.id == self.id => Err(damaged(&name, "it is missing")),
                    _ => Ok(None),
                };
            };
            let bytes = repository.prunes().open(name.as_bytes(), &object, &name)?;
            let (ids, rest) = bytes.as_chunks::<32>();
            if !rest.is_empty() {
                return Err(damaged(&name, "it is no list of ids"));
            }
            condemned.extend(ids.iter().map(|id| ChunkId::from_bytes(*id)));
        }
        if condemned.len() as u64 != self.condemned {
            let (found, said) = (condemned.len(), self.condemned);
            return Err(damaged(PLAN, &format!("its list has {found} chunks instead of {said}")));
        }
        Ok(Some(condemned))
    }
}
