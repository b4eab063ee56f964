//! The tests' own QMP monitor: small, synchronous, and apart from the product's client, which it checks.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long a command may take: a session can hold a drain for seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// An error answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{command}: {class}: {description}")]
pub(crate) struct Refusal {
    /// The command.
    pub(crate) command: String,
    /// `GenericError` and its like.
    pub(crate) class: String,
    /// For humans.
    pub(crate) description: String,
}

/// A QMP connection.
#[derive(Debug)]
pub(crate) struct Control {
    /// The connection, buffered.
    stream: BufReader<UnixStream>,
    /// The line under way: a time-out in the middle of one must not lose its beginning.
    line: Vec<u8>,
    /// Events that came while something else was waited for.
    events: VecDeque<Value>,
}

impl Control {
    /// Connects and negotiates; waits for the socket to appear.
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = BufReader::new(dial(socket, LIMIT));
        let mut control = Self { stream, line: Vec::new(), events: VecDeque::new() };
        let greeting = control.message(Instant::now() + LIMIT).expect("a greeting");
        assert!(greeting.get("QMP").is_some(), "not a QMP greeting: {greeting}");
        control.run("qmp_capabilities", &json!({}));
        control
    }

    /// Runs a command and returns its answer, or the error that QEMU answers.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, Refusal> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).expect("sending to QEMU");
        let deadline = Instant::now() + LIMIT;
        loop {
            let mut message = self.message(deadline).unwrap_or_else(|| panic!("no answer to {command} in {LIMIT:?}"));
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.get("error") {
                let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
                return Err(Refusal { command: command.into(), class: text("class"), description: text("desc") });
            }
            self.events.push_back(message);
        }
    }

    /// Runs a command that must succeed.
    pub(crate) fn run(&mut self, command: &str, arguments: &Value) -> Value {
        self.execute(command, arguments).unwrap_or_else(|refusal| panic!("{refusal}"))
    }

    /// Runs a query and returns its list.
    pub(crate) fn list(&mut self, command: &str) -> Vec<Value> {
        let answer = self.run(command, &json!({}));
        answer.as_array().cloned().unwrap_or_else(|| panic!("{command} answers no list: {answer}"))
    }

    /// Runs a command of the human monitor and returns what it prints.
    pub(crate) fn human(&mut self, line: &str) -> String {
        let answer = self.run("human-monitor-command", &json!({"command-line": line}));
        answer.as_str().unwrap_or_default().to_owned()
    }

    /// `query-status`'s status.
    pub(crate) fn status(&mut self) -> String {
        self.run("query-status", &json!({}))["status"].as_str().unwrap_or_default().to_owned()
    }

    /// Waits for an event of this name; earlier ones that nobody waited for count. `None` when it does not come.
    pub(crate) fn wait_event(&mut self, name: &str, limit: Duration) -> Option<Value> {
        if let Some(position) = self.events.iter().position(|event| event["event"] == name) {
            return self.events.remove(position);
        }
        let deadline = Instant::now() + limit;
        loop {
            let message = self.message(deadline)?;
            if message["event"] == name {
                return Some(message);
            }
            self.events.push_back(message);
        }
    }

    /// Forgets the events so far.
    pub(crate) fn clear_events(&mut self) {
        self.events.clear();
    }

    /// Asks QEMU to end and waits until it has hung up: a command whose sender hangs up first is forgotten.
    pub(crate) fn quit(mut self) {
        self.stream.get_mut().write_all(b"{\"execute\":\"quit\"}\n").expect("sending to QEMU");
        self.stream.get_ref().set_read_timeout(Some(LIMIT)).expect("setting a time-out");
        // A reset connection is an end as well; a QEMU that stays is the caller's to notice.
        self.stream.read_to_end(&mut self.line).ok();
    }

    /// The next message, or `None` at the deadline.
    fn message(&mut self, deadline: Instant) -> Option<Value> {
        let line = read_line(&mut self.stream, &mut self.line, deadline)?;
        Some(serde_json::from_slice(&line).expect("QEMU sends JSON"))
    }
}

/// Connects to a socket that may have to appear first.
pub(crate) fn dial(socket: &Path, limit: Duration) -> UnixStream {
    let deadline = Instant::now() + limit;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > deadline => panic!("connecting to {}: {error}", socket.display()),
            // QEMU makes its sockets within milliseconds, and there is nothing to wait on before.
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Reads one line; `None` at the deadline, with what has come kept in `line`. Panics when the other end hangs up.
pub(crate) fn read_line(stream: &mut BufReader<UnixStream>, line: &mut Vec<u8>, deadline: Instant) -> Option<Vec<u8>> {
    loop {
        // Zero would mean: no limit.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.get_ref().set_read_timeout(Some(left)).expect("setting a time-out");
        match stream.read_until(b'\n', line) {
            Ok(_) if line.ends_with(b"\n") => return Some(std::mem::take(line)),
            Ok(_) => panic!("the other end hung up after {:?}", String::from_utf8_lossy(line)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return None;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("reading: {error}"),
        }
    }
}

/// The end mark beside a bitmap that records.
pub(crate) fn end_mark(bitmap: &str) -> String {
    bitmap.replacen("vf-", "vf-end-", 1)
}

/// What a session has left behind in QEMU, bitmaps of these names and their end marks aside; each as a sentence.
pub(crate) fn leftovers(control: &mut Control, bitmaps: &[&str]) -> Vec<String> {
    let mut left = Vec::new();
    let marks: Vec<_> = bitmaps.iter().map(|name| end_mark(name)).collect();
    for node in control.run("query-named-block-nodes", &json!({"flat": true})).as_array().into_iter().flatten() {
        let name = node["node-name"].as_str().unwrap_or_default();
        let driver = node["drv"].as_str().unwrap_or_default();
        if name.starts_with("vf") || ["copy-before-write", "snapshot-access"].contains(&driver) {
            left.push(format!("node {name} ({driver})"));
        }
        for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
            let known = bitmap["name"]
                .as_str()
                .is_some_and(|name| bitmaps.contains(&name) || marks.iter().any(|mark| mark == name));
            if !known {
                left.push(format!("bitmap {bitmap} on {name}"));
            }
        }
    }
    for query in ["query-block-jobs", "query-jobs", "query-block-exports", "query-fdsets"] {
        left.extend(control.list(query).into_iter().map(|entry| format!("{query}: {entry}")));
    }
    let status = control.status();
    if status != "running" {
        left.push(format!("the guest is {status}"));
    }
    match control.execute("nbd-server-stop", &json!({})) {
        Ok(_) => left.push("the NBD server ran (it is stopped now)".to_owned()),
        Err(refusal) if refusal.description.contains("not running") => {}
        Err(refusal) => left.push(refusal.to_string()),
    }
    left
}
