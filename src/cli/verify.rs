//! `virt-fleece verify`

use super::{CliError, check, output::Output, progress::Progress, restore::blocking, store::StoreArgs};
use crate::image::{ChainDirectory, VerifiedBackup, verify_backup};
use clap::Args;
use serde::Serialize;
use std::{collections::HashSet, process::ExitCode};

#[derive(Debug, Args)]
#[command(after_help = "\
Exit code 5 says that a backup is damaged. Of a repository everything that names data is read, and the data is looked for;
--read-data reads it, too.

Examples:
  virt-fleece verify --qcow2-dir /backup
  virt-fleece verify --qcow2-dir /backup --vm web --backup latest
  virt-fleece verify --repository s3://backups/prod --read-data 5")]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    store: StoreArgs,
    /// Only the backups of this VM
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Only this backup (and what it builds on), or `latest`
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// Repository: read this percentage of the data, chosen at random each time
    #[arg(long, value_name = "PERCENT", default_value_t = 0, conflicts_with = "qcow2_dir",
        value_parser = clap::value_parser!(u8).range(0..=100))]
    read_data: u8,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
}

#[derive(Debug, Serialize)]
struct Verified {
    vm: String,
    #[serde(flatten)]
    backup: VerifiedBackup,
}

pub(super) async fn run(args: VerifyArgs) -> Result<ExitCode, CliError> {
    if let Some(url) = args.store.repository() {
        let repository = args.store.access.open(url).await?;
        return check::check(repository, args.vm, args.backup, args.read_data, args.output).await;
    }
    blocking(move || verify_chains(&args)).await
}

fn verify_chains(args: &VerifyArgs) -> Result<ExitCode, CliError> {
    let directory = ChainDirectory::open(args.store.qcow2_dir()?)?;
    let vms = match &args.vm {
        Some(vm) => vec![vm.clone()],
        None => directory.vms()?,
    };
    let (mut manifests, mut verified) = (Vec::new(), Vec::new());
    for vm in &vms {
        match &args.backup {
            None => {
                let inventory = directory.inventory(vm)?;
                manifests.extend(inventory.manifests);
                verified.extend(inventory.unreadable.into_iter().map(|(id, error)| Verified {
                    vm: vm.clone(),
                    backup: VerifiedBackup { id, problems: vec![error.to_string()] },
                }));
            }
            Some(id) if vms.len() == 1 => manifests.push(directory.find(vm, id)?),
            Some(_) => return Err(CliError::Usage("there are several VMs: name one with --vm".into())),
        }
    }
    let total: u64 = manifests.iter().flat_map(|m| &m.volumes).map(|volume| volume.file_bytes).sum();
    let mut progress = Progress::new("verifying", ["images".to_owned()]);
    let mut read = 0;
    let mut known_good = HashSet::new();
    for manifest in &manifests {
        let backup = verify_backup(&directory, manifest, &mut known_good, |link| {
            progress.set(0, read, total);
            progress.tick();
            read += link.file_bytes;
        });
        verified.push(Verified { vm: manifest.backup.vm.clone(), backup });
    }
    progress.finish();
    args.output.result(&verified, || text(&verified));
    let broken = verified.iter().any(|verified| !verified.backup.problems.is_empty());
    Ok(if broken { ExitCode::from(5) } else { ExitCode::SUCCESS })
}

fn text(verified: &[Verified]) -> String {
    let mut lines = Vec::new();
    for Verified { vm, backup } in verified {
        let state = if backup.problems.is_empty() { "ok" } else { "DAMAGED" };
        lines.push(format!("{vm} {} {state}", backup.id));
        lines.extend(backup.problems.iter().map(|problem| format!("  {problem}")));
    }
    let broken = verified.iter().filter(|verified| !verified.backup.problems.is_empty()).count();
    lines.push(format!("{} backups checked, {broken} damaged", verified.len()));
    lines.join("\n")
}
