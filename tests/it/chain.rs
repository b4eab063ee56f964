//! Chains at rest: what is damaged is found, what is doubtful is not restored, and `qemu-img` reads every point.

use crate::{
    bed::{cli::Cli, flavour::Flavour, flavour::tool},
    scene::{SIZES, Scene, VOLUMES, id},
};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// A full backup and two incremental ones, and the disks at each point.
struct Chain {
    directory: TempDir,
    ids: Vec<String>,
    points: Vec<Vec<Vec<u8>>>,
}

impl Chain {
    fn new(compress: bool) -> Self {
        let scene = Scene::new(Flavour::Next, false);
        let mut control = scene.vm.control();
        let (mut ids, mut points) = (Vec::new(), Vec::new());
        for round in 0..3_u64 {
            for (index, volume) in VOLUMES.iter().enumerate() {
                // Overlapping, unaligned, rewritten, zeroed, and the very end of an odd-sized disk.
                let end = SIZES[index] - 512;
                for command in [
                    format!("write -P {} {}k 900k", 10 + round, 300 * round),
                    format!("write -P {} {} 512", 20 + round, 5 * 512 + round * 70_144),
                    format!("write -z {}k 128k", 700 + 64 * round),
                    format!("write -P {} {end} 512", 30 + round),
                    "flush".into(),
                ] {
                    scene.vm.io(&mut control, volume, &command);
                }
            }
            let backup = scene.backup();
            let report: Value = if compress { backup.arg("--compress") } else { backup }.json();
            ids.push(id(&report));
            points.push(scene.disks_now());
        }
        let Scene { target, .. } = scene;
        Self { directory: target, ids, points }
    }

    fn image(&self, point: usize, volume: &str) -> PathBuf {
        self.directory.path().join("web").join(&self.ids[point]).join(format!("{volume}.qcow2"))
    }

    fn restore(&self, point: usize, to: &Path) -> Cli {
        let restore = Cli::new(["restore", "--backup", &self.ids[point], "--qcow2-dir"]);
        restore.arg(self.directory.path()).arg("--output").arg(to)
    }

    /// Neither verified nor restored, and nothing that looks restored is left.
    fn assert_refused(&self, point: usize, what: &str) {
        let verify = Cli::new(["verify", "--qcow2-dir"]).arg(self.directory.path()).run();
        assert_eq!(verify.status.code(), Some(5), "{what}: {}{}", verify.stdout, verify.stderr);
        let to = tempfile::tempdir().expect("a directory");
        let restore = self.restore(point, to.path()).arg("--volume").arg("root").arg("--force");
        let restore = restore.run();
        assert!(!restore.status.success(), "{what}: restored all the same");
        assert_eq!(fs::read_dir(to.path()).expect("a directory").count(), 0, "{what}: something was restored");
    }
}

fn every_point_reads_back(compress: bool) {
    let chain = Chain::new(compress);
    for (point, disks) in chain.points.iter().enumerate() {
        for format in ["raw", "qcow2"] {
            let to = tempfile::tempdir().expect("a directory");
            chain.restore(point, to.path()).arg("--format").arg(format).run().success();
            for (volume, disk) in VOLUMES.iter().zip(disks) {
                let restored = crate::bed::disk::read_image(&to.path().join(format!("{volume}.{format}")));
                assert!(restored == *disk, "{volume} at point {point} as {format} differs");
            }
        }
        for (volume, disk) in VOLUMES.iter().zip(disks) {
            // Without our tool: the image names the one below it.
            let image = chain.image(point, volume);
            assert!(
                crate::bed::disk::read_image(&image) == *disk,
                "qemu-img reads {volume} at point {point} differently"
            );
            let check = Command::new(tool("QEMU_IMG")).args(["check", "-q"]).arg(&image).status().expect("qemu-img");
            assert!(check.success(), "qemu-img check of {}", image.display());
        }
    }
}

#[test]
fn every_point_reads_back_with_and_without_our_tool() {
    every_point_reads_back(false);
}

#[test]
fn compressed_points_read_back_too() {
    every_point_reads_back(true);
}

#[test]
fn any_flipped_bit_and_any_missing_link_is_found() {
    let chain = Chain::new(false);
    Cli::new(["verify", "--qcow2-dir"]).arg(chain.directory.path()).run().success();
    for point in 0..3 {
        let path = chain.image(point, "root");
        let length = fs::metadata(&path).expect("an image").len();
        for at in [0, 30, 4096, length / 2, length - 1] {
            let file = fs::OpenOptions::new().read(true).write(true).open(&path).expect("an image");
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("a byte");
            file.write_all_at(&[byte[0] ^ 4], at).expect("a flip");
            chain.assert_refused(2, &format!("a flipped bit at {at} of point {point}"));
            file.write_all_at(&byte, at).expect("the flip undone");
        }
    }
    let (path, aside) = (chain.image(1, "root"), chain.directory.path().join("aside"));
    fs::rename(&path, &aside).expect("taking an image away");
    chain.assert_refused(2, "a missing image");
    fs::copy(chain.image(0, "root"), &path).expect("a foreign image");
    chain.assert_refused(2, "an image of another backup");
    fs::copy(&aside, &path).expect("the image back");
    let file = fs::OpenOptions::new().write(true).open(&path).expect("an image");
    file.set_len(fs::metadata(&aside).expect("an image").len() - 65536).expect("cutting it");
    chain.assert_refused(2, "a truncated image");
    fs::remove_file(&path).expect("removing it");
    fs::rename(&aside, &path).expect("the image back");
    fs::remove_dir_all(chain.directory.path().join("web").join(&chain.ids[1])).expect("removing a backup");
    chain.assert_refused(2, "a missing backup");
    // What does not stand on it is not touched by that.
    let to = tempfile::tempdir().expect("a directory");
    chain.restore(0, to.path()).run().success();
}

