//! The product's binary as the tests run it.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::process;

/// A run, to be started.
#[derive(Debug)]
pub(crate) struct Cli {
    /// The command.
    command: Command,
    /// How long it may take.
    limit: Duration,
}

/// What a run left.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

/// A run under way; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Running {
    /// The process.
    child: Child,
    /// Reads standard output to its end.
    stdout: Option<JoinHandle<String>>,
    /// Lines of standard error as they come.
    lines: Receiver<String>,
    /// Those that were read already.
    seen: Vec<String>,
    /// How long it may take.
    limit: Duration,
}

impl Cli {
    /// `virt-fleece` with these arguments and two minutes of time.
    pub(crate) fn new<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(arguments: I) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_virt-fleece"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command, limit: Duration::from_secs(120) }
    }

    /// Adds an argument.
    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Allows it this much time.
    pub(crate) fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The command, for somebody else to run.
    pub(crate) fn into_command(self) -> Command {
        self.command
    }

    /// Runs it to its end.
    pub(crate) fn run(self) -> Outcome {
        self.spawn().finish()
    }

    /// Runs it to its end, which must be a success, and returns what it prints as JSON.
    pub(crate) fn json<T: DeserializeOwned>(self) -> T {
        self.run().success().json()
    }

    /// Starts it.
    pub(crate) fn spawn(mut self) -> Running {
        let mut child = self.command.spawn().expect("starting virt-fleece");
        let mut stdout = child.stdout.take().expect("a pipe");
        let stderr = child.stderr.take().expect("a pipe");
        let stdout = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).expect("reading a pipe");
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n') {
                let line = line.expect("reading a pipe");
                // Nobody listens any more when the run was dropped.
                send.send(String::from_utf8_lossy(&line).into_owned()).ok();
            }
        });
        Running { child, stdout: Some(stdout), lines, seen: Vec::new(), limit: self.limit }
    }
}

impl Outcome {
    /// Asserts success.
    pub(crate) fn success(self) -> Self {
        assert!(self.status.success(), "virt-fleece ends with {}: {}{}", self.status, self.stdout, self.stderr);
        self
    }

    /// Asserts failure.
    pub(crate) fn failure(self) -> Self {
        assert!(!self.status.success(), "virt-fleece succeeds: {}{}", self.stdout, self.stderr);
        self
    }

    /// Standard output as JSON.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {:?}", self.stdout))
    }
}

impl Running {
    /// Process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of standard error that contains `text`.
    pub(crate) fn wait_line(&mut self, text: &str) -> String {
        let deadline = Instant::now() + self.limit;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no line with {text:?} in {:?}: {:#?}", self.limit, self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("ended without a line with {text:?}: {:#?}", self.seen),
            }
        }
    }

    /// Waits for it to end, and panics when it has not within its limit.
    pub(crate) fn finish(mut self) -> Outcome {
        let Some(status) = process::wait(&mut self.child, self.limit) else {
            process::kill9(&mut self.child);
            self.seen.extend(self.lines.iter());
            panic!("virt-fleece has not ended within {:?}: {:#?}", self.limit, self.seen);
        };
        self.collect(status)
    }

    /// SIGKILL.
    pub(crate) fn kill9(mut self) -> Outcome {
        process::kill9(&mut self.child);
        let status = self.child.wait().expect("the status of a reaped child is kept");
        self.collect(status)
    }

    /// Ends within this time, or `None`: for runs that ought to hang.
    pub(crate) fn ends_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        process::wait(&mut self.child, limit)
    }

    /// Reads what it has printed.
    fn collect(&mut self, status: ExitStatus) -> Outcome {
        let stdout = self.stdout.take().map(|thread| thread.join().expect("reading a pipe")).unwrap_or_default();
        self.seen.extend(self.lines.iter());
        Outcome { status, stdout, stderr: self.seen.join("\n") }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // No panic here: it could be the second one.
        self.child.kill().ok();
        process::wait(&mut self.child, Duration::from_secs(30));
    }
}
