//! What was read, or needs no reading, is discarded from a raw fleece: the guest's later writes there are not copied, and
//! the fleece shrinks. The instants stay exact.

use crate::{
    bed::{cli::Cli, control::Control, flavour::Flavour, oracle::Replay, point_in_time::PointInTime, vm::Vm},
    scene::{Scene, VOLUMES, id, is_incremental, reason, stream},
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

/// Switches discards off, to compare.
const OFF: &str = "VIRT_FLEECE_TEST_NO_DISCARD";
/// More than the disks, less than the worst case: the space of the fleeces is watched and not reserved, so that what
/// they take is what they hold.
const LIMIT: &str = "115M";

/// Bytes that the fleeces take: nameless files that QEMU holds.
fn fleece_bytes(vm: &Vm) -> u64 {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", vm.pid())).expect("QEMU's descriptors").flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let fleece = target.starts_with(vm.fleece_directory()) && target.to_string_lossy().ends_with("(deleted)");
        if let Some(file) = fleece.then(|| fs::metadata(entry.path()).ok()).flatten() {
            files.insert(file.ino(), file.blocks() * 512);
        }
    }
    files.values().sum()
}

/// What a backup did to its fleeces and its guest.
#[derive(Debug)]
struct Measured {
    mean: u64,
    last: u64,
    writes_per_second: f64,
}

/// A backup is one instant between these two.
fn prove_instant(scene: &Scene, id: &str, replay: &mut Replay, before: &[u64], after: &[u64]) {
    let images = scene.restored(id);
    let found = PointInTime::find_after(&images, replay).unwrap_or_else(|error| panic!("{id}: {error}"));
    found.assert_between(before, after);
    replay.advance_all(&found.numbers());
}

/// A slow backup of a guest at full speed, which is proved to be an exact instant.
fn slow_backup(scene: &Scene, engine: &str, off: bool, replay: &mut Replay) -> Measured {
    let mut writer = scene.vm.writer();
    let before = writer.status();
    let mut backup = scene.backup().arg("--engine").arg(engine).arg("--bandwidth-limit").arg("12MiB/s");
    backup = backup.arg("--fleece-limit").arg(LIMIT);
    if off {
        backup = backup.env(OFF, "1");
    }
    let mut running = backup.spawn();
    let begun = Instant::now();
    let mut samples = Vec::new();
    while running.ends_within(Duration::from_millis(50)).is_none() {
        samples.extend(Some(fleece_bytes(&scene.vm)).filter(|bytes| *bytes > 0));
    }
    let seconds = begun.elapsed().as_secs_f64();
    let report: Value = running.finish().success().json();
    let after = writer.status();
    assert_eq!(after.errors, 0, "the guest saw an error: {after:?}");
    prove_instant(scene, &id(&report), replay, &before.writes, &after.writes);
    let count = after.writes.iter().sum::<u64>() - before.writes.iter().sum::<u64>();
    Measured {
        mean: samples.iter().sum::<u64>() / samples.len().max(1) as u64,
        last: samples.last().copied().expect("a sample"),
        writes_per_second: count as f64 / seconds,
    }
}

fn a_fleece_shrinks_and_the_instant_is_exact(flavour: Flavour, engine: &str) {
    assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
    let scene = Scene::new(flavour, true);
    let stream = stream(u64::from(scene.vm.pid()));
    let mut writer = scene.vm.writer();
    writer.start(&stream, 0, &VOLUMES);
    let begun = writer.status();
    writer.wait_progress(&begun, 400);
    drop(writer);
    let mut replay = Replay::new(&stream);
    let without = slow_backup(&scene, engine, true, &mut replay);
    let with = slow_backup(&scene, engine, false, &mut replay);
    println!(
        "{flavour:?} {engine}: without {without:?}, with {with:?}, {:.0} and {:.0} writes a second",
        without.writes_per_second, with.writes_per_second
    );
    scene.vm.writer().stop();
    assert!(with.mean * 10 < without.mean * 8, "{with:?} {without:?}");
    assert!(with.last * 2 < without.last, "{with:?} {without:?}");
    Cli::new(["verify", "--qcow2-dir"]).arg(scene.target.path()).run().success();
}

