//! Backups of a real guest into a repository: exact instants, stored once, independent of each other.

use crate::{
    bed::{disk::DiskSpec, flavour::Flavour, oracle::Replay, point_in_time::PointInTime, vm::Vm},
    scene::{SIZES, Scene, VOLUMES, bitmap, id, is_incremental, stream},
    store::Store,
};
use serde_json::Value;
use std::os::unix::process::ExitStatusExt;

/// The chunk size of these tests: small disks have many chunks.
const CHUNK: u64 = 256 << 10;

/// Sum of a number over the volumes of a report.
fn sum(report: &Value, field: &str) -> u64 {
    report["volumes"].as_array().expect("volumes").iter().map(|volume| volume[field].as_u64().expect("a number")).sum()
}

/// A full backup and three incremental ones of a guest that never pauses; every point restores to an exact instant.
fn every_backup_is_an_instant(flavour: Flavour, store: &Store) {
    assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
    let scene = Scene::new(flavour, true);
    let stream = stream(u64::from(scene.vm.pid()));
    let mut writer = scene.vm.writer();
    writer.start(&stream, 0, &VOLUMES);
    let begun = writer.status();
    writer.wait_progress(&begun, 200);
    let mut points = Vec::new();
    for round in 0..4 {
        let before = writer.status();
        let report: Value = store.backup(&scene).json();
        let after = writer.status();
        assert_eq!(is_incremental(&report), round > 0, "{report}");
        writer.wait_progress(&after, 50);
        points.push((report, before.writes, after.writes));
    }
    let done = writer.stop();
    assert_eq!(done.errors, 0, "the guest saw an error: {done:?}");
    scene.assert_clean(Some(&bitmap(&points.last().expect("four points").0)));
    let mut replay = Replay::new(&stream);
    for (report, before, after) in &points {
        let images = store.restored(&id(report));
        let found =
            PointInTime::find_after(&images, &replay).unwrap_or_else(|error| panic!("{flavour:?}: {error}\n{report}"));
        found.assert_between(before, after);
        replay.advance_all(&found.numbers());
    }
    store.cli(["verify", "--read-data", "100"]).run().success();
}

#[test]
fn instants_of_the_allow_listed_qemu_in_a_directory() {
    every_backup_is_an_instant(Flavour::Allowlist, &Store::directory(CHUNK));
}

#[test]
fn instants_of_qemu_10_in_s3() {
    every_backup_is_an_instant(Flavour::Qemu10, &Store::s3(CHUNK));
}

#[test]
fn instants_of_the_newest_qemu_in_a_directory_of_large_chunks() {
    every_backup_is_an_instant(Flavour::Next, &Store::directory(4 << 20));
}

/// Writes to both disks of a VM without a guest, differently in every round: overlapping, off every border, zeroed,
/// discarded, and at the very end of an odd-sized disk.
pub(crate) fn scribble(scene: &Scene, round: u64) -> Vec<Vec<u8>> {
    let mut control = scene.vm.control();
    for (index, volume) in VOLUMES.iter().enumerate() {
        let end = SIZES[index] - 512;
        for command in [
            format!("write -P {} {}k 900k", 10 + round, 300 * round),
            format!("write -P {} {} 512", 20 + round, 5 * 512 + round * 70_144),
            format!("write -z {}k 128k", 700 + 64 * round),
            format!("discard {}k 640k", 500 + 100 * round),
            format!("write -P {} {end} 512", 30 + round),
            "flush".into(),
        ] {
            scene.vm.io(&mut control, volume, &command);
        }
    }
    scene.disks_now()
}

#[test]
fn a_lost_bitmap_costs_reading_and_not_storing() {
    let store = Store::directory(CHUNK);
    let images = tempfile::tempdir().expect("a directory");
    let vm = Vm::builder(Flavour::Allowlist)
        .disk(DiskSpec::new(VOLUMES[0], SIZES[0]).in_directory(images.path()))
        .disk(DiskSpec::new(VOLUMES[1], SIZES[1]).in_directory(images.path()))
        .guest(false);
    let mut first = Scene::of(vm.clone().start());
    scribble(&first, 0);
    {
        // Content that nothing compresses or deduplicates away.
        let mut control = first.vm.control();
        for step in 0..16 {
            first.vm.io(&mut control, "root", &format!("write -P {} {}M 1M", 100 + step, 20 + step));
        }
    }
    let full: Value = store.backup(&first).json();
    let (before, images) = (store.chunks().len(), scribble(&first, 1));
    first.vm.quit();
    // The same disks under a new process of QEMU: the bitmaps are gone.
    let scene = Scene::of(vm.start());
    let report: Value = store.backup(&scene).json();
    let root = &report["volumes"][0];
    assert!(root.get("parent").is_none() && root["full_reason"].is_string(), "{report}");
    assert_eq!(root["dirty_bytes"].as_u64(), Some(SIZES[0]), "everything was read: {report}");
    assert!(sum(&report, "new_bytes") < sum(&full, "new_bytes") / 3, "{report}");
    assert!(store.chunks().len() - before < before / 2, "{before} chunks, then {}", store.chunks().len());
    assert_eq!(store.restored(&id(&report)), images);
}

