//! From a repository back to files, devices, standard output, and images that exist.

use crate::{
    bed::{cli::Cli, flavour::Flavour, flavour::tool},
    repository::scribble,
    scene::{SIZES, Scene, id},
    store::Store,
};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::Path,
    process::{Command, Stdio},
};

const CHUNK: u64 = 64 << 10;

/// Two backups, and the disks at each of them.
struct Points {
    store: Store,
    scene: Scene,
    ids: [String; 2],
    disks: [Vec<Vec<u8>>; 2],
}

impl Points {
    fn new() -> Self {
        let store = Store::directory(CHUNK);
        let scene = Scene::new(Flavour::Next, false);
        let [first, second] = [0, 1].map(|round| {
            let disks = scribble(&scene, round);
            (id(&store.backup(&scene).json::<Value>()), disks)
        });
        Self { store, scene, ids: [first.0, second.0], disks: [first.1, second.1] }
    }

    fn restore(&self, point: usize, volume: &str, to: &Path) -> Cli {
        let restore = self.store.cli(["restore", "--backup", &self.ids[point], "--volume", volume]);
        restore.arg("--output").arg(to)
    }
}

#[test]
fn to_files_of_both_formats_standard_output_and_in_place() {
    let points = Points::new();
    let to = tempfile::tempdir().expect("a directory");
    let (raw, qcow2) = (to.path().join("raw"), to.path().join("qcow2"));
    points.restore(1, "data", &raw).run().success();
    assert!(fs::read(&raw).expect("restored") == points.disks[1][1]);
    let metadata = fs::metadata(&raw).expect("restored");
    assert!(metadata.blocks() * 512 < SIZES[1] / 2, "what is zero takes no space: {} blocks", metadata.blocks());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    points.restore(0, "data", &qcow2).arg("--format").arg("qcow2").run().success();
    assert!(crate::bed::disk::read_image(&qcow2) == points.disks[0][1]);
    // What exists stays.
    let refused = points.restore(0, "data", &raw).run().failure();
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    assert!(fs::read(&raw).expect("still there") == points.disks[1][1]);
    points.restore(0, "data", &raw).arg("--force").run().success();
    assert!(fs::read(&raw).expect("restored") == points.disks[0][1]);

    let piped = Command::new(env!("CARGO_BIN_EXE_virt-fleece"))
        .args(["restore", "--repository", &points.store.url, "--backup", &points.ids[1], "--volume", "root"])
        .args(["--output", "-"])
        .env("VIRT_FLEECE_PASSPHRASE", crate::store::PASSPHRASE)
        .stderr(Stdio::inherit())
        .output()
        .expect("virt-fleece");
    assert!(piped.status.success() && piped.stdout == points.disks[1][0]);

    // The image of the first point becomes the second: only what differs is written, and nothing the second time.
    let in_place = |point| points.restore(point, "data", &raw).arg("--in-place").arg("-o").arg("json");
    let report: Value = in_place(1).json();
    let written = report["in_place"]["written_bytes"].as_u64().expect("a number");
    assert!(written > 0 && written < SIZES[1] / 8, "{report}");
    assert!(fs::read(&raw).expect("restored") == points.disks[1][1]);
    let report: Value = in_place(1).json();
    assert_eq!(report["in_place"]["written_bytes"], 0, "{report}");
    let small = to.path().join("small");
    fs::write(&small, "x").expect("a file");
    let refused = points.restore(1, "data", &small).arg("--in-place").run().failure();
    assert!(refused.stderr.contains("1 bytes"), "{}", refused.stderr);
    assert_eq!(fs::read(&small).expect("still there"), b"x");
}

#[test]
fn to_a_block_device() {
    let points = Points::new();
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("image");
    fs::write(&image, vec![0xee; (64 << 20) + 4096]).expect("an image");
    let device = Command::new("losetup").args(["--find", "--show"]).arg(&image).output().expect("losetup");
    assert!(device.status.success(), "{}", String::from_utf8_lossy(&device.stderr));
    let device = String::from_utf8_lossy(&device.stdout).trim().to_owned();
    let restored = points.restore(0, "root", Path::new(&device)).run();
    let again = points.restore(1, "root", Path::new(&device)).arg("--in-place").run();
    let detached = Command::new("losetup").args(["--detach", &device]).status().expect("losetup");
    restored.success();
    again.success();
    assert!(detached.success());
    let found = fs::read(&image).expect("the image");
    assert!(found[..64 << 20] == points.disks[1][0], "what was on the device before is gone");
    assert!(found[64 << 20..].iter().all(|byte| *byte == 0xee), "what is behind the volume stays");
}

