//! NBD server for one read-only export over a Unix socket: fixed newstyle, structured replies, `base:allocation`,
//! several connections.
//!
//! A client is not trusted to keep the protocol: options, requests, and what is outstanding are bounded, and whoever
//! breaks the rules loses the connection. None of it reaches the other clients.

mod handshake;
mod options;
mod reply;
mod socket;
mod transmission;

pub use socket::PrivateSocket;

use crate::extent::{ByteRange, Piece, Run};
use crate::reason::{Reason, Retry};
use std::{future::Future, path::PathBuf, sync::Arc, time::Duration};
use tokio::{net::UnixStream, task::JoinSet};

/// Longest request, in bytes.
pub const MAX_REQUEST: u32 = 32 << 20;
/// Clients at the same time; more wait until one leaves.
const MAX_CONNECTIONS: usize = 64;
/// A client that has not chosen its export by then is sent away: it takes the place of others.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);
/// After an accept that failed, as when descriptors are used up.
const PAUSE: Duration = Duration::from_millis(100);

/// What is served.
pub trait Source: Send + Sync + 'static {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Bytes of the blocks in which reading is cheapest: a power of two, at least 512.
    fn preferred_block(&self) -> u32;

    /// The content of a range within the disk: pieces in order and without gaps. The source logs why something cannot
    /// be read, the client only learns that it cannot.
    fn read(&self, range: ByteRange) -> impl Future<Output = Result<Vec<Piece>, Unserved>> + Send;

    /// What reads as zeroes from the start of a range on, in at most `most` runs; not necessarily up to its end, but
    /// more than nothing.
    fn zeroes(&self, range: ByteRange, most: usize) -> impl Future<Output = Result<Vec<Run>, Unserved>> + Send;
}

/// A source cannot read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unserved {
    /// The first byte that cannot be read.
    pub offset: u64,
}

/// What clients see.
#[derive(Debug)]
pub struct Export<S> {
    /// Its name; the empty name, the default of many clients, stands for it too.
    pub name: String,
    /// For people.
    pub description: String,
    /// The content.
    pub source: S,
}

