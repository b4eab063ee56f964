//! Freezing with the real guest agent, by its socket and through libvirt.

use crate::{
    bed::{
        cli::Cli,
        disk::{Bus, DiskSpec},
        flavour::Flavour,
        oracle::Replay,
        point_in_time::PointInTime,
        vm::Vm,
        writer::Writer,
    },
    libvirt_daemon::{self, Boot, Disk, LibvirtDaemon},
    scene::{SIZES, VOLUMES, stream},
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
    for point in [10, 11, 12, 13, 14] {
        let outcome = backup("require").env("VIRT_FLEECE_TEST_KILL_AT", point.to_string()).run();
        assert!(!outcome.status.success(), "point {point} was not reached");
        let report = backup_when_agent_answers(|| backup("require"));
        assert_eq!(report["quiesce"]["file_systems"], 1, "after a kill at point {point}: {report}");
    }
    let never: Value = backup("never").json();
    assert_eq!(never["quiesce"]["state"], "not_frozen");
}

#[test]
fn a_backup_through_libvirt_is_a_frozen_instant_and_goes_on_incrementally() {
    for flavour in [Flavour::Qemu10, Flavour::Allowlist] {
        assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
        let daemon = LibvirtDaemon::start();
        let stream = stream(11);
        let disk = |volume: &str, bytes: u64, bus| Disk {
            volume: volume.into(),
            file: daemon.raw_file(volume, bytes),
            format: "raw",
            bus,
            serial: volume.into(),
        };
        let disks = [
            disk(VOLUMES[0], SIZES[0], libvirt_daemon::Bus::Virtio),
            disk(VOLUMES[1], SIZES[1], libvirt_daemon::Bus::Scsi),
            disk("fs", 64 << 20, libvirt_daemon::Bus::Virtio),
        ];
        let ports = ["virtfleece.writer", "org.qemu.guest_agent.0"];
        let xml = daemon.domain_xml("ns_web", &flavour.binary(), &disks, Some(&Boot::guest()), &ports);
        daemon.define_and_start(&xml);
        let mut writer = Writer::connect(&daemon.channel("ns_web", ports[0]));
        writer.start(&stream, 0, &VOLUMES);
        let target = tempfile::tempdir().expect("a directory");
        let fleece = tempfile::tempdir().expect("a directory");
        let backup = || {
            let backup = Cli::new(["backup", "--domain", "ns_web", "-o", "json", "--quiesce", "require", "--libvirt"]);
            let backup = backup.arg(daemon.socket()).arg("--fleece-dir").arg(fleece.path().join("f"));
            backup.arg("--vm").arg("web").arg("--qcow2-dir").arg(target.path())
        };
        let mut replay = Replay::new(&stream);
        for round in 0..3 {
            let before = writer.status();
            let report = backup_when_agent_answers(backup);
            let after = writer.status();
            assert_eq!(report["quiesce"]["state"], "frozen", "{flavour:?}: {report}");
            assert_eq!(report["volumes"][0].get("parent").is_some(), round > 0, "{flavour:?}: {report}");
            let to = tempfile::tempdir().expect("a directory");
            Cli::new(["restore", "--qcow2-dir"]).arg(target.path()).arg("--output").arg(to.path()).run().success();
            let images =
                VOLUMES.map(|volume| std::fs::read(to.path().join(format!("{volume}.raw"))).expect("restored"));
            let found =
                PointInTime::find_after(&images, &replay).unwrap_or_else(|error| panic!("{flavour:?}: {error}"));
            found.assert_between(&before.writes, &after.writes);
            replay.advance_all(&found.numbers());
        }
        let done = writer.stop();
        assert_eq!(done.errors, 0, "the guest saw an error: {done:?}");
    }
}
