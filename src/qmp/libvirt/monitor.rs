//! QEMU's monitor through libvirt: `virDomainQemuMonitorCommand` and, with a descriptor, `…WithFiles` (libvirt 8.2).

use super::{
    connection::{LibvirtConnection, refused_argument},
    domain::{Domain, DomainUuid},
    message::{ERR_INTERNAL, ERR_OPERATION_FAILED, ERR_RPC, ERR_SYSTEM, LibvirtError, MAX_STRING},
    rpc::{CallError, Procedure},
    xdr::Encoder,
};
use crate::{
    qmp::{ErrorClass, Monitor, QmpError, codec},
    reason::printable,
};
use futures::{FutureExt, future::BoxFuture};
use serde::de::Error as _;
use serde_json::Value;
use std::{os::fd::OwnedFd, sync::Arc};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout_at},
};

const MONITOR_COMMAND: Procedure = Procedure::qemu(1, "virDomainQemuMonitorCommand");
const MONITOR_COMMAND_WITH_FILES: Procedure = Procedure::qemu(7, "virDomainQemuMonitorCommandWithFiles");

/// The monitor of one run of one domain.
///
/// * Commands go one after the other: the daemon hands the calls of a connection to several threads, so two at once
///   could overtake each other. Other clients and libvirt itself still come between.
/// * A command goes to the QEMU process that ran when this was opened and to no other: libvirt finds the machine by
///   its UUID, so after a restart it would talk to the new process without a word. The run's number is compared before
///   each command; [`QmpError::Closed`] says that it is another one or none.
/// * The first command taints the domain `custom-monitor` (log and status XML only).
/// * Events do not arrive.
/// * libvirt (11.3, with json-c) refuses an answer nested deeper than 32 levels, and **its monitor of that machine stays
///   broken until the daemon restarts**: every later command, anybody's, is answered "nesting too deep". `backing-image`
///   nests once per overlay: `query-named-block-nodes` with 25 backing files below a node passes, with 26 it breaks
///   (measured), so ask for it with `flat` only; `query-block` nests one or two levels more and has no `flat`.
/// * An answer of more than 4 MiB does not get through either. For both, and for a monitor that libvirt lost, the error
///   is [`QmpError::Decode`]: the command may have run.
#[derive(Debug)]
pub struct LibvirtMonitor {
    connection: Arc<LibvirtConnection>,
    domain: Domain,
    queue: mpsc::UnboundedSender<Request>,
}

/// A command on its way to the task that runs them one by one. The task also keeps a command going whose caller gave
/// up: a dropped future takes nothing back.
#[derive(Debug)]
struct Request {
    name: String,
    command: String,
    fds: Vec<OwnedFd>,
    deadline: Instant,
    answer: oneshot::Sender<Result<Value, QmpError>>,
}

impl LibvirtMonitor {
    /// The monitor of this domain, which must run.
    pub async fn open(connection: Arc<LibvirtConnection>, domain: &Domain) -> Result<Self, QmpError> {
        let domain = connection.domain_by_uuid(domain.uuid).await?;
        if domain.id.is_none() {
            let state = connection.domain_state(&domain).await?;
            let message = format!("domain '{}' is {state}: there is no QEMU to talk to", domain.name.escape_debug());
            // VIR_ERR_OPERATION_INVALID of VIR_FROM_QEMU, libvirt's own answer to a command in this state.
            return Err(LibvirtError { code: 55, domain: 10, message }.refused(MONITOR_COMMAND.name));
        }
        let (queue, requests) = mpsc::unbounded_channel();
        tokio::spawn(run_in_order(Arc::clone(&connection), domain.clone(), requests));
        Ok(Self { connection, domain, queue })
    }

    /// The domain as it was when this was opened.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// The domain's name.
    pub fn name(&self) -> &str {
        &self.domain.name
    }

    /// The domain's UUID.
    pub fn uuid(&self) -> DomainUuid {
        self.domain.uuid
    }

    /// The connection, for what is not the monitor.
    pub fn connection(&self) -> &Arc<LibvirtConnection> {
        &self.connection
    }

    async fn enqueue(&self, command: Value, fds: Vec<OwnedFd>) -> Result<Value, QmpError> {
        let name = command["execute"].as_str().unwrap_or_default().to_owned();
        if fds.len() > 1 {
            // `qemuDomainQemuMonitorCommandWithFiles`: "at most 1 fd can be passed to qemu along with a command".
            let message = format!("{} descriptors, libvirt passes on at most one a command", fds.len());
            return Err(LibvirtError { code: 8, domain: 10, message }.refused(&name));
        }
        let limit = self.connection.limits().command;
        let deadline = Instant::now() + limit;
        let (answer, receiver) = oneshot::channel();
        let request = Request { name: name.clone(), command: command.to_string(), fds, deadline, answer };
        let closed = || QmpError::Closed { peer: self.peer() };
        self.queue.send(request).map_err(|_| closed())?;
        match timeout_at(deadline, receiver).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(closed()),
            Err(_) => Err(QmpError::Timeout { command: name, limit }),
        }
    }
}

impl Monitor for LibvirtMonitor {
    fn call(&self, command: Value, fds: Vec<OwnedFd>) -> BoxFuture<'_, Result<Value, QmpError>> {
        self.enqueue(command, fds).boxed()
    }

    fn peer(&self) -> String {
        self.domain.name.clone()
    }
}

