//! What others do to the VM while a backup runs: none of it spoils the backup or leaves anything behind.

use super::{INCREMENTAL, assert_is_now, assert_kinds, engines, kinds, machine, scene, wait_for_exports, write_all};
use crate::{
    bed::{
        cli::{Cli, Running},
        control::Control,
        disk::{Bus, DiskSpec, Format, read_image},
        flavour::{Flavour, tool},
    },
    scene::{Scene, bitmap, id},
};
use serde_json::{Value, json};
use std::{
    process::Command,
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;
/// What the disks hold at the point in time.
const THEN: u8 = 6;

/// A VM with a backup, changed since on its whole disks, and a second backup under way that lasts two seconds.
fn under_way(flavour: Flavour, engine: &str) -> (Scene, Control, Running) {
    let disk = |volume| DiskSpec::new(volume, 4 * MIB);
    let scene = scene(
        machine(flavour)
            .disk(disk("root").bus(Bus::VirtioBlk { iothread: true }))
            .disk(disk("data").format(Format::Qcow2).bus(Bus::ScsiHd { iothread: true })),
    );
    let mut control = scene.vm.control();
    write_all(&scene, &mut control, 5, 0);
    scene.backup().arg("--engine").arg(engine).run().success();
    for volume in ["root", "data"] {
        scene.vm.io(&mut control, volume, &format!("write -P {THEN} 0 4M"));
        scene.vm.io(&mut control, volume, "flush");
    }
    let backup = scene.backup().arg("--engine").arg(engine).arg("--bandwidth-limit").arg("4MiB/s");
    let running = backup.spawn();
    wait_for_exports(&mut control, 2);
    (scene, control, running)
}

/// It ends well, and is what the disks were.
fn ends_as_it_was(scene: &Scene, running: Running) -> Value {
    let report: Value = running.finish().success().json();
    assert_kinds(&report, &[("root", INCREMENTAL), ("data", INCREMENTAL)]);
    let to = tempfile::tempdir().expect("a directory");
    let restore = Cli::new(["restore", "--backup", &id(&report), "--qcow2-dir"]).arg(scene.target.path());
    restore.arg("--output").arg(to.path()).run().success();
    for volume in ["root", "data"] {
        let bytes = std::fs::read(to.path().join(format!("{volume}.raw"))).expect("a disk");
        assert_eq!(bytes.iter().position(|byte| *byte != THEN), None, "{volume} is no instant");
    }
    report
}

#[test]
fn a_reset_and_a_pause_change_nothing() {
    for flavour in Flavour::all() {
        for engine in engines(flavour) {
            let (scene, mut control, running) = under_way(flavour, engine);
            control.run("system_reset", &json!({}));
            write_all(&scene, &mut control, 7, 1000);
            control.run("stop", &json!({}));
            let report = ends_as_it_was(&scene, running);
            assert_eq!(control.status(), "paused", "{flavour:?} {engine}: the user's pause was ended");
            control.run("cont", &json!({}));
            drop(control);
            scene.assert_clean(Some(&bitmap(&report)));
        }
    }
}

/// An external snapshot puts an image on top: the disk keeps it, and its next backup is full, since what records is below.
/// Where the fleece itself is read, QEMU refuses it until the backup ends.
#[test]
fn an_external_snapshot_stays_in_place() {
    for flavour in Flavour::all() {
        for engine in engines(flavour) {
            let (scene, mut control, running) = under_way(flavour, engine);
            let overlay = scene.vm.directory().join("overlay.qcow2");
            let mut create = Command::new(tool("QEMU_IMG"));
            create.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b"]).arg(&scene.vm.disk("root").path);
            assert!(create.arg(&overlay).arg((4 * MIB).to_string()).status().expect("qemu-img").success());
            let file = json!({"driver": "file", "filename": overlay});
            let node = json!({"driver": "qcow2", "node-name": "overlay", "file": file, "backing": null});
            control.run("blockdev-add", &node);
            let base = scene.vm.disk("root").format_node();
            let snapshot = json!({"node": base, "overlay": "overlay"});
            if flavour == Flavour::Allowlist {
                // The fleece that is read stands on the disk, and QEMU changes nothing under it.
                let refusal = control.execute("blockdev-snapshot", &snapshot).expect_err("a snapshot");
                assert!(refusal.description.contains("busy"), "{refusal}");
                ends_as_it_was(&scene, running);
                control.run("blockdev-snapshot", &snapshot);
                continue;
            }
            control.run("blockdev-snapshot", &snapshot);
            scene.vm.io(&mut control, "root", "write -P 8 1M 1M");
            ends_as_it_was(&scene, running);

            let blocks = control.list("query-block");
            let device = scene.vm.disk("root").device();
            let root = blocks.iter().find(|block| block["qdev"].as_str() == device.as_deref()).expect("the device");
            assert_eq!(root["inserted"]["node-name"], "overlay", "{flavour:?} {engine}: the snapshot is gone");
            scene.vm.io(&mut control, "data", "write -P 8 1M 1M");
            let next: Value = scene.backup().arg("--engine").arg(engine).json();
            assert_eq!(kinds(&next)[0].1, "BitmapMissing", "{flavour:?} {engine}: {next}");
            assert_eq!(kinds(&next)[1].1, INCREMENTAL, "{flavour:?} {engine}: {next}");
            scene.vm.io(&mut control, "root", "flush");
            let to = tempfile::tempdir().expect("a directory");
            let restore = Cli::new(["restore", "--backup", &id(&next), "--qcow2-dir"]).arg(scene.target.path());
            restore.arg("--output").arg(to.path()).run().success();
            let restored = std::fs::read(to.path().join("root.raw")).expect("a disk");
            assert!(restored == read_image(&overlay), "{flavour:?} {engine}: root differs");
            assert_eq!(restored[MIB as usize], 8, "{flavour:?} {engine}: the overlay was not written");
        }
    }
}

/// A migration fails at its last step, as long as the backup holds the disks: the VM stays, and so does the backup.
#[test]
fn a_migration_fails_and_the_vm_stays() {
    for flavour in Flavour::all() {
        for engine in engines(flavour) {
            let (scene, mut control, running) = under_way(flavour, engine);
            control.run("migrate", &json!({"uri": "exec:cat >/dev/null"}));
            let begun = Instant::now();
            let status = loop {
                let status = control.run("query-migrate", &json!({}))["status"].clone();
                if status == "failed" || status == "completed" {
                    break status;
                }
                assert!(begun.elapsed() < Duration::from_secs(60), "the migration does not end: {status}");
                std::thread::sleep(Duration::from_millis(20));
            };
            println!("{flavour:?} {engine}: migration {status} after {:?}, VM {}", begun.elapsed(), control.status());
            let outcome = running.finish();
            println!("{}", outcome.stderr);
            assert_eq!(status, "failed", "{flavour:?} {engine}");
            assert_eq!(control.status(), "running", "{flavour:?} {engine}");
            assert!(outcome.status.success(), "{flavour:?} {engine}: {}", outcome.stderr);
            write_all(&scene, &mut control, 9, 2000);
            let next: Value = scene.backup().arg("--engine").arg(engine).json();
            assert_kinds(&next, &[("root", INCREMENTAL), ("data", INCREMENTAL)]);
            assert_is_now(&scene, &mut control, &next);
            drop(control);
            scene.assert_clean(Some(&bitmap(&next)));
        }
    }
}
