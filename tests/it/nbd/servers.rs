//! Real NBD servers as child processes, and images for them.

use crate::bed::{flavour::tool, process::kill9};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::net::UnixStream;

/// A server, killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) socket: PathBuf,
    _directory: TempDir,
}

impl Server {
    /// Starts a program of the bed; `arguments` gets the path of the socket to listen on.
    pub(crate) fn start(variable: &str, arguments: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let directory = TempDir::new().unwrap();
        let socket = directory.path().join("nbd");
        let mut command = Command::new(tool(variable));
        command.args(arguments(&socket)).stdin(Stdio::null());
        Self { child: command.spawn().unwrap(), socket, _directory: directory }
    }

    /// `qemu-nbd`, read-only, for any number of clients.
    pub(crate) fn qemu_nbd(image: &Path, extra: &[&str]) -> Self {
        Self::start("QEMU_NBD", |socket| {
            let mut arguments = vec!["-k".to_owned(), shown(socket)];
            arguments.extend(["-r", "-t", "-e", "4", "-x", "disk"].iter().chain(extra).map(ToString::to_string));
            arguments.push(shown(image));
            arguments
        })
    }

    /// `qemu-storage-daemon`, which is QEMU's own server, with a qcow2 image and its bitmap `b`.
    pub(crate) fn storage_daemon(image: &Path) -> Self {
        Self::start("QEMU_STORAGE_DAEMON", |socket| {
            let file = format!("driver=file,node-name=file,read-only=on,filename={}", shown(image));
            [
                ("--blockdev", file.as_str()),
                ("--blockdev", "driver=qcow2,node-name=image,read-only=on,file=file"),
                ("--nbd-server", &format!("addr.type=unix,addr.path={}", shown(socket))),
                ("--export", "type=nbd,id=export,node-name=image,name=disk,bitmaps.0=b"),
            ]
            .iter()
            .flat_map(|(option, value)| [(*option).to_owned(), (*value).to_owned()])
            .collect()
        })
    }

    /// `nbdkit` with plugin, filters and parameters.
    pub(crate) fn nbdkit(extra: &[&str]) -> Self {
        Self::start("NBDKIT", |socket| {
            let mut arguments = vec!["-f".to_owned(), "-U".to_owned(), shown(socket)];
            arguments.extend(extra.iter().map(ToString::to_string));
            arguments
        })
    }

    /// A connection, as soon as the server listens.
    pub(crate) async fn connect(&self) -> UnixStream {
        let begun = Instant::now();
        loop {
            match UnixStream::connect(&self.socket).await {
                Ok(stream) => return stream,
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(30), "{}: {error}", self.socket.display()),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn kill(&mut self) {
        kill9(&mut self.child);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Runs a tool of the bed to its end.
pub(crate) fn run(variable: &str, arguments: &[&str]) {
    let output = Command::new(tool(variable)).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Pseudo-random numbers (`SplitMix64`), so that failures repeat.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// A sparse raw file with random extents of random data, and its content.
pub(crate) fn sparse_image(path: &Path, size: u64, extents: u64, longest: u64) -> Vec<u8> {
    let mut random = Random(size);
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut content = vec![0; usize::try_from(size).unwrap()];
    for _ in 0..extents {
        let offset = random.below(size);
        let length = (1 + random.below(longest)).min(size - offset);
        let place = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
        random.fill(&mut content[place.clone()]);
        file.write_all_at(&content[place], offset).unwrap();
    }
    content
}

/// A qcow2 image with 20 MiB of data and what was changed since its bitmap `b` began: its content before and after.
pub(crate) fn changed_image(path: &Path) -> (Vec<u8>, Vec<u8>) {
    const SIZE: u64 = (32 << 20) + 512;
    let image = path.to_str().unwrap();
    // Beside `qemu-img` in the same package.
    let io = |commands: &[String]| {
        let mut program = Command::new(tool("QEMU_IMG").with_file_name("qemu-io"));
        program.args(["-f", "qcow2", image]).args(commands.iter().flat_map(|command| ["-c", command]));
        assert!(program.output().unwrap().status.success(), "qemu-io");
    };
    run("QEMU_IMG", &["create", "-q", "-f", "qcow2", image, &SIZE.to_string()]);
    io(&["write -q -P 17 0 20M".to_owned()]);
    run("QEMU_IMG", &["bitmap", "--add", "-g", "65536", image, "b"]);
    let mut before = vec![0; usize::try_from(SIZE).unwrap()];
    before[..20 << 20].fill(17);
    let mut after = before.clone();
    let mut random = Random(9);
    let changes: Vec<String> = (1..=40_u8)
        .map(|byte| {
            let offset = random.below(SIZE / 512) * 512;
            let length = (512 * (1 + random.below(100))).min(SIZE - offset);
            let zero = byte % 4 == 0;
            let place = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
            after[place].fill(if zero { 0 } else { byte });
            let how = if zero { "-z".to_owned() } else { format!("-P {byte}") };
            format!("write -q {how} {offset} {length}")
        })
        .collect();
    io(&changes);
    (before, after)
}
