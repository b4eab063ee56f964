//! What happens to disks, bitmaps and the VM between two backups: every volume goes on incrementally or says why not.

use super::{
    INCREMENTAL, after_restart, assert_is_now, assert_kinds, bitmaps, complete_backups, engines, machine, scene,
    write_all,
};
use crate::{
    bed::{
        agent::FakeAgent,
        control::Control,
        disk::{Bus, DiskSpec, Format},
        flavour::Flavour,
        vm::VmBuilder,
    },
    scene::{Scene, bitmap, reason},
};
use serde_json::{Value, json};
use std::io::Write as _;

const MIB: u64 = 1 << 20;

fn resize(scene: &Scene, control: &mut Control, volume: &str, size: u64) {
    let node = scene.vm.disk(volume).format_node();
    control.run("block_resize", &json!({"node-name": node, "size": size}));
}

/// None of the sizes is a multiple of a cluster.
#[test]
fn a_grown_disk_stays_incremental_and_a_shrunk_one_does_not() {
    for flavour in Flavour::all() {
        let scene = scene(
            machine(flavour)
                .disk(DiskSpec::new("root", 6 * MIB + 512))
                .disk(
                    DiskSpec::new("data", 6 * MIB + 3 * 512).format(Format::Qcow2).bus(Bus::ScsiHd { iothread: true }),
                )
                .disk(DiskSpec::new("other", 2 * MIB + 512)),
        );
        let mut control = scene.vm.control();
        write_all(&scene, &mut control, 1, 0);
        let first: Value = scene.backup().json();
        assert_kinds(&first, &[("root", "FirstBackup"), ("data", "FirstBackup"), ("other", "FirstBackup")]);

        // A disk may grow by what was there before, as a block device does, and no guest wrote it.
        let path = &scene.vm.disk("root").path;
        let mut image = std::fs::File::options().append(true).open(path).expect("an image");
        image.write_all(&vec![0x99; 3 << 20]).expect("more bytes");
        resize(&scene, &mut control, "root", 9 * MIB + 512);
        resize(&scene, &mut control, "data", 7 * MIB + 512);
        write_all(&scene, &mut control, 2, 300);
        let grown: Value = scene.backup().json();
        assert_kinds(&grown, &[("root", INCREMENTAL), ("data", INCREMENTAL), ("other", INCREMENTAL)]);
        assert_is_now(&scene, &mut control, &grown);

        // What was cut off and comes back is zeros, and is not what the last backup has there.
        resize(&scene, &mut control, "root", 5 * MIB + 512);
        resize(&scene, &mut control, "data", 5 * MIB + 7 * 512);
        write_all(&scene, &mut control, 3, 600);
        let shrunk: Value = scene.backup().json();
        assert_kinds(&shrunk, &[("root", "Shrunk"), ("data", "Shrunk"), ("other", INCREMENTAL)]);
        assert_is_now(&scene, &mut control, &shrunk);

        resize(&scene, &mut control, "root", 6 * MIB);
        write_all(&scene, &mut control, 4, 900);
        let regrown: Value = scene.backup().json();
        assert_kinds(&regrown, &[("root", INCREMENTAL), ("data", INCREMENTAL), ("other", INCREMENTAL)]);
        assert_is_now(&scene, &mut control, &regrown);
        drop(control);
        scene.assert_clean(Some(&bitmap(&regrown)));
    }
}

/// Both disks, one size after the other.
fn resize_both(scene: &Scene, control: &mut Control, sizes: &[u64]) {
    for size in sizes {
        resize(scene, control, "root", *size);
        resize(scene, control, "data", *size);
    }
}

/// A raw and a qcow2 disk of 4 MiB, full of data, with a backup.
fn full_disks_with_a_backup(flavour: Flavour) -> (Scene, Control) {
    let scene = scene(
        machine(flavour)
            .disk(DiskSpec::new("root", 4 * MIB))
            .disk(DiskSpec::new("data", 4 * MIB).format(Format::Qcow2)),
    );
    let mut control = scene.vm.control();
    for volume in ["root", "data"] {
        scene.vm.io(&mut control, volume, "write -P 7 0 4M");
    }
    scene.backup().run().success();
    (scene, control)
}

/// Resizes both disks and proves that the next backup is of this kind and right.
fn step(scene: &Scene, control: &mut Control, sizes: &[u64], expected: &[(&str, &str)]) -> Value {
    resize_both(scene, control, sizes);
    let report: Value = scene.backup().json();
    assert_kinds(&report, expected);
    assert_is_now(scene, control, &report);
    report
}

