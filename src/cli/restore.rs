//! `virt-fleece restore`

use super::{CliError, output::Output, progress::Progress, restore_repository, store::StoreArgs};
use crate::{
    backup::BackupRecord,
    image::{ChainDirectory, ImageError, RestoreFormat, RestoreTarget, RestoredVolume, restore_volume},
};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

#[derive(Debug, Args)]
#[command(after_help = "\
Everything is checked: a chain of images before anything is written, the chunks of a repository before each is used. A file
gets its name only when it is complete. The backups themselves are not changed.

Examples:
  virt-fleece restore --qcow2-dir /backup --vm web --output /restored
  virt-fleece restore --repository s3://backups/prod --vm web --backup 20261125T010203Z-00ff00ff \\
      --volume rootdisk --output /dev/vg0/web-root
  virt-fleece restore --repository /mnt/nas/repo --vm web --volume rootdisk --output - | ssh host 'cat > disk.raw'
  virt-fleece restore --repository /mnt/nas/repo --vm web --volume rootdisk --output disk.raw --in-place

Without this program, from a chain: qemu-img convert -O raw /backup/web/ID/rootdisk.qcow2 rootdisk.raw")]
pub(super) struct RestoreArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// The VM; can be left out when there is only one
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// The point to restore
    #[arg(long, value_name = "ID", default_value = "latest")]
    backup: String,
    /// Only this volume
    #[arg(long, value_name = "NAME")]
    pub(super) volume: Option<String>,
    /// With --volume a new file, a block device, or `-` for standard output (from a repository); otherwise a directory
    /// that gets a file for each volume
    #[arg(long = "output", value_name = "PATH")]
    pub(super) target: PathBuf,
    /// Format of restored files
    #[arg(long, value_enum, default_value_t)]
    pub(super) format: Format,
    /// Overwrite what exists
    #[arg(long)]
    pub(super) force: bool,
    /// From a repository, with --volume: make an existing raw image or device equal to the backup; what is equal already is
    /// neither fetched nor written. Interrupted, it leaves a mixture: run it again
    #[arg(long, requires = "volume", conflicts_with_all = ["force", "qcow2_dir"])]
    pub(super) in_place: bool,
    /// Form of the result
    #[arg(short, value_enum, default_value_t)]
    pub(super) output: Output,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    #[default]
    Raw,
    Qcow2,
}

impl Format {
    pub(super) fn format(self) -> (RestoreFormat, &'static str) {
        match self {
            Self::Raw => (RestoreFormat::Raw, "raw"),
            Self::Qcow2 => (RestoreFormat::Qcow2, "qcow2"),
        }
    }
}

/// What the command prints.
#[derive(Debug, Serialize)]
pub(super) struct Restored {
    pub(super) vm: String,
    pub(super) backup: String,
    pub(super) point_in_time: jiff::Timestamp,
    pub(super) volumes: Vec<RestoredVolume>,
    /// Of a restore in place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) in_place: Option<crate::repository::InPlaceSummary>,
}

impl Restored {
    pub(super) fn new(record: &BackupRecord, volumes: Vec<RestoredVolume>) -> Self {
        Self {
            vm: record.vm.clone(),
            backup: record.id.to_string(),
            point_in_time: record.point_in_time,
            volumes,
            in_place: None,
        }
    }

    fn text(&self) -> String {
        let head = format!("restored {} as of {} ({})", self.vm, self.point_in_time, self.backup);
        let lines = self.volumes.iter().map(|volume| format!("{} -> {}", volume.volume, volume.path.display()));
        let in_place = self.in_place.map(|summary| {
            format!(
                "{} were equal already, {} were written",
                super::size::show_size(summary.same_bytes),
                super::size::show_size(summary.written_bytes)
            )
        });
        std::iter::once(head).chain(lines).chain(in_place).collect::<Vec<_>>().join("\n")
    }
}

pub(super) async fn run(args: RestoreArgs) -> Result<ExitCode, CliError> {
    let cancelled = Arc::new(AtomicBool::new(false));
    let (output, to_stdout) = (args.output, args.target == Path::new("-"));
    let work = tokio::spawn({
        let cancelled = Arc::clone(&cancelled);
        async move {
            match args.store.repository() {
                Some(url) => {
                    let repository = args.store.access.open(url).await?;
                    restore_repository::restore(args, repository, cancelled).await
                }
                None => blocking(move || restore_chain(&args, &cancelled)).await,
            }
        }
    });
    let restored = until_signal(work, &cancelled).await?;
    if to_stdout {
        // Standard output is the disk.
        eprintln!("{}", restored.text());
    } else {
        output.result(&restored, || restored.text());
    }
    Ok(ExitCode::SUCCESS)
}

