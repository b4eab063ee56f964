//! What happens to disks and to the VM while a backup runs.

use super::{
    INCREMENTAL, after_restart, assert_is_now, assert_kinds, complete_backups, engines, kinds, machine, scene,
    wait_for_exports, write_all,
};
use crate::{
    bed::{
        agent::FakeAgent,
        cli::{Cli, Outcome},
        disk::{Bus, DiskSpec, Format},
        flavour::Flavour,
        vm::Vm,
    },
    scene::{Scene, bitmap},
};
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

const MIB: u64 = 1 << 20;

/// A backup that lasts two seconds: 4 MiB on each of two disks.
fn slow_backup(scene: &Scene, fleece: &Path) -> Cli {
    backup_in(scene, fleece).arg("--bandwidth-limit").arg("4MiB/s")
}

/// A backup whose journal outlives the VM.
fn backup_in(scene: &Scene, fleece: &Path) -> Cli {
    let backup = scene.command_in("backup", fleece).arg("--vm").arg("web").arg("-o").arg("json");
    backup.arg("--qcow2-dir").arg(scene.target.path())
}

/// It failed, says so and why, and nothing looks like a backup that was none before.
fn assert_failed(outcome: &Outcome, scene: &Scene, backups: usize) {
    assert_eq!(outcome.status.code(), Some(4), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("error"), "{}", outcome.stderr);
    assert_eq!(complete_backups(scene.target.path()), backups);
}

/// The device goes, what was started on its nodes goes on: the backup is an instant of both disks all the same.
#[test]
fn a_disk_unplugged_during_a_backup_harms_nothing() {
    for flavour in Flavour::all() {
        for engine in engines(flavour) {
            let disk = |volume| DiskSpec::new(volume, 4 * MIB + 512).bus(Bus::ScsiHd { iothread: true });
            let mut scene = scene(machine(flavour).disk(disk("root")).disk(disk("data").format(Format::Qcow2)));
            let mut control = scene.vm.control();
            for volume in ["root", "data"] {
                scene.vm.io(&mut control, volume, "write -P 5 0 4M");
            }
            scene.backup().arg("--engine").arg(engine).run().success();
            for volume in ["root", "data"] {
                scene.vm.io(&mut control, volume, "write -P 6 0 4M");
                scene.vm.io(&mut control, volume, "flush");
            }
            let running = slow_backup(&scene, &scene.vm.fleece_directory()).arg("--engine").arg(engine).spawn();
            wait_for_exports(&mut control, 2);
            scene.vm.unplug(&mut control, "data");
            scene.vm.io(&mut control, "root", "write -P 7 0 1M");
            // What libvirt does next: it is refused as long as the backup reads, and harms nothing.
            let node = scene.vm.disk("data").format_node();
            control.execute("blockdev-del", &json!({"node-name": node})).expect_err("the node is in use");
            let report: Value = running.finish().success().json();
            assert_kinds(&report, &[("root", INCREMENTAL), ("data", INCREMENTAL)]);
            let to = tempfile::tempdir().expect("a directory");
            let restore = Cli::new(["restore", "--qcow2-dir"]).arg(scene.target.path()).arg("--output");
            restore.arg(to.path()).run().success();
            for volume in ["root", "data"] {
                let bytes = std::fs::read(to.path().join(format!("{volume}.raw"))).expect("a disk");
                let differs = bytes[..4 << 20].iter().position(|byte| *byte != 6);
                assert_eq!(differs, None, "{flavour:?} {engine}: {volume} is no instant");
            }
            // Whoever unplugged it can remove its nodes: nothing of ours holds them.
            scene.vm.forget(&mut control, "data");
            write_all(&scene, &mut control, 8, 1000);
            let next: Value = scene.backup().arg("--engine").arg(engine).json();
            assert_kinds(&next, &[("root", INCREMENTAL)]);
            assert_is_now(&scene, &mut control, &next);
            drop(control);
            scene.assert_clean(Some(&bitmap(&next)));
        }
    }
}

/// QEMU ends in order while a backup runs, so qcow2 stores both bitmaps: the next run merges them and goes on.
#[test]
fn a_vm_that_ends_during_a_backup_goes_on_after_its_restart() {
    for flavour in Flavour::all() {
        for engine in engines(flavour) {
            let images = tempfile::tempdir().expect("a directory");
            let fleece = images.path().join("fleece");
            let disk = |volume| DiskSpec::new(volume, 4 * MIB + 512).in_directory(images.path());
            // The UUID is what the VM is known by after the restart, when its monitor is elsewhere.
            let vm = machine(flavour).disk(disk("root")).disk(disk("data").format(Format::Qcow2));
            let vm = vm.arguments(&["-uuid", "6a4cf5c0-3a8e-4f0a-9e43-0d6a6b1f2c11"]);
            let mut scene = scene(vm.clone());
            let mut control = scene.vm.control();
            write_all(&scene, &mut control, 1, 0);
            backup_in(&scene, &fleece).arg("--engine").arg(engine).run().success();
            for volume in ["root", "data"] {
                scene.vm.io(&mut control, volume, "write -P 2 0 3M");
            }
            let running = slow_backup(&scene, &fleece).arg("--engine").arg(engine).spawn();
            wait_for_exports(&mut control, 2);
            // Recorded by the new bitmap alone.
            write_all(&scene, &mut control, 3, 3500);
            drop(control);
            scene.vm.quit();
            assert_failed(&running.finish(), &scene, 1);

            let scene = after_restart(scene, vm);
            let mut control = scene.vm.control();
            write_all(&scene, &mut control, 4, 1000);
            let next: Value = backup_in(&scene, &fleece).arg("--engine").arg(engine).json();
            assert_kinds(&next, &[("root", "BitmapMissing"), ("data", INCREMENTAL)]);
            assert_is_now(&scene, &mut control, &next);
            scene.vm.assert_clean(&mut control, &[&bitmap(&next)]);
        }
    }
}

