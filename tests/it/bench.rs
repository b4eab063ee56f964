//! Measurements, run by `bench/run` alone: tables on standard output, no assertions on times.

use crate::{
    bed::{
        faults::FuseTarget,
        flavour::{Flavour, tool},
        writer::Writer,
    },
    scene::{SIZES, Scene, VOLUMES, stream},
};
use serde_json::{Value, json};
use std::{
    process::Command,
    time::{Duration, Instant},
};

/// Writes a second that the guest tries to make.
const RATE: u64 = 300;
/// How long each case is measured.
const WINDOW: Duration = Duration::from_secs(12);

/// A row: what the guest's writer saw during the window.
fn row(writer: &mut Writer, case: &str) {
    let stats = writer.stats();
    println!(
        "{case:42} {:>8.1} {:>9.2} {:>9.2} {:>10.2}",
        stats.count as f64 / stats.seconds,
        stats.p50_us / 1000.0,
        stats.p99_us / 1000.0,
        stats.max_us / 1000.0
    );
}

/// The guest writes at a fixed rate; a backup to this target runs meanwhile.
fn during_backup(scene: &Scene, writer: &mut Writer, target: &FuseTarget, case: &str) {
    let backup = scene.backup_to(target.path()).arg("--type").arg("full").spawn();
    writer.reset_stats();
    std::thread::sleep(WINDOW);
    row(writer, case);
    target.faults().release();
    target.faults().heal();
    backup.finish();
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_guest_latency() {
    let scene = Scene::new(Flavour::Next, true);
    let mut writer = scene.vm.writer();
    writer.start(&stream(1), RATE, &VOLUMES);
    println!("\nguest writes at {RATE}/s{:25} {:>8} {:>9} {:>9} {:>10}", "", "writes/s", "p50 ms", "p99 ms", "max ms");
    writer.reset_stats();
    std::thread::sleep(WINDOW);
    row(&mut writer, "no backup");
    let target = FuseTarget::new();
    target.faults().limit_bandwidth(20 << 20);
    during_backup(&scene, &mut writer, &target, "virt-fleece, target 20 MiB/s");
    target.faults().limit_bandwidth(5 << 20);
    during_backup(&scene, &mut writer, &target, "virt-fleece, target 5 MiB/s");
    target.faults().stall();
    during_backup(&scene, &mut writer, &target, "virt-fleece, target stalled");

    // The peer: QEMU's own backup straight to the same target.
    let mut control = scene.vm.control();
    for (index, size) in SIZES.iter().enumerate() {
        let file = target.path().join(format!("direct{index}.raw"));
        std::fs::File::create(&file).and_then(|file| file.set_len(*size)).expect("a file");
        let node = format!("direct{index}");
        control.run("blockdev-add", &json!({"driver": "file", "node-name": node, "filename": file}));
    }
    target.faults().limit_bandwidth(5 << 20);
    let actions: Vec<Value> = VOLUMES
        .iter()
        .enumerate()
        .map(|(index, volume)| {
            let device = scene.vm.disk(volume).format_node();
            let data = json!({"job-id": format!("direct{index}"), "device": device, "target": format!("direct{index}"), "sync": "full"});
            json!({"type": "blockdev-backup", "data": data})
        })
        .collect();
    control.run("transaction", &json!({ "actions": actions }));
    writer.reset_stats();
    std::thread::sleep(WINDOW);
    row(&mut writer, "blockdev-backup, target 5 MiB/s");
    target.faults().heal();
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_cut_and_throughput() {
    let scene = Scene::new(Flavour::Next, false);
    let mut control = scene.vm.control();
    for (volume, size) in VOLUMES.iter().zip(SIZES) {
        scene.vm.io(&mut control, volume, &format!("write -P 7 0 {}", size / 4096 * 4096));
        scene.vm.io(&mut control, volume, "flush");
    }
    let mut cuts: Vec<u64> =
        (0..30).map(|_| scene.backup().json::<Value>()["cut_microseconds"].as_u64().expect("a number")).collect();
    cuts.sort_unstable();
    println!(
        "\ncut of two disks, 30 backups: median {:.1} ms, maximum {:.1} ms",
        cuts[15] as f64 / 1000.0,
        cuts[29] as f64 / 1000.0
    );
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..5 {
        let begun = Instant::now();
        scene.backup().arg("--type").arg("full").run().success();
        ours.push(begun.elapsed());
        let begun = Instant::now();
        for volume in VOLUMES {
            let to = scene.target.path().join("peer.qcow2");
            let mut convert = Command::new(tool("QEMU_IMG"));
            let format = if volume == VOLUMES[0] { "raw" } else { "qcow2" };
            convert.args(["convert", "-U", "-f", format, "-O", "qcow2"]).arg(&scene.vm.disk(volume).path).arg(&to);
            assert!(convert.status().expect("qemu-img").success());
            std::fs::File::open(&to).and_then(|file| file.sync_all()).expect("a flush");
        }
        theirs.push(begun.elapsed());
    }
    ours.sort();
    theirs.sort();
    println!(
        "full backup of {} MiB, start to durable, median of 5: virt-fleece {:.2?} (live, with digests), qemu-img convert {:.2?} (not a live image)",
        SIZES.iter().sum::<u64>() >> 20,
        ours[2],
        theirs[2]
    );
}
