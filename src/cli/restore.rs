//! `virt-fleece restore`

use super::{CliError, output::Output, progress::Progress};
use crate::image::{ChainDirectory, ImageError, RestoreFormat, RestoreRequest, RestoredVolume, restore_volume};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

#[derive(Debug, Args)]
#[command(
    after_help = "The whole chain is checked before anything is written. The backups themselves are not changed.\n\n\
    Examples:\n  virt-fleece restore --qcow2-dir /backup --vm web --output /restored\n  \
    virt-fleece restore --qcow2-dir /backup --vm web --backup 20261125T010203Z-00ff00ff \\\n      \
    --volume rootdisk --output /dev/vg0/web-root\n\n\
    Without this program: qemu-img convert -O raw /backup/web/ID/rootdisk.qcow2 rootdisk.raw"
)]
pub(super) struct RestoreArgs {
    /// Directory with backups
    #[arg(long, value_name = "DIR")]
    qcow2_dir: PathBuf,
    /// The VM; can be left out when there is only one
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// The point to restore
    #[arg(long, value_name = "ID", default_value = "latest")]
    backup: String,
    /// Only this volume
    #[arg(long, value_name = "NAME")]
    volume: Option<String>,
    /// With --volume a new file or a block device, otherwise a directory that gets a file for each volume
    #[arg(long = "output", value_name = "PATH")]
    target: PathBuf,
    /// Format of restored files
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Overwrite what exists
    #[arg(long)]
    force: bool,
    /// Form of the result
    #[arg(short, value_enum, default_value_t)]
    pub(super) output: Output,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Format {
    #[default]
    Raw,
    Qcow2,
}

#[derive(Debug, Serialize)]
struct Restored {
    vm: String,
    backup: String,
    point_in_time: jiff::Timestamp,
    volumes: Vec<RestoredVolume>,
}

pub(super) async fn run(args: RestoreArgs) -> Result<ExitCode, CliError> {
    let cancelled = Arc::new(AtomicBool::new(false));
    let output = args.output;
    let mut work = tokio::task::spawn_blocking({
        let cancelled = Arc::clone(&cancelled);
        move || restore(&args, &cancelled)
    });
    let signal = super::backup_run::signal();
    let joined = tokio::select! {
        joined = &mut work => joined,
        _ = signal => {
            cancelled.store(true, Ordering::Relaxed);
            work.await
        }
    };
    let restored = joined.map_err(|error| CliError::Usage(format!("internal error: {error}")))??;
    output.result(&restored, || {
        let lines = restored.volumes.iter().map(|volume| format!("{} -> {}", volume.volume, volume.path.display()));
        let head = format!("restored {} as of {} ({})", restored.vm, restored.point_in_time, restored.backup);
        std::iter::once(head).chain(lines).collect::<Vec<_>>().join("\n")
    });
    Ok(ExitCode::SUCCESS)
}

fn restore(args: &RestoreArgs, cancelled: &AtomicBool) -> Result<Restored, CliError> {
    let target = &args.target;
    let directory = ChainDirectory::open(&args.qcow2_dir)?;
    let vm = match &args.vm {
        Some(vm) => vm.clone(),
        None => match directory.vms()?.as_slice() {
            [vm] => vm.clone(),
            vms => {
                let known = if vms.is_empty() { "none".into() } else { vms.join(", ") };
                return Err(CliError::Usage(format!("name the VM with --vm; there is: {known}")));
            }
        },
    };
    let manifest = directory.find(&vm, &args.backup)?;
    let (format, extension) = match args.format {
        Format::Raw => (RestoreFormat::Raw, "raw"),
        Format::Qcow2 => (RestoreFormat::Qcow2, "qcow2"),
    };
    let targets: Vec<(String, PathBuf)> = if let Some(volume) = &args.volume {
        vec![(volume.clone(), target.clone())]
    } else {
        std::fs::create_dir_all(target).map_err(ImageError::io("create", target))?;
        let path = |name: &str| target.join(format!("{name}.{extension}"));
        manifest.volumes.iter().map(|volume| (volume.name.clone(), path(&volume.name))).collect()
    };
    // Before the first byte: all targets are free.
    let taken = targets.iter().find(|(_, path)| args.volume.is_none() && !args.force && path.exists());
    if let Some((_, path)) = taken {
        return Err(ImageError::Exists { path: path.clone() }.into());
    }
    let mut volumes = Vec::new();
    for (volume, path) in &targets {
        let size = manifest.volume(volume).map_or(0, |volume| volume.virtual_size);
        let done = AtomicU64::new(0);
        let request = RestoreRequest {
            directory: &directory,
            manifest: &manifest,
            volume,
            target: path,
            format,
            force: args.force,
            progress: &done,
            cancelled,
        };
        volumes.push(with_progress(volume, size, &done, || restore_volume(&request))?);
    }
    Ok(Restored { vm, backup: manifest.backup.id.to_string(), point_in_time: manifest.backup.point_in_time, volumes })
}

/// Shows progress from a second thread while `work` runs.
fn with_progress<T>(volume: &str, size: u64, done: &AtomicU64, work: impl FnOnce() -> T) -> T {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut progress = Progress::new("restoring", [volume.to_owned()]);
            while !ended.load(Ordering::Relaxed) {
                progress.set(0, done.load(Ordering::Relaxed), size);
                progress.tick();
                std::thread::park_timeout(Duration::from_millis(200));
            }
            progress.finish();
        });
        let result = work();
        ended.store(true, Ordering::Relaxed);
        result
    })
}
