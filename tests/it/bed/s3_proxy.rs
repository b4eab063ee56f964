//! A proxy before an S3 server that does to requests what networks and overloaded servers do.
//!
//! It needs no keys: S3's signature covers the `Host` header, which it passes on as it is. Every connection carries one
//! request, so whatever happens to one request happens to no other.

mod http;

use std::collections::BTreeMap;
use std::io::{self, BufReader, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use self::http::{Request, copy, failure, head_length, status};

/// Longer than any test.
const FOREVER: Duration = Duration::from_secs(24 * 60 * 60);

/// On which side of the server's work something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The server never sees the request.
    Before,
    /// The server has done what was asked, and the client does not get to know.
    After,
}

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// The connection is closed without a reply.
    Drop(Stage),
    /// There is no reply, and no end, until the proxy is told to [`S3Proxy::clear`] its faults.
    Stall(Stage),
    /// The reply has this status, say 500, 503 (`SlowDown`) or 429.
    Answer(Stage, u16),
    /// The server gets the request this much later.
    Delay(Duration),
    /// The request's body and then the reply get this many bytes a second, whatever other requests get.
    Throttle(u64),
    /// The server gets so many bytes of the request's body, then the connections are closed.
    CutRequest(usize),
    /// The client gets so many bytes of the reply's body, then the connection is closed.
    CutReply(usize),
}

/// Which requests something happens to: all, unless narrowed down.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    /// What happens.
    effect: Effect,
    /// The method, if only one.
    method: Option<String>,
    /// What path and query contain.
    target: String,
    /// Requests to which nothing happens at first.
    skip: u64,
    /// To how many it happens after that.
    times: u64,
    /// The probability for each, and the seed of the dice.
    chance: Option<(f64, u64)>,
    /// Requests of this kind so far.
    seen: u64,
}

impl Fault {
    /// Happens to every request.
    pub(crate) fn new(effect: Effect) -> Self {
        Self { effect, method: None, target: String::new(), skip: 0, times: u64::MAX, chance: None, seen: 0 }
    }

    /// Only to requests of this method, say `PUT`.
    pub(crate) fn method(self, method: &str) -> Self {
        Self { method: Some(method.to_owned()), ..self }
    }

    /// Only where path and query, as they are on the wire, contain this: `/bucket/some/key`, `list-type=2`, `uploadId=`.
    pub(crate) fn target(self, part: &str) -> Self {
        Self { target: part.to_owned(), ..self }
    }

    /// Not to the first so many of these requests.
    pub(crate) fn skip(self, skip: u64) -> Self {
        Self { skip, ..self }
    }

    /// Only to so many of these requests.
    pub(crate) fn times(self, times: u64) -> Self {
        Self { times, ..self }
    }

    /// To each of these requests only with a probability. The same seed gives the same sequence of requests hit.
    pub(crate) fn chance(self, probability: f64, seed: u64) -> Self {
        Self { chance: Some((probability, seed)), ..self }
    }

    /// Counts a request, and says whether it is hit.
    fn hits(&mut self, request: &Request) -> bool {
        let method = self.method.as_ref().is_none_or(|method| *method == request.method);
        if !method || !request.target.contains(&self.target) {
            return false;
        }
        let number = self.seen;
        self.seen += 1;
        let due = number >= self.skip && number - self.skip < self.times;
        due && self.chance.is_none_or(|(probability, seed)| die(seed, number) < probability)
    }
}

/// A number below one that depends on nothing else than these.
fn die(seed: u64, number: u64) -> f64 {
    let hash = blake3::hash(&[seed.to_le_bytes(), number.to_le_bytes()].concat());
    let bytes = hash.as_bytes().first_chunk().expect("32 bytes");
    f64::from(u32::from_le_bytes(*bytes)) / 2f64.powi(32)
}

/// A request that the proxy got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The method.
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    /// What happened to it.
    pub(crate) effect: Option<Effect>,
    /// The server's own status, once it has answered.
    pub(crate) status: Option<u16>,
}

/// A running proxy; dropping it closes the port and ends what stalls.
#[derive(Debug)]
pub(crate) struct S3Proxy {
    /// Where it listens.
    address: SocketAddr,
    /// What the connections share.
    shared: Arc<Shared>,
}

/// What the control and the connections share.
#[derive(Debug)]
struct Shared {
    /// Where the server listens.
    server: SocketAddr,
    /// Faults, and requests.
    state: Mutex<State>,
    /// Signals that faults were cleared.
    cleared: Condvar,
}

/// Faults, and what has happened.
#[derive(Debug, Default)]
struct State {
    /// The faults, the oldest first.
    faults: Vec<Fault>,
    /// How often they were cleared.
    clears: u64,
    /// Requests, in the order in which their heads arrived.
    requests: Vec<Seen>,
    /// The end.
    closed: bool,
}

