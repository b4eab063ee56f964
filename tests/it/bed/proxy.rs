//! A QMP proxy that refuses block drivers as an allow-list does, so that an old QEMU stands for an old KubeVirt's: no
//! filter drivers and no `on-cbw-error`. No flavour of the bed has both.

use std::io::{BufRead as _, BufReader, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Drivers that CentOS Stream's QEMU does not have.
const REFUSED: [&str; 2] = ["copy-before-write", "snapshot-access"];

/// The proxy; its threads end with the test's process.
#[derive(Debug)]
pub(crate) struct QmpProxy {
    /// Holds the socket.
    directory: TempDir,
    /// How often a driver was refused.
    refusals: Arc<AtomicUsize>,
}

impl QmpProxy {
    /// Stands before this QMP socket.
    pub(crate) fn start(upstream: &Path) -> Self {
        let directory = tempfile::Builder::new().prefix("vf-proxy-").tempdir_in("/tmp").expect("a directory");
        let listener = UnixListener::bind(directory.path().join("qmp")).expect("a socket");
        let refusals = Arc::new(AtomicUsize::new(0));
        let (upstream, counter) = (upstream.to_owned(), Arc::clone(&refusals));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a connection");
                // A QEMU that is gone hangs up on the client too.
                let Ok(qemu) = UnixStream::connect(&upstream) else { continue };
                relay(client, qemu, Arc::clone(&counter));
            }
        });
        Self { directory, refusals }
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// How often a driver was refused.
    pub(crate) fn refusals(&self) -> usize {
        self.refusals.load(Ordering::SeqCst)
    }
}

/// Serves one client. Answers go back by lines, because refusals come between them.
fn relay(client: UnixStream, qemu: UnixStream, refusals: Arc<AtomicUsize>) {
    let answers = Arc::new(Mutex::new(client.try_clone().expect("a second descriptor")));
    let from_qemu = BufReader::new(qemu.try_clone().expect("a second descriptor"));
    let back = Arc::clone(&answers);
    std::thread::spawn(move || {
        for line in from_qemu.split(b'\n') {
            let Ok(mut line) = line else { break };
            line.push(b'\n');
            if back.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line).is_err() {
                break;
            }
        }
        back.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Both).ok();
    });
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        while let Some((bytes, mut fds)) = receive(&client) {
            rest.extend(bytes);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                if let Some(refusal) = refusal(&line) {
                    refusals.fetch_add(1, Ordering::SeqCst);
                    answers.lock().unwrap_or_else(PoisonError::into_inner).write_all(&refusal).ok();
                } else if !forward(&qemu, &line, &std::mem::take(&mut fds)) {
                    return;
                }
            }
        }
        qemu.shutdown(Shutdown::Both).ok();
    });
}

/// The answer to a command that is not to reach QEMU.
fn refusal(line: &[u8]) -> Option<Vec<u8>> {
    let command: Value = serde_json::from_slice(line).ok()?;
    let driver = command["arguments"]["driver"].as_str()?;
    if command["execute"] != "blockdev-add" || !REFUSED.contains(&driver) {
        return None;
    }
    let description = format!("Driver '{driver}' is not whitelisted");
    let mut answer = json!({"error": {"class": "GenericError", "desc": description}});
    if let Some(id) = command.get("id") {
        answer["id"] = id.clone();
    }
    let mut answer = answer.to_string().into_bytes();
    answer.push(b'\n');
    Some(answer)
}

/// Some bytes and the descriptors that came with them; `None` at the end.
fn receive(client: &UnixStream) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; 64 << 10];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(client, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let descriptors = descriptors.flatten().collect();
    bytes.truncate(received.bytes);
    (!bytes.is_empty()).then_some((bytes, descriptors))
}

/// Sends a line with its descriptors; `false` when QEMU has hung up.
fn forward(mut qemu: &UnixStream, line: &[u8], fds: &[OwnedFd]) -> bool {
    let borrowed: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)), "too many descriptors");
    }
    match sendmsg(qemu, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL) {
        Ok(sent) => qemu.write_all(&line[sent..]).is_ok(),
        Err(_) => false,
    }
}
