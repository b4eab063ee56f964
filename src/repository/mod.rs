//! A content-addressed, deduplicated, compressed and encrypted store of backups, in a directory or a bucket.
//!
//! Disks are cut into chunks of fixed size, named by a keyed hash of their content; every backup has a full index of
//! its chunks, so that each restores on its own and deleting one never touches another. Dirty bitmaps only decide what
//! has to be read. `docs/format.md` is the specification.

mod cache;
mod chunk;
mod error;
mod index;
mod key;
mod location;
mod manifest;
mod plan;
mod process;
mod random;
mod reader;
#[allow(clippy::module_inception, reason = "the module is named for what it holds")]
mod repository;
mod seal;
mod session;
mod storage;
mod writer;

pub use chunk::{ChunkId, DEFAULT_CHUNK_SIZE, MAX_CHUNK_SIZE, MIN_CHUNK_SIZE};
pub use error::RepositoryError;
pub use index::{FANOUT, IndexReader, Shape};
pub use key::{KeySlot, Passphrase};
pub use location::Location;
pub use manifest::{Catalogue, MANIFEST_VERSION, Manifest, StoredVolume};
pub use process::Process;
pub use random::{RandomReader, Unreadable};
pub use reader::VolumeReader;
pub use repository::{REPOSITORY_VERSION, Repository};
pub use session::RepositorySession;
pub use storage::{Storage, StoredObject};
pub use writer::{Base, ChunkPipeline, VolumeWriter};
