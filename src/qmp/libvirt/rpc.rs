//! The RPC client on libvirt's Unix socket: many calls at once, each answer finds its call by the serial.

use super::{
    message::{
        Body, Header, KEEPALIVE_PROGRAM, Kind, LibvirtError, Message, PROGRAM_VERSION, QEMU_PROGRAM, REMOTE_PROGRAM,
        body_length, decode_message, encode_message,
    },
    xdr::XdrError,
};
use crate::qmp::QmpError;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::{
    collections::HashMap,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};

/// `KEEPALIVE_PROC_PING` and `…_PONG`. The daemon only pings a client that asked for it, which this one does not; but a
/// ping that nobody answers ends the connection after half a minute, and the answer costs nothing.
const PING: i32 = 1;
const PONG: i32 = 2;
/// Answers to pings that may wait for a daemon that pings and does not read; more pings go unanswered.
const MAX_PONGS: usize = 16;

/// A procedure of one of libvirt's programs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Procedure {
    program: u32,
    number: i32,
    /// What libvirt calls it, for errors.
    pub(super) name: &'static str,
}

impl Procedure {
    /// Of libvirt's public API (`remote_protocol.x`, `enum remote_procedure`).
    pub(super) const fn remote(number: i32, name: &'static str) -> Self {
        Self { program: REMOTE_PROGRAM, number, name }
    }

    /// Of what only QEMU has (`qemu_protocol.x`, `enum qemu_procedure`).
    pub(super) const fn qemu(number: i32, name: &'static str) -> Self {
        Self { program: QEMU_PROGRAM, number, name }
    }
}

/// Why a call has no result.
#[derive(Debug)]
pub(super) enum CallError {
    /// The daemon answered with an error.
    Libvirt(LibvirtError),
    /// There is no answer.
    Transport(QmpError),
}

impl CallError {
    /// For callers to whom libvirt's errors are all the same.
    pub(super) fn into_qmp(self, command: &str) -> QmpError {
        match self {
            Self::Libvirt(error) => error.refused(command),
            Self::Transport(error) => error,
        }
    }
}

type Answer = Result<Vec<u8>, LibvirtError>;

/// A connected socket. Ends with the value.
#[derive(Debug)]
pub(super) struct RpcClient {
    peer: String,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    pending: Arc<Pending>,
    last_serial: AtomicU32,
    reader: JoinHandle<()>,
}

/// One message on its way. It is written by a task of its own: a caller that gives up half-way must not leave half a
/// message on the socket.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    is_pong: bool,
}

/// Who waits for an answer.
#[derive(Debug, Default)]
struct Pending(Mutex<PendingCalls>);

#[derive(Debug, Default)]
struct PendingCalls {
    calls: HashMap<u32, oneshot::Sender<Answer>>,
    /// Answers to pings that are not written yet.
    pongs: usize,
    ended: Option<End>,
}

/// A call that waits for its answer, until it is dropped.
#[derive(Debug)]
struct Waiting<'a> {
    pending: &'a Pending,
    serial: u32,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.pending.lock().calls.remove(&self.serial);
    }
}

/// How a connection ended.
#[derive(Debug, Clone)]
pub(super) enum End {
    Closed,
    Io(io::ErrorKind, String),
    Protocol(String),
}

