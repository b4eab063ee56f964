//! `kill -9` of the tool after every step: the guest does not notice, and the next run works as if nothing happened.

use crate::{
    bed::flavour::Flavour,
    scene::{Scene, bitmap, id, is_incremental},
};
use serde_json::Value;
use std::{
    os::unix::process::ExitStatusExt,
    time::{Duration, Instant},
};

/// Runs incremental backups that kill themselves at point 0, 1, 2, … until one comes through. After each: the guest
/// runs, a second tool can take over at once, nothing is left, and the next backup is incremental and right.
fn survives_a_kill_at_every_point(flavour: Flavour, engine: &str) {
    assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
    survives_a_kill_at_every_point_of(&Scene::new(flavour, false), engine);
}

fn survives_a_kill_at_every_point_of(scene: &Scene, engine: &str) {
    let mut control = scene.vm.control();
    scene.vm.io(&mut control, "root", "write -P 0x11 0 3M");
    scene.backup().arg("--engine").arg(engine).run().success();
    let mut killed = 0;
    for point in 0.. {
        let byte = point % 250 + 1;
        scene.vm.io(&mut control, "root", &format!("write -P {byte} {}k 100k", point * 128));
        scene.vm.io(&mut control, "data", &format!("write -P {byte} {}k 64k", point * 64));
        let outcome =
            scene.backup().arg("--engine").arg(engine).env("VIRT_FLEECE_TEST_KILL_AT", point.to_string()).run();
        if outcome.status.success() {
            break;
        }
        assert_eq!(outcome.status.signal(), Some(9), "point {point}: {}", outcome.stderr);
        killed += 1;
        wait_until_running(&mut control, point);
        // What the guest writes while everything of the dead session is still there must be in the next backup.
        scene.vm.io(&mut control, "data", &format!("write -P {byte} {}k 64k", 20_000 + point * 64));
        if point % 2 == 0 {
            scene.recover().run().success();
        }
        let report: Value = scene.backup().arg("--engine").arg(engine).json();
        assert!(is_incremental(&report), "after a kill at point {point}: {report}");
        assert_eq!(scene.restored(&id(&report)), now(scene, &mut control), "after a kill at point {point}");
        drop(control);
        scene.assert_clean(Some(&bitmap(&report)));
        control = scene.vm.control();
    }
    assert!(killed > 15, "only {killed} points");
}

/// A guest that was stopped at the time of the kill is released by the guardian process.
fn wait_until_running(control: &mut crate::bed::control::Control, point: u32) {
    let begun = Instant::now();
    while control.status() != "running" {
        assert!(begun.elapsed() < Duration::from_secs(10), "the guest is still stopped after a kill at point {point}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The disks as they are: nothing writes, but qcow2 keeps tables in memory until a flush.
fn now(scene: &Scene, control: &mut crate::bed::control::Control) -> Vec<Vec<u8>> {
    for volume in crate::scene::VOLUMES {
        scene.vm.io(control, volume, "flush");
    }
    scene.disks_now()
}

#[test]
fn by_filters_on_qemu_10() {
    survives_a_kill_at_every_point(Flavour::Qemu10, "filter");
}

#[test]
fn by_jobs_on_the_allow_listed_qemu() {
    survives_a_kill_at_every_point(Flavour::Allowlist, "job");
}

/// Neither `on-cbw-error` nor filter drivers.
#[test]
fn by_jobs_on_an_old_allow_listed_qemu() {
    assert!(Flavour::Qemu10.available(), "QEMU 10 is missing; run tests/bed/setup");
    survives_a_kill_at_every_point_of(&Scene::new(Flavour::Qemu10, false).without_filters(), "job");
}
