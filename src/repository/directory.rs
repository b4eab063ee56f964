//! The objects of a repository in a directory, for threads that may block.
//!
//! What `object_store` does with a directory, without the change of thread that it takes for each call: a chunk is
//! looked for and written by the thread that sealed it.

use super::RepositoryError;
use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

/// A directory with objects.
#[derive(Debug, Clone)]
pub(super) struct ObjectDirectory {
    path: PathBuf,
}

impl ObjectDirectory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether an object exists.
    pub(super) fn exists(&self, name: &str) -> Result<bool, RepositoryError> {
        match fs::metadata(self.path.join(name)) {
            Ok(metadata) => Ok(metadata.is_file()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("look for", name, error)),
        }
    }

    /// Writes an object, or writes it anew: whoever sees it sees all of it. It is durable only after
    /// [`super::Storage::flush`].
    pub(super) fn put(&self, name: &str, content: &[u8]) -> Result<(), RepositoryError> {
        let path = self.path.join(name);
        let put = || {
            let (mut file, staging) = stage(&path)?;
            let written = file.write_all(content).and_then(|()| fs::rename(&staging, &path));
            if written.is_err() {
                // What stays is removed by a prune.
                let _ = fs::remove_file(&staging);
            }
            written
        };
        put().map_err(|error| failed("write", name, error))
    }

    /// Reads an object of at most `limit` bytes, which must exist, into a buffer.
    pub(super) fn read(&self, name: &str, limit: u64, buffer: &mut Vec<u8>) -> Result<(), RepositoryError> {
        let mut file = match File::open(self.path.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(RepositoryError::damaged(name, "it is missing"));
            }
            Err(error) => return Err(failed("read", name, error)),
        };
        let size = file.metadata().map_err(|error| failed("read", name, error))?.len();
        if size > limit {
            return Err(RepositoryError::damaged(name, format!("it has {size} bytes, more than the {limit} allowed")));
        }
        buffer.resize(usize::try_from(size).unwrap_or(usize::MAX), 0);
        file.read_exact(buffer).map_err(|error| failed("read", name, error))
    }
}

fn failed(attempt: &'static str, name: &str, error: std::io::Error) -> RepositoryError {
    RepositoryError::storage(attempt, name)(object_store::Error::Generic { store: "directory", source: error.into() })
}

/// How often a directory is made that is missing: somebody else may make it, or remove it, at the same time.
const MAKINGS: u32 = 3;

/// A new file beside an object, with a name that no list shows: `NAME#DIGITS`, as `object_store` names them.
pub(super) fn stage(path: &Path) -> std::io::Result<(File, PathBuf)> {
    let (mut number, mut makings) = (1_u32, 0);
    loop {
        let mut staging = path.as_os_str().to_owned();
        staging.push(format!("#{number}"));
        match OpenOptions::new().write(true).create_new(true).open(&staging) {
            Ok(file) => return Ok((file, staging.into())),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            Err(error) if error.kind() == ErrorKind::NotFound && makings < MAKINGS => {
                makings += 1;
                fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_there_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let objects = ObjectDirectory::new(directory.path().to_owned());
        assert!(!objects.exists("chunks/ab/abcd").unwrap());
        assert!(!objects.exists("chunks").unwrap());
        objects.put("chunks/ab/abcd", b"first").unwrap();
        // What somebody else is about to write is left alone.
        fs::write(directory.path().join("chunks/ab/abcd#1"), b"half").unwrap();
        objects.put("chunks/ab/abcd", b"second").unwrap();
        assert!(objects.exists("chunks/ab/abcd").unwrap());
        assert!(!objects.exists("chunks/ab").unwrap(), "a directory is no object");
        let mut buffer = vec![7; 100];
        objects.read("chunks/ab/abcd", 6, &mut buffer).unwrap();
        assert_eq!(buffer, b"second");
        assert!(matches!(objects.read("chunks/ab/abcd", 5, &mut buffer), Err(RepositoryError::Damaged { .. })));
        assert!(matches!(objects.read("chunks/ab/none", 5, &mut buffer), Err(RepositoryError::Damaged { .. })));
        assert_eq!(fs::read_dir(directory.path().join("chunks/ab")).unwrap().count(), 2);
    }

    #[test]
    fn a_directory_that_several_need_at_once_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let objects = ObjectDirectory::new(directory.path().to_owned());
        for round in 0..200 {
            let start = std::sync::Barrier::new(8);
            std::thread::scope(|scope| {
                for thread in 0..8 {
                    let (objects, start) = (&objects, &start);
                    scope.spawn(move || {
                        start.wait();
                        objects.put(&format!("chunks/{round}/{thread}"), b"content").unwrap();
                    });
                }
            });
        }
    }
}
