//! A content-addressed, deduplicated, compressed and encrypted store of backups, in a directory or a bucket.
//!
//! Disks are cut into chunks of fixed size, named by a keyed hash of their content; every backup has a full index of
//! its chunks, so that each restores on its own and deleting one never touches another. Dirty bitmaps only decide what
//! has to be read. `docs/format.md` is the specification.

mod cache;
mod check;
mod chunk;
mod commit;
mod create;
mod directory;
mod error;
mod forget;
#[cfg(test)]
mod hostile;
mod index;
mod key;
mod location;
mod manifest;
mod need;
mod pipeline;
mod plan;
mod process;
#[cfg(test)]
mod protocol_test;
mod prune;
mod random;
mod reader;
#[cfg(test)]
mod reliance;
#[allow(clippy::module_inception, reason = "the module is named for what it holds")]
mod repository;
mod restore;
mod scatter;
mod seal;
mod session;
mod storage;
mod strays;
mod usage;
#[cfg(test)]
mod vectors;
mod workbench;
mod workers;
mod writer;

pub use check::{CheckOptions, CheckProgress, CheckSummary, CheckedBackup};
pub use chunk::{ChunkId, DEFAULT_CHUNK_SIZE, MAX_CHUNK_SIZE, MIN_CHUNK_SIZE};
pub use error::RepositoryError;
pub use forget::NamedBackup;
pub use index::{FANOUT, IndexReader, Shape};
pub use key::{KeySlot, Passphrase};
pub use location::Location;
pub use manifest::{Catalogue, MANIFEST_VERSION, Manifest, StoredVolume};
pub use pipeline::ChunkPipeline;
pub use process::Process;
pub use prune::{PruneOptions, PruneProgress, PruneSummary};
pub use random::{RandomReader, Unreadable};
pub use reader::VolumeReader;
pub use repository::{REPOSITORY_VERSION, Repository};
pub use restore::{InPlaceSummary, RepositorySource, restore_in_place};
pub use session::RepositorySession;
pub use storage::{Storage, StoredObject};
pub use usage::ChunkUsage;
pub use writer::{Base, VolumeWriter};
