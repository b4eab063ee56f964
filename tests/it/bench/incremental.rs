//! Incremental backups: whether their time depends on the disk's size, and what a chunk size costs.

use super::{
    content::noise,
    full::{FullScene, SIZE, VOLUME},
    measure::{median, run},
};
use crate::{
    bed::{control::Control, disk::DiskSpec, flavour::Flavour, vm::Vm},
    nbd::servers::Random,
    scene::{Scene, is_incremental},
    store::{Store, files},
};
use serde_json::Value;
use std::{fs, path::Path};
use virt_fleece::repository::DEFAULT_CHUNK_SIZE;

/// Bytes that are written before an incremental backup.
const DIRTY: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

/// Overwrites parts of a disk with random bytes, never the same ones.
struct Scribbler<'a> {
    scene: &'a Scene,
    control: Control,
    volume: &'a str,
    seed: u64,
    content: std::path::PathBuf,
}

impl<'a> Scribbler<'a> {
    fn new(scene: &'a Scene, volume: &'a str, directory: &Path) -> Self {
        let content = directory.join("scribble");
        Self { scene, control: scene.vm.control(), volume, seed: 1000, content }
    }

    fn write(&mut self, offset: u64, length: u64) {
        self.seed += 1;
        fs::write(&self.content, noise(self.seed, length as usize)).unwrap();
        let command = format!("write -s {} {offset} {length}", self.content.display());
        self.scene.vm.io(&mut self.control, self.volume, &command);
    }

    /// Pieces of this length at even distances over the disk.
    fn spread(&mut self, size: u64, length: u64) {
        let count = DIRTY / length;
        for piece in 0..count {
            self.write(size / count / length * length * piece, length);
        }
    }

    /// Pieces of this length at random places, none twice.
    fn scatter(&mut self, size: u64, length: u64, bytes: u64) {
        let mut random = Random(self.seed);
        let mut places = std::collections::BTreeSet::new();
        while (places.len() as u64) < bytes / length {
            places.insert(random.below(size / length));
        }
        for place in places {
            self.write(place * length, length);
        }
    }
}

/// Seconds of an incremental backup, and what it says.
fn incremental(store: &Store, scene: &Scene) -> (f64, Value) {
    let ran = run(store.backup(scene).into_command());
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert!(is_incremental(&report), "{report}");
    (ran.seconds, report)
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_size_of_the_disk() {
    println!(
        "\n64 MiB in 64 places changed on a sparse disk{:>18} {:>14} {:>18}",
        "incremental s", "nothing dirty", "first backup s"
    );
    let mut times = Vec::new();
    for gib in [4_u64, 64, 1024] {
        let directory = tempfile::tempdir().unwrap();
        let disk = DiskSpec::new(VOLUME, gib << 30).in_directory(directory.path());
        let scene = Scene::of(Vm::builder(Flavour::Next).disk(disk).guest(false).start());
        let store = Store::within(directory.path(), DEFAULT_CHUNK_SIZE);
        let mut scribbler = Scribbler::new(&scene, VOLUME, directory.path());
        scribbler.spread(gib << 30, MIB);
        let first = run(store.backup(&scene).into_command()).seconds;
        let mut changed = Vec::new();
        let mut idle = Vec::new();
        for _ in 0..5 {
            scribbler.spread(gib << 30, MIB);
            changed.push(incremental(&store, &scene).0);
            idle.push(incremental(&store, &scene).0);
        }
        times.push(median(changed));
        let seconds = times[times.len() - 1];
        println!("{gib:>6} GiB {seconds:>51.2} {:>14.2} {first:>18.2}", median(idle));
    }
    println!("64 GiB / 4 GiB: {:.2}, 1 TiB / 4 GiB: {:.2} (goal 1.3)", times[1] / times[0], times[2] / times[0]);
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_chunk_size() {
    let full = FullScene::new(Flavour::Next);
    let mut scribbler = Scribbler::new(&full.scene, VOLUME, full.directory.path());
    println!(
        "\nchunk size, disk of {} MiB data{:>11} {:>11} {:>12} {:>12} {:>13} {:>13} {:>11}",
        full.data >> 20,
        "full MiB/s",
        "stored MiB",
        "objects/TiB",
        "sequential",
        "64K scattered",
        "64K s",
        "4K stored"
    );
    for kib in [256_u64, 512, 1024, 2048, 4096] {
        // Three first backups, each into a repository of its own; the last one goes on.
        let mut seconds = Vec::new();
        let mut store = None;
        for _ in 0..3 {
            drop(store.take());
            let fresh = Store::within(full.directory.path(), kib << 10);
            seconds.push(run(fresh.backup(&full.scene).into_command()).seconds);
            store = Some(fresh);
        }
        let store = store.unwrap();
        let objects = files(&store.path().join("chunks"));
        let stored: u64 = objects.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
        let share = |report: &Value| {
            let number = |name: &str| report["volumes"][0][name].as_u64().unwrap() as f64;
            number("stored_bytes") / number("dirty_bytes")
        };
        let bytes_per_written = |report: &Value, written: u64| {
            report["volumes"][0]["stored_bytes"].as_u64().unwrap() as f64 / written as f64
        };
        scribbler.write(100 * MIB, DIRTY);
        let sequential = share(&incremental(&store, &full.scene).1);
        scribbler.scatter(SIZE, 64 << 10, DIRTY / 2);
        let (scattered_seconds, report) = incremental(&store, &full.scene);
        let scattered = bytes_per_written(&report, DIRTY / 2);
        scribbler.scatter(SIZE, 4 << 10, MIB);
        let small = bytes_per_written(&incremental(&store, &full.scene).1, MIB);
        println!(
            "{kib:>6} KiB {:>31.0} {:>11} {:>12.0} {sequential:>12.2} {scattered:>13.2} {scattered_seconds:>13.2} {small:>11.1}",
            (full.data >> 20) as f64 / median(seconds),
            stored >> 20,
            objects.len() as f64 / full.data as f64 * (1_u64 << 40) as f64,
        );
    }
}