async fn run_in_order(
    connection: Arc<LibvirtConnection>,
    domain: Domain,
    mut requests: mpsc::UnboundedReceiver<Request>,
) {
    while let Some(request) = requests.recv().await {
        let Request { name, command, fds, deadline, answer } = request;
        // Its caller has been told that nobody knows; running it much later would be the worst of the possible ends.
        if Instant::now() >= deadline {
            continue;
        }
        let limit = connection.limits().command;
        let timed_out = || QmpError::Timeout { command: name.clone(), limit };
        let run = run(&connection, &domain, &name, &command, fds);
        let result = timeout_at(deadline, run).await.unwrap_or_else(|_| Err(timed_out()));
        // The caller may be gone; the command has run all the same.
        let _ = answer.send(result);
    }
}

async fn run(
    connection: &LibvirtConnection,
    domain: &Domain,
    name: &str,
    command: &str,
    fds: Vec<OwnedFd>,
) -> Result<Value, QmpError> {
    same_run(connection, domain).await?;
    let procedure = if fds.is_empty() { MONITOR_COMMAND } else { MONITOR_COMMAND_WITH_FILES };
    let mut arguments = Encoder::new();
    domain
        .encode(&mut arguments)
        .and_then(|encoder| encoder.string(command, MAX_STRING))
        .map_err(|error| refused_argument(name, &error))?
        // Flags: QMP, not HMP.
        .u32(0);
    let answer = match connection.call(procedure, arguments, fds, connection.limits().command).await {
        Ok(answer) => connection.decode(procedure, &answer, |d| d.string(MAX_STRING).map(str::to_owned))?,
        Err(CallError::Transport(error)) => return Err(error),
        Err(CallError::Libvirt(error)) => {
            // "domain is not running", "End of file from qemu monitor" and the like: one error for a QEMU that is gone.
            same_run(connection, domain).await?;
            return Err(not_run(name, error));
        }
    };
    decode_reply(name, &answer)
}

/// Fails with [`QmpError::Closed`] unless the domain still has the QEMU process that it had.
async fn same_run(connection: &LibvirtConnection, domain: &Domain) -> Result<(), QmpError> {
    let now = connection.find_by_uuid(domain.uuid).await?;
    let why = match now {
        Some(now) if now.id == domain.id => return Ok(()),
        Some(now) if now.id.is_some() => "was restarted",
        Some(_) => "is not running any more",
        None => "is gone",
    };
    Err(QmpError::Closed { peer: format!("the QEMU of domain '{}', which {why},", domain.name.escape_debug()) })
}

/// What libvirt's error means. Most say that the command did not run (a wrong state, a lock that another job holds, no
/// access). With these it may have: libvirt got into trouble with the monitor or the answer.
fn not_run(name: &str, error: LibvirtError) -> QmpError {
    if !matches!(error.code, ERR_INTERNAL | ERR_OPERATION_FAILED | ERR_SYSTEM | ERR_RPC) {
        return error.refused(name);
    }
    let LibvirtError { code, domain, message } = error;
    let hint = "libvirt refuses answers over 4 MiB or deeply nested ones";
    let text = format!("libvirt could not pass it on: {message} (libvirt error {code}, domain {domain}; {hint})");
    QmpError::Decode { command: name.to_owned(), source: serde_json::Error::custom(text) }
}

/// Reads QEMU's reply. libvirt passes it on as it came, errors too (`qemuMonitorJSONArbitraryCommand` does not look).
pub(super) fn decode_reply(name: &str, reply: &str) -> Result<Value, QmpError> {
    let decode = |source| QmpError::Decode { command: name.to_owned(), source };
    let mut reply = codec::parse(reply).map_err(decode)?;
    if let Some(error) = reply.get("error") {
        let text = |key: &str| printable(error.get(key).and_then(Value::as_str).unwrap_or("(no text)"), 2000);
        return Err(QmpError::Refused {
            command: name.to_owned(),
            class: ErrorClass::from_wire(&text("class")),
            description: text("desc"),
        });
    }
    let value = reply.get_mut("return").map(Value::take);
    value.ok_or_else(|| decode(serde_json::Error::custom("neither a return nor an error")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::libvirt::libvirt_code;
    use serde_json::json;

    #[test]
    fn a_reply_reads_as_on_a_socket() {
        assert_eq!(decode_reply("x", r#"{"return":{"a":1},"id":"libvirt-1"}"#).unwrap(), json!({"a": 1}));
        let error = r#"{"id":"libvirt-2","error":{"class":"DeviceNotActive","desc":"Block job 'x' not found"}}"#;
        let error = decode_reply("block-job-cancel", error).unwrap_err();
        assert!(error.is_not_found(), "{error:?}");
        for reply in ["", "[]", "{}", "{\"return\":"] {
            assert!(matches!(decode_reply("x", reply), Err(QmpError::Decode { .. })), "{reply}");
        }
    }

    #[test]
    fn an_error_after_which_the_command_may_have_run_is_no_refusal() {
        let error = |code| LibvirtError { code, domain: 10, message: "text".into() };
        assert_eq!(libvirt_code(&not_run("x", error(68))), Some((68, 10)));
        for code in [1, 9, 38, 39] {
            assert!(matches!(not_run("x", error(code)), QmpError::Decode { .. }), "{code}");
        }
    }
}
