//! Backup targets that misbehave: too small, slow, stalled, failing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, MountOption};
use rustix::io::Errno;
use tempfile::TempDir;

use super::fuse::Passthrough;

/// A RAM file system of a fixed size: a target that fills up.
#[derive(Debug)]
pub(crate) struct TmpfsTarget {
    /// Where it is mounted.
    mounted: Mounted,
}

impl TmpfsTarget {
    /// Mounts one of this many bytes.
    pub(crate) fn new(size: u64) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(directory.path());
        assert!(mount.status().expect("starting mount").success(), "mount failed");
        Self { mounted: Mounted(directory) }
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        self.mounted.0.path()
    }
}

/// A mount point that is unmounted before it is removed.
#[derive(Debug)]
struct Mounted(TempDir);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a process that a test left behind may still have a file open there.
        Command::new("umount").arg("--lazy").arg(self.0.path()).status().ok();
    }
}

/// A directory behind a file system that misbehaves on demand.
///
/// Writes come synchronously, as they do on a network file system with `sync`: the kernel's page cache passes them on.
#[derive(Debug)]
pub(crate) struct FuseTarget {
    /// Makes it misbehave.
    faults: Faults,
    /// Unmounted (lazily) before the session goes, whose own way of unmounting fails while files are open.
    mounted: Mounted,
    /// What holds the files.
    backing: TempDir,
    /// Serves the kernel's requests.
    session: BackgroundSession,
}

impl FuseTarget {
    /// Mounts one over a new directory.
    pub(crate) fn new() -> Self {
        let backing = tempfile::tempdir().expect("a directory");
        let mounted = Mounted(tempfile::tempdir().expect("a directory"));
        let faults = Faults::default();
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("vf-faults".to_owned()), MountOption::DefaultPermissions];
        config.acl = fuser::SessionACL::All;
        // Reads of one file go on while another one's request is served.
        config.n_threads = Some(2);
        let files = Passthrough::new(backing.path(), faults.clone()).expect("opening the backing directory");
        let session = fuser::spawn_mount(files, mounted.0.path(), &config).expect("mounting FUSE as root");
        Self { faults, mounted, backing, session }
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> &Path {
        self.mounted.0.path()
    }

    /// The directory behind it, which always behaves.
    pub(crate) fn backing(&self) -> &Path {
        self.backing.path()
    }

    /// Makes it misbehave.
    pub(crate) fn faults(&self) -> &Faults {
        &self.faults
    }
}

impl Drop for FuseTarget {
    fn drop(&mut self) {
        // What waits in a stall would keep the file system alive.
        self.faults.heal();
    }
}

/// How a target misbehaves now; clones control the same target.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults(Arc<Shared>);

/// What the control and the file system share.
#[derive(Debug, Default)]
struct Shared {
    /// What is wrong.
    state: Mutex<State>,
    /// Signals every change of it.
    changed: Condvar,
}

/// What is wrong, and what has happened.
#[derive(Debug, Default)]
struct State {
    /// Each write takes this much longer.
    delay: Duration,
    /// Bytes a second, if there is a limit.
    bandwidth: Option<u64>,
    /// When the write that is last in line will be through the bandwidth.
    busy_until: Option<Instant>,
    /// Writes and syncs wait for as long as this holds.
    stalled: bool,
    /// Requests that wait for the end of the stall.
    waiting: usize,
    /// Bytes until writes fail, and the error.
    budget: Option<(u64, Errno)>,
    /// Ending of the names of files to which no write succeeds, and the error.
    failing_name: Option<(String, Errno)>,
    /// The error of every sync.
    sync_error: Option<Errno>,
    /// Bytes written.
    written: u64,
    /// Syncs that succeeded.
    syncs: u64,
}

impl Faults {
    /// Each write takes this much longer.
    pub(crate) fn delay_writes(&self, delay: Duration) {
        self.change(|state| state.delay = delay);
    }

    /// Writes get this many bytes a second together.
    pub(crate) fn limit_bandwidth(&self, bytes_per_second: u64) {
        self.change(|state| state.bandwidth = Some(bytes_per_second));
    }

    /// Writes and syncs wait from now on, until [`Faults::release`].
    pub(crate) fn stall(&self) {
        self.change(|state| state.stalled = true);
    }

