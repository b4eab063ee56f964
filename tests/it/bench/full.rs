//! Full backups beside what others do with the same disk, and beside what the machine allows.

use super::{
    content::mixed,
    limit::{Stages, stages},
    measure::{Run, Watched, allocated, median, run},
    push::{Export, push},
};
use crate::{
    bed::{
        disk::DiskSpec,
        flavour::{Flavour, tool},
        vm::Vm,
    },
    scene::Scene,
    store::Store,
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
};
use virt_fleece::repository::DEFAULT_CHUNK_SIZE;

/// Bytes of the disk.
pub(super) const SIZE: u64 = 1536 << 20;
/// Its name.
pub(super) const VOLUME: &str = "root";
/// How often each is measured; the peers take turns.
const ROUNDS: usize = 3;

/// How nbdcopy reads at the least cost: its own choice takes QEMU two to four times as long.
const CHEAPEST: [&str; 3] = ["--connections=1", "--requests=4", "--request-size=262144"];

/// Who makes a copy of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Ours,
    OursPlain,
    OursChain,
    Push,
    PushCompressed,
    Convert,
    ConvertCompressed,
    Nbdcopy,
    NbdcopyNowhere,
}

impl Who {
    const ALL: [Self; 9] = [
        Self::Ours,
        Self::OursPlain,
        Self::OursChain,
        Self::Push,
        Self::PushCompressed,
        Self::Convert,
        Self::ConvertCompressed,
        Self::Nbdcopy,
        Self::NbdcopyNowhere,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Ours => "virt-fleece, repository, default",
            Self::OursPlain => "virt-fleece, repository, --compression-level 0",
            Self::OursChain => "virt-fleece, qcow2 chain",
            Self::Push => "fleecing blockdev-backup into qcow2",
            Self::PushCompressed => "fleecing blockdev-backup, compress=true",
            Self::Convert => "qemu-img convert -O qcow2 (no VM)",
            Self::ConvertCompressed => "qemu-img convert -c zstd -m 16 -W (no VM)",
            Self::Nbdcopy => "nbdcopy of an export to a raw file",
            Self::NbdcopyNowhere => "nbdcopy to nowhere, 1 connection, 4 x 256 KiB",
        }
    }
}

/// What one of them cost, at the median.
#[derive(Debug, Clone, Default)]
struct Cost {
    seconds: f64,
    qemu_cpu: f64,
    cpu: f64,
    peak: u64,
    growth: u64,
}

/// A VM with a disk that has content, everything in memory.
pub(super) struct FullScene {
    pub(super) scene: Scene,
    pub(super) directory: tempfile::TempDir,
    pub(super) image: PathBuf,
    /// Bytes that are not holes.
    pub(super) data: u64,
}

impl FullScene {
    pub(super) fn new(flavour: Flavour) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join(format!("{VOLUME}.raw"));
        mixed(&image, SIZE);
        let disk = DiskSpec::new(VOLUME, SIZE).in_directory(directory.path());
        let scene = Scene::of(Vm::builder(flavour).disk(disk).guest(false).start());
        let data = allocated(&File::open(&image).unwrap());
        Self { scene, directory, image, data }
    }

    /// `virt-fleece backup`, full, into a repository.
    pub(super) fn backup(&self, store: &Store, arguments: &[&str]) -> Run {
        let mut cli = store.backup(&self.scene).arg("--type").arg("full");
        for argument in arguments {
            cli = cli.arg(argument);
        }
        run(cli.into_command())
    }

    fn run(&self, who: Who) -> Run {
        let directory = self.directory.path();
        let output = directory.join("copy");
        let ours = |arguments: &[&str]| self.backup(&Store::within(directory, DEFAULT_CHUNK_SIZE), arguments);
        let pushed = |compress| Run { seconds: push(&self.scene, VOLUME, directory, compress), ..Run::default() };
        let convert = |options: &[&str]| {
            let mut command = Command::new(tool("QEMU_IMG"));
            command.args(["convert", "-U", "-f", "raw", "-O", "qcow2"]).args(options);
            command.arg(&self.image).arg(&output);
            run(command)
        };
        let result = match who {
            Who::Ours => ours(&[]),
            Who::OursPlain => ours(&["--compression-level", "0"]),
            Who::OursChain => {
                std::fs::create_dir(&output).unwrap();
                let ran = run(self.scene.backup_to(&output).arg("--type").arg("full").into_command());
                std::fs::remove_dir_all(&output).unwrap();
                return ran;
            }
            Who::Push => pushed(false),
            Who::PushCompressed => pushed(true),
            Who::Convert => convert(&[]),
            Who::ConvertCompressed => convert(&["-c", "-o", "compression_type=zstd", "-m", "16", "-W"]),
            Who::Nbdcopy => run(Export::new(&self.scene, VOLUME).nbdcopy(&[], &output)),
            Who::NbdcopyNowhere => run(Export::new(&self.scene, VOLUME).nbdcopy(&CHEAPEST, Path::new("null:"))),
        };
        std::fs::remove_file(&output).ok();
        result
    }

    fn cost(&self, who: Who, rounds: &[(Run, f64, u64)]) -> Cost {
        let gib = self.data as f64 / f64::from(1 << 30);
        let of = |value: &dyn Fn(&(Run, f64, u64)) -> f64| median(rounds.iter().map(value));
        let cost = Cost {
            seconds: of(&|(run, ..)| run.seconds),
            qemu_cpu: of(&|(_, cpu, _)| *cpu) / gib,
            cpu: of(&|(run, ..)| run.cpu) / gib,
            peak: rounds.iter().map(|(run, ..)| run.peak).max().unwrap_or(0),
            growth: rounds.iter().map(|(.., growth)| *growth).max().unwrap_or(0),
        };
        println!(
            "{:48} {:>7.2} {:>7.0} {:>9.2} {:>9.2} {:>8} {:>9}",
            who.name(),
            cost.seconds,
            self.rate(cost.seconds),
            cost.qemu_cpu,
            cost.cpu,
            cost.peak >> 20,
            cost.growth >> 20
        );
        cost
    }

    /// MiB of data a second.
    fn rate(&self, seconds: f64) -> f64 {
        self.data as f64 / f64::from(1 << 20) / seconds
    }

    fn table(&self, wanted: &[Who], flavour: Flavour) -> Vec<Cost> {
        println!(
            "\nfull backup of {} MiB of data, {flavour:?}, {ROUNDS} rounds\n{:48} {:>7} {:>7} {:>9} {:>9} {:>8} {:>9}",
            self.data >> 20,
            "",
            "s",
            "MiB/s",
            "QEMU s/G",
            "own s/G",
            "peak MiB",
            "QEMU +MiB"
        );
        let mut rounds = vec![Vec::new(); wanted.len()];
        for round in 0..ROUNDS {
            for (who, rounds) in wanted.iter().zip(&mut rounds) {
                // It takes longer than all others together.
                if *who == Who::PushCompressed && round > 0 {
                    continue;
                }
                let qemu = Watched::new(self.scene.vm.pid());
                let ran = self.run(*who);
                let (cpu, growth) = qemu.cost();
                rounds.push((ran, cpu, growth));
            }
        }
        wanted.iter().zip(&rounds).map(|(who, rounds)| self.cost(*who, rounds)).collect()
    }
}

