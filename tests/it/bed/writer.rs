//! Client of the writer inside the guest; `tests/bed/README.md` specifies the protocol.

use std::fmt::Write as _;
use std::io::{BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::control::{dial, read_line};
use super::oracle::Stream;

/// Booting under emulation on a busy machine.
const BOOT: Duration = Duration::from_secs(120);
/// Any answer of a running guest.
const ANSWER: Duration = Duration::from_secs(60);

/// A connection to the writer.
#[derive(Debug)]
pub(crate) struct Writer {
    /// The virtio-serial port's socket.
    stream: BufReader<UnixStream>,
    /// The answer under way.
    line: Vec<u8>,
    /// Answers that nobody waits for any more and that come before the next one.
    abandoned: usize,
}

/// What the writer has done.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Status {
    /// Whether it writes.
    pub(crate) running: bool,
    /// Per thread the number of its last completed write.
    pub(crate) writes: Vec<u64>,
    /// Writes that failed.
    pub(crate) errors: u64,
    /// The first failure; empty when there is none.
    #[serde(default)]
    pub(crate) first_error: String,
}

/// Latencies since `start` or the last reset.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Stats {
    /// Time they cover.
    pub(crate) seconds: f64,
    /// Writes.
    pub(crate) count: u64,
    /// Median.
    pub(crate) p50_us: f64,
    /// 99th percentile.
    pub(crate) p99_us: f64,
    /// Slowest.
    pub(crate) max_us: f64,
}

impl Writer {
    /// Connects and waits for the guest to have booted.
    pub(crate) fn connect(socket: &Path) -> Self {
        let mut writer = Self { stream: BufReader::new(dial(socket, BOOT)), line: Vec::new(), abandoned: 0 };
        // `ready` comes to the first connection only; the port keeps the ping until the guest opens it.
        writer.send("ping");
        let deadline = Instant::now() + BOOT;
        loop {
            match writer.receive(deadline) {
                Some(answer) if answer["ok"] == true => return writer,
                Some(_) => {}
                None => panic!("the guest has not booted within {BOOT:?}; see its console log"),
            }
        }
    }

    /// Starts writing: this stream over the disks with these serials, `rate` writes a second (0: full speed).
    pub(crate) fn start(&mut self, stream: &Stream, rate: u64, disks: &[&str]) {
        assert_eq!(disks.len(), stream.disks.len(), "one serial per disk of the stream");
        let Stream { seed, threads, zero, .. } = stream;
        let disks = disks.join(",");
        self.ok(&format!("start seed={seed} threads={threads} rate={rate} zero={zero} disks={disks}"));
    }

    /// Finishes the writes under way and stops.
    pub(crate) fn stop(&mut self) -> Status {
        self.ask("stop")
    }

    /// Goes on after [`Writer::stop`].
    pub(crate) fn resume(&mut self) {
        self.ok("resume");
    }

    /// What it has done so far.
    pub(crate) fn status(&mut self) -> Status {
        self.ask("status")
    }

    /// Like [`Writer::status`], but `None` when the guest does not answer in time: it is paused or stalled.
    pub(crate) fn status_within(&mut self, limit: Duration) -> Option<Status> {
        self.send("status");
        let answer = self.receive(Instant::now() + limit);
        if answer.is_none() {
            self.abandoned += 1;
        }
        answer.map(|answer| parse("status", &answer))
    }

    /// Waits until every thread has done `more` writes after `since`.
    pub(crate) fn wait_progress(&mut self, since: &Status, more: u64) -> Status {
        let deadline = Instant::now() + ANSWER;
        loop {
            let status = self.status();
            assert_eq!(status.errors, 0, "the guest's writes fail: {:?}", status.first_error);
            if status.writes.iter().zip(&since.writes).all(|(now, then)| *now >= then + more) {
                return status;
            }
            assert!(Instant::now() < deadline, "the writer does not proceed: {status:?} after {since:?}");
            // The guest has one CPU, and questions compete with the writes that are waited for.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Latencies since `start` or the last [`Writer::reset_stats`].
    pub(crate) fn stats(&mut self) -> Stats {
        self.ask("stats")
    }

    /// Starts the latencies afresh.
    pub(crate) fn reset_stats(&mut self) {
        self.ok("stats reset");
    }

    /// Reads past the guest's cache and returns the FNV-1a hash of the bytes.
    pub(crate) fn read(&mut self, serial: &str, offset: u64, length: u64) -> u64 {
        let command = format!("read serial={serial} offset={offset} length={length}");
        let answer: Value = self.ask(&command);
        let text = answer["fnv1a64"].as_str().unwrap_or_else(|| panic!("{command}: {answer}"));
        u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a hexadecimal number")
    }

    /// Writes one byte value.
    pub(crate) fn write(&mut self, serial: &str, offset: u64, length: u64, byte: u8) {
        self.ok(&format!("write serial={serial} offset={offset} length={length} byte={byte}"));
    }

    /// Zeroes (hole punch).
    pub(crate) fn zero(&mut self, serial: &str, offset: u64, length: u64) {
        self.ok(&format!("zero serial={serial} offset={offset} length={length}"));
    }

    /// Bytes of the disk, as the guest sees it.
    pub(crate) fn size(&mut self, serial: &str) -> u64 {
        let answer: Value = self.ask(&format!("size serial={serial}"));
        answer["bytes"].as_u64().unwrap_or_else(|| panic!("size of {serial}: {answer}"))
    }

    /// A command whose success has no content.
    fn ok(&mut self, command: &str) {
        let answer: Value = self.ask(command);
        assert!(answer["ok"] == true, "{command}: {answer}");
    }

    /// Sends a command and returns its answer.
    fn ask<T: DeserializeOwned>(&mut self, command: &str) -> T {
        self.send(command);
        let answer = self.receive(Instant::now() + ANSWER);
        parse(command, &answer.unwrap_or_else(|| panic!("the writer does not answer {command} within {ANSWER:?}")))
    }

    /// Sends a command.
    fn send(&mut self, command: &str) {
        let mut line = command.to_owned();
        line.write_char('\n').expect("a string grows");
        self.stream.get_mut().write_all(line.as_bytes()).expect("sending to the writer");
    }

    /// The next line that is no event.
    fn receive(&mut self, deadline: Instant) -> Option<Value> {
        loop {
            let line = read_line(&mut self.stream, &mut self.line, deadline)?;
            let text = String::from_utf8_lossy(&line);
            let answer: Value = serde_json::from_str(text.trim())
                .unwrap_or_else(|error| panic!("the writer sends {text:?}, which is not JSON: {error}"));
            match self.abandoned {
                _ if answer.get("event").is_some() => {}
                0 => return Some(answer),
                _ => self.abandoned -= 1,
            }
        }
    }
}

/// FNV-1a, as the writer computes it in `read`.
pub(crate) fn fnv1a64(bytes: &[u8]) -> u64 {
    let add = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, add)
}

/// An answer in its type.
fn parse<T: DeserializeOwned>(command: &str, answer: &Value) -> T {
    serde_json::from_value(answer.clone()).unwrap_or_else(|error| panic!("{command}: {error} in {answer}"))
}