    /// Ends a stall.
    pub(crate) fn release(&self) {
        self.change(|state| state.stalled = false);
    }

    /// Waits until so many requests wait in a stall; `false` when they do not come.
    pub(crate) fn wait_stalled(&self, requests: usize, limit: Duration) -> bool {
        let state = self.0.changed.wait_timeout_while(self.lock(), limit, |state| state.waiting < requests);
        state.unwrap_or_else(PoisonError::into_inner).0.waiting >= requests
    }

    /// Writes fail with this error when this many more bytes are written.
    pub(crate) fn fail_writes_after(&self, bytes: u64, error: Errno) {
        self.change(|state| state.budget = Some((bytes, error)));
    }

    /// Writes to files whose names end so fail with this error.
    pub(crate) fn fail_writes_to(&self, suffix: &str, error: Errno) {
        self.change(|state| state.failing_name = Some((suffix.to_owned(), error)));
    }

    /// Syncs of files and directories fail with this error.
    pub(crate) fn fail_syncs(&self, error: Errno) {
        self.change(|state| state.sync_error = Some(error));
    }

    /// Everything is well again, whatever was wrong.
    pub(crate) fn heal(&self) {
        self.change(|state| {
            let State { waiting, written, syncs, .. } = *state;
            *state = State { waiting, written, syncs, ..State::default() };
        });
    }

    /// Bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.lock().written
    }

    /// Successful syncs so far.
    pub(crate) fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// Whether a write or sync now takes its time, so that it must not occupy the thread that serves all requests.
    pub(super) fn slow(&self) -> bool {
        let state = self.lock();
        state.stalled || state.bandwidth.is_some() || !state.delay.is_zero()
    }

    /// Waits as long as a write of these bytes is to take and says whether it may happen.
    pub(super) fn admit_write(&self, name: &str, bytes: u64, process: u32) -> Result<(), Errno> {
        self.wait_out(process)?;
        let mut state = self.lock();
        if let Some((suffix, error)) = &state.failing_name
            && name.ends_with(suffix.as_str())
        {
            return Err(*error);
        }
        if let Some((budget, error)) = &mut state.budget {
            if *budget < bytes {
                return Err(*error);
            }
            *budget -= bytes;
        }
        state.written += bytes;
        let now = Instant::now();
        let mut until = now + state.delay;
        if let Some(bandwidth) = state.bandwidth {
            let start = state.busy_until.map_or(now, |busy| busy.max(now));
            let end = start + Duration::from_secs_f64(bytes as f64 / bandwidth as f64);
            state.busy_until = Some(end);
            until = until.max(end);
        }
        drop(state);
        // The delay is the fault itself, there is nothing to wait for.
        std::thread::sleep(until.saturating_duration_since(now));
        Ok(())
    }

    /// Waits out a stall and says whether a sync may happen.
    pub(super) fn admit_sync(&self, process: u32) -> Result<(), Errno> {
        self.wait_out(process)?;
        let mut state = self.lock();
        if let Some(error) = state.sync_error {
            return Err(error);
        }
        state.syncs += 1;
        Ok(())
    }

    /// Waits for the end of a stall, or of the process that waits for the answer.
    fn wait_out(&self, process: u32) -> Result<(), Errno> {
        let mut state = self.lock();
        if !state.stalled {
            return Ok(());
        }
        state.waiting += 1;
        self.0.changed.notify_all();
        let mut result = Ok(());
        while state.stalled {
            // The kernel lets nobody out of a request that is being served, not even by SIGKILL, and fuser does not
            // tell of interrupts: so look. NFS, which this stands for, can be killed out of.
            if killed(process) {
                result = Err(Errno::INTR);
                break;
            }
            let tick = Duration::from_millis(20);
            state = self.0.changed.wait_timeout(state, tick).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting -= 1;
        result
    }

    /// Changes what is wrong.
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.0.changed.notify_all();
    }

    /// The state, whatever panicked elsewhere.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a SIGKILL waits for this thread; `false` for the kernel's own write-back, which has no process.
fn killed(thread: u32) -> bool {
    let Ok(text) = fs::read_to_string(format!("/proc/{thread}/status")) else { return false };
    let pending = |line: &str| {
        let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    };
    text.lines().filter_map(pending).any(|mask| mask & (1 << 8) != 0)
}

#[cfg(test)]
mod tests;
