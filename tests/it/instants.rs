//! The promise: every backup is one instant of all disks, taken while the guest writes at full speed.

use crate::{
    bed::{cli::Cli, flavour::Flavour, oracle::Replay, point_in_time::PointInTime},
    scene::{Scene, bitmap, id, is_incremental, stream},
};
use serde_json::Value;

/// A full backup and three incremental ones of a guest that never pauses; every point is restored and must be an
/// exact instant of the guest's stream, between what was written before and after the backup.
fn every_backup_is_an_instant(flavour: Flavour, engine: &str, options: &[&str]) {
    assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
    let scene = Scene::new(flavour, true);
    let stream = stream(u64::from(scene.vm.pid()));
    let mut writer = scene.vm.writer();
    writer.start(&stream, 0, &crate::scene::VOLUMES);
    let begun = writer.status();
    writer.wait_progress(&begun, 200);
    let mut points = Vec::new();
    for round in 0..4 {
        let before = writer.status();
        let mut backup = scene.backup().arg("--engine").arg(engine);
        for option in options {
            backup = backup.arg(option);
        }
        let report: Value = backup.json();
        let after = writer.status();
        assert_eq!(is_incremental(&report), round > 0, "{report}");
        writer.wait_progress(&after, 50);
        points.push((report, before.writes, after.writes));
    }
    let done = writer.stop();
    assert_eq!(done.errors, 0, "the guest saw an error: {done:?}");
    let last = &points.last().expect("four points").0;
    scene.assert_clean(Some(&bitmap(last)));
    let mut replay = Replay::new(&stream);
    for (report, before, after) in &points {
        let images = scene.restored(&id(report));
        let found =
            PointInTime::find_after(&images, &replay).unwrap_or_else(|error| panic!("{flavour:?}: {error}\n{report}"));
        found.assert_between(before, after);
        replay.advance_all(&found.numbers());
    }
    Cli::new(["verify", "--qcow2-dir"]).arg(scene.target.path()).run().success();
}

#[test]
fn qemu_10_by_filters() {
    every_backup_is_an_instant(Flavour::Qemu10, "auto", &[]);
}

#[test]
fn qemu_10_by_jobs_compressed() {
    every_backup_is_an_instant(Flavour::Qemu10, "job", &["--compress"]);
}

#[test]
fn newest_qemu_by_jobs() {
    every_backup_is_an_instant(Flavour::Next, "auto", &[]);
}

#[test]
fn newest_qemu_by_filters() {
    every_backup_is_an_instant(Flavour::Next, "filter", &[]);
}

#[test]
fn allow_listed_qemu_by_jobs() {
    every_backup_is_an_instant(Flavour::Allowlist, "auto", &[]);
}
