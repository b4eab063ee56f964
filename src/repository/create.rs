//! Creating a file that must not exist yet, on file systems without hard links (FAT, many of FUSE, some shares): those
//! are what `object_store` does it with.

use super::directory::stage;
use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};
use std::{
    error::Error,
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// Whether an error may say that the file system has no hard links. The same errors have other causes, too; those come
/// up again in [`create_by_rename`].
pub(super) fn has_no_hard_links(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(number) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return [Errno::PERM, Errno::OPNOTSUPP, Errno::NOSYS, Errno::MLINK]
                .map(Errno::raw_os_error)
                .contains(&number);
        }
        next = error.source();
    }
    false
}

/// Writes a file durably unless it exists; whether it was written.
pub(super) fn create_by_rename(path: &Path, content: &[u8]) -> io::Result<bool> {
    let (mut file, staging) = stage(path)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    let renamed = written.and_then(|()| match renameat_with(CWD, &staging, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Err(io::Error::other(
            "this file system can create a file on the condition that it does not exist neither by link(2) nor by \
            renameat2(2): a repository cannot be there",
        )),
        Err(error) => Err(error.into()),
    });
    if !matches!(renamed, Ok(true)) {
        // What stays is removed by a prune.
        let _ = fs::remove_file(&staging);
        return renamed;
    }
    path.parent().map_or(Ok(()), |above| File::open(above)?.sync_all())?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_created_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        assert!(create_by_rename(&path, b"mine").unwrap());
        assert!(!create_by_rename(&path, b"theirs").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left");
        assert!(has_no_hard_links(&io::Error::from(Errno::PERM)));
        assert!(!has_no_hard_links(&io::Error::from(Errno::NOSPC)));
    }
}
