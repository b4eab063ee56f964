//! Restores, prunes and lists.

use super::{
    full::{FullScene, SIZE, VOLUME},
    measure::{Run, median, run},
};
use crate::{
    bed::flavour::Flavour,
    made_up_repository::RepositoryScene,
    scene::id,
    store::{Store, files},
};
use serde_json::Value;
use std::{fs, process::Command, time::Instant};
use virt_fleece::repository::DEFAULT_CHUNK_SIZE;

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_restore() {
    let full = FullScene::new(Flavour::Next);
    let directory = full.directory.path();
    let store = Store::within(directory, DEFAULT_CHUNK_SIZE);
    let report: Value = serde_json::from_str(&full.backup(&store, &[]).stdout).unwrap();
    let objects = files(&store.path().join("chunks"));
    let bytes: u64 = objects.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    let per_tib = (1_u64 << 40) as f64 / full.data as f64;
    println!(
        "\nobjects: {:.0} a TiB of data; stored: {:.0} GiB a TiB ({} MiB of {} MiB)",
        objects.len() as f64 * per_tib,
        bytes as f64 * per_tib / f64::from(1 << 30),
        bytes >> 20,
        full.data >> 20
    );
    let output = directory.join("restored");
    let image = output.join(format!("{VOLUME}.raw"));
    let mut ours: Vec<Run> = Vec::new();
    let mut copies: Vec<Run> = Vec::new();
    let mut converts: Vec<Run> = Vec::new();
    for _ in 0..3 {
        fs::create_dir(&output).unwrap();
        ours.push(run(store.cli(["restore", "--backup", &id(&report)]).arg("--output").arg(&output).into_command()));
        assert!(fs::metadata(&image).unwrap().len() == SIZE);
        fs::remove_dir_all(&output).unwrap();
        let mut copy = Command::new("cp");
        copies.push(run({
            copy.arg(&full.image).arg(&output);
            copy
        }));
        fs::remove_file(&output).unwrap();
        let mut convert = Command::new(crate::bed::flavour::tool("QEMU_IMG"));
        convert.args(["convert", "-U", "-f", "raw", "-O", "raw"]).arg(&full.image).arg(&output);
        converts.push(run(convert));
        fs::remove_file(&output).unwrap();
    }
    println!("restore to a raw file{:>23} {:>7} {:>9} {:>9}", "s", "MiB/s", "CPU s/GiB", "peak MiB");
    let mut times = Vec::new();
    for (case, runs) in
        [("virt-fleece restore", &ours), ("cp of the image", &copies), ("qemu-img convert to raw", &converts)]
    {
        let seconds = median(runs.iter().map(|run| run.seconds));
        times.push(seconds);
        println!(
            "{case:35} {seconds:>8.2} {:>7.0} {:>9.2} {:>9}",
            (full.data >> 20) as f64 / seconds,
            median(runs.iter().map(|run| run.cpu)) / full.data as f64 * f64::from(1 << 30),
            runs.iter().map(|run| run.peak).max().unwrap() >> 20
        );
    }
    println!("ratio: {:.2} x cp, {:.2} x qemu-img convert (goal 0.8)", times[1] / times[0], times[2] / times[0]);

    let forget = store.cli(["forget", "--vm", "web", "--backup", &id(&report)]);
    forget.run().success();
    let pruned = run(store.cli(["repository", "prune"]).into_command());
    println!("prune of {} objects: {:.2} s, peak {} MiB", objects.len(), pruned.seconds, pruned.peak >> 20);
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_many_backups() {
    const VMS: usize = 100;
    const EACH: usize = 100;
    let repository = RepositoryScene::new("many");
    repository.init();
    let times: Vec<String> = (0..EACH).map(|at| format!("2026-01-01T00:{:02}:{:02}Z", at / 60, at % 60)).collect();
    let times: Vec<&str> = times.iter().map(String::as_str).collect();
    let begun = Instant::now();
    for vm in 0..VMS {
        repository.commit(&format!("vm{vm}"), &times);
    }
    println!("\n{} backups made up in {:.1} s", VMS * EACH, begun.elapsed().as_secs_f64());
    let listed = |arguments: &[&str]| {
        let runs: Vec<Run> = (0..3).map(|_| run(repository.run(arguments.iter().copied()).into_command())).collect();
        (median(runs.iter().map(|run| run.seconds)), runs.iter().map(|run| run.peak).max().unwrap() >> 20, runs)
    };
    let (seconds, peak, runs) = listed(&["list", "-o", "json"]);
    let found = serde_json::from_str::<Value>(&runs[0].stdout).unwrap();
    let count = found["backups"].as_array().or(found.as_array()).map_or(0, Vec::len);
    println!("list of {count} backups: {seconds:.2} s, peak {peak} MiB");
    let (seconds, peak, _) = listed(&["list", "--vm", "vm7"]);
    println!("list of the backups of one VM: {seconds:.2} s, peak {peak} MiB");
    let pruned = run(repository.repository(["prune"]).into_command());
    println!("prune with that many backups: {:.2} s, peak {} MiB", pruned.seconds, pruned.peak >> 20);
}
