//! Backups that are cut short: by users, by migrations, by SIGKILL.

use super::{BACKUP_LIMIT, DISKS, Operator, stream};
use crate::{
    bed::{
        flavour::Flavour,
        s3_proxy::{Effect, Fault, Stage},
    },
    node::Launcher,
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A VM that writes slowly, with a first backup behind it.
fn running(operator: &Operator) -> Launcher {
    operator.tenant("prod");
    let launcher = Launcher::start(&operator.cluster, &operator.nodes[0], Flavour::Allowlist, ("prod", "web"), &DISKS);
    let names: Vec<&str> = DISKS.iter().map(|disk| disk.name).collect();
    launcher.writer().start(&stream(5), 500, &names);
    launcher
}

/// A backup whose session stays open: the bucket takes no chunks until the proxy's faults are cleared.
fn stalled(operator: &Operator, name: &str) -> Value {
    operator.proxy.inject(Fault::new(Effect::Stall(Stage::Before)).method("PUT").target("/chunks/"));
    operator.back_up("prod", name, "web", &json!({}));
    operator.until("prod", name, BACKUP_LIMIT, "reading", |it| it["status"]["run"]["state"] == "Reading")
}

#[test]
fn an_agent_that_is_killed_is_followed_by_one_that_cleans_up() {
    let mut operator = Operator::start(&["node-a"]);
    let launcher = running(&operator);
    stalled(&operator, "first");
    operator.nodes[0].kill_agent();
    assert!(!launcher.leftovers().is_empty(), "a session was open");
    operator.proxy.clear();
    operator.nodes[0].start_agent();
    let backup = operator.complete("prod", "first");
    assert_eq!(launcher.leftovers(), Vec::<String>::new(), "{}", operator.logs());
    assert!(backup["status"]["attempts"].as_i64() >= Some(1), "{backup:#}");
    operator.back_up("prod", "second", "web", &json!({}));
    let backup = operator.complete("prod", "second");
    assert_eq!(backup["status"]["type"], "Incremental", "{backup:#}\n{}", operator.logs());
}

#[test]
fn a_cancelled_backup_leaves_nothing() {
    let operator = Operator::start(&["node-a"]);
    let launcher = running(&operator);
    stalled(&operator, "first");
    operator.admin().patch(&["-n", "prod", "vfb", "first"], &json!({"spec": {"cancel": true}}));
    operator.wait("prod", "vfb/first", "Failed", BACKUP_LIMIT);
    let backup = operator.backup("prod", "first");
    assert_eq!(backup["status"]["reason"], "Cancelled", "{backup:#}");
    assert_eq!(launcher.leftovers(), Vec::<String>::new());
}

#[test]
fn a_migration_ends_the_session_within_a_second() {
    let operator = Operator::start(&["node-a"]);
    let launcher = running(&operator);
    let backup = stalled(&operator, "first");
    let mover = backup["status"]["assignment"]["mover"]["name"].as_str().expect("a mover").to_owned();
    // Nor does the mover help: it stands still.
    let pid = operator.nodes[0].kubelet().pid_of("prod", &mover).expect("a mover that runs");
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopping the mover");
    assert!(!launcher.leftovers().is_empty(), "a session is open");
    operator.admin().apply(
        &json!({
            "apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstanceMigration",
            "metadata": {"name": "move", "namespace": "prod"}, "spec": {"vmiName": "web"},
        })
        .to_string(),
    );
    let begun = Instant::now();
    while !launcher.leftovers().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(5), "the session stays: {}", operator.logs());
    }
    eprintln!("the session was gone {} ms behind the migration", begun.elapsed().as_millis());
    let aborted = operator.until("prod", "first", BACKUP_LIMIT, "waiting", |it| {
        it["status"]["phase"] == "Pending" && it["status"]["run"]["state"] == "Aborted"
    });
    assert_eq!(aborted["status"]["run"]["reason"], "Migrating", "{aborted:#}");
    operator.proxy.clear();
    operator.admin().run(["-n", "prod", "delete", "vmim", "move"]);
    let backup = operator.complete("prod", "first");
    assert_eq!(backup["status"]["attempts"], 2, "{backup:#}");
}
