//! A second process that releases the guest if this one dies while the guest is frozen or stopped.
//!
//! It is started before the freeze and holds duplicates of the connections to the monitor and the guest agent, since
//! both serve one client at a time. It learns by one byte what has begun or ended, and acts when its pipe closes (the
//! session was killed) or when the time is up (the session hangs): it thaws, and lets the CPUs run.

use crate::{
    guest_agent::{GuestAgent, LibvirtAgent},
    qmp::{
        Qmp, TimeLimits,
        command::Cont,
        libvirt::{LibvirtConnection, LibvirtMonitor},
    },
};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

/// After this time frozen or stopped, the guest is released whatever the session does.
const LIMIT: Duration = Duration::from_secs(30);
/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// The hidden subcommand.
pub const SUBCOMMAND: &str = "guardian";
/// Sent on the agent's connection. 0xff: the agent's parser forgets a command that was cut off.
const THAW: &[u8] = b"\xff{\"execute\":\"guest-fsfreeze-thaw\"}\n";
/// Sent on the monitor's connection. The line end ends a command that was cut off.
const CONT: &[u8] = b"\n{\"execute\":\"cont\",\"id\":\"guardian\"}\n";

/// The ways to a VM's monitor and guest agent.
#[derive(Debug, Default)]
pub struct Ways {
    /// A duplicate of the connection to a QMP socket.
    pub monitor: Option<OwnedFd>,
    /// A duplicate of the connection to a guest agent's socket.
    pub agent: Option<OwnedFd>,
    /// libvirt's socket and the domain's UUID. libvirt takes any number of clients.
    pub libvirt: Option<(PathBuf, String)>,
}

/// The guardian of one session. Dropping it ends it; it acts then if anything is still watched.
#[derive(Debug)]
pub struct Guardian {
    process: Option<(Child, UnixStream)>,
}

impl Guardian {
    /// Starts it, with the ways to what it has to release.
    pub fn start(ways: Ways) -> io::Result<Self> {
        let Ways { monitor, agent, libvirt } = ways;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let libvirt = libvirt.into_iter().flat_map(|(socket, domain)| [socket.into_os_string(), domain.into()]);
        let child = Command::new(std::env::current_exe()?)
            .arg(SUBCOMMAND)
            .args(libvirt)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let kinds = [monitor.is_some().then_some(b'm'), agent.is_some().then_some(b'a')];
        let kinds: Vec<u8> = kinds.into_iter().flatten().collect();
        let fds: Vec<OwnedFd> = monitor.into_iter().chain(agent).collect();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&borrowed));
        }
        let mut greeting = vec![u8::try_from(kinds.len()).unwrap_or(0)];
        greeting.extend(kinds);
        rustix::net::sendmsg(&ours, &[IoSlice::new(&greeting)], &mut control, SendFlags::NOSIGNAL)?;
        let mut stream = UnixStream::from(ours);
        // It is ready before anything is frozen.
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.read_exact(&mut [0])?;
        Ok(Self { process: Some((child, stream)) })
    }

    /// No guardian: nothing will be frozen or stopped.
    pub fn none() -> Self {
        Self { process: None }
    }

    /// A freeze begins.
    pub fn watch_freeze(&mut self) {
        self.tell(b'F');
    }

    /// The guest was thawed.
    pub fn freeze_ended(&mut self) {
        self.tell(b'f');
    }

    /// The CPUs are about to be stopped.
    pub fn watch_stop(&mut self) {
        self.tell(b'S');
    }

    /// The CPUs run again.
    pub fn stop_ended(&mut self) {
        self.tell(b's');
    }

    fn tell(&mut self, word: u8) {
        if let Some((_, stream)) = &mut self.process
            && let Err(error) = stream.write_all(&[word])
        {
            tracing::warn!(%error, "the guardian process is gone");
        }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if let Some((mut child, stream)) = self.process.take() {
            drop(stream);
            let _ = child.wait();
        }
    }
}

