//! Node-local storage of the fleece: files without a name, and the space they may take.
//!
//! A full fleece breaks the snapshot (or, on QEMU before 10.1, hits the guest), so the space is reserved beforehand
//! where there is enough, and watched where there is not.

use super::SessionError;
use rustix::fs::{self, FallocateFlags, FlockOperation, Mode, OFlags};
use std::{
    fs::{DirBuilder, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

/// Space that is left to others on the file system of the fleece, in bytes, at the least.
pub(super) const HEADROOM_MIN: u64 = 256 << 20;
/// A fleece may be this much larger than the disk: qcow2's tables, and a margin.
const METADATA_SHARE: u64 = 64;
/// File systems on which a fleece can stall with the network (`statfs(2)` magic numbers): NFS, SMB, CIFS, Ceph, 9p, FUSE.
const NETWORK_FILE_SYSTEMS: [(u32, &str); 6] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9p"),
    (0x6573_5546, "FUSE"),
];

/// The directory of the fleece.
#[derive(Debug, Clone)]
pub struct FleeceDirectory {
    path: PathBuf,
    owner: Option<(u32, String)>,
}

impl FleeceDirectory {
    /// Opens the directory; makes it, accessible to its owner alone, when it is missing.
    pub fn open(path: &Path) -> Result<Self, SessionError> {
        let failed = |source| SessionError::FleeceDirectory { path: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        let path = path.canonicalize().map_err(failed)?;
        let metadata = path.metadata().map_err(failed)?;
        if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o022 != 0 {
            let message = "it must belong to the user who runs the backup and must not be writable by others";
            return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, message)));
        }
        Ok(Self { path, owner: None })
    }

    /// The same, with files that belong to this user and group, and have this `SELinux` label where `SELinux` is enabled: of
    /// a QEMU in a pod, which gets descriptors, but whose every access to them is checked against the label.
    #[must_use]
    pub fn with_owner(mut self, uid: u32, selinux_label: &str) -> Self {
        self.owner = Some((uid, selinux_label.to_owned()));
        self
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name of the network file system that holds the directory, if it is one: a stalled fleece hangs QEMU.
    pub fn network_file_system(&self) -> Option<&'static str> {
        let magic = u32::try_from(fs::statfs(&self.path).ok()?.f_type & 0xffff_ffff).ok()?;
        NETWORK_FILE_SYSTEMS.iter().find(|(known, _)| *known == magic).map(|(_, name)| *name)
    }

    /// Bytes that unprivileged writers can still take.
    pub fn available(&self) -> Result<u64, SessionError> {
        let stat = fs::statvfs(&self.path)
            .map_err(|error| SessionError::FleeceDirectory { path: self.path.clone(), source: error.into() })?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// A new fleece file without a name: it is gone when the last descriptor is closed, whatever happens to us.
    pub fn create_file(&self) -> Result<FleeceFile, SessionError> {
        let failed = |source| SessionError::FleeceDirectory { path: self.path.clone(), source };
        let write = fs::open(&self.path, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
            .map_err(|error| failed(error.into()))?;
        if let Some((uid, label)) = &self.owner {
            // The label first: it is the owner who may set it.
            // Mounted where SELinux is enabled (selinuxfs).
            if Path::new("/sys/fs/selinux/enforce").exists() {
                fs::fsetxattr(&write, "security.selinux", label.as_bytes(), fs::XattrFlags::empty())
                    .map_err(|error| failed(error.into()))?;
            }
            let (user, group) = (fs::Uid::from_raw(*uid), fs::Gid::from_raw(*uid));
            fs::fchown(&write, Some(user), Some(group)).map_err(|error| failed(error.into()))?;
        }
        // QEMU looks in the descriptor set for one with the access mode it opens with: it wants both kinds. The file
        // has no name, so the second one comes by way of /proc; it is ours, no link can be in the way.
        let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&write));
        let read = File::open(own).map_err(failed)?;
        Ok(FleeceFile { file: File::from(write), read_only: read })
    }

    /// Takes the lock of one VM, so that two sessions of it never run at once on this node. `None`: somebody holds it.
    pub fn lock(&self, key: &str) -> Result<Option<VmLock>, SessionError> {
        let path = self.path.join(format!("{key}.lock"));
        let failed = |source| SessionError::FleeceDirectory { path: path.clone(), source };
        let file = fs::open(&path, OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
            .map_err(|error| failed(error.into()))?;
        match fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(VmLock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    }
}

/// Held while a session of a VM runs; ends with the process.
#[derive(Debug)]
pub struct VmLock {
    _file: OwnedFd,
}

/// One fleece file.
#[derive(Debug)]
pub struct FleeceFile {
    file: File,
    read_only: File,
}

impl FleeceFile {
    /// Sets the apparent size in bytes (a raw fleece has exactly the disk's).
    pub fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    /// Takes `bytes` of space beforehand, so that no write can find the file system full.
    pub fn reserve(&self, bytes: u64) -> io::Result<()> {
        fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, bytes).map_err(Into::into)
    }

    /// Space that the file takes, in bytes.
    pub fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Duplicates for QEMU: one to write, one to read.
    pub fn descriptors(&self) -> io::Result<[OwnedFd; 2]> {
        Ok([self.file.as_fd().try_clone_to_owned()?, self.read_only.as_fd().try_clone_to_owned()?])
    }
}

