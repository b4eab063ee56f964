//! Threads that take jobs from one queue.
//!
//! Plain threads, not the runtime's pool: the runtime waits for its own at shutdown, and these may hang in the kernel for
//! as long as a file system does.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, PoisonError},
};

/// A bounded number of threads, started when there is work for them; they end when this is dropped. Who adds jobs bounds
/// how many wait.
pub(super) struct Workers<J> {
    shared: Arc<Shared<J>>,
    most: usize,
    name: &'static str,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    ready: Condvar,
    work: Box<dyn Fn(J) + Send + Sync>,
}

struct State<J> {
    jobs: VecDeque<J>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl<J: Send + 'static> Workers<J> {
    /// At most `most` threads of this name, each of which calls `work` for one job after the other.
    pub(super) fn new(most: usize, name: &'static str, work: impl Fn(J) + Send + Sync + 'static) -> Self {
        let state = Mutex::new(State { jobs: VecDeque::new(), threads: 0, idle: 0, closed: false });
        Self { shared: Arc::new(Shared { state, ready: Condvar::new(), work: Box::new(work) }), most, name }
    }

    /// Adds a job.
    pub(super) fn add(&self, job: J) -> std::io::Result<()> {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            self.shared.ready.notify_one();
        } else if state.threads < self.most {
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new().name(self.name.into()).spawn(move || shared.run());
            match spawned {
                Ok(_) => state.threads += 1,
                Err(error) if state.threads == 0 => return Err(error),
                // The others do it.
                Err(_) => {}
            }
        }
        Ok(())
    }
}

impl<J> Shared<J> {
    fn run(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // A panic is reported by whoever finds the job dropped; the others wait for this thread.
                let _ = catch_unwind(AssertUnwindSafe(|| (self.work)(job)));
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if state.closed {
                return;
            }
            state.idle += 1;
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

impl<J> Drop for Workers<J> {
    /// Waits for nobody.
    fn drop(&mut self) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.ready.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn every_job_is_done_once_by_no_more_threads_than_allowed() {
        let (sender, done) = mpsc::channel();
        let (begun, threads) = (Arc::new(Mutex::new(std::collections::HashSet::new())), 3);
        let seen = Arc::clone(&begun);
        let workers = Workers::new(threads, "test", move |job: u32| {
            seen.lock().unwrap().insert(std::thread::current().id());
            sender.send(job).unwrap();
        });
        (0..1000).for_each(|job| workers.add(job).unwrap());
        drop(workers);
        let mut jobs: Vec<u32> = done.iter().collect();
        jobs.sort_unstable();
        assert_eq!(jobs, (0..1000).collect::<Vec<_>>());
        assert!((1..=threads).contains(&begun.lock().unwrap().len()));
    }
}