/// Cut off and grown back between two backups: the size says nothing, and QEMU's bitmaps forget what was cut off, whose
/// zeros would be in no incremental backup. The end mark tells.
#[test]
fn a_disk_that_was_shrunk_and_grown_back_is_right_all_the_same() {
    const SHRUNK: [(&str, &str); 2] = [("root", "Shrunk"), ("data", "Shrunk")];
    const BOTH: [(&str, &str); 2] = [("root", INCREMENTAL), ("data", INCREMENTAL)];
    for flavour in Flavour::all() {
        let (scene, mut control) = full_disks_with_a_backup(flavour);
        step(&scene, &mut control, &[2 * MIB, 4 * MIB], &SHRUNK);
        // Nothing was written since: what an incremental backup reads is the last granule.
        let idle = step(&scene, &mut control, &[], &BOTH);
        assert_eq!(idle["volumes"][0]["dirty_bytes"], 65_536, "{idle}");
        step(&scene, &mut control, &[3 * MIB, 6 * MIB], &SHRUNK);
        step(&scene, &mut control, &[8 * MIB, 9 * MIB + 512], &BOTH);
        for volume in ["root", "data"] {
            scene.vm.io(&mut control, volume, "write -P 8 9M 512");
        }
        step(&scene, &mut control, &[10 * MIB], &BOTH);
        for volume in ["root", "data"] {
            scene.vm.io(&mut control, volume, "write -P 9 0 10M");
        }
        scene.backup().run().success();
        // Less than a granule leaves the mark, and is read in any case.
        let last = step(&scene, &mut control, &[10 * MIB - 32 * 1024, 10 * MIB], &BOTH);
        drop(control);
        scene.assert_clean(Some(&bitmap(&last)));
    }
}

/// A backup that dies at any point must not mend the mark of the one before.
#[test]
fn what_a_shrunk_disk_forgot_stays_forgotten_when_a_backup_is_killed() {
    let (scene, mut control) = full_disks_with_a_backup(Flavour::Allowlist);
    let mut killed = 0;
    for point in (0..).step_by(2) {
        for volume in ["root", "data"] {
            scene.vm.io(&mut control, volume, &format!("write -P {} 0 4M", point % 250 + 1));
        }
        scene.backup().run().success();
        resize_both(&scene, &mut control, &[2 * MIB, 4 * MIB]);
        let before = complete_backups(scene.target.path());
        if scene.backup().env("VIRT_FLEECE_TEST_KILL_AT", point.to_string()).run().status.success() {
            break;
        }
        killed += 1;
        // One that was killed behind its commit has read everything.
        let was_complete = complete_backups(scene.target.path()) > before;
        let expected = if was_complete { INCREMENTAL } else { "Shrunk" };
        let report: Value = scene.backup().json();
        assert_kinds(&report, &[("root", expected), ("data", expected)]);
        assert_is_now(&scene, &mut control, &report);
    }
    assert!(killed > 8, "only {killed} points");
}

/// Between the plan and the point in time: the backup fails, and the next one reads everything. A fleece that is a qcow2
/// over the disk forbids it from then on.
#[test]
fn a_disk_that_is_shrunk_and_grown_back_before_the_point_in_time_fails_the_backup() {
    for flavour in [Flavour::Qemu10, Flavour::Next] {
        let (scene, mut control) = full_disks_with_a_backup(flavour);
        let agent = FakeAgent::start();
        for sizes in [&[2 * MIB, 4 * MIB][..], &[5 * MIB]] {
            let backup = scene.backup().arg("--quiesce").arg("require").arg("--guest-agent").arg(agent.socket());
            let running = backup.spawn();
            agent.wait_freeze();
            resize_both(&scene, &mut control, sizes);
            agent.answer();
            assert_eq!(reason(&running.finish().failure()), "DiskResized", "{flavour:?}");
            assert!(agent.is_thawed());
        }
        let report: Value = scene.backup().json();
        assert_kinds(&report, &[("root", "Shrunk"), ("data", "Shrunk")]);
        assert_is_now(&scene, &mut control, &report);
        drop(control);
        scene.assert_clean(Some(&bitmap(&report)));
    }
}