impl RpcClient {
    /// Connects, within `limit`.
    pub(super) async fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let shown = path.display().to_string();
        let stream = match timeout(limit, UnixStream::connect(path)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(source)) => return Err(QmpError::Connect { path: shown, source }),
            Err(_) => return Err(QmpError::Connect { path: shown, source: io::ErrorKind::TimedOut.into() }),
        };
        Ok(Self::new(stream, shown))
    }

    fn new(stream: UnixStream, peer: String) -> Self {
        let (read_half, write_half) = stream.into_split();
        let (outgoing, queue) = mpsc::unbounded_channel();
        let pending = Arc::new(Pending::default());
        // Both tasks end with the client: the reader is aborted, the writer's queue closes once it is empty. The
        // reader must not keep the queue open, or the writer would never end.
        tokio::spawn(write_all(write_half, queue, Arc::clone(&pending)));
        let reader = tokio::spawn(read_all(read_half, outgoing.downgrade(), Arc::clone(&pending)));
        Self { peer, outgoing, pending, last_serial: AtomicU32::new(0), reader }
    }

    /// The socket's path.
    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// Calls a procedure and returns its result's XDR. The call is on its way when this future is first polled;
    /// dropping it does not take it back.
    pub(super) async fn call(
        &self,
        procedure: Procedure,
        payload: Vec<u8>,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Vec<u8>, CallError> {
        let (_waiting, receiver) = self.send(procedure, &payload, fds)?;
        match timeout(limit, receiver).await {
            Ok(Ok(answer)) => answer.map_err(CallError::Libvirt),
            Ok(Err(_)) => Err(CallError::Transport(self.ended())),
            Err(_) => Err(CallError::Transport(QmpError::Timeout { command: procedure.name.to_owned(), limit })),
        }
    }

    /// Sends a call whose answer nobody waits for.
    pub(super) fn send_and_forget(&self, procedure: Procedure) {
        // It is the connection's last message: if it cannot be sent, the daemon notices the end of the connection.
        let _ = self.send(procedure, &[], Vec::new());
    }

    fn send(
        &self,
        procedure: Procedure,
        payload: &[u8],
        fds: Vec<OwnedFd>,
    ) -> Result<(Waiting<'_>, oneshot::Receiver<Answer>), CallError> {
        let (sender, receiver) = oneshot::channel();
        // Zero is the events' serial. After 2^32 calls a serial comes again; its first call is long over.
        let serial = loop {
            let serial = self.last_serial.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
            if serial != 0 {
                break serial;
            }
        };
        let header = Header {
            program: procedure.program,
            version: PROGRAM_VERSION,
            procedure: procedure.number,
            kind: if fds.is_empty() { Kind::Call } else { Kind::CallWithFds },
            serial,
        };
        let count = u32::try_from(fds.len()).unwrap_or(u32::MAX);
        let bytes = encode_message(header, count, payload).map_err(|error| self.unsendable(procedure, &error))?;
        {
            let mut pending = self.pending.lock();
            if pending.ended.is_some() {
                drop(pending);
                return Err(CallError::Transport(self.ended()));
            }
            pending.calls.insert(serial, sender);
        }
        let waiting = Waiting { pending: &self.pending, serial };
        let message = Outgoing { bytes, fds, is_pong: false };
        self.outgoing.send(message).map_err(|_| CallError::Transport(self.ended()))?;
        Ok((waiting, receiver))
    }

    /// The error for what does not fit into a message. Nothing was sent.
    fn unsendable(&self, procedure: Procedure, error: &XdrError) -> CallError {
        CallError::Libvirt(LibvirtError {
            code: super::message::ERR_RPC,
            domain: 0,
            message: format!("{} for {}: {error}", procedure.name, self.peer),
        })
    }

    fn ended(&self) -> QmpError {
        let peer = self.peer.clone();
        match self.pending.lock().ended.clone() {
            None | Some(End::Closed) => QmpError::Closed { peer },
            Some(End::Io(kind, text)) => QmpError::Io { peer, source: io::Error::new(kind, text) },
            Some(End::Protocol(detail)) => QmpError::Protocol { peer, detail },
        }
    }
}

impl Drop for RpcClient {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, PendingCalls> {
        // The data is plain: a panic elsewhere leaves it usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes everybody who waits. The first reason stays.
    fn end(&self, end: End) {
        let mut pending = self.lock();
        pending.ended.get_or_insert(end);
        pending.calls.clear();
    }

