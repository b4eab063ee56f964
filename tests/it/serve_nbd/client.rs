//! A small NBD client that speaks byte by byte, and so can also speak wrongly.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// Any answer.
const LIMIT: Duration = Duration::from_secs(60);
const OPTION: &[u8] = b"IHAVEOPT";

/// A connection in transmission phase.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    /// Bytes of the export.
    pub(super) size: u64,
    structured: bool,
    cookie: u64,
}

/// A reply, or the error number in it.
type Reply = Result<Vec<u8>, u32>;

fn dial(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("a server");
    stream.set_read_timeout(Some(LIMIT)).expect("a limit");
    stream.set_write_timeout(Some(LIMIT)).expect("a limit");
    stream
}

fn take<const N: usize>(stream: &mut UnixStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).expect("an answer");
    bytes
}

fn take_u32(stream: &mut UnixStream) -> u32 {
    u32::from_be_bytes(take(stream))
}

/// The greeting, answered.
fn greeted(socket: &Path) -> UnixStream {
    let mut stream = dial(socket);
    assert_eq!(&take::<18>(&mut stream), b"NBDMAGICIHAVEOPT\x00\x03");
    stream.write_all(&3_u32.to_be_bytes()).expect("sending");
    stream
}

fn option(stream: &mut UnixStream, number: u32, payload: &[u8]) {
    let length = (payload.len() as u32).to_be_bytes();
    stream.write_all(&[OPTION, &number.to_be_bytes(), &length, payload].concat()).expect("sending");
}

/// Type and payload of an answer to an option.
fn option_reply(stream: &mut UnixStream, number: u32) -> (u32, Vec<u8>) {
    assert_eq!(u64::from_be_bytes(take(stream)), 0x0003_e889_0455_65a9);
    assert_eq!(take_u32(stream), number);
    let kind = take_u32(stream);
    let mut payload = vec![0; take_u32(stream) as usize];
    stream.read_exact(&mut payload).expect("a payload");
    (kind, payload)
}

impl Client {
    /// Negotiates: structured replies with `base:allocation` and `NBD_OPT_GO`, or the old way.
    pub(super) fn connect(socket: &Path, structured: bool) -> Self {
        let mut stream = greeted(socket);
        if !structured {
            option(&mut stream, 1, b"");
            let size = u64::from_be_bytes(take(&mut stream));
            let flags = u16::from_be_bytes(take(&mut stream));
            assert_eq!(flags & 0b11, 0b11, "flags, read-only");
            return Self { stream, size, structured, cookie: 0 };
        }
        option(&mut stream, 8, b"");
        assert_eq!(option_reply(&mut stream, 8).0, 1);
        let mut query = [0_u32.to_be_bytes(), 1_u32.to_be_bytes(), 15_u32.to_be_bytes()].concat();
        query.extend(b"base:allocation");
        option(&mut stream, 10, &query);
        assert_eq!(option_reply(&mut stream, 10), (4, [b"\0\0\0\x01", b"base:allocation".as_slice()].concat()));
        assert_eq!(option_reply(&mut stream, 10).0, 1);
        option(&mut stream, 7, &[0; 6]);
        let mut size = 0;
        loop {
            match option_reply(&mut stream, 7) {
                (1, _) => break,
                (3, info) if info[..2] == [0, 0] => size = u64::from_be_bytes(info[2..10].try_into().expect("8 bytes")),
                (3, _) => {}
                other => panic!("{other:?}"),
            }
        }
        Self { stream, size, structured, cookie: 0 }
    }

    /// Sends a request.
    pub(super) fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> u64 {
        self.cookie += 1;
        let request = request(command, flags, self.cookie, offset, length);
        self.send(&request);
        self.cookie
    }

