//! Backups that are cut short: by users, by migrations, by SIGKILL.

use super::{BACKUP_LIMIT, DISKS, Operator, stream};
use crate::{bed::flavour::Flavour, node::Launcher};
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

fn is_reading(backup: &Value) -> bool {
    backup["status"]["run"]["state"] == "Reading"
}

#[test]
fn an_agent_that_is_killed_is_followed_by_one_that_cleans_up() {
    let mut operator = Operator::start(&["node-a"]);
    let launcher = running(&operator);
    operator.back_up("prod", "first", "web", &json!({}));
    operator.until("prod", "first", BACKUP_LIMIT, "claimed", |it| it["status"]["run"]["state"].is_string());
    operator.nodes[0].kill_agent();
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
    operator.nodes[0].kubelet().hold(true);
    operator.back_up("prod", "first", "web", &json!({}));
    operator.until("prod", "first", BACKUP_LIMIT, "preparing", |it| it["status"]["phase"] == "Preparing");
    operator.admin().patch(&["-n", "prod", "vfb", "first"], &json!({"spec": {"cancel": true}}));
    operator.nodes[0].kubelet().hold(false);
    operator.wait("prod", "vfb/first", "Failed", BACKUP_LIMIT);
    let backup = operator.backup("prod", "first");
    assert_eq!(backup["status"]["reason"], "Cancelled", "{backup:#}");
    assert_eq!(launcher.leftovers(), Vec::<String>::new());
}

#[test]
fn a_migration_ends_the_session_within_a_second() {
    let operator = Operator::start(&["node-a"]);
    let launcher = running(&operator);
    // A mover that stands still keeps the session open for as long as this takes.
    operator.back_up("prod", "first", "web", &json!({}));
    let backup = operator.until("prod", "first", BACKUP_LIMIT, "reading", is_reading);
    let mover = backup["status"]["assignment"]["mover"]["name"].as_str().expect("a mover").to_owned();
    let pid = operator.nodes[0].kubelet().pid_of("prod", &mover);
    let Some(pid) = pid.and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) else {
        panic!("the backup was over too soon: {backup:#}");
    };
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
    operator.admin().run(["-n", "prod", "delete", "vmim", "move"]);
    let backup = operator.complete("prod", "first");
    assert_eq!(backup["status"]["attempts"], 2, "{backup:#}");
}
