//! Where the objects of a repository are: a directory, or a bucket.
//!
//! Contract: reading and listing are consistent with writes that completed (S3, GCS, Azure and local file systems are;
//! on NFS as far as close-to-open goes). Errors arrive after the store's own retries of transient failures.

use super::{
    RepositoryError,
    create::{create_by_rename, has_no_hard_links},
    directory::ObjectDirectory,
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use jiff::Timestamp;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, path::Path};
use std::{fs::File, path::PathBuf, sync::Arc};

/// A place for objects, under one prefix.
#[derive(Debug, Clone)]
pub struct Storage {
    /// For objects whose order of arrival does not matter.
    store: Arc<dyn ObjectStore>,
    /// For objects that must survive a power cut when the write returns.
    durable: Arc<dyn ObjectStore>,
    prefix: Path,
    url: String,
    directory: Option<ObjectDirectory>,
    /// The directory, open from the beginning on: syncfs(2) reports those errors of write-back that came after the
    /// descriptor was opened, unless nobody has been told of them yet.
    opened: Option<Arc<File>>,
}

impl Storage {
    /// From a store of any kind. `durable` is the same place, with writes that are on disk when they return; stores
    /// in the network are like that anyway.
    pub fn new(
        store: Arc<dyn ObjectStore>,
        durable: Arc<dyn ObjectStore>,
        prefix: Path,
        url: impl Into<String>,
        directory: Option<PathBuf>,
    ) -> Self {
        let opened = directory.as_ref().and_then(|directory| File::open(directory).ok()).map(Arc::new);
        Self { store, durable, prefix, url: url.into(), directory: directory.map(ObjectDirectory::new), opened }
    }

    /// How people name it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The directory, when it is one.
    pub fn directory(&self) -> Option<&std::path::Path> {
        self.directory.as_ref().map(ObjectDirectory::path)
    }

    /// The directory, for threads that may block.
    pub(super) fn objects(&self) -> Option<&ObjectDirectory> {
        self.directory.as_ref()
    }