    fn answer(&self, serial: u32, answer: Answer) {
        let Some(sender) = self.lock().calls.remove(&serial) else {
            // Of a call that timed out.
            tracing::debug!(serial, "libvirt answered a call that nobody waits for");
            return;
        };
        // The caller may have given up just now.
        let _ = sender.send(answer);
    }
}

async fn write_all(mut socket: OwnedWriteHalf, mut queue: mpsc::UnboundedReceiver<Outgoing>, pending: Arc<Pending>) {
    while let Some(message) = queue.recv().await {
        let sent = async {
            socket.write_all(&message.bytes).await?;
            for fd in &message.fds {
                send_fd(socket.as_ref(), fd).await?;
            }
            io::Result::Ok(())
        };
        if let Err(error) = sent.await {
            pending.end(End::from(error));
            return;
        }
        if message.is_pong {
            pending.lock().pongs -= 1;
        }
    }
}

/// Sends a descriptor the way libvirt reads it: on one byte of its own after the message (`virNetSocketRecvFD` reads
/// exactly one byte; descriptors on the message itself would be lost, since that is read with plain `read`).
async fn send_fd(socket: &UnixStream, fd: &OwnedFd) -> io::Result<()> {
    socket
        .async_io(Interest::WRITABLE, || {
            let borrowed = [fd.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
            if sent == 1 { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
        })
        .await
}

async fn read_all(mut socket: OwnedReadHalf, outgoing: mpsc::WeakUnboundedSender<Outgoing>, pending: Arc<Pending>) {
    let end = loop {
        let bytes = match read_message(&mut socket).await {
            Ok(bytes) => bytes,
            Err(end) => break end,
        };
        let message = match decode_message(&bytes) {
            Ok(message) => message,
            Err(error) => break End::Protocol(error.to_string()),
        };
        // Read without a buffer for descriptors, the kernel closes what comes along.
        for _ in 0..message.fds {
            if let Err(error) = socket.read_u8().await {
                pending.end(End::from(error));
                return;
            }
        }
        handle(message, &outgoing, &pending);
    };
    pending.end(end);
}

fn handle(message: Message<'_>, outgoing: &mpsc::WeakUnboundedSender<Outgoing>, pending: &Pending) {
    let Message { header, body, .. } = message;
    match header.kind {
        Kind::Reply | Kind::ReplyWithFds => pending.answer(
            header.serial,
            match body {
                Body::Payload(payload) => Ok(payload.to_vec()),
                Body::Error(error) => Err(error),
            },
        ),
        Kind::Event if header.program == KEEPALIVE_PROGRAM && header.procedure == PING => {
            let pong = encode_message(Header { procedure: PONG, ..header }, 0, &[]);
            let mut pending = pending.lock();
            if let (Ok(bytes), Some(outgoing), true) = (pong, outgoing.upgrade(), pending.pongs < MAX_PONGS) {
                pending.pongs += 1;
                // A writer that has ended has told everybody.
                let _ = outgoing.send(Outgoing { bytes, fds: Vec::new(), is_pong: true });
            }
        }
        // Events that this client did not ask for; streams that it did not open; calls, which only it may make.
        _ => tracing::debug!(?header, "libvirt sent a message that nobody asked for"),
    }
}

/// Reads one whole message. Its memory grows with what arrives, not with what the length word says.
pub(super) async fn read_message(socket: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, End> {
    let mut word = [0; 4];
    socket.read_exact(&mut word).await?;
    let length = body_length(word).map_err(|error| End::Protocol(error.to_string()))?;
    let mut bytes = word.to_vec();
    let limit = u64::try_from(length).unwrap_or(u64::MAX);
    let read = socket.take(limit).read_to_end(&mut bytes).await?;
    if read < length { Err(End::Closed) } else { Ok(bytes) }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match error.kind() {
            // A daemon that is killed resets the connection when it had something left to read.
            UnexpectedEof | ConnectionReset | BrokenPipe => Self::Closed,
            kind => Self::Io(kind, error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROCEDURE: Procedure = Procedure::remote(5, "virTest");
    const LIMIT: Duration = Duration::from_secs(5);

    fn pair() -> (RpcClient, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (RpcClient::new(ours, "test".into()), theirs)
    }

    async fn receive(socket: &mut UnixStream) -> (Header, Vec<u8>) {
        let mut word = [0; 4];
        socket.read_exact(&mut word).await.unwrap();
        let mut bytes = word.to_vec();
        bytes.resize(body_length(word).unwrap() + 4, 0);
        socket.read_exact(&mut bytes[4..]).await.unwrap();
        let message = decode_message(&bytes).unwrap();
        let Body::Payload(payload) = message.body else { panic!("an error") };
        (message.header, payload.to_vec())
    }

    async fn send(socket: &mut UnixStream, header: Header, payload: &[u8]) {
        socket.write_all(&encode_message(header, 0, payload).unwrap()).await.unwrap();
    }

    #[tokio::test]
    async fn answers_find_their_calls_in_any_order() {
        let (client, mut daemon) = pair();
        let daemon = async {
            let (first, one) = receive(&mut daemon).await;
            let (second, two) = receive(&mut daemon).await;
            send(&mut daemon, Header { kind: Kind::Reply, serial: 999, ..first }, b"none").await;
            send(&mut daemon, Header { kind: Kind::Reply, ..second }, &two).await;
            send(&mut daemon, Header { kind: Kind::Reply, ..first }, &one).await;
        };
        let one = client.call(PROCEDURE, b"1111".to_vec(), Vec::new(), LIMIT);
        let two = client.call(PROCEDURE, b"2222".to_vec(), Vec::new(), LIMIT);
        let (one, two, ()) = tokio::join!(one, two, daemon);
        assert_eq!((one.unwrap(), two.unwrap()), (b"1111".to_vec(), b"2222".to_vec()));
    }

    #[tokio::test]
    async fn a_ping_is_answered_and_an_event_is_not() {
        let (_client, mut daemon) = pair();
        let event = Header { program: REMOTE_PROGRAM, version: 1, procedure: 107, kind: Kind::Event, serial: 0 };
        let ping = Header { program: KEEPALIVE_PROGRAM, procedure: PING, ..event };
        send(&mut daemon, event, b"an event").await;
        send(&mut daemon, ping, &[]).await;
        assert_eq!(receive(&mut daemon).await, (Header { procedure: PONG, ..ping }, Vec::new()));
    }

    #[tokio::test]
    async fn a_daemon_that_pings_and_does_not_read_costs_no_memory() {
        let (client, mut daemon) = pair();
        let header = Header { program: KEEPALIVE_PROGRAM, version: 1, procedure: PING, kind: Kind::Event, serial: 0 };
        // Far more answers than the socket's buffers hold.
        for _ in 0..200_000 {
            send(&mut daemon, header, &[]).await;
        }
        // What was sent before is handled once the call behind it is answered.
        let call = client.call(PROCEDURE, Vec::new(), Vec::new(), LIMIT);
        let answer = Header { program: REMOTE_PROGRAM, kind: Kind::Reply, serial: 1, ..header };
        let (answer, ()) = tokio::join!(call, send(&mut daemon, answer, b"good"));
        assert_eq!(answer.unwrap(), b"good");
        assert_eq!(client.pending.lock().pongs, MAX_PONGS);
    }

    #[tokio::test]
    async fn a_call_that_is_dropped_waits_no_longer() {
        let (client, _daemon) = pair();
        let call = client.call(PROCEDURE, Vec::new(), Vec::new(), LIMIT);
        assert!(futures::FutureExt::now_or_never(call).is_none());
        client.send_and_forget(PROCEDURE);
        assert!(client.pending.lock().calls.is_empty());
    }

    #[tokio::test]
    async fn the_end_of_the_connection_wakes_who_waits_and_refuses_who_comes() {
        let (client, daemon) = pair();
        let call = client.call(PROCEDURE, Vec::new(), Vec::new(), LIMIT);
        let (answer, ()) = tokio::join!(call, async { drop(daemon) });
        for answer in [answer, client.call(PROCEDURE, Vec::new(), Vec::new(), LIMIT).await] {
            assert!(matches!(answer, Err(CallError::Transport(QmpError::Closed { .. }))), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn a_daemon_that_breaks_the_protocol_is_named() {
        let (client, mut daemon) = pair();
        daemon.write_all(&[0xff; 64]).await.unwrap();
        let answer = client.call(PROCEDURE, Vec::new(), Vec::new(), LIMIT).await;
        assert!(matches!(answer, Err(CallError::Transport(QmpError::Protocol { .. }))), "{answer:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_daemon_is_a_timeout_and_the_late_answer_harms_nobody() {
        let (client, mut daemon) = pair();
        let answer = client.call(PROCEDURE, Vec::new(), Vec::new(), LIMIT).await;
        assert!(matches!(answer, Err(CallError::Transport(QmpError::Timeout { .. }))), "{answer:?}");
        let (late, _) = receive(&mut daemon).await;
        send(&mut daemon, Header { kind: Kind::Reply, ..late }, b"late").await;
        let daemon = async {
            let (header, _) = receive(&mut daemon).await;
            send(&mut daemon, Header { kind: Kind::Reply, ..header }, b"good").await;
        };
        let (answer, ()) = tokio::join!(client.call(PROCEDURE, Vec::new(), Vec::new(), LIMIT), daemon);
        assert_eq!(answer.unwrap(), b"good");
    }

    #[tokio::test]
    async fn a_client_that_goes_says_everything_it_had_to_say() {
        let (client, mut daemon) = pair();
        client.send_and_forget(PROCEDURE);
        drop(client);
        assert_eq!(receive(&mut daemon).await.0.procedure, 5);
        assert_eq!(daemon.read(&mut [0]).await.unwrap(), 0);
    }
}
