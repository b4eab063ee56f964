//! The bed itself: each QEMU boots the guest, and the writer writes what the oracle computes.

use std::time::Duration;

use serde_json::json;

use crate::bed::cli::Cli;
use crate::bed::control::leftovers;
use crate::bed::disk::{Bus, DiskSpec, Format, read_image};
use crate::bed::flavour::Flavour;
use crate::bed::oracle::{Replay, Stream};
use crate::bed::point_in_time::PointInTime;
use crate::bed::vm::Vm;
use crate::bed::writer::fnv1a64;

/// Size of each disk.
const SIZE: u64 = 64 << 20;

/// Writes at full speed for three seconds, stops, and compares the images with the replay.
fn writer_agrees_with_oracle(flavour: Flavour) {
    assert!(flavour.available(), "{flavour:?} is not set up; run tests/bed/setup");
    let mut vm = Vm::builder(flavour)
        .disk(DiskSpec::new("a", SIZE).bus(Bus::VirtioBlk { iothread: true }))
        .disk(DiskSpec::new("b", SIZE + 512).bus(Bus::ScsiHd { iothread: true }))
        .start();
    let mut writer = vm.writer();
    assert_eq!((writer.size("a"), writer.size("b")), (SIZE, SIZE + 512));
    let stream = Stream { seed: 7, threads: 4, zero: 20, disks: vec![SIZE, SIZE + 512] };
    writer.start(&stream, 0, &["a", "b"]);
    let begun = writer.status();
    writer.wait_progress(&begun, 10);
    // Not a wait for something: three seconds at full speed are the load that is asked for.
    std::thread::sleep(Duration::from_secs(3));
    let done = writer.stop();
    assert_eq!((done.running, done.errors), (false, 0), "{done:?}");
    let stats = writer.stats();
    println!("{flavour:?}: {done:?} {stats:?}");

    let mut replay = Replay::new(&stream);
    replay.advance_all(&done.writes);
    assert_eq!(writer.read("a", 1 << 20, 64 << 10), fnv1a64(&replay.bytes(0)[1 << 20..][..64 << 10]));
    vm.assert_clean(&mut vm.control(), &[]);
    vm.quit();

    let images = ["a", "b"].map(|volume| read_image(&vm.disk(volume).path));
    for (disk, image) in images.iter().enumerate() {
        let expected = replay.bytes(disk);
        let differs = expected.iter().zip(image).position(|(wanted, found)| wanted != found);
        assert_eq!((image.len(), differs), (expected.len(), None), "disk {disk} after {done:?}");
    }
    let found = PointInTime::find(&images, &stream).expect("an instant of the stream");
    assert!(!found.torn());
    found.assert_between(&done.writes, &done.writes);
}

#[test]
fn qemu_10_boots_and_writes_what_the_oracle_says() {
    assert!(Flavour::Qemu10.available(), "no test bed: run tests/bed/setup");
    writer_agrees_with_oracle(Flavour::Qemu10);
}

#[test]
fn qemu_next_boots_and_writes_what_the_oracle_says() {
    writer_agrees_with_oracle(Flavour::Next);
}

#[test]
fn qemu_allowlist_boots_and_writes_what_the_oracle_says() {
    writer_agrees_with_oracle(Flavour::Allowlist);
}

#[test]
fn a_killed_qemu_leaves_an_instant_and_a_slow_copy_does_not() {
    let mut vm = Vm::builder(Flavour::Qemu10)
        .disk(DiskSpec::new("a", SIZE).bus(Bus::VirtioBlk { iothread: true }))
        .disk(DiskSpec::new("b", SIZE).bus(Bus::ScsiHd { iothread: false }))
        .start();
    let mut writer = vm.writer();
    let stream = Stream { seed: 8, threads: 4, zero: 20, disks: vec![SIZE, SIZE] };
    writer.start(&stream, 0, &["a", "b"]);
    let begun = writer.status();
    let before = writer.wait_progress(&begun, 500);
    let read = |vm: &Vm, volume| read_image(&vm.disk(volume).path);
    let first = read(&vm, "a");
    writer.wait_progress(&before, 100);
    let second = read(&vm, "b");
    let later = writer.status();
    vm.kill();

    let error = PointInTime::find(&[first, second], &stream).expect_err("the disks were copied one after the other");
    assert!(error.contains("order/completeness violation"), "{error}");
    // The host's page cache outlives QEMU: what the guest knows to be complete is there, and at most one write more.
    let found = PointInTime::find(&[read(&vm, "a"), read(&vm, "b")], &stream).expect("an instant of the stream");
    println!("killed at {found:?} after {later:?}; the copy: {error}");
    for (cut, known) in found.threads.iter().zip(&later.writes) {
        assert!(cut.latest >= *known, "{cut:?} is before {known}");
    }
}

