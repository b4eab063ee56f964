//! How fast a volume is served, beside the same bytes from a restored file. Measures only.

use super::{Client, Server, Stored, run};
use crate::bed::flavour::tool;
use std::{
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// `nbdcopy` to nowhere, in MiB a second.
fn speed(source: &str, arguments: &[&str], size: u64) -> f64 {
    let begun = Instant::now();
    run(Command::new("nbdcopy").args(arguments).args([source, "null:"]));
    (size >> 20) as f64 / begun.elapsed().as_secs_f64()
}

#[test]
#[ignore = "measures; needs nbdcopy"]
fn speed_beside_a_restored_file() {
    let size = 768 << 20;
    let stored = Stored::with_chunks(size, 1 << 20, |_, _| true);
    let raw = stored.directory.path().join("restored.raw");
    std::fs::write(&raw, &stored.content).expect("a file");
    for one in [["--connections=1", "--requests=1"].as_slice(), &["--connections=1"], &[]] {
        // Each with a cache that is empty.
        let server = Server::start(&stored, &[]);
        let ours = speed(&server.uri, one, size);
        let memory = server.peak_memory() >> 20;
        server.stop();
        let nbd = run_qemu_nbd(&raw, |uri| speed(uri, one, size));
        println!("{one:?}: {ours:.0} MiB/s served ({memory} MiB of memory), {nbd:.0} MiB/s by qemu-nbd of the file");
    }
    let begun = Instant::now();
    let length = std::fs::read(&raw).expect("a file").len() >> 20;
    println!("the file itself: {:.0} MiB/s", length as f64 / begun.elapsed().as_secs_f64());
    let server = Server::start(&stored, &[]);
    let mut client = Client::connect(&server.socket, true);
    let (begun, count) = (Instant::now(), 400_u64);
    for number in 0..count {
        client.read((number * 7919 % (size >> 12)) << 12, 4096, false).expect("readable");
    }
    println!("random reads of 4 KiB, cold: {:.0} a second", count as f64 / begun.elapsed().as_secs_f64());
    server.stop();
}

/// The same bytes from a file, by the server that everybody knows.
fn run_qemu_nbd(raw: &Path, measure: impl FnOnce(&str) -> f64) -> f64 {
    let socket = raw.with_extension("sock");
    let mut command = Command::new(tool("QEMU_NBD"));
    command.args(["--read-only", "--persistent", "--shared=8", "--format=raw", "--socket"]).arg(&socket).arg(raw);
    let _child = Killed(command.stdout(Stdio::null()).spawn().expect("starting qemu-nbd"));
    while UnixStream::connect(&socket).is_err() {
        thread::sleep(Duration::from_millis(10));
    }
    measure(&format!("nbd+unix:///?socket={}", socket.display()))
}

/// A child that does not outlive the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
