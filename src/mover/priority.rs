//! The guest goes first on the processor, too.

use rustix::process::{Pid, setpriority_process};

/// Lowers the priority of all threads of this process, and of those that they start later. Linux keeps it per thread
/// (setpriority(2), "C library/kernel differences"). Best effort: what cannot be lowered stays.
pub(super) fn lower(nice: i32) {
    // Twice: while threads end, a list of them may leave others out.
    let threads = || std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    for thread in (0..2).flat_map(|_| threads()) {
        let id = thread.file_name().to_str().and_then(|id| id.parse().ok()).and_then(Pid::from_raw);
        if id.is_some() && setpriority_process(id, nice).is_err() {
            tracing::debug!(?id, "the priority of a thread could not be lowered");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::getpriority_process;

    #[test]
    fn threads_that_run_already_are_lowered_too() {
        let (send, wait) = std::sync::mpsc::channel::<()>();
        let (ready, started) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            ready.send(()).unwrap();
            wait.recv().unwrap();
            getpriority_process(None).unwrap()
        });
        started.recv().unwrap();
        lower(3);
        send.send(()).unwrap();
        assert_eq!(thread.join().unwrap(), 3);
        assert_eq!(std::thread::spawn(|| getpriority_process(None).unwrap()).join().unwrap(), 3);
    }
}