#[test]
fn every_disk_layout_starts_without_a_guest() {
    let size = 4 << 20;
    let mut vm = Vm::builder(Flavour::Qemu10)
        .guest(false)
        .agent(true)
        .disk(DiskSpec::new("plain", size))
        .disk(DiskSpec::new("limited", size).format(Format::Qcow2).throttled(1 << 30))
        .disk(DiskSpec::new("lun", size).bus(Bus::ScsiHd { iothread: false }).stop_on_error(false))
        .disk(DiskSpec::new("ahci", size).bus(Bus::Ide).format(Format::Qcow2))
        .disk(DiskSpec::new("anonymous", size).bus(Bus::VirtioBlk { iothread: true }).qdev(None))
        .start();
    let mut control = vm.control();
    for volume in ["plain", "limited", "lun", "ahci"] {
        vm.io(&mut control, volume, "write -P 0x5a 64k 64k");
    }
    let inserted = control.list("query-block");
    for disk in vm.disks() {
        let node = disk.top_node();
        let block = inserted.iter().find(|block| block["inserted"]["node-name"] == node.as_str());
        let block = block.unwrap_or_else(|| panic!("{node} is not in query-block"));
        match disk.device() {
            Some(device) => assert_eq!(block["qdev"], device.as_str()),
            None => assert!(block["qdev"].as_str().is_some_and(|qdev| qdev.contains("peripheral-anon"))),
        }
    }
    vm.assert_clean(&mut control, &[]);
    drop(control);
    vm.quit();
    for volume in ["plain", "limited", "lun", "ahci"] {
        let image = read_image(&vm.disk(volume).path);
        assert_eq!(image.len() as u64, size);
        assert!(image[..64 << 10].iter().all(|byte| *byte == 0), "{volume}");
        assert!(image[64 << 10..128 << 10].iter().all(|byte| *byte == 0x5a), "{volume}");
    }
}

#[test]
fn leftovers_are_found() {
    let vm = Vm::builder(Flavour::Qemu10).guest(false).disk(DiskSpec::new("a", 4 << 20)).start();
    let mut control = vm.control();
    let node = vm.disk("a").format_node();
    vm.assert_clean(&mut control, &[]);
    control.run("block-dirty-bitmap-add", &json!({"node": node, "name": "kept"}));
    vm.assert_clean(&mut control, &["kept"]);

    control.run("block-dirty-bitmap-add", &json!({"node": node, "name": "lost"}));
    control.run("blockdev-add", &json!({"driver": "null-co", "node-name": "vf-fleece", "size": 4 << 20}));
    let job = json!({"job-id": "vf-job", "device": node, "target": "vf-fleece", "sync": "none"});
    control.run("blockdev-backup", &job);
    let address = json!({"type": "unix", "data": {"path": vm.directory().join("nbd")}});
    control.run("nbd-server-start", &json!({"addr": address}));
    control.run("stop", &json!({}));
    let left = leftovers(&mut control, &["kept"]).join("\n");
    for part in ["bitmap", "lost", "vf-fleece", "query-block-jobs", "query-jobs", "NBD server", "paused"] {
        assert!(left.contains(part), "{part} is not in {left}");
    }
    assert!(!left.contains("kept"), "{left}");
}

#[test]
fn the_binary_runs() {
    let outcome = Cli::new(["--version"]).run().success();
    assert!(outcome.stderr.is_empty(), "{outcome:?}");
}