/// How the fleeces of a session are kept from running full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// The worst case is reserved: nothing to watch.
    Reserved,
    /// The fleeces together may take this many bytes; the session is given up before.
    Watched {
        /// Bytes.
        limit: u64,
    },
}

/// Decides how to keep fleeces of disks with these sizes within `available` bytes of space and the user's `limit`.
/// `None` when there is no space worth beginning with.
pub fn budget(disk_sizes: &[u64], available: u64, limit: Option<u64>) -> Option<Budget> {
    let usable = available.saturating_sub((available / 10).max(HEADROOM_MIN)).min(limit.unwrap_or(u64::MAX));
    let worst: u64 = disk_sizes.iter().map(|size| worst_case(*size)).fold(0, u64::saturating_add);
    if worst <= usable {
        Some(Budget::Reserved)
    } else {
        // Under 16 MiB the first poll would come too late.
        (usable >= 16 << 20).then_some(Budget::Watched { limit: usable })
    }
}

/// The most that the fleece of a disk of this size can take, in bytes.
pub(super) fn worst_case(disk_size: u64) -> u64 {
    disk_size.saturating_add(disk_size / METADATA_SHARE).saturating_add(2 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_fits_is_reserved_and_what_does_not_is_watched() {
        assert_eq!(budget(&[GIB, GIB], 10 * GIB, None), Some(Budget::Reserved));
        assert_eq!(budget(&[8 * GIB, 8 * GIB], 10 * GIB, None), Some(Budget::Watched { limit: 9 * GIB }));
        assert_eq!(budget(&[GIB], 10 * GIB, Some(GIB / 2)), Some(Budget::Watched { limit: GIB / 2 }));
        assert_eq!(budget(&[GIB], HEADROOM_MIN, None), None);
    }

    #[test]
    fn fleece_files_have_no_name_and_two_kinds_of_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let fleece = FleeceDirectory::open(&directory.path().join("a/b")).unwrap();
        let file = fleece.create_file().unwrap();
        file.reserve(1 << 20).unwrap();
        assert!(file.allocated().unwrap() >= 1 << 20);
        assert_eq!(std::fs::read_dir(fleece.path()).unwrap().count(), 0);
        let [write, read] = file.descriptors().unwrap();
        let mode = |fd: &OwnedFd| fs::fcntl_getfl(fd).unwrap() & OFlags::ACCMODE;
        assert_eq!((mode(&write), mode(&read)), (OFlags::RDWR, OFlags::RDONLY));
    }

    #[test]
    fn the_lock_of_a_vm_is_exclusive() {
        let directory = tempfile::tempdir().unwrap();
        let fleece = FleeceDirectory::open(directory.path()).unwrap();
        let held = fleece.lock("vm").unwrap();
        assert!(held.is_some());
        assert!(fleece.lock("vm").unwrap().is_none());
        assert!(fleece.lock("other").unwrap().is_some());
        drop(held);
        assert!(fleece.lock("vm").unwrap().is_some());
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("open");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(FleeceDirectory::open(&path).is_err());
    }
}