#[test]
fn clones_share_their_chunks() {
    let store = Store::directory(CHUNK);
    let scene = Scene::new(Flavour::Allowlist, false);
    let images = scribble(&scene, 3);
    let first: Value = store.backup_as(&scene, "one").json();
    let chunks = store.chunks().len();
    let second: Value = store.backup_as(&scene, "two").json();
    assert_eq!(second["sequence"], 1, "{second}");
    assert_eq!((sum(&second, "new_bytes"), sum(&second, "stored_bytes")), (0, 0), "{second}");
    assert_eq!(store.chunks().len(), chunks);
    assert!(sum(&first, "new_bytes") > 0);
    assert_eq!(store.restored(&id(&second)), images);
}

#[test]
fn a_disk_that_grew_is_right() {
    let store = Store::directory(CHUNK);
    let scene = Scene::new(Flavour::Next, false);
    scribble(&scene, 0);
    store.backup(&scene).run().success();
    let mut control = scene.vm.control();
    let grown = SIZES[1] + (3 << 20) + 512;
    let node = scene.vm.disk("data").format_node();
    control.run("block_resize", &serde_json::json!({ "node-name": node, "size": grown }));
    scene.vm.io(&mut control, "data", &format!("write -P 0x77 {} 512", grown - 512));
    drop(control);
    let images = scribble(&scene, 1);
    assert_eq!(images[1].len() as u64, grown);
    let report: Value = store.backup(&scene).json();
    assert_eq!(store.restored(&id(&report)), images, "{report}");
}

#[test]
fn any_backup_may_go_and_the_others_stay() {
    let store = Store::directory(CHUNK);
    let scene = Scene::new(Flavour::Allowlist, false);
    let mut points = Vec::new();
    for round in 0..5 {
        let images = scribble(&scene, round);
        points.push((id(&store.backup(&scene).json::<Value>()), images));
    }
    // The oldest, a middle one, the newest.
    for victim in [0, 1, 2] {
        let (gone, _) = points.remove(victim);
        store.cli(["forget", "--vm", "web", "--backup", &gone]).run().success();
        let before = store.chunks().len();
        let pruned: Value = store.cli(["repository", "prune", "-o", "json"]).json();
        assert_eq!(before as u64 - pruned["deleted_chunks"].as_u64().expect("a number"), store.chunks().len() as u64);
        assert!(pruned["deleted_chunks"].as_u64() > Some(0), "no space was given back: {pruned}");
        for (id, images) in &points {
            assert!(store.restored(id) == *images, "{id} after {gone} was forgotten");
        }
        store.cli(["verify", "--read-data", "100"]).run().success();
    }
    let report: Value = store.backup(&scene).json();
    assert!(store.restored(&id(&report)) == points.last().expect("two are left").1 || !is_incremental(&report));
}

#[test]
fn a_kill_at_any_point_costs_nothing() {
    let store = Store::directory(CHUNK);
    let scene = Scene::new(Flavour::Allowlist, false);
    scribble(&scene, 0);
    store.backup(&scene).run().success();
    let mut killed = 0;
    for point in 0.. {
        scribble(&scene, point % 40);
        let outcome = store.backup(&scene).env("VIRT_FLEECE_TEST_KILL_AT", point.to_string()).run();
        if outcome.status.success() {
            break;
        }
        assert_eq!(outcome.status.signal(), Some(9), "point {point}: {}", outcome.stderr);
        killed += 1;
        let images = scribble(&scene, point % 40 + 1);
        if point % 3 == 0 {
            // Without the passphrase: whether a backup is complete can be seen from outside.
            scene.recover().run().success();
        }
        let report: Value = store.backup(&scene).json();
        assert!(is_incremental(&report), "after a kill at point {point}: {report}");
        assert!(store.restored(&id(&report)) == images, "after a kill at point {point}: {report}");
        scene.assert_clean(Some(&bitmap(&report)));
    }
    assert!(killed > 12, "only {killed} points");
    // What the dead ones left does not stand in the way of a prune.
    let pruned: Value = store.cli(["repository", "prune", "-o", "json"]).json();
    assert_eq!(pruned["waits_for"], serde_json::json!([]), "{pruned}");
    store.cli(["verify", "--read-data", "100"]).run().success();
}
