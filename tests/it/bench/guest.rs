//! What the guest notices.

use super::measure::{is_stopped, median_and_maximum};
use crate::{
    bed::{
        cli::{Cli, Running},
        control::Control,
        disk::{Bus, DiskSpec},
        faults::FuseTarget,
        flavour::Flavour,
        vm::Vm,
        writer::{Stats, Writer},
    },
    scene::{SIZES, Scene, VOLUMES, stream},
    store::Store,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::{
    process::{Child, Stdio},
    time::{Duration, Instant},
};
use virt_fleece::repository::DEFAULT_CHUNK_SIZE;

/// Writes a second that the guest tries to make.
const RATE: u64 = 300;
/// How long each case is measured.
const WINDOW: Duration = Duration::from_secs(8);

/// A row: what the guest's writer saw since the last reset.
fn row(writer: &mut Writer, case: &str) -> Stats {
    let stats = writer.stats();
    println!(
        "{case:44} {:>8.1} {:>9.2} {:>9.2} {:>10.2}",
        stats.count as f64 / stats.seconds,
        stats.p50_us / 1000.0,
        stats.p99_us / 1000.0,
        stats.max_us / 1000.0
    );
    stats
}

/// A row during a backup to this target, which goes on until the end of the window.
fn during(writer: &mut Writer, target: &FuseTarget, backup: Cli, case: &str) -> Stats {
    let backup = backup.arg("--type").arg("full").spawn();
    writer.reset_stats();
    std::thread::sleep(WINDOW);
    let stats = row(writer, case);
    target.faults().heal();
    backup.finish();
    stats
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_guest_latency() {
    let scene = Scene::new(Flavour::Next, true);
    let mut writer = scene.vm.writer();
    writer.start(&stream(1), RATE, &VOLUMES);
    println!("\nguest writes at {RATE}/s{:27} {:>8} {:>9} {:>9} {:>10}", "", "writes/s", "p50 ms", "p99 ms", "max ms");
    writer.reset_stats();
    std::thread::sleep(WINDOW);
    row(&mut writer, "no backup");
    let target = FuseTarget::new();
    target.faults().limit_bandwidth(5 << 20);
    during(&mut writer, &target, scene.backup_to(target.path()), "qcow2 chain, target 5 MiB/s");
    target.faults().stall();
    during(&mut writer, &target, scene.backup_to(target.path()), "qcow2 chain, target stalled");

    let store = Store::within(target.path(), DEFAULT_CHUNK_SIZE);
    writer.reset_stats();
    let begun = Instant::now();
    let mut backups = 0;
    while begun.elapsed() < WINDOW {
        store.backup(&scene).arg("--type").arg("full").run().success();
        backups += 1;
    }
    row(&mut writer, &format!("repository, fast, {backups} full backups on end"));
    // What a backup that takes as long as the window asks of the guest.
    let paced = store.backup(&scene).arg("--bandwidth-limit").arg("12MiB/s");
    let fast = during(&mut writer, &target, paced, "repository, fast, backup paced to the window");
    target.faults().stall();
    let stalled = during(&mut writer, &target, store.backup(&scene), "repository, stalled");
    println!("p99 stalled / fast: {:.2} (goal 0.8 to 1.2)", stalled.p99_us / fast.p99_us);
    drop(store);

    // The peer: QEMU's own backup straight to the same target.
    target.faults().limit_bandwidth(5 << 20);
    let mut control = scene.vm.control();
    push_straight(&scene, &mut control, &target);
    writer.reset_stats();
    std::thread::sleep(WINDOW);
    row(&mut writer, "blockdev-backup, target 5 MiB/s");
    target.faults().heal();
}

fn push_straight(scene: &Scene, control: &mut Control, target: &FuseTarget) {
    for (index, size) in SIZES.iter().enumerate() {
        let file = target.path().join(format!("direct{index}.raw"));
        std::fs::File::create(&file).and_then(|file| file.set_len(*size)).expect("a file");
        let node = format!("direct{index}");
        control.run("blockdev-add", &json!({"driver": "file", "node-name": node, "filename": file}));
    }
    let actions: Vec<Value> = VOLUMES
        .iter()
        .enumerate()
        .map(|(index, volume)| {
            let device = scene.vm.disk(volume).format_node();
            let data = json!({"job-id": format!("direct{index}"), "device": device,
                "target": format!("direct{index}"), "sync": "full"});
            json!({"type": "blockdev-backup", "data": data})
        })
        .collect();
    control.run("transaction", &json!({ "actions": actions }));
}

/// Milliseconds that `stop` takes.
fn stop(control: &mut Control) -> f64 {
    let begun = Instant::now();
    control.run("stop", &json!({}));
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    control.run("cont", &json!({}));
    took
}

fn print_stops(case: &str, stops: &[f64]) {
    let (median, maximum) = median_and_maximum(stops);
    println!("{case:66} {median:>9.2} {maximum:>9.2}");
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

/// SIGSTOP, and waits until it holds.
fn freeze(pid: u32) {
    signal(pid, Signal::STOP);
    let begun = Instant::now();
    while !is_stopped(pid) && begun.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_stop_while_the_repository_is_stalled() {
    let scene = Scene::new(Flavour::Next, false);
    let mut control = scene.vm.control();
    // Nothing that is alike: the repository would have it after the first chunk.
    let content = scene.vm.directory().join("content");
    std::fs::write(&content, super::content::noise(1, 32 << 20)).unwrap();
    for volume in VOLUMES {
        scene.vm.io(&mut control, volume, &format!("write -s {} 0 32M", content.display()));
    }
    println!("\nQMP stop, 20 times{:48} {:>9} {:>9}", "", "median ms", "max ms");
    let twenty = |control: &mut Control| -> Vec<f64> { (0..20).map(|_| stop(control)).collect() };
    print_stops("no backup", &twenty(&mut control));
    let target = FuseTarget::new();
    let store = Store::within(target.path(), DEFAULT_CHUNK_SIZE);
    let begin = || -> Running { store.backup(&scene).arg("--type").arg("full").spawn() };

    target.faults().limit_bandwidth(1 << 20);
    let backup = begin();
    target.faults().wait_stalled(1, Duration::from_millis(1500));
    target.faults().stall();
    assert!(target.faults().wait_stalled(1, Duration::from_secs(20)), "nothing is written");
    std::thread::sleep(Duration::from_millis(500));
    print_stops("repository stalled", &twenty(&mut control));
    freeze(backup.pid());
    print_stops("repository stalled, virt-fleece stopped by SIGSTOP", &twenty(&mut control));
    signal(backup.pid(), Signal::CONT);
    target.faults().heal();
    backup.finish();

    // Stopped while it reads.
    let mut stops = Vec::new();
    for round in 0..20 {
        let backup = begin();
        std::thread::sleep(Duration::from_millis(150 + 8 * round));
        freeze(backup.pid());
        stops.push(stop(&mut control));
        signal(backup.pid(), Signal::CONT);
        backup.finish();
    }
    print_stops("virt-fleece stopped by SIGSTOP at 20 moments of a fast backup", &stops);
    print_stops(
        "nbdcopy stopped by SIGSTOP for 5 s (it was killed then)",
        &[stop_beside_nbdcopy(&scene, &mut control)],
    );
}

/// The peer: a client that lets answers pile up. It is killed after 5 seconds, or this would never end.
fn stop_beside_nbdcopy(scene: &Scene, control: &mut Control) -> f64 {
    let export = super::push::Export::new(scene, VOLUMES[0]);
    // A reader of nothing: nbdcopy has asked for all that it may, and is stopped before it takes it.
    let mut copy: Child = export.nbdcopy(&[], std::path::Path::new("-")).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    freeze(copy.id());
    let pid = copy.id();
    let end = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(5));
        signal(pid, Signal::KILL);
    });
    let took = stop(control);
    end.join().unwrap();
    copy.wait().unwrap();
    took
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_cut_and_freeze() {
    let scene = Scene::new(Flavour::Next, false);
    let cuts: Vec<f64> = (0..50)
        .map(|_| scene.backup().json::<Value>()["cut_microseconds"].as_u64().expect("a number") as f64 / 1000.0)
        .collect();
    let (median, maximum) = median_and_maximum(&cuts);
    println!("\ncut of two disks, 50 backups: median {median:.1} ms, maximum {maximum:.1} ms");
    drop(scene);

    let vm = Vm::builder(Flavour::Next)
        .disk(DiskSpec::new("fs", 64 << 20).bus(Bus::VirtioBlk { iothread: true }))
        .agent(true)
        .start();
    vm.writer().size("fs");
    let target = tempfile::tempdir().expect("a directory");
    let mut frozen = Vec::new();
    let mut cuts = Vec::new();
    let begun = Instant::now();
    while frozen.len() < 50 {
        let backup = Cli::new(["backup", "--vm", "web", "-o", "json", "--quiesce", "require", "--qmp"]);
        let backup = backup.arg(vm.qmp_socket()).arg("--guest-agent").arg(vm.agent_socket());
        let backup = backup.arg("--fleece-dir").arg(vm.fleece_directory()).arg("--qcow2-dir").arg(target.path());
        let outcome = backup.run();
        if !outcome.status.success() {
            assert!(begun.elapsed() < Duration::from_secs(120), "no guest agent answers: {}", outcome.stderr);
            continue;
        }
        let report: Value = outcome.json();
        frozen.push(report["quiesce"]["microseconds"].as_u64().expect("a number") as f64 / 1000.0);
        cuts.push(report["cut_microseconds"].as_u64().expect("a number") as f64 / 1000.0);
    }
    let (median, maximum) = median_and_maximum(&frozen);
    println!(
        "file systems frozen by the guest's agent (request to thaw), 50 backups: median {median:.1} ms, maximum {maximum:.1} ms"
    );
    let (median, maximum) = median_and_maximum(&cuts);
    println!("of that the cut: median {median:.1} ms, maximum {maximum:.1} ms");
}
