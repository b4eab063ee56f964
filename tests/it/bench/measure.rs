//! Time, CPU time and memory of processes.

use std::{
    fs::{self, File},
    io::Read as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// What a program cost.
#[derive(Debug, Clone, Default)]
pub(super) struct Run {
    /// From its start to its end.
    pub(super) seconds: f64,
    /// User and system time of all of its threads.
    pub(super) cpu: f64,
    /// Most memory that it had resident, in bytes.
    pub(super) peak: u64,
    /// Standard output.
    pub(super) stdout: String,
}

/// Runs a program to its end, which must be a success.
pub(super) fn run(mut command: Command) -> Run {
    let begun = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    let pid = child.id();
    let mut stdout = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        text
    });
    let mut peak = 0;
    // A program that has ended and was not waited for still has its times, but its memory is gone: so look often.
    while !is_zombie(pid) {
        peak = peak.max(memory(pid, "VmHWM"));
        std::thread::sleep(Duration::from_millis(2));
    }
    let (seconds, cpu) = (begun.elapsed().as_secs_f64(), cpu_seconds(pid));
    let status = child.wait().unwrap();
    let stdout = reader.join().unwrap();
    assert!(status.success(), "{command:?} ends with {status}: {stdout}");
    Run { seconds, cpu, peak, stdout }
}

/// The fields of `/proc/PID/stat` from the state on.
fn stat(pid: u32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name before it may hold anything.
    text[text.rfind(')').unwrap() + 1..].split_whitespace().map(str::to_owned).collect()
}

fn is_zombie(pid: u32) -> bool {
    stat(pid)[0] == "Z"
}

/// Whether a process is stopped by a signal.
pub(super) fn is_stopped(pid: u32) -> bool {
    stat(pid)[0] == "T"
}

/// Seconds of CPU that a process has taken, user and system.
pub(super) fn cpu_seconds(pid: u32) -> f64 {
    let stat = stat(pid);
    let ticks: u64 = stat[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    // `USER_HZ`, which is the same on every machine.
    ticks as f64 / 100.0
}

/// A line of `/proc/PID/status` in bytes; 0 when it is not there.
pub(super) fn memory(pid: u32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// A process that does something for us meanwhile: QEMU.
pub(super) struct Watched {
    pid: u32,
    cpu: f64,
    resident: u64,
}

impl Watched {
    /// From now on.
    pub(super) fn new(pid: u32) -> Self {
        // 5 sets the peak back to what is resident now.
        fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
        Self { pid, cpu: cpu_seconds(pid), resident: memory(pid, "VmRSS") }
    }

    /// CPU seconds, and bytes by which its memory grew at most.
    pub(super) fn cost(&self) -> (f64, u64) {
        (cpu_seconds(self.pid) - self.cpu, memory(self.pid, "VmHWM").saturating_sub(self.resident))
    }
}

/// CPU seconds of this thread.
pub(super) fn thread_cpu() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The one in the middle.
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The one in the middle and the largest.
pub(super) fn median_and_maximum(values: &[f64]) -> (f64, f64) {
    (median(values.iter().copied()), values.iter().copied().fold(f64::MIN, f64::max))
}

/// Bytes of a file that are not in holes.
pub(super) fn allocated(file: &File) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    file.metadata().unwrap().blocks() * 512
}
