//! As much of HTTP/1.1 as the proxy needs: one request a connection, with a body of a known length.

use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// Larger heads are an error: those of S3 are below 8 KiB.
const MAX_HEAD: usize = 64 << 10;
/// Slices of a second in which a slow transfer proceeds.
const SLICES: u64 = 20;

/// A request.
#[derive(Debug)]
pub(super) struct Request {
    /// The method.
    pub(super) method: String,
    /// Path and query, as sent.
    pub(super) target: String,
    /// Everything before the body, changed to ask for the end of the connection after the reply.
    pub(super) head: Vec<u8>,
    /// The body.
    pub(super) body: Vec<u8>,
    /// Bytes of the body that are yet to be read.
    length: u64,
}

impl Request {
    /// Reads the head of one; `None` when the client hangs up instead.
    pub(super) fn read_head(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Self>> {
        let mut lines = Vec::new();
        let mut size = 0;
        loop {
            let mut line = String::new();
            size += stream.by_ref().take(MAX_HEAD as u64).read_line(&mut line)?;
            match line.trim_end() {
                _ if size > MAX_HEAD => return Err(invalid("a head too large")),
                _ if line.is_empty() && lines.is_empty() => return Ok(None),
                _ if line.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
                "" => break,
                text => lines.push(text.to_owned()),
            }
        }
        let mut words = lines[0].split(' ').map(str::to_owned);
        let (Some(method), Some(target)) = (words.next(), words.next()) else {
            return Err(invalid("a request line without a target"));
        };
        let mut head = vec![lines[0].as_str()];
        let mut length = 0;
        for line in &lines[1..] {
            let (name, value) = line.split_once(':').ok_or_else(|| invalid("a header without a value"))?;
            match name.to_ascii_lowercase().as_str() {
                "connection" => continue,
                "content-length" => length = value.trim().parse().map_err(|_| invalid("a length that is none"))?,
                "transfer-encoding" | "expect" | "upgrade" => return Err(invalid("a header that the proxy lacks")),
                _ => {}
            }
            head.push(line);
        }
        head.extend(["Connection: close", "\r\n"]);
        Ok(Some(Self { method, target, head: head.join("\r\n").into_bytes(), body: Vec::new(), length }))
    }

    /// Reads the body, at this many bytes a second if there is a limit.
    pub(super) fn read_body(&mut self, stream: &mut BufReader<TcpStream>, pace: Option<u64>) -> io::Result<()> {
        let copied = copy(&mut stream.take(self.length), &mut self.body, pace)?;
        if copied < self.length { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Sends it and returns the whole reply, which the end of the connection delimits.
    pub(super) fn forward(&self, server: &mut TcpStream) -> io::Result<Vec<u8>> {
        // A server may refuse a request, and hang up, before it has read the body: its reply counts.
        let sent = server.write_all(&self.head).and_then(|()| server.write_all(&self.body));
        let mut reply = Vec::new();
        let received = server.read_to_end(&mut reply);
        if reply.is_empty() {
            sent?;
            received?;
        }
        Ok(reply)
    }

    /// Sends it with only so many bytes of the body, and then nothing more.
    pub(super) fn forward_part(&self, server: &mut TcpStream, bytes: usize) -> io::Result<()> {
        server.write_all(&self.head)?;
        server.write_all(&self.body[..bytes.min(self.body.len())])?;
        server.shutdown(Shutdown::Write)?;
        // Until the server has taken note, whatever it answers.
        io::copy(server, &mut io::sink()).map(drop)
    }
}

/// The status of a reply.
pub(super) fn status(reply: &[u8]) -> Option<u16> {
    let text = reply.get(9..12)?;
    str::from_utf8(text).ok()?.parse().ok()
}

/// The length of a reply's head.
pub(super) fn head_length(reply: &[u8]) -> usize {
    let end = b"\r\n\r\n";
    reply.windows(end.len()).position(|window| window == end).map_or(reply.len(), |at| at + end.len())
}

/// A reply as S3 gives it when it fails.
pub(super) fn failure(status: u16, request: &Request) -> Vec<u8> {
    let code = match status {
        403 => "AccessDenied",
        404 => "NoSuchKey",
        429 => "TooManyRequests",
        500 => "InternalError",
        503 => "SlowDown",
        _ => "Injected",
    };
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>injected</Message></Error>"
    );
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    let body = if request.method == "HEAD" { "" } else { body.as_str() };
    [head.as_bytes(), body.as_bytes()].concat()
}

/// Copies everything, at this many bytes a second if there is a limit.
pub(super) fn copy(from: &mut impl Read, to: &mut impl Write, pace: Option<u64>) -> io::Result<u64> {
    let Some(pace) = pace else { return io::copy(from, to) };
    let mut due = Instant::now();
    let mut copied = 0;
    loop {
        let step = io::copy(&mut from.by_ref().take((pace / SLICES).max(1)), to)?;
        if step == 0 {
            return Ok(copied);
        }
        copied += step;
        due += Duration::from_secs_f64(step as f64 / pace.max(1) as f64);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// Something that the proxy does not understand.
fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