#[test]
fn qemu_10_by_filters() {
    a_fleece_shrinks_and_the_instant_is_exact(Flavour::Qemu10, "filter");
}

/// Where a full fleece hits the guest, a backup of a guest this fast is given up long before its fleece would be full,
/// unless it is fast too: nothing to compare there, but instants to prove.
#[test]
fn qemu_10_by_jobs() {
    let scene = Scene::new(Flavour::Qemu10, true);
    let stream = stream(u64::from(scene.vm.pid()));
    let mut writer = scene.vm.writer();
    writer.start(&stream, 0, &VOLUMES);
    drop(writer);
    let mut replay = Replay::new(&stream);
    let mut proved = 0;
    for _ in 0..20 {
        let before = scene.vm.writer().status();
        let outcome = scene.backup().arg("--engine").arg("job").arg("--fleece-limit").arg(LIMIT).run();
        let after = scene.vm.writer().status();
        assert_eq!(after.errors, 0, "the guest saw an error: {after:?}");
        if !outcome.status.success() {
            assert_eq!(reason(&outcome), "FleeceFull", "{}", outcome.stderr);
            continue;
        }
        prove_instant(&scene, &id(&outcome.json()), &mut replay, &before.writes, &after.writes);
        proved += 1;
        if proved == 5 {
            break;
        }
    }
    scene.vm.writer().stop();
    assert!(proved >= 3, "only {proved} backups came through");
}

#[test]
fn newest_qemu_by_jobs() {
    a_fleece_shrinks_and_the_instant_is_exact(Flavour::Next, "job");
}

/// What did not change since the last backup is never copied, though the guest overwrites all of it.
fn what_needs_no_reading_is_not_copied(flavour: Flavour, engine: &str) {
    assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
    let taken = |off: bool| {
        let scene = Scene::new(flavour, false);
        let mut control = scene.vm.control();
        write_all(&scene, &mut control, 1, "0 40M");
        scene.backup().arg("--engine").arg(engine).run().success();
        write_all(&scene, &mut control, 2, "20M 3M");
        let expected = now(&scene, &mut control);
        let mut backup = scene.backup().arg("--engine").arg(engine).arg("--fleece-limit").arg(LIMIT);
        backup = backup.arg("--bandwidth-limit").arg("2MiB/s");
        let running = if off { backup.env(OFF, "1") } else { backup }.spawn();
        let begun = Instant::now();
        while control.list("query-block-exports").len() < 2 {
            assert!(begun.elapsed() < Duration::from_secs(30), "no export appears");
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(500));
        write_all(&scene, &mut control, 3, "0 16M");
        write_all(&scene, &mut control, 3, "24M 16M");
        let bytes = fleece_bytes(&scene.vm);
        let report: Value = running.finish().success().json();
        assert!(is_incremental(&report), "{report}");
        assert!(scene.restored(&id(&report)) == expected, "{flavour:?} {engine}: not the point in time");
        bytes
    };
    let (without, with) = (taken(true), taken(false));
    println!("{flavour:?} {engine}: {without} bytes without discards, {with} with them");
    assert!(without >= 60 << 20 && with < 2 << 20, "{flavour:?} {engine}: {without} and {with}");
}

fn write_all(scene: &Scene, control: &mut Control, byte: u8, place: &str) {
    for volume in VOLUMES {
        scene.vm.io(control, volume, &format!("write -P {byte} {place}"));
    }
}

fn now(scene: &Scene, control: &mut Control) -> Vec<Vec<u8>> {
    for volume in VOLUMES {
        scene.vm.io(control, volume, "flush");
    }
    scene.disks_now()
}

#[test]
fn what_is_unchanged_is_not_copied() {
    for (flavour, engine) in [(Flavour::Qemu10, "filter"), (Flavour::Qemu10, "job"), (Flavour::Next, "job")] {
        what_needs_no_reading_is_not_copied(flavour, engine);
    }
}
