//! A repository with one volume, and the server of it.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;
use virt_fleece::{
    backup::BackupId,
    extent::{ByteRange, Piece},
    image::ImageSink,
    repository::{ChunkPipeline, Location, Manifest, Passphrase, Repository, RepositorySession, VolumeWriter},
};

/// Bytes of a chunk: the smallest, so that there are many.
pub(super) const CHUNK: u64 = 64 << 10;
/// The volume's name.
pub(super) const VOLUME: &str = "root disk";
/// The repository's passphrase.
pub(super) const PASSPHRASE: &str = "for the tests";

/// A volume in a repository, and what it holds.
pub(super) struct Stored {
    /// Holds the repository, and what the tests put there.
    pub(super) directory: TempDir,
    /// The volume's bytes.
    pub(super) content: Vec<u8>,
    repository: Arc<Repository>,
}

/// Pseudo-random bytes that compress half.
fn data(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words = (0..length.div_ceil(16)).flat_map(|_| [next().to_le_bytes(), [0x11; 8]]);
    words.flatten().take(length).collect()
}

/// Chunks of this number hold data: many at the beginning, some at the end, none between.
fn holds_data(chunk: u64, chunks: u64) -> bool {
    let near_begin = chunk < 180 && chunk % 7 != 6 && !(40..60).contains(&chunk);
    near_begin || chunk + 20 > chunks && chunk % 2 == (chunks - 1) % 2
}

impl Stored {
    /// A volume of this size, in the backup of a VM named `web`.
    pub(super) fn new(size: u64) -> Self {
        Self::with_chunks(size, CHUNK, holds_data)
    }

    /// One with other chunks, of which those for which `holds_data` says so hold data.
    pub(super) fn with_chunks(size: u64, chunk_size: u64, holds_data: fn(u64, u64) -> bool) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let url = directory.path().join("repository").display().to_string();
        let storage = Location { url, create: true, ..Location::default() }.open().expect("a place");
        let passphrase = Passphrase::new(PASSPHRASE.into()).expect("a passphrase");
        let repository = runtime.block_on(Repository::init(storage, passphrase, chunk_size)).expect("a repository");
        let session = runtime.block_on(RepositorySession::start(Arc::clone(&repository))).expect("a session");
        let session = Arc::new(session);
        let mut sink = {
            let _within = runtime.enter();
            Box::new(VolumeWriter::new(ChunkPipeline::new(Arc::clone(&session), 1), size, None))
        };
        let mut content = vec![0; size as usize];
        let chunks = size.div_ceil(chunk_size);
        for chunk in 0..chunks {
            let offset = chunk * chunk_size;
            let range = ByteRange::new(offset, (offset + chunk_size).min(size)).expect("a chunk");
            let piece = if holds_data(chunk, chunks) {
                let bytes = data(chunk + 1, range.len() as usize);
                content[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
                Piece::Data { offset, bytes: bytes.into() }
            } else {
                Piece::Zero(range)
            };
            sink.write(piece).expect("writing");
        }
        let summary = sink.finish().expect("the volume is stored");
        let manifest = manifest(size, &summary.content.expect("a root"));
        runtime.block_on(session.commit(&manifest, std::time::Duration::from_secs(60))).expect("a backup");
        Self { directory, content, repository }
    }

    /// The repository's directory.
    pub(super) fn repository(&self) -> PathBuf {
        self.directory.path().join("repository")
    }

    /// Whether a chunk is zero.
    pub(super) fn is_zero(&self, chunk: u64) -> bool {
        self.chunk(chunk).iter().all(|byte| *byte == 0)
    }

    fn chunk(&self, chunk: u64) -> &[u8] {
        let begin = (chunk * CHUNK) as usize;
        &self.content[begin..self.content.len().min(begin + CHUNK as usize)]
    }

    /// Name of a chunk's object.
    pub(super) fn object(&self, chunk: u64) -> String {
        let id = self.repository.chunk_id(self.chunk(chunk)).to_hex();
        format!("chunks/{}/{id}", &id[..2])
    }
}

fn manifest(size: u64, root: &str) -> Manifest {
    let now = "2026-11-25T01:02:03Z";
    let manifest = json!({
        "format_version": 1, "id": BackupId::generate().expect("an id").as_str(), "vm": "web", "sequence": 1,
        "bitmap_line": "00ff00ff", "point_in_time": now, "started": now, "finished": now, "engine": "job",
        "transfer": "pull", "qemu_version": "10.0.2", "cut_microseconds": 1, "quiesce": "not_frozen",
        "tool_version": "0",
        "volumes": [{"name": VOLUME, "virtual_size": size, "root": root, "source_format": "raw", "bitmap": "b",
            "dirty_bytes": 0, "read_bytes": 0, "data_bytes": 0, "zero_bytes": 0, "new_bytes": 0, "stored_bytes": 0}],
    });
    serde_json::from_value(manifest).expect("a manifest")
}

/// A server that is ready; dropping it kills it.
pub(super) struct Server {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    log: PathBuf,
    /// Its socket.
    pub(super) socket: PathBuf,
    /// Its address.
    pub(super) uri: String,
    /// What it printed, when that was JSON.
    pub(super) ready: Value,
}

impl Server {
    /// Starts it with these arguments and waits until it says that it is ready.
    pub(super) fn start(stored: &Stored, arguments: &[&str]) -> Self {
        let (socket, log) = (stored.directory.path().join("nbd socket"), stored.directory.path().join("serve.log"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_virt-fleece"));
        command.args(["serve-nbd", "-v", "--vm", "web", "--backup", "latest", "--volume", VOLUME, "--repository"]);
        command.arg(stored.repository()).arg("--socket").arg(&socket).args(arguments);
        command.env("VIRT_FLEECE_PASSPHRASE", PASSPHRASE).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(File::create(&log).expect("a log")).spawn().expect("starting virt-fleece");
        let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut printed = String::new();
        let ready = if arguments.contains(&"json") {
            let mut document = serde_json::Deserializer::from_reader(&mut stdout).into_iter::<Value>();
            document.next().expect("a document").expect("JSON")
        } else {
            stdout.read_line(&mut printed).expect("reading a pipe");
            json!({"uri": printed.trim()})
        };
        let uri = ready["uri"].as_str().unwrap_or_default().to_owned();
        let logged = std::fs::read_to_string(&log).unwrap_or_default();
        assert!(uri.starts_with("nbd+unix:///root%20disk?socket=/"), "{uri}: {logged}");
        Self { child, stdout, log, socket, uri, ready }
    }

    /// Ends it with SIGTERM, which must be in order; what it logged.
    pub(super) fn stop(mut self) -> String {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
        let code = self.ends_within(Duration::from_secs(30));
        let log = std::fs::read_to_string(&self.log).expect("a log");
        assert_eq!(code, Some(0), "{log}");
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("reading a pipe");
        assert_eq!(rest.trim(), "", "nothing else is printed");
        log
    }

    /// SIGKILL.
    pub(super) fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ends");
    }

    /// Its exit code, when it ends by itself in this time.
    pub(super) fn ends_within(&mut self, limit: Duration) -> Option<i32> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status.code();
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Bytes of memory that it holds, at most so far.
    pub(super) fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
        line.split_ascii_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("server: {}", std::fs::read_to_string(&self.log).unwrap_or_default());
        }
        // No panic here: it could be the second one.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
