//! The monitor behind a Unix socket (`-qmp unix:…`).

use super::{ErrorClass, Monitor, QmpError, codec::LineDecoder};
use crate::reason::printable;
use futures::{FutureExt, future::BoxFuture};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    io::{self, IoSlice},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::{broadcast, oneshot},
    task::JoinHandle,
    time::timeout,
};

/// Events that wait for a slow listener; more are dropped (a drain flips job states by the hundred).
const EVENT_QUEUE: usize = 256;
/// Memory of one event, in bytes; a heavier one is dropped, since so many can wait. Real ones have less than 8 KiB.
const MAX_EVENT: usize = 64 << 10;

/// Time limits of a connection.
#[derive(Debug, Clone, Copy)]
pub struct TimeLimits {
    /// For the greeting. A monitor that somebody else holds accepts the connection and stays silent.
    pub greeting: Duration,
    /// For the answer to one command.
    pub command: Duration,
}

impl Default for TimeLimits {
    fn default() -> Self {
        Self { greeting: Duration::from_secs(5), command: Duration::from_secs(60) }
    }
}

type Answer = Result<Value, Refusal>;

/// QEMU's `error` member.
#[derive(Debug)]
struct Refusal {
    class: ErrorClass,
    description: String,
}

/// A connected QMP socket. One client at a time: QEMU serves the next when this one is dropped.
#[derive(Debug)]
pub struct UnixMonitor {
    path: String,
    stream: Arc<UnixStream>,
    shared: Arc<Shared>,
    limits: TimeLimits,
    sending: tokio::sync::Mutex<()>,
    next_id: AtomicU64,
    reader: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    /// Who waits for which id; `None` once the connection has ended, with the reason beside it.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
    protocol_error: Mutex<Option<String>>,
    /// `None` once the connection has ended: that is how listeners learn of it.
    events: Mutex<Option<broadcast::Sender<Value>>>,
}

impl Shared {
    /// Wakes everybody who waits. The first reason stays.
    fn end(&self, protocol_error: Option<String>) {
        if let Some(detail) = protocol_error {
            lock(&self.protocol_error).get_or_insert(detail);
        }
        lock(&self.waiting).take();
        lock(&self.events).take();
    }
}

/// A call that waits for its answer, until it is dropped.
#[derive(Debug)]
struct Waiting<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = lock(&self.shared.waiting).as_mut() {
            waiting.remove(&self.id);
        }
    }
}