/// CPU seconds of all stages, over two processors.
fn limit(stages: &Stages, read: &Cost, gib: f64, compressed: bool) -> f64 {
    let which = usize::from(!compressed);
    let zstd = if compressed { stages.zstd } else { 0.0 };
    let own = stages.blake3 + zstd + stages.seal[which] + stages.write[which];
    let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(2);
    (own + (read.qemu_cpu + read.cpu) * gib) / processors as f64
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_full_backup() {
    let full = FullScene::new(Flavour::Next);
    let costs = full.table(&Who::ALL, Flavour::Next);
    let of = |who: Who| &costs[Who::ALL.iter().position(|known| *known == who).unwrap()];
    let stages = stages(&full.image, full.directory.path());
    let gib = full.data as f64 / f64::from(1 << 30);
    println!(
        "stages, CPU s/GiB: read {:.2} (QEMU {:.2}), BLAKE3 {:.2}, zstd {:.2} (to {:.0} %), AES {:.2}, write {:.2} \
         (uncompressed: {:.2}, {:.2})",
        of(Who::NbdcopyNowhere).cpu,
        of(Who::NbdcopyNowhere).qemu_cpu,
        stages.blake3 / gib,
        stages.zstd / gib,
        100.0 * stages.bytes[1] as f64 / stages.bytes[0] as f64,
        stages.seal[0] / gib,
        stages.write[0] / gib,
        stages.seal[1] / gib,
        stages.write[1] / gib,
    );
    let limits = [true, false].map(|compressed| limit(&stages, of(Who::NbdcopyNowhere), gib, compressed));
    println!("limit {:.2} s, uncompressed {:.2} s", limits[0], limits[1]);
    let faster = |ours: Who, theirs: f64| theirs / of(ours).seconds;
    println!(
        "ratios: default is {:.2} x qemu-img -c zstd (goal 1.5), {:.1} x push compress (8), {:.2} of the limit (0.8)",
        faster(Who::Ours, of(Who::ConvertCompressed).seconds),
        faster(Who::Ours, of(Who::PushCompressed).seconds),
        faster(Who::Ours, limits[0]),
    );
    println!(
        "ratios: level 0 is {:.2} x push (goal 1.0), {:.2} of the limit; chain is {:.2} x push, {:.2} x qemu-img; \
         QEMU's CPU is {:.2} of push's (0.25)",
        faster(Who::OursPlain, of(Who::Push).seconds),
        faster(Who::OursPlain, limits[1]),
        faster(Who::OursChain, of(Who::Push).seconds),
        faster(Who::OursChain, of(Who::Convert).seconds),
        of(Who::Ours).qemu_cpu / of(Who::Push).qemu_cpu,
    );
}

#[test]
#[ignore = "a measurement: bench/run"]
fn bench_full_backup_of_the_allow_listed_qemu() {
    let full = FullScene::new(Flavour::Allowlist);
    full.table(&[Who::Ours, Who::OursPlain, Who::ConvertCompressed], Flavour::Allowlist);
}
