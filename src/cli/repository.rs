//! `virt-fleece repository`: what concerns a repository as a whole.

use super::{
    CliError, check,
    output::Output,
    prune,
    repository_args::{REPOSITORY_HELP, RepositoryArgs},
    repository_info, repository_key,
    size::{parse_size, show_size},
};
use crate::repository::{REPOSITORY_VERSION, Repository};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde::Serialize;
use std::process::ExitCode;

/// One variant per command: its arguments carry the form of the output, its file does the work.
#[derive(Debug, Subcommand)]
pub(super) enum RepositoryCommand {
    /// Make a repository
    Init(InitArgs),
    /// Show what a repository is, and how much is in it
    Info(repository_info::InfoArgs),
    /// Look for damage: every index, that every chunk is there, and as much of the data as is asked for
    Check(CheckArgs),
    /// Remove what no backup needs any more
    Prune(prune::PruneArgs),
    /// Show, add and remove passphrases
    #[command(subcommand)]
    Key(repository_key::KeyCommand),
}

impl RepositoryCommand {
    /// Form of the result.
    pub(super) fn output(&self) -> Output {
        match self {
            Self::Init(args) => args.output,
            Self::Info(args) => args.output,
            Self::Check(args) => args.output,
            Self::Prune(args) => args.output,
            Self::Key(command) => command.output(),
        }
    }
}

/// Runs it.
pub(super) async fn run(command: RepositoryCommand) -> Result<ExitCode, CliError> {
    match command {
        RepositoryCommand::Init(args) => init(args).await,
        RepositoryCommand::Info(args) => repository_info::run(args).await,
        RepositoryCommand::Check(args) => {
            check::check(args.repository.open().await?, None, None, args.read_data, args.output).await
        }
        RepositoryCommand::Prune(args) => prune::run(args).await,
        RepositoryCommand::Key(command) => repository_key::run(command).await,
    }
}

#[derive(Debug, Args)]
#[command(
    after_help = "Exit code 5 says that something is damaged. `virt-fleece verify --repository` does the same for one VM or \
    one backup.\n\nExample:\n  virt-fleece repository check --repository /srv/backup --read-data 10"
)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Read this percentage of the data, chosen at random each time
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    read_data: u8,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = init_help())]
pub(super) struct InitArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Bytes of a chunk, a power of two from 64KiB to 8MiB; it can never be changed. Smaller ones find more that is
    /// alike and make more objects
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "512KiB")]
    chunk_size: u64,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

fn init_help() -> String {
    format!(
        "The directory is made if it is missing; it, or the prefix in the bucket, has to be empty. Everything is \
        encrypted: whoever loses the passphrase loses the backups. `virt-fleece repository key add` makes a second one.\n\n\
        Examples:\n  \
        virt-fleece repository init --repository /srv/backup\n  \
        virt-fleece repository init --repository s3://backups/prod \\\n      \
        --s3-endpoint https://minio.example:9000 --passphrase-file /etc/virt-fleece/passphrase\n\n{REPOSITORY_HELP}"
    )
}

/// What a repository is; never changes.
#[derive(Debug, Serialize)]
pub(super) struct Identity {
    url: String,
    id: String,
    format_version: u32,
    chunk_size: u64,
    created: Timestamp,
}

impl Identity {
    /// Of an open repository.
    pub(super) fn of(repository: &Repository) -> Self {
        Self {
            url: repository.storage().url().to_owned(),
            id: repository.id(),
            // An open one has this version: what is older does not exist, what is newer does not open.
            format_version: REPOSITORY_VERSION,
            chunk_size: repository.chunk_size(),
            created: repository.created(),
        }
    }

    /// Lines for people.
    pub(super) fn lines(&self) -> Vec<String> {
        vec![
            format!("repository  {}", self.url),
            format!("id          {}", self.id),
            format!("format      version {}", self.format_version),
            format!("chunk size  {}", show_size(self.chunk_size)),
            format!("created     {}", show_time(self.created)),
        ]
    }
}

/// A time for people.
pub(super) fn show_time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

async fn init(args: InitArgs) -> Result<ExitCode, CliError> {
    // First: without a passphrase no directory is made.
    let passphrase = args.repository.access.new_passphrase()?;
    let storage = args.repository.access.location(&args.repository.url, true).open()?;
    let repository = Repository::init(storage, passphrase, args.chunk_size).await?;
    let identity = Identity::of(&repository);
    args.output.result(&identity, || {
        let mut lines = identity.lines();
        lines.push("Keep the passphrase where it survives this machine: without it the backups are lost.".into());
        lines.join("\n")
    });
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::DEFAULT_CHUNK_SIZE;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        command: RepositoryCommand,
    }

    #[test]
    fn the_default_chunk_size_is_that_of_the_library() {
        let line = Line::try_parse_from(["x", "init", "--repository", "/r"]).unwrap();
        let RepositoryCommand::Init(args) = line.command else { panic!("not init") };
        assert_eq!(args.chunk_size, DEFAULT_CHUNK_SIZE);
    }
}
