//! A repository in a directory whose file system runs full, fails, stalls, or may not be written.

use crate::{
    bed::{
        cli::Outcome,
        faults::{FuseTarget, TmpfsTarget},
        flavour::Flavour,
    },
    scene::{Scene, bitmap, id, is_incremental, noise, reason},
    store::Store,
};
use rustix::io::Errno;
use serde_json::{Value, json};
use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// The chunk size of these tests.
const CHUNK: u64 = 256 << 10;

fn change(scene: &Scene, seed: u64) {
    noise(scene, "root", seed, 3, 5);
    noise(scene, "data", seed + 1000, 5, 3);
}

/// A repository below a directory, and a VM with a backup in it and changes since.
fn bed(parent: &Path) -> (Store, Scene) {
    let (store, scene) = (Store::below(parent, CHUNK), Scene::new(Flavour::Next, false));
    noise(&scene, "root", 1, 0, 1);
    store.backup(&scene).run().success();
    change(&scene, 2);
    (store, scene)
}

fn remount(target: &TmpfsTarget, options: &str) {
    let mut mount = Command::new("mount");
    mount.args(["-o", &format!("remount,{options}")]).arg(target.path());
    assert!(mount.status().expect("starting mount").success(), "mount failed");
}

/// A backup that failed cleanly.
fn failed(scene: &Scene, outcome: Outcome) -> Outcome {
    let outcome = outcome.failure();
    assert_eq!(scene.vm.control().status(), "running");
    outcome
}

/// The next backup is incremental and right, and what the failed ones left does no harm.
fn goes_on(store: &Store, scene: &Scene, backups: usize) {
    let listed: Value = store.cli(["list", "-o", "json"]).json();
    assert_eq!(listed.as_array().map(Vec::len), Some(backups), "{listed}");
    let report: Value = store.backup(scene).json();
    assert!(is_incremental(&report), "{report}");
    assert!(store.restored(&id(&report)) == scene.disks_now(), "{report}");
    scene.assert_clean(Some(&bitmap(&report)));
    let pruned: Value = store.cli(["repository", "prune", "-o", "json"]).json();
    assert_eq!(pruned["waits_for"], json!([]), "{pruned}");
    store.cli(["verify", "--read-data", "100"]).run().success();
}

#[test]
fn a_full_repository_is_named_as_such_and_a_prune_helps() {
    let target = TmpfsTarget::new(6 << 20);
    let (store, scene) = bed(target.path());
    let full = failed(&scene, store.backup(&scene).run());
    assert_eq!((full.status.code(), reason(&full).as_str()), (Some(4), "TargetFull"), "{}", full.stderr);
    assert!(full.stderr.contains("chunks/"), "the object is named: {}", full.stderr);
    assert!(full.stderr.contains("repository prune"), "the way out: {}", full.stderr);
    let again = failed(&scene, store.backup(&scene).run());
    assert_eq!(reason(&again), "TargetFull", "{}", again.stderr);
    // What the failed ones wrote is needed by nobody.
    let pruned: Value = store.cli(["repository", "prune", "-o", "json"]).json();
    assert!(pruned["deleted_chunks"].as_u64() > Some(5), "{pruned}");
    remount(&target, "size=40m");
    goes_on(&store, &scene, 1);
}

#[test]
fn a_repository_without_any_space_says_so_at_once() {
    let target = TmpfsTarget::new(6 << 20);
    let (store, scene) = bed(target.path());
    let mut file = std::fs::File::create(target.path().join("filler")).expect("a file");
    let block = [0x55; 4096];
    while std::io::Write::write_all(&mut file, &block).is_ok() {}
    drop(file);
    let full = failed(&scene, store.backup(&scene).run());
    assert_eq!(reason(&full), "TargetFull", "{}", full.stderr);
    let prune = store.cli(["repository", "prune", "-o", "json"]).run().failure();
    assert_eq!((prune.status.code(), reason(&prune).as_str()), (Some(6), "TargetFull"), "{}", prune.stderr);
    std::fs::remove_file(target.path().join("filler")).expect("removing a file");
    remount(&target, "size=40m");
    goes_on(&store, &scene, 1);
}

