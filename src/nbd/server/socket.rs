//! The socket of a server: for its own user only, and never taken from a server that lives.

use super::ServeError;
use rustix::{
    fs::{FlockOperation, Mode, flock},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
    process::umask,
};
use std::{
    fs::{self, File},
    io::{Error, ErrorKind},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};
use tokio::net::{UnixListener, UnixStream};

/// A listening Unix socket of mode 0600. Dropping it removes it, unless something else has taken its place.
#[derive(Debug)]
pub struct PrivateSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl PrivateSocket {
    /// Listens at this path. The socket of a dead server is replaced. To be called within the runtime.
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        let failed = |attempt| {
            let path = path.to_owned();
            move |source| ServeError::Socket { attempt, path, source }
        };
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let lock = File::open(directory).map_err(failed("open the directory of"))?;
        // Two servers that find the same dead socket must not remove each other's new one. Where directories cannot be
        // locked, that is all that is lost.
        let _ = flock(&lock, FlockOperation::LockExclusive);
        remove_dead(path)?;
        // The mode counts from the first instant on; a chmod afterwards would come too late. Files that other threads
        // make meanwhile are more private, no less.
        let before = umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        umask(before);
        let listener = bound.map_err(failed("listen on"))?;
        let identity = identity(path).map_err(failed("look at"))?;
        Ok(Self { listener, path: path.to_owned(), identity })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next client.
    pub(super) async fn accept(&self) -> std::io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Removes the socket that a killed server left.
fn remove_dead(path: &Path) -> Result<(), ServeError> {
    let failed = |attempt| move |source: Error| ServeError::Socket { attempt, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(ServeError::NoSocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    match try_connect(path) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed("replace the dead server's")),
        // AGAIN: it lives, and is busy.
        Ok(()) | Err(Errno::AGAIN) => Err(ServeError::InUse { path: path.to_owned() }),
        // Nobody can tell from here that it is dead.
        Err(error) => Err(failed("connect to")(error.into())),
    }
}

/// Without waiting: a server that hangs with a full queue must not make this one hang too.
fn try_connect(path: &Path) -> Result<(), Errno> {
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)
}