impl RestoreArgs {
    pub(super) fn vm(&self) -> Option<&str> {
        self.vm.as_deref()
    }

    pub(super) fn backup(&self) -> &str {
        &self.backup
    }

    /// The one VM that there is, where none is named.
    pub(super) fn only_vm(vms: &[String]) -> Result<String, CliError> {
        match vms {
            [vm] => Ok(vm.clone()),
            [] => Err(CliError::Usage("there are no backups".into())),
            vms => Err(CliError::Usage(format!("name the VM with --vm; there is: {}", vms.join(", ")))),
        }
    }

    /// A path for each volume; all are free, unless they may be overwritten.
    pub(super) fn targets(&self, volumes: &[&str]) -> Result<Vec<(String, PathBuf)>, CliError> {
        if let Some(volume) = &self.volume {
            return Ok(vec![(volume.clone(), self.target.clone())]);
        }
        let target = &self.target;
        let extension = self.format.format().1;
        let targets: Vec<_> = volumes
            .iter()
            .map(|name| {
                let path = target.join(format!("{name}.{extension}"));
                is_file_name(name).then(|| ((*name).to_owned(), path)).ok_or_else(|| {
                    let name = crate::reason::printable(name, 100);
                    CliError::Usage(format!("volume `{name}` needs a path of its own: use --volume and --output"))
                })
            })
            .collect::<Result<_, _>>()?;
        std::fs::create_dir_all(target).map_err(ImageError::io("create", target))?;
        match targets.iter().find(|(_, path)| !self.force && path.exists()) {
            Some((_, path)) => Err(ImageError::Exists { path: path.clone() }.into()),
            None => Ok(targets),
        }
    }
}

/// Whether a name in a manifest can be that of a file: it must not lead out of the directory, nor hide there.
fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(|c: char| c == '/' || c.is_control())
}

/// Waits for work that stops when `cancelled` is set; a signal sets it.
pub(super) async fn until_signal<T>(
    mut work: tokio::task::JoinHandle<Result<T, CliError>>,
    cancelled: &AtomicBool,
) -> Result<T, CliError> {
    let joined = tokio::select! {
        joined = &mut work => joined,
        _ = super::backup_run::signal() => {
            cancelled.store(true, Ordering::Relaxed);
            work.await
        }
    };
    joined.map_err(|error| CliError::Usage(format!("internal error: {error}")))?
}

/// Work that blocks, on a thread where it may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CliError> + Send + 'static,
) -> Result<T, CliError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| CliError::Usage(format!("internal error: {error}")))?
}

fn restore_chain(args: &RestoreArgs, cancelled: &AtomicBool) -> Result<Restored, CliError> {
    let directory = ChainDirectory::open(args.store.qcow2_dir()?)?;
    if args.target == Path::new("-") {
        return Err(CliError::Usage("only a backup in a repository can be written to standard output".into()));
    }
    let vm = match args.vm() {
        Some(vm) => vm.to_owned(),
        None => RestoreArgs::only_vm(&directory.vms()?)?,
    };
    let manifest = directory.find(&vm, &args.backup)?;
    let names: Vec<&str> = manifest.volumes.iter().map(|volume| volume.name.as_str()).collect();
    let mut volumes = Vec::new();
    for (volume, path) in args.targets(&names)? {
        let size = manifest.volume(&volume).map_or(0, |volume| volume.virtual_size);
        let done = AtomicU64::new(0);
        let target = RestoreTarget {
            path: &path,
            format: args.format.format().0,
            force: args.force,
            protected: Some(directory.path()),
            progress: &done,
            cancelled,
        };
        let restore = || restore_volume(&directory, &manifest, &volume, &target);
        volumes.push(with_progress(&volume, size, &done, restore)?);
    }
    Ok(Restored::new(&manifest.backup, volumes))
}

/// Shows progress from a second thread while `work` runs.
pub(super) fn with_progress<T>(volume: &str, size: u64, done: &AtomicU64, work: impl FnOnce() -> T) -> T {
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

#[cfg(test)]
mod tests {
    #[test]
    fn names_of_volumes_stay_in_their_directory() {
        for name in ["root", "a disk", "x..y", "ö"] {
            assert!(super::is_file_name(name), "{name}");
        }
        for name in ["", ".", "..", ".hidden", "../up", "a/b", "/root", "a\0b", "a\nb", "\u{1b}[2J", "\u{9b}x"] {
            assert!(!super::is_file_name(name), "{name:?}");
        }
    }
}
