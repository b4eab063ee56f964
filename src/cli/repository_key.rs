//! `virt-fleece repository key`

use super::{
    CliError,
    output::Output,
    repository::show_time,
    repository_args::{REPOSITORY_HELP, RepositoryArgs, ask_twice, given},
};
use crate::repository::KeySlot;
use clap::{Args, Subcommand};
use comfy_table::Table;
use jiff::Timestamp;
use serde::Serialize;
use std::{path::PathBuf, process::ExitCode};

/// Environment variable with the passphrase to add.
const NEW_PASSPHRASE: &str = "VIRT_FLEECE_NEW_PASSPHRASE";

#[derive(Debug, Subcommand)]
pub(super) enum KeyCommand {
    /// List the key slots: each opens the repository with one passphrase
    List(ListArgs),
    /// Add a passphrase
    Add(AddArgs),
    /// Remove a passphrase, by the id of its key slot
    Remove(RemoveArgs),
}

impl KeyCommand {
    /// Form of the result.
    pub(super) fn output(&self) -> Output {
        match self {
            Self::List(args) => args.output,
            Self::Add(args) => args.output,
            Self::Remove(args) => args.output,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = list_help())]
pub(super) struct ListArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

fn list_help() -> String {
    format!("Example:\n  virt-fleece repository key list --repository /srv/backup\n\n{REPOSITORY_HELP}")
}

#[derive(Debug, Args)]
#[command(after_help = add_help())]
pub(super) struct AddArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// File with the passphrase to add (its last newline is not part of it); without it
    /// `$VIRT_FLEECE_NEW_PASSPHRASE` counts, and on a terminal you are asked
    #[arg(long, value_name = "FILE", env = "VIRT_FLEECE_NEW_PASSPHRASE_FILE")]
    new_passphrase_file: Option<PathBuf>,
    /// What people call it; it is stored where everybody can read it who can read the repository's objects
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    label: String,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

fn add_help() -> String {
    format!(
        "Every passphrase opens the whole repository. To change one, add the new one and remove the old one.\n\n\
        Examples:\n  \
        virt-fleece repository key add --repository /srv/backup --label safe\n  \
        virt-fleece repository key add --repository s3://backups/prod --passphrase-file old \\\n      \
        --new-passphrase-file new -o json\n\n{REPOSITORY_HELP}"
    )
}

#[derive(Debug, Args)]
#[command(after_help = remove_help())]
pub(super) struct RemoveArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Id of the key slot, as `key list` shows it; the last one cannot be removed
    #[arg(value_name = "SLOT")]
    slot: String,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

fn remove_help() -> String {
    format!(
        "The passphrase no longer opens the repository. Whoever copied the key slot before can still use it with that \
        copy: if a passphrase has become known to others, make a new repository.\n\n\
        Example:\n  virt-fleece repository key remove --repository /srv/backup 0123456789abcdef\n\n{REPOSITORY_HELP}"
    )
}

/// A key slot, without what is sealed in it.
#[derive(Debug, Serialize)]
struct Slot {
    id: String,
    label: String,
    created: Timestamp,
    /// How the passphrase becomes a key: algorithm, memory, passes, lanes.
    kdf: String,
}

impl From<KeySlot> for Slot {
    fn from(slot: KeySlot) -> Self {
        let kdf = &slot.kdf;
        let (memory, passes, lanes) = (kdf.memory_kib, kdf.iterations, kdf.parallelism);
        let kdf = format!("{} m={memory},t={passes},p={lanes}", kdf.algorithm);
        Self { id: slot.id, label: slot.label, created: slot.created, kdf }
    }
}

/// Runs it.
pub(super) async fn run(command: KeyCommand) -> Result<ExitCode, CliError> {
    match command {
        KeyCommand::List(args) => list(args).await,
        KeyCommand::Add(args) => add(args).await,
        KeyCommand::Remove(args) => remove(args).await,
    }
}

async fn list(args: ListArgs) -> Result<ExitCode, CliError> {
    let repository = args.repository.open().await?;
    let slots: Vec<Slot> = repository.key_slots().await?.into_iter().map(Slot::from).collect();
    args.output.result(&slots, || table(&slots));
    Ok(ExitCode::SUCCESS)
}

async fn add(args: AddArgs) -> Result<ExitCode, CliError> {
    let repository = args.repository.open().await?;
    let passphrase = match given(args.new_passphrase_file.as_ref(), NEW_PASSPHRASE)? {
        Some(passphrase) => passphrase,
        None => ask_twice("--new-passphrase-file", NEW_PASSPHRASE)?,
    };
    let slot = Slot::from(repository.add_key(passphrase, args.label).await?);
    args.output.result(&slot, || format!("key slot {} added", slot.id));
    Ok(ExitCode::SUCCESS)
}

async fn remove(args: RemoveArgs) -> Result<ExitCode, CliError> {
    let repository = args.repository.open().await?;
    repository.remove_key(&args.slot).await?;
    let document = serde_json::json!({ "removed": args.slot });
    args.output.result(&document, || format!("key slot {} removed", args.slot));
    Ok(ExitCode::SUCCESS)
}

fn table(slots: &[Slot]) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["SLOT", "CREATED", "LABEL"]);
    for slot in slots {
        // A slot is readable without the key, and so is its label writable: no control characters on a terminal.
        let label = slot.label.replace(char::is_control, "?");
        table.add_row([slot.id.clone(), show_time(slot.created), label]);
    }
    table.trim_fmt()
}
