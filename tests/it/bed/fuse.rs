//! A FUSE file system that passes everything through to a directory, once [`Faults`] lets it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite,
    Request, TimeOrNow, WriteFlags,
};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::backing::{Backing, Change, backing_flags, raw};
use super::faults::Faults;

/// Others change the backing directory behind the kernel's back only in tests that look at it, not through us.
const TTL: Duration = Duration::from_secs(1);

/// The file system.
#[derive(Debug)]
pub(super) struct Passthrough {
    /// What is wrong with it.
    faults: Faults,
    /// What it passes everything to.
    backing: Backing,
}

impl Passthrough {
    /// Serves this directory.
    pub(super) fn new(directory: &Path, faults: Faults) -> io::Result<Self> {
        Ok(Self { faults, backing: Backing::new(directory)? })
    }

    /// Syncs a file or directory, in a thread of its own while that takes its time.
    fn sync(&self, file: io::Result<File>, request: &Request, reply: ReplyEmpty) {
        let (faults, process) = (self.faults.clone(), request.pid());
        let work = move || {
            let synced = faults.admit_sync(process).map_err(io::Error::from).and_then(|()| file?.sync_all());
            answer(synced.map_err(|error| raw(&error)), reply);
        };
        self.run(work);
    }

    /// Runs work, in a thread of its own while it takes its time.
    fn run(&self, work: impl FnOnce() + Send + 'static) {
        if self.faults.slow() {
            std::thread::spawn(work);
        } else {
            work();
        }
    }
}

/// An error as fuser takes it.
fn code(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error.raw_os_error())
}

/// Answers a request that has no content.
fn answer(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(code(error)),
    }
}

/// Answers with an entry.
fn answer_entry(result: Result<FileAttr, Errno>, reply: ReplyEntry) {
    match result {
        Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
        Err(error) => reply.error(code(error)),
    }
}

/// Answers with attributes.
fn answer_attributes(result: Result<FileAttr, Errno>, reply: ReplyAttr) {
    match result {
        Ok(attributes) => reply.attr(&TTL, &attributes),
        Err(error) => reply.error(code(error)),
    }
}

impl Filesystem for Passthrough {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        answer_entry(self.backing.enter(parent, name), reply);
    }

    fn forget(&self, _: &Request, ino: INodeNo, lookups: u64) {
        self.backing.forget(ino, lookups);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer_attributes(self.backing.attributes(ino), reply);
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        answer_attributes(self.backing.change(ino, &Change { mode, uid, gid, size, atime, mtime }), reply);
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let result =
            self.backing.inode(parent).and_then(|fd| rustix::fs::mkdirat(&*fd, name, Mode::from_raw_mode(mode)));
        answer_entry(result.and_then(|()| self.backing.enter(parent, name)), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.backing.inode(parent).and_then(|fd| rustix::fs::unlinkat(&*fd, name, AtFlags::empty()));
        answer(removed, reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.backing.inode(parent).and_then(|fd| rustix::fs::unlinkat(&*fd, name, AtFlags::REMOVEDIR));
        answer(removed, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
        let from = self.backing.inode(parent);
        let renamed = from
            .and_then(|from| rustix::fs::renameat_with(&*from, name, &*self.backing.inode(newparent)?, newname, flags));
        answer(renamed, reply);
    }

    fn link(&self, _: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let linked = self.backing.inode(ino).and_then(|file| {
            let parent = self.backing.inode(newparent)?;
            rustix::fs::linkat(&*file, "", &*parent, newname, rustix::fs::AtFlags::EMPTY_PATH)?;
            self.backing.enter(newparent, newname)
        });
        answer_entry(linked, reply);
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.backing.reopen(ino, OFlags::from_bits_retain(flags.0.cast_unsigned())) {
            Ok(file) => reply.opened(self.backing.remember(file), FopenFlags::empty()),
            Err(error) => reply.error(code(error)),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, flags: i32, reply: ReplyCreate) {
        let asked = OFlags::from_bits_retain(flags.cast_unsigned());
        let flags = backing_flags(asked) | OFlags::CREATE | OFlags::NOFOLLOW | (asked & OFlags::EXCL);
        let opened = self.backing.inode(parent).and_then(|fd| {
            let file = rustix::fs::openat(&*fd, name, flags, Mode::from_raw_mode(mode & 0o7777))?;
            Ok((file, self.backing.enter(parent, name)?))
        });
        match opened {
            Ok((file, attributes)) => {
                let handle = self.backing.remember(file.into());
                reply.created(&TTL, &attributes, Generation(0), handle, FopenFlags::empty());
            }
            Err(error) => reply.error(code(error)),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buffer = vec![0; size as usize];
        let mut filled = 0;
        let file = match self.backing.file(handle) {
            Ok(file) => file,
            Err(error) => return reply.error(code(error)),
        };
        while filled < buffer.len() {
            match file.file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) => return reply.error(code(raw(&error))),
            }
        }
        reply.data(&buffer[..filled]);
    }

    fn write(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (faults, process, file) = (self.faults.clone(), request.pid(), self.backing.file(handle));
        // The kernel's buffer is used again as soon as this returns.
        let data = data.to_vec();
        self.run(move || {
            let written = file.and_then(|file| {
                faults.admit_write(&file.name, data.len() as u64, process)?;
                file.file.write_all_at(&data, offset).map_err(|error| raw(&error))
            });
            match written {
                Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
                Err(error) => reply.error(code(error)),
            }
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.backing.close(handle);
        reply.ok();
    }

    fn fsync(&self, request: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        let file = self.backing.file(handle).map_err(io::Error::from);
        self.sync(file.and_then(|open| open.file.try_clone()), request, reply);
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let directory = self.backing.reopen(ino, OFlags::RDONLY | OFlags::DIRECTORY);
        self.sync(directory.map_err(io::Error::from), request, reply);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        match self.backing.list(ino, offset, &mut reply) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(code(error)),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let stat = self.backing.inode(INodeNo::ROOT).and_then(|root| rustix::fs::fstatvfs(root.as_fd()));
        match stat {
            Ok(stat) => reply.statfs(
                stat.f_blocks,
                stat.f_bfree,
                stat.f_bavail,
                stat.f_files,
                stat.f_ffree,
                u32::try_from(stat.f_bsize).unwrap_or(4096),
                255,
                u32::try_from(stat.f_frsize).unwrap_or(4096),
            ),
            Err(error) => reply.error(code(error)),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let done = self.backing.file(handle).and_then(|open| rustix::fs::fallocate(&open.file, mode, offset, length));
        answer(done, reply);
    }
}