    /// Sends bytes.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("sending");
    }

    /// The reply to the only request that is outstanding; of a read `length` bytes.
    pub(super) fn reply(&mut self, cookie: u64, length: u32) -> Reply {
        if self.structured {
            return self.collect(&[cookie]).remove(&cookie).expect("a reply");
        }
        assert_eq!(take_u32(&mut self.stream), 0x6744_6698);
        let error = take_u32(&mut self.stream);
        assert_eq!(u64::from_be_bytes(take(&mut self.stream)), cookie);
        if error != 0 {
            return Err(error);
        }
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes).expect("content");
        Ok(bytes)
    }

    /// The structured replies to these requests. What comes in chunks must be in order and without gaps.
    pub(super) fn collect(&mut self, cookies: &[u64]) -> HashMap<u64, Reply> {
        let mut replies: HashMap<u64, Reply> = HashMap::new();
        let mut next: HashMap<u64, u64> = HashMap::new();
        let mut open = cookies.len();
        while open > 0 {
            let stream = &mut self.stream;
            assert_eq!(take_u32(stream), 0x668e_33ef);
            let (flags, kind) = (u16::from_be_bytes(take(stream)), u16::from_be_bytes(take(stream)));
            let cookie = u64::from_be_bytes(take(stream));
            assert!(cookies.contains(&cookie));
            let mut payload = vec![0; take_u32(stream) as usize];
            stream.read_exact(&mut payload).expect("a payload");
            let (number, rest) = payload.split_at(payload.len().min(8));
            let offset = || u64::from_be_bytes(number.try_into().expect("8 bytes"));
            let reply = replies.entry(cookie).or_insert(Ok(Vec::new()));
            let content = match kind {
                0 => Vec::new(),
                1 => rest.to_vec(),
                2 => vec![0; u32::from_be_bytes(rest.try_into().expect("4 bytes")) as usize],
                5 => payload.clone(),
                kind if kind >= 1 << 15 => {
                    *reply = Err(u32::from_be_bytes(payload[..4].try_into().expect("4 bytes")));
                    Vec::new()
                }
                other => panic!("a chunk of type {other}"),
            };
            if matches!(kind, 1 | 2) {
                assert_eq!(*next.entry(cookie).or_insert_with(offset), offset(), "in order and without gaps");
                *next.get_mut(&cookie).expect("there") += content.len() as u64;
            }
            if let Ok(bytes) = reply {
                bytes.extend(content);
            }
            open -= usize::from(flags & 1);
        }
        replies
    }

    /// Reads; `whole` asks for one chunk.
    pub(super) fn read(&mut self, offset: u64, length: u32, whole: bool) -> Reply {
        let flags = if whole && self.structured { 1 << 2 } else { 0 };
        let cookie = self.ask(0, flags, offset, length);
        let read = self.reply(cookie, length);
        assert!(read.as_ref().map_or(true, |bytes| bytes.len() == length as usize), "{length} bytes at {offset}");
        read
    }

    /// Lengths and whether they read as zeroes.
    pub(super) fn states(&mut self, offset: u64, length: u32, one: bool) -> Vec<(u32, bool)> {
        let cookie = self.ask(7, if one { 1 << 3 } else { 0 }, offset, length);
        let payload = self.reply(cookie, 0).expect("a state");
        let (context, rest) = payload.split_at(4);
        assert_eq!(context, [0, 0, 0, 1]);
        rest.chunks(8)
            .map(|extent| {
                let number = |at: usize| u32::from_be_bytes(extent[at..at + 4].try_into().expect("4 bytes"));
                assert!(matches!(number(4), 0 | 3), "both or none");
                (number(0), number(4) == 3)
            })
            .collect()
    }

    /// Says good-bye; the server closes.
    pub(super) fn leave(mut self) {
        self.ask(2, 0, 0, 0);
        assert_eq!(self.stream.read(&mut [0]).expect("an end"), 0);
    }
}

fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend(flags.to_be_bytes());
    request.extend(command.to_be_bytes());
    request.extend(cookie.to_be_bytes());
    request.extend(offset.to_be_bytes());
    request.extend(length.to_be_bytes());
    request
}

/// The server closes the connection, whatever it says before.
fn assert_closed(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the connection stays: {error}"),
    }
}

/// What a client does to break a server; each leaves a connection that is closed.
type Script = fn(&Path);

