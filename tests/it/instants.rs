//! The promise: every backup is one instant of all disks, taken while the guest writes at full speed.

use crate::{
    bed::{cli::Cli, flavour::Flavour, oracle::Replay, point_in_time::PointInTime},
    scene::{Scene, bitmap, id, is_incremental, stream},
};
use serde_json::Value;
use std::time::Duration;

/// A full backup and three incremental ones of a guest that never pauses; every point is restored and must be an
/// exact instant of the guest's stream, between what was written before and after the backup.
fn every_backup_is_an_instant(flavour: Flavour, engine: &str, options: &[&str]) {
    assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
    every_backup_of_is_an_instant(&Scene::new(flavour, true), engine, options);
}

fn every_backup_of_is_an_instant(scene: &Scene, engine: &str, options: &[&str]) {
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
        let found = PointInTime::find_after(&images, &replay).unwrap_or_else(|error| panic!("{error}\n{report}"));
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

/// No filter drivers and no `on-cbw-error`, as up to KubeVirt 1.7: the fleece is read itself, and watched closely.
#[test]
fn old_allow_listed_qemu_by_jobs() {
    assert!(Flavour::Qemu10.available(), "QEMU 10 is missing; run tests/bed/setup");
    let scene = Scene::new(Flavour::Qemu10, true).without_filters();
    every_backup_of_is_an_instant(&scene, "auto", &[]);
    let refusals = scene.proxy.as_ref().map_or(0, crate::bed::proxy::QmpProxy::refusals);
    assert!(refusals >= 8, "the proxy refused {refusals} drivers of two for each of four backups");
    let filter = scene.backup().arg("--engine").arg("filter").run().failure();
    assert!(filter.stderr.contains("not whitelisted"), "{}", filter.stderr);
}

/// Backups of a guest that never pauses, some of them killed at a random step or told to end in the middle. Every one
/// that completes is an exact instant, and incremental: no failure costs the chain.
fn random_failures_never_cost_an_instant(flavour: Flavour, cycles: u32) {
    assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
    let scene = Scene::new(flavour, true);
    let seed = std::env::var("VIRT_FLEECE_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random = seed.unwrap_or_else(|| u64::from(getrandom::u32().expect("randomness")));
    println!("{flavour:?}: VIRT_FLEECE_TEST_SEED={random}");
    let stream = stream(random);
    let mut writer = scene.vm.writer();
    writer.start(&stream, 0, &crate::scene::VOLUMES);
    let mut replay = Replay::new(&stream);
    let (mut complete, mut failed) = (0, 0);
    for _ in 0..cycles {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let choice = random >> 33;
        let before = writer.status();
        let outcome = match choice % 5 {
            0 | 1 => scene.backup().env("VIRT_FLEECE_TEST_KILL_AT", (choice / 5 % 18).to_string()).run(),
            2 => {
                let running = scene.backup().arg("--bandwidth-limit").arg("8MiB/s").spawn();
                std::thread::sleep(Duration::from_millis(choice / 5 % 1500));
                running.kill9()
            }
            _ => scene.backup().run(),
        };
        let after = writer.status();
        if !outcome.status.success() {
            assert!(choice % 5 < 3, "a backup that nobody disturbed fails: {}", outcome.stderr);
            failed += 1;
            continue;
        }
        let report: Value = outcome.json();
        assert!(complete == 0 || is_incremental(&report), "{report}");
        complete += 1;
        let images = scene.restored(&id(&report));
        let found =
            PointInTime::find_after(&images, &replay).unwrap_or_else(|error| panic!("{flavour:?}: {error}\n{report}"));
        found.assert_between(&before.writes, &after.writes);
        replay.advance_all(&found.numbers());
    }
    let done = writer.stop();
    println!("{flavour:?}: {complete} instants, {failed} failed runs, writes {:?}", done.writes);
    assert_eq!(done.errors, 0, "the guest saw an error: {done:?}");
}

#[test]
fn random_failures_on_the_allow_listed_qemu() {
    random_failures_never_cost_an_instant(Flavour::Allowlist, 12);
}

#[test]
#[ignore = "long: make soak"]
fn soak() {
    let cycles = std::env::var("VIRT_FLEECE_SOAK_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(100);
    for flavour in [Flavour::Allowlist, Flavour::Next] {
        random_failures_never_cost_an_instant(flavour, cycles);
    }
}