impl<S: Source> Export<S> {
    fn is_called(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

/// How long a server goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Until it is told to end.
    Told,
    /// Until the last client has left, once one was there.
    ClientsLeft,
}

/// Serves until `told` ends, or the clients have left. Connections that are open then are closed.
pub async fn serve<S: Source>(
    socket: &PrivateSocket,
    export: Arc<Export<S>>,
    until: Until,
    told: impl Future<Output = ()>,
) {
    let mut told = std::pin::pin!(told);
    let mut clients = JoinSet::new();
    let mut served = false;
    loop {
        tokio::select! {
            () = &mut told => break,
            Some(ended) = clients.join_next() => {
                // One that only asked which exports there are was no reader.
                served |= ended.unwrap_or(true);
                if until == Until::ClientsLeft && served && clients.is_empty() {
                    break;
                }
            }
            accepted = socket.accept(), if clients.len() < MAX_CONNECTIONS => match accepted {
                Ok(stream) => {
                    clients.spawn(client(stream, Arc::clone(&export)));
                }
                Err(error) => {
                    tracing::warn!(%error, "a client could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            },
        }
    }
    clients.shutdown().await;
}

/// Serves one client; whether it came as far as reading.
async fn client<S: Source>(stream: UnixStream, export: Arc<Export<S>>) -> bool {
    let (reader, mut writer) = stream.into_split();
    let mut reader = tokio::io::BufReader::new(reader);
    let negotiated =
        tokio::time::timeout(HANDSHAKE_LIMIT, handshake::negotiate(&mut reader, &mut writer, &export)).await;
    let settled = match negotiated {
        Ok(Ok(Some(settled))) => settled,
        Ok(Ok(None)) => return false,
        Ok(Err(fault)) => {
            tracing::info!(%fault, "a client was sent away in the handshake");
            return false;
        }
        Err(_) => {
            tracing::info!("a client was sent away: it did not end the handshake");
            return false;
        }
    };
    tracing::debug!(?settled, "a client reads");
    match transmission::run(reader, writer, export, settled).await {
        Ok(()) => tracing::debug!("a client left"),
        Err(fault) => tracing::info!(%fault, "a client was sent away"),
    }
    true
}

/// What a handshake settled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Settled {
    structured: bool,
    /// `base:allocation` was chosen.
    allocation: bool,
}

/// Why a connection ends other than by a good-bye.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("the connection failed: {0}")]
    Io(#[from] std::io::Error),
    #[error("it broke the protocol: {0}")]
    Protocol(String),
}

/// Why an export cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be made.
    #[error("cannot {attempt} the socket {}", path.display())]
    Socket {
        /// What was attempted.
        attempt: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Somebody listens there.
    #[error("{} is the socket of a server that runs; end it, or choose another path", path.display())]
    InUse {
        /// Its path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} exists and is no socket; it stays as it is, choose another path", path.display())]
    NoSocket {
        /// Its path.
        path: PathBuf,
    },
}

impl Reason for ServeError {
    fn reason(&self) -> &str {
        match self {
            Self::Socket { .. } => "SocketFailed",
            Self::InUse { .. } => "SocketInUse",
            Self::NoSocket { .. } => "SocketPathTaken",
        }
    }

    fn retry(&self) -> Retry {
        Retry::Terminal
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// 1 MiB of ones.
    struct Ones;

    impl Source for Ones {
        fn size(&self) -> u64 {
            1 << 20
        }

        fn preferred_block(&self) -> u32 {
            4096
        }

        async fn read(&self, range: ByteRange) -> Result<Vec<Piece>, Unserved> {
            assert!(range.end() <= self.size());
            Ok(vec![Piece::Data { offset: range.start(), bytes: Bytes::from(vec![1; range.len() as usize]) }])
        }

        async fn zeroes(&self, range: ByteRange, most: usize) -> Result<Vec<Run>, Unserved> {
            assert!(range.end() <= self.size() && most > 0);
            Ok(vec![Run { length: range.len(), set: false }])
        }
    }

    /// An option or a request whose numbers are near to what is valid.
    fn nearly_valid(transmission: bool) -> impl Strategy<Value = Vec<u8>> {
        let length = prop_oneof![4 => 0_u32..40, 1 => Just(u32::MAX), 1 => Just(16 << 10)];
        (0_u16..12, 0_u16..9, any::<u64>(), length, proptest::collection::vec(prop_oneof![Just(0), any::<u8>()], 0..40))
            .prop_map(move |(number, flags, offset, length, rest)| {
                let mut bytes = Vec::new();
                if transmission {
                    bytes.extend(0x2560_9513_u32.to_be_bytes());
                    bytes.extend(flags.to_be_bytes());
                    bytes.extend(number.to_be_bytes());
                    bytes.extend(offset.to_be_bytes());
                    bytes.extend((offset % (3 << 19)).to_be_bytes());
                    bytes.extend(length.to_be_bytes());
                } else {
                    bytes.extend(b"IHAVEOPT");
                    bytes.extend(u32::from(number).to_be_bytes());
                    // Mostly as long as it says.
                    let length = if flags == 0 { length } else { rest.len() as u32 };
                    bytes.extend(length.to_be_bytes());
                    bytes.extend(rest);
                }
                bytes
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
        #[test]
        fn whatever_a_client_sends_it_is_served_or_sent_away(
            options in proptest::collection::vec(nearly_valid(false), 0..8),
            go in any::<bool>(),
            requests in proptest::collection::vec(nearly_valid(true), 0..20),
            garbage in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut script = vec![0, 0, 0, 3];
            options.iter().for_each(|option| script.extend(option));
            if go {
                script.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
            }
            requests.iter().for_each(|request| script.extend(request));
            script.extend(garbage);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (near, far) = UnixStream::pair().unwrap();
                let export = Export { name: "ones".into(), description: "a test".into(), source: Ones };
                let served = tokio::spawn(client(far, Arc::new(export)));
                let (mut reader, mut writer) = near.into_split();
                let received = tokio::spawn(async move {
                    let mut answers = Vec::new();
                    let _ = reader.read_to_end(&mut answers).await;
                });
                // It may have been sent away already.
                let _ = writer.write_all(&script).await;
                drop(writer);
                let ended = tokio::time::timeout(Duration::from_secs(10), served).await;
                assert!(ended.is_ok_and(|joined| joined.is_ok()), "it hangs, or panicked");
                received.await.unwrap();
            });
        }
    }
}