#[test]
fn a_disk_cannot_be_resized_during_a_backup() {
    for flavour in Flavour::all() {
        for engine in engines(flavour) {
            let scene = scene(machine(flavour).disk(DiskSpec::new("root", 4 * MIB)));
            let mut control = scene.vm.control();
            scene.vm.io(&mut control, "root", "write -P 7 0 4M");
            let backup = scene.backup().arg("--engine").arg(engine);
            let running = backup.arg("--bandwidth-limit").arg("4MiB/s").spawn();
            super::wait_for_exports(&mut control, 1);
            let node = scene.vm.disk("root").format_node();
            for size in [3 * MIB, 5 * MIB] {
                let resize = control.execute("block_resize", &json!({"node-name": node, "size": size}));
                assert!(resize.is_err(), "{flavour:?} {engine}: resized to {size}");
            }
            let report: Value = running.finish().success().json();
            assert_is_now(&scene, &mut control, &report);
            // It was the backup that forbade it.
            control.run("block_resize", &json!({"node-name": node, "size": 5 * MIB}));
        }
    }
}

/// A raw and a qcow2 disk whose images outlive the VM.
fn raw_and_qcow2(flavour: Flavour, directory: &std::path::Path) -> VmBuilder {
    machine(flavour)
        .disk(DiskSpec::new("root", 4 * MIB + 512).in_directory(directory))
        .disk(DiskSpec::new("data", 4 * MIB + 512).format(Format::Qcow2).in_directory(directory))
}

/// qcow2 stores its bitmaps when QEMU ends in order, raw images have nowhere to store them; nothing is stored by SIGKILL.
#[test]
fn a_restart_keeps_the_bitmaps_of_qcow2_and_a_kill_keeps_none() {
    for flavour in Flavour::all() {
        let images = tempfile::tempdir().expect("a directory");
        let vm = raw_and_qcow2(flavour, images.path());
        let mut scene = scene(vm.clone());
        let mut control = scene.vm.control();
        let node = scene.vm.disk("data").format_node();
        control.run("block-dirty-bitmap-add", &json!({"node": node, "name": "foreign", "persistent": true}));
        write_all(&scene, &mut control, 1, 0);
        scene.backup().run().success();
        // Recorded before the end, by the bitmap that is stored.
        write_all(&scene, &mut control, 2, 300);
        drop(control);
        scene.vm.quit();

        let mut scene = after_restart(scene, vm.clone());
        let mut control = scene.vm.control();
        write_all(&scene, &mut control, 3, 600);
        let second: Value = scene.backup().json();
        assert_kinds(&second, &[("root", "BitmapMissing"), ("data", INCREMENTAL)]);
        assert_is_now(&scene, &mut control, &second);
        assert_eq!(bitmaps(&mut control, &node), ["foreign".to_owned(), bitmap(&second)]);
        drop(control);
        scene.vm.kill();

        // The bitmap was made in the run that was killed: it never reached the disk.
        let mut scene = after_restart(scene, vm.clone());
        let mut control = scene.vm.control();
        write_all(&scene, &mut control, 4, 900);
        let third: Value = scene.backup().json();
        assert_kinds(&third, &[("root", "BitmapMissing"), ("data", "BitmapMissing")]);
        assert_is_now(&scene, &mut control, &third);
        assert_eq!(bitmaps(&mut control, &node), ["foreign".to_owned(), bitmap(&third)]);
        drop(control);
        scene.vm.quit();

        // The bitmap was loaded in the run that is killed: it is there and worth nothing.
        let mut scene = after_restart(scene, vm.clone());
        drop(scene.vm.control());
        scene.vm.kill();
        let scene = after_restart(scene, vm);
        let mut control = scene.vm.control();
        write_all(&scene, &mut control, 5, 1200);
        let fourth: Value = scene.backup().json();
        assert_kinds(&fourth, &[("root", "BitmapMissing"), ("data", "BitmapInconsistent")]);
        assert_is_now(&scene, &mut control, &fourth);
        assert_eq!(bitmaps(&mut control, &node), ["foreign".to_owned(), bitmap(&fourth)]);
        write_all(&scene, &mut control, 6, 1500);
        let fifth: Value = scene.backup().json();
        assert_kinds(&fifth, &[("root", INCREMENTAL), ("data", INCREMENTAL)]);
        assert_is_now(&scene, &mut control, &fifth);
    }
}