#[test]
fn errors_of_a_repositorys_disk_end_the_backup() {
    let target = FuseTarget::new();
    let (store, scene) = bed(target.path());
    for (errno, expected) in [
        (Errno::IO, "TargetIo"),
        (Errno::NOSPC, "TargetFull"),
        (Errno::DQUOT, "TargetFull"),
        (Errno::ACCESS, "PermissionDenied"),
    ] {
        target.faults().fail_writes_after(2 << 20, errno);
        let outcome = failed(&scene, store.backup(&scene).run());
        target.faults().heal();
        assert_eq!((outcome.status.code(), reason(&outcome).as_str()), (Some(4), expected), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("chunks/"), "the object is named: {}", outcome.stderr);
        change(&scene, 10 + u64::from(errno.raw_os_error().unsigned_abs()));
    }
    // Nothing can be made durable: neither the session, nor the manifest.
    target.faults().fail_syncs(Errno::IO);
    let outcome = failed(&scene, store.backup(&scene).run());
    target.faults().heal();
    assert_eq!(reason(&outcome), "TargetIo", "{}", outcome.stderr);
    goes_on(&store, &scene, 1);
}

#[test]
fn a_repository_that_stalls_does_not_touch_the_guest() {
    let target = FuseTarget::new();
    let (store, scene) = bed(target.path());
    // Slow enough that the stall comes in the middle.
    let backup = store.backup(&scene).arg("--bandwidth-limit").arg("3MiB/s").arg("--stall-timeout").arg("5");
    let before = target.faults().written();
    let mut running = backup.spawn();
    let begun = Instant::now();
    while target.faults().written() < before + (1 << 20) {
        assert!(begun.elapsed() < Duration::from_secs(30), "nothing is written");
        std::thread::sleep(Duration::from_millis(5));
    }
    target.faults().stall();
    assert!(target.faults().wait_stalled(1, Duration::from_secs(30)), "nothing is written");
    let mut control = scene.vm.control();
    for round in 0..5 {
        let asked = Instant::now();
        control.run("stop", &json!({}));
        let stopped = asked.elapsed();
        control.run("cont", &json!({}));
        assert!(stopped < Duration::from_secs(1), "`stop` took {stopped:?}");
        scene.vm.io(&mut control, "root", &format!("write -P 7 {}k 64k", 4096 + 64 * round));
        assert!(asked.elapsed() < Duration::from_secs(1), "a write took {:?}", asked.elapsed());
    }
    scene.vm.io(&mut control, "root", "flush");
    drop(control);
    let ended = running.ends_within(Duration::from_secs(60));
    target.faults().release();
    assert!(ended.is_some_and(|status| status.code() == Some(4)), "{ended:?}");
    target.faults().heal();
    goes_on(&store, &scene, 1);
}

#[test]
fn a_repository_that_is_read_only_can_be_read() {
    let target = TmpfsTarget::new(40 << 20);
    let (store, scene) = bed(target.path());
    let listed: Value = store.cli(["list", "-o", "json"]).json();
    let first = id(&listed[0]);
    let before = store.restored(&first);
    remount(&target, "ro");
    let refused = failed(&scene, store.backup(&scene).run());
    assert_eq!(reason(&refused), "PermissionDenied", "{}", refused.stderr);
    assert!(refused.stderr.contains("sessions/"), "the object is named: {}", refused.stderr);
    assert!(store.restored(&first) == before);
    store.cli(["verify", "--read-data", "100"]).run().success();
    store.cli(["repository", "prune", "--dry-run"]).run().success();
    let prune = store.cli(["repository", "prune", "-o", "json"]).run().failure();
    assert_eq!((prune.status.code(), reason(&prune).as_str()), (Some(6), "PermissionDenied"), "{}", prune.stderr);
    remount(&target, "rw");
    goes_on(&store, &scene, 1);
}

#[test]
fn a_prune_removes_what_killed_writers_left() {
    let target = tempfile::tempdir().expect("a directory");
    let (store, scene) = bed(target.path());
    let chunk = store.chunks().remove(0);
    let beside = |suffix: &str| std::path::PathBuf::from(format!("{}{suffix}", chunk.display()));
    let hour = std::time::SystemTime::now() - Duration::from_secs(3600);
    let list = store.path().join("prune/0011223344556677");
    std::fs::create_dir_all(&list).expect("a directory");
    let clock = store.path().join("prune/clock-8899aabbccddeeff");
    for (path, is_old) in [(beside("#1"), true), (beside("#2"), false), (list.join("0"), false), (clock.clone(), false)]
    {
        let file = std::fs::File::create(path).expect("a file");
        if is_old {
            file.set_modified(hour).expect("an old file");
        }
    }
    store.cli(["repository", "prune"]).run().success();
    assert!(!beside("#1").exists() && !list.join("0").exists() && !clock.exists());
    assert!(beside("#2").exists(), "whoever writes it may be alive");
    goes_on(&store, &scene, 1);
}