/// Scripts with their names.
pub(super) fn hostile() -> Vec<(&'static str, Script)> {
    vec![
        ("says nothing and goes", |socket| drop(dial(socket))),
        ("unknown flags", |socket| {
            let mut stream = dial(socket);
            stream.write_all(&[0xff; 4]).expect("sending");
            assert_closed(&mut stream);
        }),
        ("garbage instead of an option", |socket| {
            let mut stream = greeted(socket);
            stream.write_all(&[0xa5; 16]).expect("sending");
            assert_closed(&mut stream);
        }),
        ("an option of 4 GiB", |socket| {
            let mut stream = greeted(socket);
            stream.write_all(&[OPTION, &7_u32.to_be_bytes(), &[0xff; 4]].concat()).expect("sending");
            assert_eq!(option_reply(&mut stream, 7).0, (1 << 31) | 9);
            assert_closed(&mut stream);
        }),
        ("half an option", |socket| {
            let mut stream = greeted(socket);
            stream
                .write_all(&[OPTION, &7_u32.to_be_bytes(), &100_u32.to_be_bytes(), b"abc"].concat())
                .expect("sending");
        }),
        ("options that lie about their lengths", |socket| {
            let mut stream = greeted(socket);
            option(&mut stream, 8, b"");
            assert_eq!(option_reply(&mut stream, 8).0, 1);
            for number in [6, 7, 9, 10] {
                for payload in [b"".as_slice(), &[0xff; 6], &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], &[0; 7]] {
                    option(&mut stream, number, payload);
                    let (kind, text) = option_reply(&mut stream, number);
                    assert_eq!(kind, (1 << 31) | 3, "{number} {payload:?} {text:?}");
                }
            }
            // It is still in order after that.
            option(&mut stream, 99, b"whatever");
            assert_eq!(option_reply(&mut stream, 99).0, (1 << 31) | 1);
            option(&mut stream, 7, b"\0\0\0\x05other\0\0");
            assert_eq!(option_reply(&mut stream, 7).0, (1 << 31) | 6);
            option(&mut stream, 2, b"");
            assert_eq!(option_reply(&mut stream, 2).0, 1);
            assert_closed(&mut stream);
        }),
        ("a name that does not exist", |socket| {
            let mut stream = greeted(socket);
            option(&mut stream, 1, b"nobody");
            assert_closed(&mut stream);
        }),
        ("options without end", |socket| {
            let mut stream = greeted(socket);
            for _ in 0..128 {
                option(&mut stream, 50, b"");
                assert_eq!(option_reply(&mut stream, 50).0, (1 << 31) | 1);
            }
            assert_closed(&mut stream);
        }),
        ("garbage instead of a request", |socket| {
            let mut client = Client::connect(socket, true);
            client.send(&[0x5a; 28]);
            assert_closed(&mut client.stream);
        }),
        ("half a request", |socket| {
            let mut client = Client::connect(socket, true);
            client.send(&request(0, 0, 1, 0, 512)[..13]);
            client.stream.shutdown(std::net::Shutdown::Write).expect("half closed");
            assert_closed(&mut client.stream);
        }),
        ("a write of 4 GiB", |socket| {
            let mut client = Client::connect(socket, true);
            client.ask(1, 0, 0, u32::MAX);
            assert_closed(&mut client.stream);
        }),
        ("half a write", |socket| {
            let mut client = Client::connect(socket, true);
            client.ask(1, 0, 0, 1 << 20);
            client.send(&[1; 1000]);
            client.stream.shutdown(std::net::Shutdown::Write).expect("half closed");
            assert_closed(&mut client.stream);
        }),
        ("asks for gigabytes and receives nothing", |socket| {
            let mut client = Client::connect(socket, true);
            client.stream.set_nonblocking(true).expect("non-blocking");
            let all = request(0, 0, 9, 0, 32 << 20);
            // Until the server takes no more requests: that is its bound.
            let taken = (0..100_000).take_while(|_| client.stream.write_all(&all).is_ok()).count();
            assert!(taken < 100_000, "requests without end are taken");
        }),
    ]
}
