//! The libvirt transport against a real session daemon, from a root client, as on a `KubeVirt` node.
#![allow(clippy::unwrap_used, reason = "tests")]

use crate::{
    bed::flavour::Flavour,
    libvirt_daemon::{Boot, Bus, Disk, LibvirtDaemon},
};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};
use virt_fleece::qmp::{
    ErrorClass, Monitor, QmpError, TimeLimits,
    libvirt::{DomainState, Driver, LibvirtConnection, LibvirtMonitor, libvirt_code},
};

const LIMITS: TimeLimits = TimeLimits { greeting: Duration::from_secs(30), command: Duration::from_secs(60) };

/// A daemon with one machine that stays in its firmware.
fn daemon() -> LibvirtDaemon {
    let daemon = LibvirtDaemon::start();
    let xml = daemon.domain_xml("ns_vm", &Flavour::Qemu10.binary(), &[], None, &["org.qemu.guest_agent.0"]);
    daemon.define_and_start(&xml);
    daemon
}

async fn connect(daemon: &LibvirtDaemon, limits: TimeLimits) -> Arc<LibvirtConnection> {
    Arc::new(LibvirtConnection::connect(&daemon.socket(), limits).await.unwrap())
}

async fn monitor(daemon: &LibvirtDaemon, limits: TimeLimits) -> LibvirtMonitor {
    let connection = connect(daemon, limits).await;
    let domain = connection.domain_by_name("ns_vm").await.unwrap();
    LibvirtMonitor::open(connection, &domain).await.unwrap()
}

async fn execute(monitor: &LibvirtMonitor, command: &str, arguments: Value) -> Result<Value, QmpError> {
    monitor.call(json!({"execute": command, "arguments": arguments}), Vec::new()).await
}

fn some_file() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

#[tokio::test]
async fn a_session_daemon_is_opened_and_its_domains_are_found() {
    let daemon = daemon();
    let connection = connect(&daemon, LIMITS).await;
    assert_eq!(connection.driver(), Driver::Session);
    let domain = connection.domain_by_name("ns_vm").await.unwrap();
    assert_eq!(connection.domain_by_uuid(domain.uuid).await.unwrap(), domain);
    assert_eq!(connection.domains().await.unwrap(), std::slice::from_ref(&domain));
    assert_eq!(connection.domain_state(&domain).await.unwrap(), DomainState::Running);

    let unknown = connection.domain_by_name("other").await.unwrap_err();
    assert_eq!(libvirt_code(&unknown), Some((42, 10)));
    assert!(unknown.to_string().contains("no domain named 'other'; it knows ns_vm"), "{unknown}");
    let uuid = "00000000-0000-0000-0000-000000000001".parse().unwrap();
    let unknown = connection.domain_by_uuid(uuid).await.unwrap_err();
    assert!(unknown.to_string().contains("it knows ns_vm"), "{unknown}");

    // The other driver, asked for by name, is refused by libvirt.
    let refused = LibvirtConnection::connect_to(&daemon.socket(), Driver::System, LIMITS).await.unwrap_err();
    assert!(refused.to_string().contains("qemu:///session"), "{refused}");
    Arc::into_inner(connection).unwrap().close().await.unwrap();
}