impl UnixMonitor {
    /// Connects, reads the greeting and negotiates.
    pub async fn connect(path: &Path, limits: TimeLimits) -> Result<Self, QmpError> {
        let shown = path.display().to_string();
        let stream = dial(path, limits.greeting).await.map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => QmpError::Occupied { path: shown.clone() },
            _ => QmpError::Connect { path: shown.clone(), source },
        })?;
        let mut decoder = LineDecoder::default();
        let greeting = match timeout(limits.greeting, read_message(&stream, &mut decoder)).await {
            Err(_) => return Err(QmpError::Occupied { path: shown }),
            Ok(Err(error)) => return Err(error.into_qmp(&shown)),
            Ok(Ok(greeting)) => greeting,
        };
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Protocol { peer: shown, detail: "no QMP greeting".into() });
        }
        let stream = Arc::new(stream);
        let shared = Arc::new(Shared {
            waiting: Mutex::new(Some(HashMap::new())),
            protocol_error: Mutex::new(None),
            events: Mutex::new(Some(broadcast::channel(EVENT_QUEUE).0)),
        });
        let reader = tokio::spawn(read_all(Arc::clone(&stream), Arc::clone(&shared), decoder));
        let monitor = Self {
            path: shown,
            stream,
            shared,
            limits,
            sending: tokio::sync::Mutex::new(()),
            next_id: AtomicU64::new(1),
            reader,
        };
        monitor.call(json!({"execute": "qmp_capabilities"}), Vec::new()).await?;
        Ok(monitor)
    }

    /// QEMU's events from now on. A listener that lags loses the oldest, and sees the end of the connection.
    pub fn events(&self) -> broadcast::Receiver<Value> {
        let events = lock(&self.shared.events);
        // Without a sender a receiver is closed from the start.
        events.as_ref().map_or_else(|| broadcast::channel(1).1, broadcast::Sender::subscribe)
    }

    /// A duplicate of the connection's descriptor, for a guardian that continues the guest when this process dies:
    /// QEMU serves one client per monitor, so the guardian has to speak on the same connection.
    pub fn duplicate_fd(&self) -> io::Result<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned()
    }

    async fn send_and_wait(&self, mut command: Value, fds: Vec<OwnedFd>) -> Result<Value, QmpError> {
        let name = command["execute"].as_str().unwrap_or_default().to_owned();
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        command["id"] = id.into();
        let mut line = command.to_string().into_bytes();
        line.push(b'\n');
        let (sender, receiver) = oneshot::channel();
        match lock(&self.shared.waiting).as_mut() {
            Some(waiting) => waiting.insert(id, sender),
            None => return Err(self.ended()),
        };
        let _waiting = Waiting { shared: &self.shared, id };
        let sent = async {
            let _guard = self.sending.lock().await;
            Sending { shared: &self.shared, line: &line, sent: 0 }.run(&self.stream, &fds).await
        };
        let exchange = async {
            sent.await.map_err(|source| QmpError::Io { peer: self.path.clone(), source })?;
            receiver.await.map_err(|_| self.ended())
        };
        match timeout(self.limits.command, exchange).await {
            Err(_) => Err(QmpError::Timeout { command: name, limit: self.limits.command }),
            Ok(Err(error)) => Err(error),
            Ok(Ok(Err(refusal))) => {
                Err(QmpError::Refused { command: name, class: refusal.class, description: refusal.description })
            }
            Ok(Ok(Ok(value))) => Ok(value),
        }
    }

    fn ended(&self) -> QmpError {
        match lock(&self.shared.protocol_error).clone() {
            Some(detail) => QmpError::Protocol { peer: self.path.clone(), detail },
            None => QmpError::Closed { peer: self.path.clone() },
        }
    }
}

impl Monitor for UnixMonitor {
    fn call(&self, command: Value, fds: Vec<OwnedFd>) -> BoxFuture<'_, Result<Value, QmpError>> {
        self.send_and_wait(command, fds).boxed()
    }

    fn peer(&self) -> String {
        self.path.clone()
    }
}

impl Drop for UnixMonitor {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Connects; while the listener's backlog is full (Linux answers `EAGAIN` at once), tries again until the limit.
async fn dial(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            result => return result,
        }
    }
}

/// A line on its way.
#[derive(Debug)]
struct Sending<'a> {
    shared: &'a Shared,
    line: &'a [u8],
    sent: usize,
}

impl Sending<'_> {
    /// Sends the whole line, the descriptors with its first byte. In one `sendmsg` as a rule, so that a guardian with a
    /// duplicate of the socket cannot cut a line in two.
    async fn run(&mut self, stream: &UnixStream, fds: &[OwnedFd]) -> io::Result<()> {
        while self.sent < self.line.len() {
            stream.writable().await?;
            let result = stream.try_io(Interest::WRITABLE, || {
                let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if self.sent == 0 && !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than 8 descriptors"));
                }
                let rest = IoSlice::new(&self.line[self.sent..]);
                rustix::net::sendmsg(stream, &[rest], &mut control, SendFlags::NOSIGNAL).map_err(Into::into)
            });
            match result {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        // Its caller gave up half-way: the next line would be glued to the half one.
        if (1..self.line.len()).contains(&self.sent) {
            self.shared.end(Some("it did not read a command to its end".into()));
        }
    }
}

enum ReadError {
    Closed,
    Io(io::Error),
    Protocol(String),
}

