//! Freezing with the real guest agent, by its socket and through libvirt.

use crate::{
    bed::{
        cli::Cli,
        disk::{Bus, DiskSpec},
        flavour::Flavour,
        vm::Vm,
    },
    libvirt_daemon::{Boot, Disk, LibvirtDaemon},
};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Waits until the agent in the guest answers, by trying a backup that requires it.
fn backup_when_agent_answers(backup: impl Fn() -> Cli) -> Value {
    let begun = Instant::now();
    loop {
        let outcome = backup().run();
        if outcome.status.success() {
            return outcome.json();
        }
        let reason = outcome.json::<Value>()["error"]["reason"].clone();
        assert_eq!(reason, "QuiesceFailed", "{}", outcome.stderr);
        assert!(begun.elapsed() < Duration::from_secs(120), "no guest agent answers: {}", outcome.stderr);
    }
}

#[test]
fn file_systems_are_frozen_at_the_point_in_time_alone() {
    let vm = Vm::builder(Flavour::Next)
        .disk(DiskSpec::new("fs", 64 << 20).bus(Bus::VirtioBlk { iothread: true }))
        .agent(true)
        .start();
    let mut writer = vm.writer();
    writer.size("fs");
    let target = tempfile::tempdir().expect("a directory");
    let backup = |quiesce: &str| {
        let backup = Cli::new(["backup", "--vm", "web", "-o", "json", "--quiesce", quiesce, "--qmp"]);
        let backup = backup.arg(vm.qmp_socket()).arg("--guest-agent").arg(vm.agent_socket());
        backup.arg("--fleece-dir").arg(vm.fleece_directory()).arg("--qcow2-dir").arg(target.path())
    };
    let report = backup_when_agent_answers(|| backup("require"));
    assert_eq!(report["quiesce"]["state"], "frozen", "{report}");
    assert_eq!(report["quiesce"]["file_systems"], 1, "{report}");
    // A tool that is killed right behind the freeze: the guardian thaws, and the next backup freezes again.
    for point in [8, 9, 10, 11, 12] {
        let outcome = backup("require").env("VIRT_FLEECE_TEST_KILL_AT", point.to_string()).run();
        assert!(!outcome.status.success(), "point {point} was not reached");
        let report = backup_when_agent_answers(|| backup("require"));
        assert_eq!(report["quiesce"]["file_systems"], 1, "after a kill at point {point}: {report}");
    }
    let never: Value = backup("never").json();
    assert_eq!(never["quiesce"]["state"], "not_frozen");
}

#[test]
fn a_backup_through_libvirt_freezes_too_and_goes_on_incrementally() {
    for flavour in [Flavour::Qemu10, Flavour::Allowlist] {
        assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
        let daemon = LibvirtDaemon::start();
        let disk = daemon.raw_file("fs", 64 << 20);
        let xml = daemon.domain_xml(
            "ns_web",
            &flavour.binary(),
            &[Disk { volume: "fs".into(), file: disk.clone(), format: "raw", ..disk_on_virtio() }],
            Some(&Boot::guest()),
            &["virtfleece.writer", "org.qemu.guest_agent.0"],
        );
        daemon.define_and_start(&xml);
        let target = tempfile::tempdir().expect("a directory");
        let fleece = tempfile::tempdir().expect("a directory");
        let backup = || {
            let backup = Cli::new(["backup", "--domain", "ns_web", "-o", "json", "--quiesce", "require", "--libvirt"]);
            let backup = backup.arg(daemon.socket()).arg("--fleece-dir").arg(fleece.path().join("f"));
            backup.arg("--qcow2-dir").arg(target.path())
        };
        let full = backup_when_agent_answers(backup);
        assert_eq!(full["quiesce"]["state"], "frozen", "{flavour:?}: {full}");
        let incremental: Value = backup().json();
        assert!(incremental["volumes"][0].get("parent").is_some(), "{flavour:?}: {incremental}");
        let to = tempfile::tempdir().expect("a directory");
        Cli::new(["restore", "--qcow2-dir"]).arg(target.path()).arg("--output").arg(to.path()).run().success();
        daemon.virsh(&["destroy", "ns_web"]);
        let (restored, now) = (std::fs::read(to.path().join("fs.raw")), std::fs::read(&disk));
        assert!(restored.expect("restored") == now.expect("the disk"), "{flavour:?}: the restored disk differs");
    }
}
