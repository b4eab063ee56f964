//! `virt-fleece list`

use super::{CliError, output::Output, size::show_size, store::StoreArgs};
use crate::{
    backup::BackupRecord,
    image::{self, ChainDirectory},
    repository,
};
use clap::Args;
use comfy_table::Table;
use serde::Serialize;
use std::process::ExitCode;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virt-fleece list --qcow2-dir /backup
  virt-fleece list --repository s3://backups/prod --vm web -o json")]
pub(super) struct ListArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// Only the backups of this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
}

pub(super) async fn run(args: ListArgs) -> Result<ExitCode, CliError> {
    let Some(url) = args.store.repository() else {
        let backups = of_chains(&args)?;
        args.output.result(&backups, || table(backups.iter().map(chain_row)));
        return Ok(ExitCode::SUCCESS);
    };
    let catalogue = args.store.access.open(url).await?.catalogue(args.vm.as_deref()).await?;
    for error in &catalogue.damaged {
        tracing::warn!(error = error as &dyn std::error::Error, "a backup cannot be read");
    }
    let backups = &catalogue.manifests;
    args.output.result(backups, || table(backups.iter().map(repository_row)));
    // What is listed is right, but not all.
    Ok(if catalogue.damaged.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(5) })
}

fn of_chains(args: &ListArgs) -> Result<Vec<image::Manifest>, CliError> {
    let directory = ChainDirectory::open(args.store.qcow2_dir()?)?;
    let vms = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => directory.vms()?,
    };
    let mut backups = Vec::new();
    for vm in vms {
        backups.extend(directory.manifests(&vm)?);
    }
    Ok(backups)
}

/// What a line says.
#[derive(Debug, Serialize)]
struct Row<'a> {
    record: &'a BackupRecord,
    /// Volumes, and how many of them were read as a whole.
    volumes: Vec<&'a str>,
    full: usize,
    stored: u64,
}

fn chain_row(manifest: &image::Manifest) -> Row<'_> {
    Row {
        record: &manifest.backup,
        volumes: manifest.volumes.iter().map(|volume| volume.name.as_str()).collect(),
        full: manifest.volumes.iter().filter(|volume| volume.parent.is_none()).count(),
        stored: manifest.volumes.iter().map(|volume| volume.file_bytes).sum(),
    }
}

fn repository_row(manifest: &repository::Manifest) -> Row<'_> {
    Row {
        record: &manifest.backup,
        volumes: manifest.volumes.iter().map(|volume| volume.name.as_str()).collect(),
        full: manifest.volumes.iter().filter(|volume| volume.parent.is_none()).count(),
        stored: manifest.volumes.iter().map(|volume| volume.stored_bytes).sum(),
    }
}

fn table<'a>(rows: impl Iterator<Item = Row<'a>>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["VM", "BACKUP", "TYPE", "POINT IN TIME", "QUIESCED", "STORED", "VOLUMES"]);
    let mut empty = true;
    for row in rows {
        empty = false;
        let kind = match row.full {
            0 => "incremental".to_owned(),
            all if all == row.volumes.len() => "full".to_owned(),
            some => format!("incremental ({some} full)"),
        };
        let frozen = if row.record.quiesce["state"] == "frozen" { "yes" } else { "no" };
        table.add_row([
            row.record.vm.clone(),
            row.record.id.to_string(),
            kind,
            row.record.point_in_time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
            frozen.to_owned(),
            show_size(row.stored),
            row.volumes.join(", "),
        ]);
    }
    if empty { "no complete backups".into() } else { table.trim_fmt() }
}
