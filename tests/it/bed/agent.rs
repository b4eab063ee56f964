//! A guest agent that lives in the test: it says when it was asked to freeze, and answers when it is told to.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

/// The command that freezes.
const FREEZE: &str = "guest-fsfreeze-freeze";
/// The command that thaws.
const THAW: &str = "guest-fsfreeze-thaw";

/// The agent; its thread ends with the test's process.
#[derive(Debug)]
pub(crate) struct FakeAgent {
    /// Holds the socket.
    directory: TempDir,
    /// Commands that came, in order.
    commands: Arc<Mutex<Vec<String>>>,
    /// A freeze was asked for.
    asked: Receiver<()>,
    /// It may be answered.
    answer: Sender<()>,
}

impl FakeAgent {
    /// Starts it.
    pub(crate) fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("vf-agent-").tempdir_in("/tmp").expect("a directory");
        let listener = UnixListener::bind(directory.path().join("agent")).expect("a socket");
        let commands = Arc::new(Mutex::new(Vec::new()));
        let (ask, asked) = channel();
        let (answer, may_answer) = channel();
        let log = Arc::clone(&commands);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(&stream.expect("a connection"), &log, &ask, &may_answer);
            }
        });
        Self { directory, commands, asked, answer }
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> PathBuf {
        Path::join(self.directory.path(), "agent")
    }

    /// Waits until it is asked to freeze. The asker waits until [`FakeAgent::answer`].
    pub(crate) fn wait_freeze(&self) {
        self.asked.recv_timeout(Duration::from_secs(60)).expect("nobody freezes");
    }

    /// Says that the file systems are frozen now.
    pub(crate) fn answer(&self) {
        self.answer.send(()).expect("the agent's thread runs");
    }

    /// Whether it ever was asked to freeze.
    pub(crate) fn was_asked_to_freeze(&self) -> bool {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|command| command == FREEZE)
    }

    /// Whether it was asked to thaw, and not to freeze again since.
    pub(crate) fn is_thawed(&self) -> bool {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        let last = commands.iter().rev().find(|command| *command == FREEZE || *command == THAW);
        last.is_some_and(|command| command == THAW)
    }
}

/// Serves one client until it hangs up.
fn serve(stream: &UnixStream, log: &Mutex<Vec<String>>, ask: &Sender<()>, may_answer: &Receiver<()>) {
    let mut output = stream;
    for line in BufReader::new(stream).split(b'\n') {
        let Ok(line) = line else { return };
        // The byte that resets the parser comes before a command.
        let start = line.iter().rposition(|byte| *byte == 0xff).map_or(0, |at| at + 1);
        let Ok(command) = serde_json::from_slice::<Value>(&line[start..]) else { continue };
        let name = command["execute"].as_str().unwrap_or_default().to_owned();
        log.lock().unwrap_or_else(PoisonError::into_inner).push(name.clone());
        let mut answer = Vec::new();
        match name.as_str() {
            "guest-sync-delimited" => {
                answer.push(0xff);
                answer.extend(json!({"return": command["arguments"]["id"]}).to_string().into_bytes());
            }
            FREEZE => {
                ask.send(()).ok();
                // The test has ended when nobody can tell.
                if may_answer.recv().is_err() {
                    return;
                }
                answer.extend(json!({"return": 1}).to_string().into_bytes());
            }
            THAW => answer.extend(json!({"return": 1}).to_string().into_bytes()),
            _ => answer.extend(json!({"return": {}}).to_string().into_bytes()),
        }
        answer.push(b'\n');
        if output.write_all(&answer).is_err() {
            return;
        }
    }
}