#[test]
fn targets_that_exist_or_are_too_small_are_refused() {
    let chain = Chain::new(false);
    let to = tempfile::tempdir().expect("a directory");
    let file = to.path().join("root.raw");
    fs::write(&file, "precious").expect("a file");
    for restore in [chain.restore(2, to.path()), chain.restore(2, &file).arg("--volume").arg("root")] {
        let refused = restore.run().failure();
        assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    }
    assert_eq!(fs::read(&file).expect("the file"), b"precious");
    for (bytes, fits) in [(SIZES[0] - (1 << 20), false), (SIZES[0] + (1 << 20), true)] {
        let backing = to.path().join("device");
        // A device that held something else: what is zero in the backup must become zero.
        fs::write(&backing, vec![0xee; usize::try_from(bytes).expect("a size")]).expect("a file");
        let attach = Command::new("losetup").args(["--find", "--show"]).arg(&backing).output().expect("losetup");
        let device = PathBuf::from(String::from_utf8(attach.stdout).expect("a path").trim());
        let outcome = chain.restore(2, &device).arg("--volume").arg("root").run();
        let detach = Command::new("losetup").arg("-d").arg(&device).status().expect("losetup");
        assert!(detach.success() && outcome.status.success() == fits, "{}", outcome.stderr);
        if fits {
            let restored = fs::read(&backing).expect("the device");
            assert!(restored[..usize::try_from(SIZES[0]).expect("a size")] == chain.points[2][0], "the device differs");
        }
    }
}

#[test]
fn a_restore_never_writes_among_the_backups_or_to_a_mounted_device() {
    let chain = Chain::new(false);
    let image = chain.image(0, "root");
    let before = fs::read(&image).expect("an image");
    let refused = chain.restore(2, &image).arg("--volume").arg("root").arg("--force").run().failure();
    assert!(refused.stderr.contains("directory of the backups"), "{}", refused.stderr);
    assert!(fs::read(&image).expect("an image") == before, "a backup was overwritten");

    let to = tempfile::tempdir().expect("a directory");
    let backing = to.path().join("device");
    fs::File::create(&backing).and_then(|file| file.set_len(128 << 20)).expect("a file");
    let made = Command::new("mke2fs").args(["-q", "-F"]).arg(&backing).status().expect("mke2fs");
    assert!(made.success());
    let attach = Command::new("losetup").args(["--find", "--show"]).arg(&backing).output().expect("losetup");
    let device = PathBuf::from(String::from_utf8(attach.stdout).expect("a path").trim());
    let mounted = to.path().join("mounted");
    fs::create_dir(&mounted).expect("a directory");
    let mount = Command::new("mount").arg(&device).arg(&mounted).status().expect("mount");
    let outcome = chain.restore(2, &device).arg("--volume").arg("root").run();
    let unmount = Command::new("umount").arg(&mounted).status().expect("umount");
    let detach = Command::new("losetup").arg("-d").arg(&device).status().expect("losetup");
    assert!(mount.success() && unmount.success() && detach.success());
    assert!(!outcome.status.success(), "a mounted device was overwritten");
}

#[test]
fn a_changed_manifest_is_found_and_stands_in_nobodys_way() {
    let chain = Chain::new(false);
    let manifest = chain.directory.path().join("web").join(&chain.ids[0]).join("manifest.json");
    let text = fs::read_to_string(&manifest).expect("a manifest");
    for damaged in [text.replacen("\"sequence\": 1", "\"sequence\": 7", 1), text[..text.len() / 2].to_owned()] {
        assert_ne!(damaged, text);
        fs::write(&manifest, &damaged).expect("a change");
        chain.assert_refused(0, "a changed manifest");
        chain.assert_refused(2, "a chain that stands on a changed manifest");
        let list = Cli::new(["list", "-o", "json", "--qcow2-dir"]).arg(chain.directory.path());
        assert_eq!(list.json::<Vec<Value>>().len(), 2, "the other backups are listed");
    }
    fs::write(&manifest, &text).expect("the text back");
    Cli::new(["verify", "--qcow2-dir"]).arg(chain.directory.path()).run().success();
}
