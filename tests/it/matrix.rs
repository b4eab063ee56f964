//! The cases that the two ancestors' users met: every kind of disk, bus and filter, what happens to a disk or a VM between
//! and during backups, and what is recorded of it. Most need no guest: `qemu-io` writes through the devices.

mod disks;
mod history;
mod interruptions;
mod meddling;
mod safety;

use crate::{
    bed::{
        cli::Cli,
        control::{Control, end_mark},
        disk::read_image,
        flavour::Flavour,
        vm::{Vm, VmBuilder},
    },
    scene::{Scene, id},
};
use serde_json::{Value, json};
use std::{
    path::Path,
    time::{Duration, Instant},
};

/// What [`kind`] says of a volume that was not read as a whole.
const INCREMENTAL: &str = "incremental";

/// A VM without a guest, to be given disks.
fn machine(flavour: Flavour) -> VmBuilder {
    assert!(flavour.available(), "{flavour:?} is missing; run tests/bed/setup");
    Vm::builder(flavour).guest(false)
}

/// A VM and a target for it.
fn scene(builder: VmBuilder) -> Scene {
    Scene::of(builder.start())
}

/// The same target, and the VM as it comes up again.
fn after_restart(scene: Scene, builder: VmBuilder) -> Scene {
    let Scene { vm, target, .. } = scene;
    drop(vm);
    Scene { target, ..Scene::of(builder.start()) }
}

/// The engines that run on a flavour.
fn engines(flavour: Flavour) -> &'static [&'static str] {
    if flavour == Flavour::Allowlist { &["job"] } else { &["job", "filter"] }
}

/// The volumes of the VM that are plugged in and have a name.
fn volumes(scene: &Scene) -> Vec<String> {
    let plugged = scene.vm.disks().iter().filter(|disk| disk.device().is_some() && !disk.spec.read_only);
    plugged.map(|disk| disk.spec.volume.clone()).filter(|volume| !volume.ends_with("(gone)")).collect()
}

/// One byte over part of every disk, across the borders of clusters, and over its first and last sector.
fn write_all(scene: &Scene, control: &mut Control, byte: u8, at_kib: u64) {
    for volume in volumes(scene) {
        write(scene, control, &volume, byte, at_kib);
    }
}

/// The same for one disk.
fn write(scene: &Scene, control: &mut Control, volume: &str, byte: u8, at_kib: u64) {
    let end = size(control, &scene.vm.disk(volume).format_node()) - 512;
    for command in [format!("write -P {byte} {at_kib}k 100k"), format!("write -P {byte} {end} 512")] {
        scene.vm.io(control, volume, &command);
    }
}

/// Size of the disk behind a node, in bytes.
fn size(control: &mut Control, node: &str) -> u64 {
    let nodes = control.run("query-named-block-nodes", &json!({"flat": true}));
    let found = nodes.as_array().into_iter().flatten().find(|found| found["node-name"] == node);
    found.unwrap_or_else(|| panic!("no node {node}"))["image"]["virtual-size"].as_u64().expect("a size")
}

/// Each volume of a report with `incremental` or the reason why it is a full one.
fn kinds(report: &Value) -> Vec<(String, String)> {
    let volumes = report["volumes"].as_array().expect("volumes");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let kind = |volume: &Value| match volume.get("parent") {
        Some(_) => INCREMENTAL.to_owned(),
        None => text(&volume["full_reason"]),
    };
    volumes.iter().map(|volume| (text(&volume["name"]), kind(volume))).collect()
}

fn assert_kinds(report: &Value, expected: &[(&str, &str)]) {
    let expected: Vec<_> = expected.iter().map(|(name, kind)| ((*name).to_owned(), (*kind).to_owned())).collect();
    assert_eq!(kinds(report), expected, "{report}");
}

/// The restored backup is what the disks are now.
fn assert_is_now(scene: &Scene, control: &mut Control, report: &Value) {
    let to = tempfile::tempdir().expect("a directory");
    let restore = Cli::new(["restore", "--vm", "web", "--backup", &id(report), "--qcow2-dir"]);
    restore.arg(scene.target.path()).arg("--output").arg(to.path()).run().success();
    for (index, (volume, kind)) in kinds(report).into_iter().enumerate() {
        // All tests write to all disks before a backup: an incremental one that found nothing proves nothing.
        assert_ne!(report["volumes"][index]["dirty_bytes"], 0, "nothing changed in {volume}: {report}");
        // qcow2 keeps tables in memory until a flush.
        scene.vm.io(control, &volume, "flush");
        let (restored, disk) = (to.path().join(format!("{volume}.raw")), read_image(&scene.vm.disk(&volume).path));
        let restored = std::fs::read(restored).expect("a restored disk");
        let differs = restored.iter().zip(&disk).position(|(a, b)| a != b);
        assert_eq!((restored.len(), differs), (disk.len(), None), "{volume} ({kind}) is not restored as it is");
    }
}

/// Why a device is no volume of a report.
fn skipped<'a>(report: &'a Value, name: &str) -> &'a str {
    let devices = report["skipped"].as_array().into_iter().flatten();
    let found = devices.into_iter().find(|device| device["name"] == name);
    found.unwrap_or_else(|| panic!("{name} is not skipped: {report}"))["reason"].as_str().expect("a reason")
}

/// Waits until a backup has made its snapshots readable.
fn wait_for_exports(control: &mut Control, count: usize) {
    let begun = Instant::now();
    // Those of scratch nodes are there for a moment, before the point in time.
    let is_snapshot = |export: &&Value| export["node-name"].as_str().is_some_and(|node| !node.ends_with("-end"));
    while control.list("query-block-exports").iter().filter(is_snapshot).count() < count {
        assert!(begun.elapsed() < Duration::from_secs(30), "no export appears");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How many complete backups there are, and that nothing else lies beside them.
fn complete_backups(target: &Path) -> usize {
    let entries = std::fs::read_dir(target.join("web")).map(|entries| entries.flatten().collect());
    let entries: Vec<_> = entries.unwrap_or_default();
    entries.iter().filter(|entry| entry.path().join("manifest.json").exists()).count()
}

/// The names of all bitmaps of a node, end marks aside: each of those stands beside its bitmap.
fn bitmaps(control: &mut Control, node: &str) -> Vec<String> {
    let nodes = control.run("query-named-block-nodes", &json!({"flat": true}));
    let found = nodes.as_array().into_iter().flatten().find(|found| found["node-name"] == node);
    let found = found.unwrap_or_else(|| panic!("no node {node}"))["dirty-bitmaps"].clone();
    let names = found.as_array().into_iter().flatten().filter_map(|bitmap| bitmap["name"].as_str());
    let mut names: Vec<_> = names.map(str::to_owned).collect();
    names.sort();
    let (marks, names): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| name.starts_with("vf-end-"));
    let stray = marks.iter().find(|mark| !names.iter().any(|name| end_mark(name) == **mark));
    assert_eq!(stray, None, "an end mark without its bitmap, beside {names:?}");
    names
}