    fn path(&self, name: &str) -> Path {
        // Names are made of hex digits, ids, `/` and `.` only.
        Path::from(if self.prefix.as_ref().is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) })
    }

    fn name(&self, path: &Path) -> String {
        let path = path.as_ref();
        let prefix = self.prefix.as_ref();
        let rest = if prefix.is_empty() { Some(path) } else { path.strip_prefix(prefix) };
        rest.unwrap_or(path).trim_start_matches('/').to_owned()
    }

    /// Reads an object of at most `limit` bytes; `None` when it does not exist.
    pub async fn get(&self, name: &str, limit: u64) -> Result<Option<Bytes>, RepositoryError> {
        Ok(self.get_with_version(name, limit).await?.map(|(content, _)| content))
    }

    /// Reads an object of at most `limit` bytes, and which version of it that is.
    pub async fn get_with_version(&self, name: &str, limit: u64) -> Result<Option<(Bytes, Version)>, RepositoryError> {
        let got = match self.store.get(&self.path(name)).await {
            Ok(got) => got,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(RepositoryError::storage("read", name)(error)),
        };
        let size = got.meta.size;
        if size > limit {
            return Err(RepositoryError::damaged(name, format!("it has {size} bytes, more than the {limit} allowed")));
        }
        let version = Version { e_tag: got.meta.e_tag.clone(), version: got.meta.version.clone() };
        let content = got.bytes().await.map_err(RepositoryError::storage("read", name))?;
        Ok(Some((content, version)))
    }

    /// Reads an object that must exist.
    pub async fn require(&self, name: &str, limit: u64) -> Result<Bytes, RepositoryError> {
        let missing = || RepositoryError::damaged(name, "it is missing");
        self.get(name, limit).await?.ok_or_else(missing)
    }

    /// Whether an object exists.
    pub async fn exists(&self, name: &str) -> Result<bool, RepositoryError> {
        match self.store.head(&self.path(name)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(RepositoryError::storage("look for", name)(error)),
        }
    }

    /// When an object was written, by the clock of the storage; `None` when it does not exist.
    pub async fn written(&self, name: &str) -> Result<Option<Timestamp>, RepositoryError> {
        match self.store.head(&self.path(name)).await {
            Ok(meta) => Ok(Some(time_of(&meta))),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(RepositoryError::storage("look for", name)(error)),
        }
    }

    /// Writes an object, or writes it anew. In a directory it is durable only after [`Storage::flush`].
    pub async fn put(&self, name: &str, content: Bytes) -> Result<(), RepositoryError> {
        let written = self.store.put(&self.path(name), PutPayload::from_bytes(content)).await;
        written.map(drop).map_err(RepositoryError::storage("write", name))
    }

    /// Writes an object durably, or writes it anew.
    /// The answer is when that was, by the clock of the storage.
    pub async fn put_durably(&self, name: &str, content: Bytes) -> Result<Timestamp, RepositoryError> {
        let path = self.path(name);
        let written = self.durable.put(&path, PutPayload::from_bytes(content)).await;
        written.map_err(RepositoryError::storage("write", name))?;
        let meta = self.durable.head(&path).await.map_err(RepositoryError::storage("look for", name))?;
        Ok(time_of(&meta))
    }

    /// Writes an object durably unless it exists; whether it was written. `content` must be unique, as sealed objects
    /// are: it tells whose object is there.
    pub async fn create(&self, name: &str, content: Bytes) -> Result<bool, RepositoryError> {
        Ok(self.put_conditionally(name, content, PutMode::Create).await?.is_some())
    }

    /// Writes an object anew, durably, if it still is what `version` says; the new version, or `None` when somebody else
    /// was faster. A directory has no versions: who writes there holds [`Storage::lock`].
    pub async fn replace(
        &self,
        name: &str,
        content: Bytes,
        version: &Version,
    ) -> Result<Option<Version>, RepositoryError> {
        let mode = if self.directory.is_some() { PutMode::Overwrite } else { PutMode::Update(version.clone()) };
        self.put_conditionally(name, content, mode).await
    }

    async fn put_conditionally(
        &self,
        name: &str,
        content: Bytes,
        mode: PutMode,
    ) -> Result<Option<Version>, RepositoryError> {
        let create = mode == PutMode::Create;
        let options = PutOptions { mode, ..PutOptions::default() };
        let payload = PutPayload::from_bytes(content.clone());
        let error = match self.durable.put_opts(&self.path(name), payload, options).await {
            Ok(written) => return Ok(Some(written.into())),
            Err(error) => error,
        };
        let refused = match error {
            object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => true,
            // The version that was to be replaced is gone.
            object_store::Error::NotFound { .. } => !create && self.directory.is_none(),
            _ => false,
        };
        if let Some(directory) = self.directory.as_ref().filter(|_| !refused) {
            if create && has_no_hard_links(&error) {
                let path = directory.path().join(name);
                let created = tokio::task::spawn_blocking(move || create_by_rename(&path, &content));
                let created = created.await.map_err(|_| RepositoryError::WorkerDied)?;
                let failed =
                    |source: std::io::Error| object_store::Error::Generic { store: "directory", source: source.into() };
                let created = created.map_err(failed).map_err(RepositoryError::storage("write", name))?;
                return Ok(created.then_some(Version { e_tag: None, version: None }));
            }
            // A file that is there after a failure may not be durable.
            return Err(RepositoryError::storage("write", name)(error));
        }
        // A request over the network that seemed to fail may have been carried out: when its answer got lost, or when
        // it was repeated and met the first.
        match self.get_with_version(name, content.len() as u64).await {
            Ok(Some((found, version))) if found == content => Ok(Some(version)),
            Ok(_) | Err(RepositoryError::Damaged { .. }) if refused => Ok(None),
            Err(failure) if refused => Err(failure),
            _ => Err(RepositoryError::storage("write", name)(error)),
        }
    }

    /// In a directory: keeps every other process out that asks for the same lock, until the answer is dropped; `None`
    /// when another one holds it. Elsewhere [`Storage::replace`] does.
    pub fn lock(&self, name: &str) -> Result<Option<StorageLock>, RepositoryError> {
        let Some(directory) = &self.directory else { return Ok(Some(StorageLock(None))) };
        let local = RepositoryError::local("lock the repository");
        let file =
            std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(directory.path().join(name));
        let file = file.map_err(local)?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(StorageLock(Some(file)))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(RepositoryError::local("lock the repository")(error.into())),
        }
    }

    /// Removes an object; one that does not exist is no error.
    pub async fn delete(&self, name: &str) -> Result<(), RepositoryError> {
        match self.store.delete(&self.path(name)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(RepositoryError::storage("delete", name)(error)),
        }
    }

    /// Names, sizes and times of all objects under a directory such as `chunks`.
    pub fn list(&self, directory: &str) -> BoxStream<'static, Result<StoredObject, RepositoryError>> {
        let this = self.clone();
        let label = directory.to_owned();
        let prefix = if directory.is_empty() { self.prefix.clone() } else { self.path(directory) };
        let listed = self.store.list(Some(&prefix));
        listed
            .map(move |meta: Result<ObjectMeta, object_store::Error>| {
                let meta = meta.map_err(RepositoryError::storage("list", label.clone()))?;
                Ok(StoredObject { name: this.name(&meta.location), size: meta.size, last_modified: time_of(&meta) })
            })
            .boxed()
    }

    /// All of [`Storage::list`], when it is known to be short.
    pub async fn list_all(&self, directory: &str) -> Result<Vec<StoredObject>, RepositoryError> {
        self.list(directory).try_collect().await
    }

    /// In a directory: removes files of writes that never came to their end, which no list shows; how many.
    pub(super) async fn remove_unfinished(
        &self,
        is_old: impl Fn(Timestamp) -> bool + Send + 'static,
    ) -> Result<u64, RepositoryError> {
        let Some(directory) = self.directory.clone() else { return Ok(0) };
        let removed = tokio::task::spawn_blocking(move || remove_unfinished(directory.path(), &is_old));
        let removed = removed.await.map_err(|_| RepositoryError::WorkerDied)?;
        removed.map_err(RepositoryError::local("remove unfinished files of the repository"))
    }

    /// Makes all that was written so far durable.
    pub async fn flush(&self) -> Result<(), RepositoryError> {
        let Some(directory) = self.directory.clone() else { return Ok(()) };
        let opened = self.opened.clone();
        let synced = tokio::task::spawn_blocking(move || {
            let handle = match opened {
                Some(handle) => handle,
                None => Arc::new(File::open(directory.path())?),
            };
            // One call for all files and directories below, instead of two for each chunk.
            rustix::fs::syncfs(&handle).map_err(std::io::Error::from)
        });
        synced
            .await
            .map_err(|_| RepositoryError::WorkerDied)?
            .map_err(RepositoryError::local("make the chunks durable"))
    }
}