#[tokio::test]
async fn commands_answers_errors_and_descriptors_pass_as_on_a_socket() {
    let daemon = daemon();
    let monitor = monitor(&daemon, LIMITS).await;
    assert_eq!(monitor.peer(), "ns_vm");
    assert_eq!(execute(&monitor, "query-status", json!({})).await.unwrap()["status"], "running");

    let error = execute(&monitor, "block-job-cancel", json!({"device": "nope"})).await.unwrap_err();
    let class = |error: &QmpError| match error {
        QmpError::Refused { class, .. } => class.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(class(&error), ErrorClass::DeviceNotActive, "{error}");
    let error = execute(&monitor, "no-such-command", json!({})).await.unwrap_err();
    assert_eq!(class(&error), ErrorClass::CommandNotFound, "{error}");

    let added = json!({"execute": "add-fd", "arguments": {"fdset-id": 77, "opaque": "from the test"}});
    let reply = monitor.call(added.clone(), vec![some_file()]).await.unwrap();
    assert_eq!(reply["fdset-id"], 77);
    let sets = execute(&monitor, "query-fdsets", json!({})).await.unwrap();
    let set = sets.as_array().unwrap().iter().find(|set| set["fdset-id"] == 77).unwrap();
    assert_eq!(set["fds"][0]["opaque"], "from the test");
    let refused = monitor.call(added, vec![some_file(), some_file()]).await.unwrap_err();
    assert!(refused.to_string().contains("at most one"), "{refused}");

    // The largest answer that QEMU has.
    let schema = execute(&monitor, "query-qmp-schema", json!({})).await.unwrap();
    assert!(schema.as_array().unwrap().len() > 500);

    // libvirt takes the port of the agent, and nobody is at its other end.
    let agent = monitor.guest_ping(Duration::from_secs(1)).await.unwrap_err();
    assert_eq!(libvirt_code(&agent).map(|(code, _)| code), Some(86), "{agent}");
    let agent = monitor.fs_freeze(Duration::from_secs(30)).await.unwrap_err();
    assert_eq!(libvirt_code(&agent).map(|(code, _)| code), Some(86), "{agent}");
}

#[tokio::test]
async fn two_connections_and_many_calls_work_at_once() {
    let daemon = daemon();
    let (one, two) = (monitor(&daemon, LIMITS).await, monitor(&daemon, LIMITS).await);
    let calls = (0..40).map(|index| {
        let monitor = if index % 2 == 0 { &one } else { &two };
        async move {
            let command = if index % 3 == 0 { "query-name" } else { "query-status" };
            let reply = execute(monitor, command, json!({})).await.unwrap();
            assert!(reply.get(if index % 3 == 0 { "name" } else { "status" }).is_some(), "{reply}");
        }
    });
    futures::future::join_all(calls).await;

    // In the order in which they were polled, also when the callers leave at once.
    for id in 100..120 {
        let added = json!({"execute": "add-fd", "arguments": {"fdset-id": id}});
        let call = one.call(added, vec![some_file()]);
        assert!(futures::FutureExt::now_or_never(call).is_none());
    }
    let sets = execute(&one, "query-fdsets", json!({})).await.unwrap();
    let ours = sets.as_array().unwrap().iter().filter(|set| set["fdset-id"].as_u64() >= Some(100)).count();
    assert_eq!(ours, 20);
}

#[tokio::test]
async fn a_daemon_that_is_killed_ends_the_call_that_waits_and_its_successor_is_the_same_machine() {
    let mut daemon = daemon();
    let monitor = monitor(&daemon, LIMITS).await;
    // The daemon is stopped, so that the call certainly waits.
    kill_process(daemon.pid(), Signal::STOP).unwrap();
    let call = execute(&monitor, "query-status", json!({}));
    let (answer, ()) = tokio::join!(call, async {
        tokio::task::yield_now().await;
        daemon.kill();
    });
    let error = answer.unwrap_err();
    assert!(matches!(error, QmpError::Closed { .. }), "{error:?}");
    assert!(error.is_disconnected());
    let before = monitor.domain().clone();

    daemon.restart();
    let connection = connect(&daemon, LIMITS).await;
    let after = connection.domain_by_uuid(before.uuid).await.unwrap();
    assert_eq!(after, before);
    let monitor = LibvirtMonitor::open(connection, &after).await.unwrap();
    assert_eq!(execute(&monitor, "query-status", json!({})).await.unwrap()["status"], "running");
}

#[tokio::test]
async fn a_daemon_that_stands_still_is_a_timeout() {
    let daemon = daemon();
    let limits = TimeLimits { command: Duration::from_secs(1), ..LIMITS };
    let monitor = monitor(&daemon, LIMITS).await;
    let short = Arc::new(LibvirtConnection::connect(&daemon.socket(), limits).await.unwrap());
    let short = LibvirtMonitor::open(short, monitor.domain()).await.unwrap();
    kill_process(daemon.pid(), Signal::STOP).unwrap();
    let error = execute(&short, "query-status", json!({})).await.unwrap_err();
    assert!(matches!(&error, QmpError::Timeout { command, .. } if command == "query-status"), "{error:?}");
    kill_process(daemon.pid(), Signal::CONT).unwrap();
    assert!(execute(&monitor, "query-status", json!({})).await.is_ok());
}

#[tokio::test]
async fn a_machine_that_is_gone_or_another_is_no_refusal_but_the_end() {
    let daemon = daemon();
    let monitor = monitor(&daemon, LIMITS).await;
    // Destroyed while a command waits for QEMU, which is stopped.
    kill_process(daemon.qemu_pid("ns_vm").unwrap(), Signal::STOP).unwrap();
    let waiting = execute(&monitor, "query-status", json!({}));
    let (answer, ()) = tokio::join!(waiting, async {
        // Not for correctness: the call should have reached libvirt, and either order must end the same.
        tokio::time::sleep(Duration::from_millis(300)).await;
        daemon.virsh(&["destroy", "ns_vm"]);
    });
    let error = answer.unwrap_err();
    assert!(matches!(error, QmpError::Closed { .. }), "{error:?}");
    let error = execute(&monitor, "query-status", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("domain 'ns_vm', which is not running any more"), "{error}");

    let connection = Arc::clone(monitor.connection());
    let error = LibvirtMonitor::open(Arc::clone(&connection), monitor.domain()).await.unwrap_err();
    assert!(error.to_string().contains("domain 'ns_vm' is shut off"), "{error}");
    assert_eq!(connection.domain_state(monitor.domain()).await.unwrap(), DomainState::ShutOff);

    // The same domain with another process: the old monitor must not speak to it.
    daemon.virsh(&["start", "ns_vm"]);
    let error = execute(&monitor, "query-status", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("which was restarted"), "{error}");
    let again = LibvirtMonitor::open(connection, monitor.domain()).await.unwrap();
    assert!(execute(&again, "query-status", json!({})).await.is_ok());
}

#[tokio::test]
async fn a_socket_that_is_not_there_is_named() {
    let error = LibvirtConnection::connect("/nonexistent/libvirt-sock".as_ref(), LIMITS).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot connect to /nonexistent/libvirt-sock");
}

#[tokio::test]
async fn a_guest_is_frozen_and_thawed_and_its_disks_have_the_aliases_of_kubevirt() {
    let daemon = LibvirtDaemon::start();
    let disk = |volume: &str, bus| Disk {
        volume: volume.into(),
        file: daemon.raw_file(&format!("{volume}.raw"), 64 << 20),
        format: "raw",
        bus,
        serial: volume.into(),
    };
    let disks = [disk("fs", Bus::Virtio), disk("data", Bus::Scsi)];
    let ports = ["virtfleece.writer", "org.qemu.guest_agent.0"];
    let boot = Boot::guest();
    daemon.define_and_start(&daemon.domain_xml("ns_vm", &Flavour::Qemu10.binary(), &disks, Some(&boot), &ports));
    assert!(daemon.channel("ns_vm", "virtfleece.writer").exists());

    let monitor = monitor(&daemon, LIMITS).await;
    let blocks = execute(&monitor, "query-block", json!({})).await.unwrap();
    let devices: Vec<_> = blocks.as_array().unwrap().iter().map(|block| block["qdev"].as_str().unwrap()).collect();
    assert_eq!(devices, ["/machine/peripheral/ua-fs/virtio-backend", "ua-data"]);

    let end = Instant::now() + Duration::from_secs(180);
    while let Err(error) = monitor.guest_ping(Duration::from_secs(5)).await {
        assert!(Instant::now() < end && libvirt_code(&error).is_some_and(|(code, _)| code == 86), "{error}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let limit = Duration::from_secs(60);
    assert_eq!(monitor.fs_freeze(limit).await.unwrap(), 1, "{}", daemon.console("ns_vm"));
    let status = monitor.agent_command(&json!({"execute": "guest-fsfreeze-status"}), 10).await.unwrap();
    assert_eq!(status, "frozen");
    let again = monitor.fs_freeze(limit).await.unwrap_err();
    assert!(libvirt_code(&again).is_some(), "{again:?}");
    assert_eq!(monitor.fs_thaw(limit).await.unwrap(), 1);
    assert_eq!(monitor.fs_thaw(limit).await.unwrap(), 0);
    let unknown = monitor.agent_command(&json!({"execute": "guest-nothing"}), 10).await.unwrap_err();
    assert!(unknown.to_string().contains("guest-nothing"), "{unknown}");
}

#[tokio::test]
async fn the_other_flavours_of_qemu_start_too() {
    let daemon = LibvirtDaemon::start();
    for flavour in [Flavour::Next, Flavour::Allowlist].into_iter().filter(|flavour| flavour.available()) {
        let name = &format!("{flavour:?}").to_lowercase();
        daemon.define_and_start(&daemon.domain_xml(name, &flavour.binary(), &[], None, &[]));
        let connection = connect(&daemon, LIMITS).await;
        let domain = connection.domain_by_name(name).await.unwrap();
        let monitor = LibvirtMonitor::open(connection, &domain).await.unwrap();
        let version = execute(&monitor, "query-version", json!({})).await.unwrap();
        assert!(version["qemu"]["major"].as_u64() >= Some(10), "{version}");
    }
}
