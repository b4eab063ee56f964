//! `virt-fleece backup`: options and result.

use super::{
    CliError, backup_run,
    connection::VmArgs,
    output::Output,
    size::{parse_rate, parse_size, show_size},
    target::TargetArgs,
};
use crate::{
    backup::BackupId,
    chain::BackupType,
    fleecing::{Engine, Recovered, Wish},
    mover::CompleteBackup,
};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Debug, Args)]
#[command(after_help = "\
The first backup of a VM is a full one, later ones read and store what changed. Where the dirty bitmaps cannot be trusted
(QEMU was restarted, the disk is new, …) the volume is read as a whole and the reason is on record; a repository then
still stores only what is new. `--type full` also looks for every chunk in the repository and sends again what got lost
there.

A backup that is cut short, even by SIGKILL, leaves nothing that looks like a backup. The next one cleans up behind it.

Examples:
  virt-fleece backup --qmp /run/vm/web.qmp --qcow2-dir /backup --vm web
  virt-fleece backup --qmp /run/vm/web.qmp --guest-agent /run/vm/web.qga --quiesce require \\
      --qcow2-dir /mnt/nas --compress --bandwidth-limit 50MiB/s -o json
  virt-fleece backup --libvirt /run/libvirt/virtqemud-sock --domain web \\
      --repository s3://backups/prod --passphrase-file /etc/virt-fleece/passphrase")]
pub(super) struct BackupArgs {
    #[command(flatten)]
    pub(super) vm_args: VmArgs,
    #[command(flatten)]
    pub(super) target: TargetArgs,
    /// Name of the VM at the target [default: the name that QEMU knows]
    #[arg(long, value_name = "NAME")]
    pub(super) vm: Option<String>,
    /// What is stored
    #[arg(long = "type", value_enum, default_value_t)]
    pub(super) backup_type: TypeArg,
    /// Only this volume (repeat for more)
    #[arg(long = "volume", value_name = "NAME")]
    pub(super) volumes: Vec<String>,
    /// Not this volume (repeat for more)
    #[arg(long = "exclude-volume", value_name = "NAME")]
    pub(super) exclude_volumes: Vec<String>,
    /// How the point in time is made
    #[arg(long, value_enum, default_value_t)]
    pub(super) engine: EngineArg,
    /// The most that the fleece may take, such as 10G [default: 90 % of what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) fleece_limit: Option<u64>,
    /// Freeze the guest's file systems at the point in time
    #[arg(long, value_enum, default_value_t)]
    pub(super) quiesce: QuiesceArg,
    /// Read at most this much a second, such as 50MiB/s
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(super) bandwidth_limit: Option<u64>,
    /// Processor priority of reading, hashing and compressing: 0 as usual, 19 last
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(i32).range(0..=19))]
    pub(super) nice: i32,
    /// Give up when the target takes no data for this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(super) stall_timeout: u64,
    /// Wait this many seconds for another backup of this VM to end
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(super) wait: u64,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(super) enum TypeArg {
    /// Incremental where that is safe
    #[default]
    Auto,
    /// Everything
    Full,
    /// Incremental or nothing
    Incremental,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(super) enum EngineArg {
    /// What suits this QEMU
    #[default]
    Auto,
    /// One transaction of backup jobs
    Job,
    /// copy-before-write filters, with the CPUs stopped for some milliseconds
    Filter,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(super) enum QuiesceArg {
    /// Where a guest agent answers
    #[default]
    Auto,
    /// No backup without it
    Require,
    /// Crash-consistent
    Never,
}

impl TypeArg {
    pub(super) fn backup_type(self) -> BackupType {
        match self {
            Self::Auto => BackupType::Auto,
            Self::Full => BackupType::Full,
            Self::Incremental => BackupType::Incremental,
        }
    }
}

impl EngineArg {
    pub(super) fn engine(self) -> Option<Engine> {
        match self {
            Self::Auto => None,
            Self::Job => Some(Engine::Job),
            Self::Filter => Some(Engine::Filter),
        }
    }
}

impl QuiesceArg {
    pub(super) fn wish(self) -> Wish {
        match self {
            Self::Auto => Wish::IfPossible,
            Self::Require => Wish::Required,
            Self::Never => Wish::Never,
        }
    }
}

/// What the command prints.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The backup, as the target describes it.
    #[serde(flatten)]
    pub(super) backup: CompleteBackup,
    /// What an earlier run had left, if anything.
    #[serde(skip_serializing_if = "Recovered::is_nothing")]
    pub(super) recovered: Recovered,
    /// Why this engine.
    pub(super) engine_reason: String,
}

pub(super) async fn run(args: BackupArgs) -> Result<ExitCode, CliError> {
    let report = backup_run::run(&args).await?;
    args.output.result(&report, || text(&report));
    Ok(ExitCode::SUCCESS)
}

fn text(report: &Report) -> String {
    let record = report.backup.record();
    let seconds = record.finished.duration_since(record.started).as_secs_f64();
    let mut lines = vec![
        format!("backup {} of {} is complete", record.id, record.vm),
        format!(
            "point in time {}, made in {:.1} ms by engine {} ({}), {}",
            record.point_in_time.strftime("%Y-%m-%d %H:%M:%S%.3f UTC"),
            record.cut_microseconds as f64 / 1000.0,
            record.engine,
            report.engine_reason,
            match record.quiesce["why"].as_str() {
                Some(why) => format!("not frozen: {why}"),
                None => format!("{} file systems frozen", record.quiesce["file_systems"]),
            }
        ),
    ];
    let how = |parent: Option<&BackupId>, full_reason: Option<&String>| match (parent, full_reason) {
        (Some(parent), _) => format!("incremental since {parent}"),
        (None, Some(reason)) => format!("full ({reason})"),
        (None, None) => "full".into(),
    };
    match &report.backup {
        CompleteBackup::Chain(manifest) => lines.extend(manifest.volumes.iter().map(|volume| {
            format!(
                "  {}: {}, {} changed of {}, {} stored",
                volume.name,
                how(volume.parent.as_ref(), volume.full_reason.as_ref()),
                show_size(volume.dirty_bytes),
                show_size(volume.virtual_size),
                show_size(volume.file_bytes),
            )
        })),
        CompleteBackup::Repository(manifest) => lines.extend(manifest.volumes.iter().map(|volume| {
            format!(
                "  {}: {}, {} changed of {}, {} new, {} stored",
                volume.name,
                how(volume.parent.as_ref(), volume.full_reason.as_ref()),
                show_size(volume.dirty_bytes),
                show_size(volume.virtual_size),
                show_size(volume.new_bytes),
                show_size(volume.stored_bytes),
            )
        })),
    }
    lines.extend(record.skipped.iter().map(|skipped| format!("  {}: skipped ({})", skipped.name, skipped.reason)));
    lines.push(format!("took {seconds:.1} s"));
    lines.join("\n")
}