/// What the hidden subcommand does: standard input is the session, the arguments are libvirt's socket and the domain.
pub fn run(libvirt: Option<&(PathBuf, String)>) -> io::Result<()> {
    // A signal to the terminal's process group is for the session; the guardian outlives it.
    let _ = rustix::process::setsid();
    let session = io::stdin().as_fd().try_clone_to_owned()?;
    let (kinds, fds) = receive(&session)?;
    let mut session = UnixStream::from(session);
    let held = libvirt.and_then(|(socket, _)| hold(socket));
    session.write_all(b"r")?;
    let connection = |kind| kinds.iter().position(|k| *k == kind).and_then(|at| fds.get(at));
    let (mut frozen, mut stopped) = (false, false);
    loop {
        session.set_read_timeout((frozen || stopped).then_some(LIMIT))?;
        let mut word = [0];
        match session.read(&mut word) {
            Ok(1) => match word[0] {
                b'F' => frozen = true,
                b'f' => frozen = false,
                b'S' => stopped = true,
                b's' => stopped = false,
                _ => {}
            },
            // The session ended, or the time is up.
            ended => {
                if frozen {
                    send(connection(b'a'), THAW, b"return");
                }
                if stopped {
                    send(connection(b'm'), CONT, b"guardian");
                }
                if let Some((socket, domain)) = libvirt
                    && (frozen || stopped)
                {
                    // The daemon may have been restarted, with another socket in the old place.
                    let by_held = held.as_ref().map(|(_, path)| release_through_libvirt(path, domain, frozen, stopped));
                    if by_held.is_none_or(|released| released.is_err()) {
                        release_through_libvirt(socket, domain, frozen, stopped)?;
                    }
                }
                let time_is_up = matches!(&ended, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
                if !time_is_up {
                    return Ok(());
                }
                (frozen, stopped) = (false, false);
            }
        }
    }
}

/// Holds the socket's inode: its path may be one of the session's process, and ends with it.
fn hold(socket: &Path) -> Option<(OwnedFd, PathBuf)> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let held = rustix::fs::open(socket, flags, rustix::fs::Mode::empty()).ok()?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held)));
    Some((held, path))
}

fn release_through_libvirt(socket: &Path, domain: &str, frozen: bool, stopped: bool) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let connection = LibvirtConnection::connect(socket, TimeLimits::default()).await.map_err(io::Error::other)?;
        let uuid = domain.parse().map_err(io::Error::other)?;
        let domain = connection.domain_by_uuid(uuid).await.map_err(io::Error::other)?;
        let monitor = LibvirtMonitor::open(Arc::new(connection), &domain).await.map_err(io::Error::other)?;
        let monitor = Arc::new(monitor);
        if stopped {
            let qmp = Qmp::new(Arc::<LibvirtMonitor>::clone(&monitor));
            qmp.execute(&Cont {}).await.map_err(io::Error::other)?;
        }
        if frozen {
            LibvirtAgent(monitor).thaw(LIMIT).await.map_err(io::Error::other)?;
        }
        Ok(())
    })
}

/// Sends a command and waits for its answer, which holds `answer`: QEMU forgets what it has not read yet when the
/// other side hangs up.
fn send(connection: Option<&OwnedFd>, line: &[u8], answer: &[u8]) {
    let Some(fd) = connection else { return };
    // The session may have left the socket non-blocking; the answer is waited for by poll.
    if rustix::net::send(fd, line, SendFlags::NOSIGNAL).is_err() {
        return;
    }
    let deadline = Instant::now() + ANSWER_LIMIT;
    let mut seen = Vec::new();
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        let timeout = rustix::event::Timespec::try_from(left).ok();
        let mut polled = [PollFd::new(fd, PollFlags::IN)];
        if !matches!(rustix::event::poll(&mut polled, timeout.as_ref()), Ok(ready) if ready > 0) {
            return;
        }
        let mut buffer = [0; 4096];
        match rustix::io::read(fd, &mut buffer) {
            Ok(count) if count > 0 => seen.extend_from_slice(&buffer[..count]),
            _ => return,
        }
        if seen.windows(answer.len()).any(|window| window == answer) || seen.len() > 1 << 20 {
            return;
        }
    }
}

fn receive(session: &OwnedFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut greeting = [0; 3];
    let received =
        rustix::net::recvmsg(session, &mut [IoSliceMut::new(&mut greeting)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    Ok((greeting[1..received.bytes.max(1)].to_vec(), fds))
}