#[test]
fn what_is_damaged_is_not_restored() {
    let points = Points::new();
    let to = tempfile::tempdir().expect("a directory");
    let device = to.path().join("exists");
    fs::write(&device, vec![0x55; 64 << 20]).expect("an image");
    // The largest chunk is one of data.
    let chunks = points.store.chunks();
    let victim = chunks.iter().max_by_key(|path| fs::metadata(path).expect("a chunk").len()).expect("chunks");
    let good = fs::read(victim).expect("a chunk");
    let refused = |what: &str, in_place: bool| {
        for point in [0, 1] {
            for volume in ["root", "data"] {
                let to = to.path().join("new");
                let outcome = points.restore(point, volume, &to).run();
                if outcome.status.success() {
                    fs::remove_file(&to).expect("restored");
                    continue;
                }
                assert_eq!(outcome.status.code(), Some(5), "{what}: {}", outcome.stderr);
                assert!(outcome.stderr.contains("chunks/"), "the object is not named: {}", outcome.stderr);
                assert!(!to.exists() && !to.with_extension("partial").exists(), "{what}: something was left");
                let piped = points.restore(point, volume, Path::new("-")).run();
                assert_eq!(piped.status.code(), Some(5), "{what}: {}", piped.stderr);
                if in_place {
                    // Missing objects are seen before anything is written.
                    let outcome = points.restore(point, volume, &device).arg("--in-place").run();
                    assert_eq!(outcome.status.code(), Some(5), "{what}: {}", outcome.stderr);
                    assert!(fs::read(&device).expect("there").iter().all(|byte| *byte == 0x55), "{what}");
                }
                return;
            }
        }
        panic!("{what}: nobody noticed");
    };
    let file = fs::OpenOptions::new().write(true).open(victim).expect("a chunk");
    file.write_all_at(&[good[good.len() / 2] ^ 1], good.len() as u64 / 2).expect("damage");
    refused("a flipped bit", false);
    let verify = points.store.cli(["verify", "--read-data", "100", "-o", "json"]).run();
    assert_eq!(verify.status.code(), Some(5), "{}", verify.stdout);
    file.set_len(good.len() as u64 - 1).expect("damage");
    refused("a truncated chunk", false);
    fs::remove_file(victim).expect("damage");
    refused("a missing chunk", true);
    let verify = points.store.cli(["repository", "check"]).run();
    assert_eq!(verify.status.code(), Some(5), "{}", verify.stdout);
    assert!(verify.stdout.contains("it is missing"), "{}", verify.stdout);
    // A backup that is asked to be full looks for every chunk, and so heals what the guest still has.
    for chunk in &chunks {
        fs::remove_file(chunk).or_else(|error| if chunk == victim { Ok(()) } else { Err(error) }).expect("damage");
    }
    let full: Value = points.store.backup(&points.scene).arg("--type").arg("full").json();
    assert!(points.store.restored(&id(&full)) == points.disks[1]);
    points.restore(1, "root", &to.path().join("healed")).run().success();
    assert!(fs::read(to.path().join("healed")).expect("restored") == points.disks[1][0]);
}

#[test]
fn nothing_is_restored_into_the_repository() {
    let points = Points::new();
    let inside = Path::new(&points.store.url).join("chunks/image");
    let refused = points.restore(0, "root", &inside).run().failure();
    assert!(refused.stderr.contains("another place"), "{}", refused.stderr);
    assert!(!inside.exists());
    // Nor from a directory of images that a repository is not, and the other way round.
    let refused = Cli::new(["list", "--qcow2-dir", &points.store.url, "--repository", &points.store.url]).run();
    assert_eq!(refused.status.code(), Some(2), "{}", refused.stderr);
    assert!(tool("QEMU_IMG").exists());
}