#[test]
fn a_guest_that_powers_off_during_a_backup_ends_it() {
    let images = tempfile::tempdir().expect("a directory");
    let disk = |volume| DiskSpec::new(volume, 32 * MIB).in_directory(images.path());
    let builder = |guest| {
        let vm = Vm::builder(Flavour::Next).guest(guest);
        vm.disk(disk("root").bus(Bus::VirtioBlk { iothread: true })).disk(disk("data").format(Format::Qcow2))
    };
    let mut scene = scene(builder(true));
    let mut writer = scene.vm.writer();
    for volume in ["root", "data"] {
        writer.write(volume, 0, 8 << 20, 9);
    }
    let mut control = scene.vm.control();
    let fleece = scene.vm.fleece_directory();
    let running = backup_in(&scene, &fleece).arg("--bandwidth-limit").arg("256KiB/s").spawn();
    wait_for_exports(&mut control, 2);
    control.run("system_powerdown", &json!({}));
    let status = scene.vm.wait_exit(Duration::from_secs(60));
    assert!(status.success(), "QEMU does not end in order: {status}");
    assert_failed(&running.finish(), &scene, 0);
    drop((control, writer));

    let scene = after_restart(scene, builder(false));
    let mut control = scene.vm.control();
    let next: Value = scene.backup().json();
    assert_kinds(&next, &[("root", "FirstBackup"), ("data", "FirstBackup")]);
    assert_is_now(&scene, &mut control, &next);
}

/// Nothing is frozen, since nothing is written and nobody could thaw, and the VM is left as it was.
#[test]
fn a_paused_vm_is_backed_up_and_stays_paused() {
    for flavour in Flavour::all() {
        for engine in engines(flavour) {
            let scene = scene(
                machine(flavour)
                    .disk(DiskSpec::new("root", 2 * MIB + 512).bus(Bus::VirtioBlk { iothread: true }))
                    .disk(DiskSpec::new("data", 2 * MIB).format(Format::Qcow2)),
            );
            let mut control = scene.vm.control();
            let agent = FakeAgent::start();
            let mut last = String::new();
            for (round, state) in ["running", "paused", "paused", "running"].into_iter().enumerate() {
                let command = if state == "paused" { "stop" } else { "cont" };
                control.run(command, &json!({}));
                // A stopped VM's disks are inactive for nobody: `qemu-io` writes to them like a device's last requests.
                write_all(&scene, &mut control, u8::try_from(round).expect("a byte") + 1, 300 * round as u64);
                control.clear_events();
                let mut backup = scene.backup().arg("--engine").arg(engine).arg("--quiesce").arg("auto");
                if state == "paused" {
                    // It would answer, which no agent in a paused guest does.
                    backup = backup.arg("--guest-agent").arg(agent.socket());
                }
                let report: Value = backup.json();
                assert_eq!(control.status(), state, "{flavour:?} {engine}");
                assert_eq!(report["quiesce"]["state"], "not_frozen", "{report}");
                if state == "paused" {
                    let why = report["quiesce"]["why"].as_str().unwrap_or_default();
                    assert!(why.contains("paused"), "{report}");
                    assert!(!agent.was_asked_to_freeze(), "{flavour:?} {engine}");
                    // Not even for a moment.
                    assert_eq!(control.wait_event("RESUME", Duration::from_millis(1)), None, "{flavour:?} {engine}");
                }
                assert_eq!(kinds(&report)[1].1, if round == 0 { "FirstBackup" } else { INCREMENTAL });
                assert_is_now(&scene, &mut control, &report);
                last = bitmap(&report);
            }
            drop(control);
            scene.assert_clean(Some(&last));
        }
    }
}

/// QEMU was started with `-S` and waits for its first `cont`.
#[test]
fn a_vm_that_was_not_started_yet_is_backed_up_and_still_waits() {
    for (flavour, engine) in [(Flavour::Qemu10, "filter"), (Flavour::Next, "job")] {
        let scene = scene(machine(flavour).arguments(&["-S"]).disk(DiskSpec::new("root", 2 * MIB)));
        let mut control = scene.vm.control();
        for (byte, kind) in [(1, "FirstBackup"), (2, INCREMENTAL)] {
            write_all(&scene, &mut control, byte, 300 * u64::from(byte));
            let report: Value = scene.backup().arg("--engine").arg(engine).json();
            assert_kinds(&report, &[("root", kind)]);
            assert_is_now(&scene, &mut control, &report);
            assert_eq!(control.status(), "prelaunch", "{flavour:?} {engine}");
        }
    }
}