impl ReadError {
    fn into_qmp(self, peer: &str) -> QmpError {
        let peer = peer.to_owned();
        match self {
            Self::Closed => QmpError::Closed { peer },
            Self::Io(source) => QmpError::Io { peer, source },
            Self::Protocol(detail) => QmpError::Protocol { peer, detail },
        }
    }
}

async fn read_message(stream: &UnixStream, decoder: &mut LineDecoder) -> Result<Value, ReadError> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        if let Some(message) = decoder.next_message().map_err(|error| ReadError::Protocol(error.to_string()))? {
            return Ok(message);
        }
        stream.readable().await.map_err(ReadError::Io)?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Err(ReadError::Closed),
            Ok(count) => decoder.push(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(ReadError::Io(error)),
        }
    }
}

async fn read_all(stream: Arc<UnixStream>, shared: Arc<Shared>, mut decoder: LineDecoder) {
    loop {
        let error = match read_message(&stream, &mut decoder).await {
            Ok(message) if message.get("event").is_some() => {
                publish(&shared, message, decoder.weight());
                continue;
            }
            Ok(message) => match deliver(&shared, message) {
                Ok(()) => continue,
                Err(error) => error,
            },
            Err(error) => error,
        };
        shared.end(if let ReadError::Protocol(detail) = error { Some(detail) } else { None });
        return;
    }
}

fn publish(shared: &Shared, event: Value, weight: usize) {
    if weight > MAX_EVENT {
        tracing::debug!(weight, "an event of the monitor is too large to keep");
    } else if let Some(events) = lock(&shared.events).as_ref() {
        // No listener is no error.
        let _ = events.send(event);
    }
}

fn deliver(shared: &Shared, mut message: Value) -> Result<(), ReadError> {
    let sender = message.get("id").and_then(Value::as_u64).and_then(|id| lock(&shared.waiting).as_mut()?.remove(&id));
    let Some(sender) = sender else {
        // The answer to a command that timed out, or to a guardian's.
        tracing::debug!("monitor answered nobody's command");
        return Ok(());
    };
    let refused = message.get("error").map(refusal);
    let answer = match (refused, message.get_mut("return")) {
        (Some(refusal), _) => Err(refusal),
        (None, Some(value)) => Ok(value.take()),
        (None, None) => return Err(ReadError::Protocol("an answer without return and without error".into())),
    };
    let _ = sender.send(answer);
    Ok(())
}

fn refusal(error: &Value) -> Refusal {
    let text = |key: &str| printable(error.get(key).and_then(Value::as_str).unwrap_or("(no text)"), 2000);
    Refusal { class: ErrorClass::from_wire(&text("class")), description: text("desc") }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The data is plain: a panic elsewhere leaves it usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
        net::UnixListener,
    };

    #[tokio::test]
    async fn a_call_that_is_dropped_waits_no_longer_and_its_answer_harms_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let mut stream = BufReader::new(listener.accept().await.unwrap().0);
            stream.write_all(b"{\"QMP\": {}}\n").await.unwrap();
            let mut line = String::new();
            while stream.read_line(&mut line).await.unwrap() > 0 {
                let request: Value = serde_json::from_str(&line).unwrap();
                line.clear();
                // The dropped one is answered along with the next.
                if request["execute"] != "dropped" {
                    for id in 1..=request["id"].as_u64().unwrap() {
                        stream.write_all(format!("{{\"return\": {id}, \"id\": {id}}}\n").as_bytes()).await.unwrap();
                    }
                }
            }
        });
        let monitor = UnixMonitor::connect(&path, TimeLimits::default()).await.unwrap();
        for _ in 0..10 {
            let mut call = monitor.call(json!({"execute": "dropped"}), Vec::new());
            assert!(futures::poll!(&mut call).is_pending());
            assert_eq!(lock(&monitor.shared.waiting).as_ref().unwrap().len(), 1);
            drop(call);
            assert!(lock(&monitor.shared.waiting).as_ref().unwrap().is_empty());
        }
        assert_eq!(monitor.call(json!({"execute": "next"}), Vec::new()).await.unwrap(), 12);
        drop(monitor);
        server.await.unwrap();
    }
}