/// Removes the files that `object_store` writes to before it gives them their names (`NAME#DIGITS`), where they were
/// last written at a time that `is_old` takes for old.
fn remove_unfinished(directory: &std::path::Path, is_old: &dyn Fn(Timestamp) -> bool) -> std::io::Result<u64> {
    let mut removed = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        // Of a file that is gone meanwhile nothing is wanted.
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            removed += remove_unfinished(&entry.path(), is_old)?;
            continue;
        }
        let name = entry.file_name();
        let suffix = name.to_str().and_then(|name| name.split_once('#')).map(|(_, suffix)| suffix);
        let is_unfinished =
            suffix.is_some_and(|suffix| !suffix.is_empty() && suffix.bytes().all(|b| b.is_ascii_digit()));
        let written = meta.modified().ok().and_then(|written| Timestamp::try_from(written).ok());
        if is_unfinished && meta.is_file() && written.is_some_and(is_old) {
            match std::fs::remove_file(entry.path()) {
                Ok(()) => removed += 1,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(removed)
}

fn time_of(meta: &ObjectMeta) -> Timestamp {
    let nanoseconds = meta.last_modified.timestamp_nanos_opt().unwrap_or(0);
    Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Which version of an object.
pub(super) type Version = object_store::UpdateVersion;

/// See [`Storage::lock`].
#[derive(Debug)]
pub struct StorageLock(#[allow(dead_code, reason = "held, and released when it is closed")] Option<File>);

/// An object in a list.
#[derive(Debug, Clone)]
pub struct StoredObject {
    /// Name within the repository.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// When it was written, by the clock of the storage.
    pub last_modified: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_object_is_created_once_also_when_the_answer_was_lost() {
        let store: Arc<dyn ObjectStore> = Arc::new(object_store::memory::InMemory::new());
        let storage = Storage::new(Arc::clone(&store), store, Path::from("prefix"), "memory:", None);
        assert!(storage.create("a", Bytes::from_static(b"mine")).await.unwrap());
        assert!(storage.create("a", Bytes::from_static(b"mine")).await.unwrap(), "the same request once more");
        for other in [&b"else"[..], b"x", b"much longer than the other"] {
            assert!(!storage.create("a", Bytes::from_static(other)).await.unwrap());
        }
        assert_eq!(storage.get("a", 4).await.unwrap().unwrap(), b"mine"[..]);
        assert!(matches!(storage.get("a", 3).await, Err(RepositoryError::Damaged { .. })));
    }

    #[test]
    fn unfinished_files_go_when_they_are_old() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("chunks/ab");
        std::fs::create_dir_all(&below).unwrap();
        for name in ["old#1", "old#23", "young#1", "whole", "odd#", "odd#1a"] {
            std::fs::write(below.join(name), "x").unwrap();
        }
        let hour = std::time::Duration::from_secs(3600);
        for name in ["old#1", "old#23", "whole", "odd#", "odd#1a"] {
            let file = File::options().write(true).open(below.join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - hour).unwrap();
        }
        let limit = Timestamp::now() - jiff::SignedDuration::from_mins(30);
        assert_eq!(remove_unfinished(directory.path(), &|written| written < limit).unwrap(), 2);
        let mut left: Vec<_> = std::fs::read_dir(below).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["odd#", "odd#1a", "whole", "young#1"]);
    }
}
