//! Child processes: waiting with a time limit, and killing.

use std::io;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Waits until the child ends, or returns `None` when it has not within the limit.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a child has a pid");
    // An already reaped child answers at once; the descriptor of an unreaped one cannot be of another process.
    if let Some(status) = child.try_wait().expect("asking for a child's status") {
        return Some(status);
    }
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("a descriptor for a child");
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).expect("a limit of hours at most");
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(_) => return child.try_wait().expect("asking for a child's status"),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("waiting for a child: {}", io::Error::from(error)),
        }
    }
}

/// Kills the child (SIGKILL) and reaps it.
pub(crate) fn kill9(child: &mut Child) {
    // The error says that it has ended already.
    child.kill().ok();
    assert!(wait(child, Duration::from_secs(30)).is_some(), "process {} survives SIGKILL", child.id());
}
