//! `virt-fleece list`

use super::{CliError, output::Output, size::show_size};
use crate::image::{ChainDirectory, Manifest};
use clap::Args;
use comfy_table::Table;
use std::{path::PathBuf, process::ExitCode};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  virt-fleece list --qcow2-dir /backup")]
pub(super) struct ListArgs {
    /// Directory with backups
    #[arg(long, value_name = "DIR")]
    qcow2_dir: PathBuf,
    /// Only the backups of this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
}

pub(super) fn run(args: &ListArgs) -> Result<ExitCode, CliError> {
    let directory = ChainDirectory::open(&args.qcow2_dir)?;
    let vms = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => directory.vms()?,
    };
    let mut backups = Vec::new();
    for vm in vms {
        backups.extend(directory.manifests(&vm)?);
    }
    args.output.result(&backups, || table(&backups));
    Ok(ExitCode::SUCCESS)
}

fn table(backups: &[Manifest]) -> String {
    if backups.is_empty() {
        return "no complete backups".into();
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["VM", "BACKUP", "TYPE", "POINT IN TIME", "QUIESCED", "STORED", "VOLUMES"]);
    for backup in backups {
        let full = backup.volumes.iter().filter(|volume| volume.parent.is_none()).count();
        let kind = match full {
            0 => "incremental".to_owned(),
            all if all == backup.volumes.len() => "full".to_owned(),
            some => format!("incremental ({some} full)"),
        };
        let stored = backup.volumes.iter().map(|volume| volume.file_bytes).sum();
        let volumes: Vec<_> = backup.volumes.iter().map(|volume| volume.name.as_str()).collect();
        let frozen = if backup.backup.quiesce["state"] == "frozen" { "yes" } else { "no" };
        table.add_row([
            backup.backup.vm.clone(),
            backup.backup.id.to_string(),
            kind,
            backup.backup.point_in_time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
            frozen.to_owned(),
            show_size(stored),
            volumes.join(", "),
        ]);
    }
    table.trim_fmt()
}
