//! The directory behind a FUSE file system: inodes, open files and their attributes.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileHandle, FileType, INodeNo, ReplyDirectory, TimeOrNow};
use rustix::fs::{AtFlags, Dir, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;

/// What the kernel knows of a directory.
#[derive(Debug)]
pub(super) struct Backing {
    /// Inodes that the kernel knows.
    inodes: Mutex<HashMap<u64, Inode>>,
    /// Open files.
    files: Mutex<HashMap<u64, Arc<OpenFile>>>,
    /// Handle of the next one.
    next: AtomicU64,
}

/// An inode that the kernel knows. Its number is that of the backing file, which the descriptor keeps from reuse.
#[derive(Debug)]
struct Inode {
    /// `O_PATH` descriptor: follows renames, survives unlinking.
    path: Arc<OwnedFd>,
    /// Look-ups that the kernel has not forgotten yet.
    lookups: u64,
}

/// An open file.
#[derive(Debug)]
pub(super) struct OpenFile {
    /// The backing file.
    pub(super) file: File,
    /// Name when it was opened, for faults by name.
    pub(super) name: String,
}

impl Backing {
    /// Serves this directory.
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        let root = rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let inodes = HashMap::from([(INodeNo::ROOT.0, Inode { path: Arc::new(root), lookups: 1 })]);
        Ok(Self { inodes: Mutex::new(inodes), files: Mutex::default(), next: AtomicU64::new(1) })
    }

    /// The inodes, whatever panicked elsewhere.
    fn inodes(&self) -> MutexGuard<'_, HashMap<u64, Inode>> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open files, whatever panicked elsewhere.
    fn files(&self) -> MutexGuard<'_, HashMap<u64, Arc<OpenFile>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The descriptor of an inode.
    pub(super) fn inode(&self, ino: INodeNo) -> Result<Arc<OwnedFd>, Errno> {
        self.inodes().get(&ino.0).map(|inode| inode.path.clone()).ok_or(Errno::STALE)
    }

    /// An open file.
    pub(super) fn file(&self, handle: FileHandle) -> Result<Arc<OpenFile>, Errno> {
        self.files().get(&handle.0).cloned().ok_or(Errno::BADF)
    }

    /// Looks a name up; the kernel remembers the inode from then on.
    pub(super) fn enter(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = rustix::fs::openat(&*self.inode(parent)?, name, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&path)?;
        let mut inodes = self.inodes();
        inodes.entry(stat.st_ino).or_insert_with(|| Inode { path: Arc::new(path), lookups: 0 }).lookups += 1;
        Ok(attributes(&stat, INodeNo(stat.st_ino)))
    }

    /// Attributes of an inode.
    pub(super) fn attributes(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        Ok(attributes(&rustix::fs::fstat(&*self.inode(ino)?)?, ino))
    }

    /// Opens the file behind an inode.
    pub(super) fn reopen(&self, ino: INodeNo, flags: OFlags) -> Result<File, Errno> {
        let link = format!("/proc/self/fd/{}", self.inode(ino)?.as_raw_fd());
        Ok(rustix::fs::open(link, backing_flags(flags), Mode::empty())?.into())
    }

    /// Remembers an open file.
    pub(super) fn remember(&self, file: File) -> FileHandle {
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = std::fs::read_link(link).unwrap_or_default();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.files().insert(handle, Arc::new(OpenFile { file, name }));
        FileHandle(handle)
    }

    /// Closes an open file.
    pub(super) fn close(&self, handle: FileHandle) {
        self.files().remove(&handle.0);
    }

    /// Drops look-ups of an inode; the root stays.
    pub(super) fn forget(&self, ino: INodeNo, lookups: u64) {
        let mut inodes = self.inodes();
        if let Some(inode) = inodes.get_mut(&ino.0).filter(|_| ino != INodeNo::ROOT) {
            inode.lookups = inode.lookups.saturating_sub(lookups);
            if inode.lookups == 0 {
                inodes.remove(&ino.0);
            }
        }
    }

    /// Changes what `setattr` may change.
    pub(super) fn change(&self, ino: INodeNo, change: &Change) -> Result<FileAttr, Errno> {
        let inode = self.inode(ino)?;
        let link = format!("/proc/self/fd/{}", inode.as_raw_fd());
        if let Some(mode) = change.mode {
            rustix::fs::chmod(&link, Mode::from_raw_mode(mode))?;
        }
        if change.uid.is_some() || change.gid.is_some() {
            rustix::fs::chown(&link, change.uid.map(Uid::from_raw), change.gid.map(Gid::from_raw))?;
        }
        if let Some(size) = change.size {
            self.reopen(ino, OFlags::WRONLY)?.set_len(size).map_err(|error| raw(&error))?;
        }
        if change.atime.is_some() || change.mtime.is_some() {
            let times = Timestamps {
                last_access: timespec(change.atime, rustix::fs::UTIME_OMIT),
                last_modification: timespec(change.mtime, rustix::fs::UTIME_OMIT),
            };
            rustix::fs::utimensat(rustix::fs::CWD, &link, &times, AtFlags::empty())?;
        }
        self.attributes(ino)
    }

    /// Fills a directory listing from an offset.
    pub(super) fn list(&self, ino: INodeNo, offset: u64, reply: &mut ReplyDirectory) -> Result<(), Errno> {
        let directory = self.reopen(ino, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let entries = Dir::read_from(&directory)?.skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for (entry, next) in entries.zip(offset + 1..) {
            let entry = entry?;
            let kind = match entry.file_type() {
                rustix::fs::FileType::Directory => FileType::Directory,
                rustix::fs::FileType::Symlink => FileType::Symlink,
                _ => FileType::RegularFile,
            };
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if reply.add(INodeNo(entry.ino()), next, kind, name) {
                break;
            }
        }
        Ok(())
    }
}

/// What `setattr` asks for.
#[derive(Debug)]
pub(super) struct Change {
    /// Permissions.
    pub(super) mode: Option<u32>,
    /// Owner.
    pub(super) uid: Option<u32>,
    /// Group.
    pub(super) gid: Option<u32>,
    /// Length.
    pub(super) size: Option<u64>,
    /// Time of the last access.
    pub(super) atime: Option<TimeOrNow>,
    /// Time of the last change.
    pub(super) mtime: Option<TimeOrNow>,
}

/// A time as the kernel takes it.
fn timespec(time: Option<TimeOrNow>, otherwise: rustix::fs::Nsecs) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: otherwise },
        Some(TimeOrNow::Now) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
        Some(TimeOrNow::SpecificTime(time)) => {
            let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            Timespec::try_from(since).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 })
        }
    }
}

/// A time as fuser takes it.
fn time(seconds: i64, nanoseconds: u64) -> SystemTime {
    let since = Duration::from_secs(seconds.unsigned_abs()) + Duration::from_nanos(nanoseconds);
    UNIX_EPOCH + since
}

/// Attributes as fuser takes them.
fn attributes(stat: &Stat, ino: INodeNo) -> FileAttr {
    let kind = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::Directory => FileType::Directory,
        rustix::fs::FileType::Symlink => FileType::Symlink,
        _ => FileType::RegularFile,
    };
    FileAttr {
        ino,
        size: stat.st_size.unsigned_abs(),
        blocks: stat.st_blocks.unsigned_abs(),
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        crtime: UNIX_EPOCH,
        kind,
        perm: (stat.st_mode & 0o7777) as u16,
        nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Flags for the backing file: the kernel has followed, created and aligned already.
pub(super) fn backing_flags(flags: OFlags) -> OFlags {
    let done = OFlags::NOFOLLOW | OFlags::CREATE | OFlags::EXCL | OFlags::DIRECT | OFlags::APPEND;
    (flags - done) | OFlags::CLOEXEC
}

/// The number of an I/O error.
pub(super) fn raw(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