/// What was decided about a request.
#[derive(Debug, Clone, Copy)]
struct Admitted {
    /// Its place in the list of requests.
    place: usize,
    /// What shall happen to it.
    effect: Option<Effect>,
    /// How often faults had been cleared.
    clears: u64,
}

impl S3Proxy {
    /// Starts one before the server at this address, without faults.
    pub(crate) fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared { server, state: Mutex::default(), cleared: Condvar::new() });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                let shared = Arc::clone(&accepting);
                if shared.state().closed {
                    return;
                }
                client.map(|client| thread::spawn(move || shared.serve_or_hang_up(&client))).ok();
            }
        });
        Self { address, shared }
    }

    /// Its URL, in place of the server's.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Adds a fault. Of several that hit a request the oldest counts.
    pub(crate) fn inject(&self, fault: Fault) {
        self.shared.state().faults.push(fault);
    }

    /// Removes all faults. The connections that stall are closed.
    pub(crate) fn clear(&self) {
        let mut state = self.shared.state();
        state.faults.clear();
        state.clears += 1;
        self.shared.cleared.notify_all();
    }

    /// All requests so far.
    pub(crate) fn requests(&self) -> Vec<Seen> {
        self.shared.state().requests.clone()
    }

    /// How many requests there were of each method.
    pub(crate) fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for seen in &self.shared.state().requests {
            *counts.entry(seen.method.clone()).or_default() += 1;
        }
        counts
    }
}

impl Drop for S3Proxy {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.clear();
        // Wakes the thread that accepts, so that it sees the end.
        TcpStream::connect(self.address).ok();
    }
}

impl Shared {
    /// The state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a request, and decides what shall happen to it.
    fn admit(&self, request: &Request) -> Admitted {
        let mut state = self.state();
        // Each fault counts every request of its kind, whether an older one takes it or not.
        let hits: Vec<_> = state.faults.iter_mut().filter_map(|f| f.hits(request).then_some(f.effect)).collect();
        let effect = hits.first().copied();
        let (method, target) = (request.method.clone(), request.target.clone());
        state.requests.push(Seen { method, target, effect, status: None });
        Admitted { place: state.requests.len() - 1, effect, clears: state.clears }
    }

    /// Waits this long at most until the faults that there were at the admission are cleared.
    fn wait(&self, admitted: &Admitted, limit: Duration) {
        let state = self.state();
        let waits = |state: &mut State| state.clears == admitted.clears && !state.closed;
        drop(self.cleared.wait_timeout_while(state, limit, waits).unwrap_or_else(PoisonError::into_inner));
    }

    /// Serves one connection, which ends without a reply on an error: of the client, or of the server.
    fn serve_or_hang_up(&self, client: &TcpStream) {
        if let Err(error) = self.serve(client)
            && error.kind() == io::ErrorKind::InvalidData
        {
            eprintln!("the S3 proxy does not understand a request: {error}");
        }
    }

    /// Serves one connection.
    fn serve(&self, client: &TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut from = BufReader::new(client.try_clone()?);
        let Some(mut request) = Request::read_head(&mut from)? else { return Ok(()) };
        let admitted = self.admit(&request);
        let effect = admitted.effect;
        let pace = if let Some(Effect::Throttle(pace)) = effect { Some(pace) } else { None };
        request.read_body(&mut from, pace)?;
        match effect {
            Some(Effect::Drop(Stage::Before)) => return client.shutdown(Shutdown::Both),
            Some(Effect::Stall(Stage::Before)) => {
                self.wait(&admitted, FOREVER);
                return client.shutdown(Shutdown::Both);
            }
            Some(Effect::Answer(Stage::Before, status)) => return send(client, &failure(status, &request), None),
            Some(Effect::Delay(delay)) => self.wait(&admitted, delay),
            _ => {}
        }

        let mut server = TcpStream::connect(self.server)?;
        server.set_nodelay(true)?;
        if let Some(Effect::CutRequest(bytes)) = effect {
            request.forward_part(&mut server, bytes)?;
            return client.shutdown(Shutdown::Both);
        }
        let mut reply = request.forward(&mut server)?;
        self.state().requests[admitted.place].status = status(&reply);
        match effect {
            Some(Effect::Drop(_)) => return client.shutdown(Shutdown::Both),
            Some(Effect::Stall(_)) => {
                self.wait(&admitted, FOREVER);
                return client.shutdown(Shutdown::Both);
            }
            Some(Effect::Answer(_, status)) => reply = failure(status, &request),
            Some(Effect::CutReply(bytes)) => reply.truncate(head_length(&reply).saturating_add(bytes)),
            _ => {}
        }
        send(client, &reply, pace)
    }
}

/// Sends a reply and closes the connection.
fn send(mut client: &TcpStream, mut reply: &[u8], pace: Option<u64>) -> io::Result<()> {
    copy(&mut reply, &mut client, pace)?;
    client.flush()?;
    client.shutdown(Shutdown::Both)
}