#[test]
fn a_disabled_and_a_busy_bitmap_are_not_trusted_and_foreign_ones_are_not_touched() {
    let directory = tempfile::tempdir().expect("a directory");
    let scene = scene(raw_and_qcow2(Flavour::Next, directory.path()));
    let mut control = scene.vm.control();
    let (root, data) = (scene.vm.disk("root").format_node(), scene.vm.disk("data").format_node());
    write_all(&scene, &mut control, 1, 0);
    let first: Value = scene.backup().json();
    // Like ours, but for other chains, or not quite.
    let line = bitmap(&first)[..11].to_owned();
    let mut foreign =
        ["vf-".to_owned(), line.clone(), format!("{line}-"), "vf-deadbeef-1".into(), format!("{line}x-1")];
    foreign.sort();
    for name in &foreign {
        control.run("block-dirty-bitmap-add", &json!({"node": root, "name": name}));
    }
    let with = |ours: &str| {
        let mut names: Vec<_> = foreign.iter().cloned().chain([ours.to_owned()]).collect();
        names.sort();
        names
    };
    control.run("block-dirty-bitmap-disable", &json!({"node": root, "name": bitmap(&first)}));
    write_all(&scene, &mut control, 2, 300);
    let second: Value = scene.backup().json();
    assert_kinds(&second, &[("root", "BitmapDisabled"), ("data", INCREMENTAL)]);
    assert_is_now(&scene, &mut control, &second);
    assert_eq!(bitmaps(&mut control, &root), with(&bitmap(&second)));

    // Somebody else reads our bitmap over NBD, of which there is one server.
    let address = json!({"type": "unix", "data": {"path": scene.vm.directory().join("theirs")}});
    control.run("nbd-server-start", &json!({"addr": address}));
    control.run("block-dirty-bitmap-disable", &json!({"node": data, "name": bitmap(&second)}));
    let export = json!({"type": "nbd", "id": "theirs", "node-name": data, "bitmaps": [bitmap(&second)]});
    control.run("block-export-add", &export);
    write_all(&scene, &mut control, 3, 600);
    let refused = scene.backup().run().failure();
    assert!(refused.stderr.contains("NBD server"), "{}", refused.stderr);
    assert_eq!(control.list("query-block-exports").len(), 1, "their export was touched");
    assert_eq!(bitmaps(&mut control, &data), [bitmap(&second)]);
    let strict = scene.backup().arg("--type").arg("incremental").arg("--volume").arg("data").run().failure();
    assert_eq!(reason(&strict), "NotIncremental");
    assert!(strict.stderr.contains("in use"), "{}", strict.stderr);
    control.run("nbd-server-stop", &json!({}));

    let third: Value = scene.backup().json();
    assert_kinds(&third, &[("root", INCREMENTAL), ("data", "BitmapDisabled")]);
    assert_is_now(&scene, &mut control, &third);
    assert_eq!(bitmaps(&mut control, &root), with(&bitmap(&third)));
    assert_eq!(bitmaps(&mut control, &data), [bitmap(&third)]);
}

#[test]
fn a_plugged_disk_is_full_and_an_unplugged_one_missed_by_nobody() {
    for flavour in Flavour::all() {
        let disk = |volume| DiskSpec::new(volume, 2 * MIB + 512).bus(Bus::ScsiHd { iothread: true });
        let mut scene = scene(machine(flavour).disk(disk("root")).disk(disk("data").format(Format::Qcow2)));
        let mut control = scene.vm.control();
        write_all(&scene, &mut control, 1, 0);
        scene.backup().run().success();

        scene.vm.plug(&mut control, &disk("hot"));
        write_all(&scene, &mut control, 2, 300);
        let plugged: Value = scene.backup().json();
        let mut kinds = super::kinds(&plugged);
        kinds.sort();
        let expected = [("data", INCREMENTAL), ("hot", "NotInParent"), ("root", INCREMENTAL)];
        assert_eq!(kinds, expected.map(|(name, kind)| (name.to_owned(), kind.to_owned())), "{flavour:?}");
        assert_is_now(&scene, &mut control, &plugged);

        scene.vm.unplug(&mut control, "data");
        scene.vm.forget(&mut control, "data");
        write_all(&scene, &mut control, 3, 600);
        let unplugged: Value = scene.backup().json();
        assert_kinds(&unplugged, &[("root", INCREMENTAL), ("hot", INCREMENTAL)]);
        assert_is_now(&scene, &mut control, &unplugged);
        // What the earlier backup has of the disk that is gone stays restorable.
        let verify = crate::bed::cli::Cli::new(["verify", "--qcow2-dir"]).arg(scene.target.path());
        verify.run().success();

        // A disk of that name again: not the one that the chain knows.
        scene.vm.plug(&mut control, &disk("data"));
        write_all(&scene, &mut control, 4, 900);
        let again: Value = scene.backup().json();
        let found = super::kinds(&again).into_iter().find(|(name, _)| name == "data");
        assert_eq!(found.map(|(_, kind)| kind).as_deref(), Some("NotInParent"), "{flavour:?}");
        assert_is_now(&scene, &mut control, &again);
        drop(control);
        scene.assert_clean(Some(&bitmap(&again)));
    }
}
