//! Options that name a repository, and the way into it.

use super::CliError;
use crate::repository::{Location, Passphrase, Repository};
use clap::Args;
use std::{io::IsTerminal, path::PathBuf, sync::Arc};

/// Environment variable with the passphrase.
pub(super) const PASSPHRASE: &str = "VIRT_FLEECE_PASSPHRASE";

#[derive(Debug, Clone, Args)]
pub(super) struct AccessArgs {
    /// File with the repository's passphrase (its last newline is not part of it); without it `$VIRT_FLEECE_PASSPHRASE`
    /// counts, and on a terminal you are asked
    #[arg(long, value_name = "FILE", env = "VIRT_FLEECE_PASSPHRASE_FILE")]
    pub(super) passphrase_file: Option<PathBuf>,
    /// S3 server that is not Amazon's, such as <https://minio.example:9000>; buckets are then in the path
    #[arg(long, value_name = "URL", env = "AWS_ENDPOINT_URL", hide_env_values = true)]
    s3_endpoint: Option<String>,
    /// S3 region
    #[arg(long, value_name = "NAME", env = "AWS_REGION", hide_env_values = true)]
    s3_region: Option<String>,
    /// PEM file with certificates that the storage's server may show, besides the system's
    #[arg(long, value_name = "FILE", env = "VIRT_FLEECE_CA_FILE")]
    ca_file: Option<PathBuf>,
}

/// The repository that a command works on.
#[derive(Debug, Clone, Args)]
pub(super) struct RepositoryArgs {
    /// The repository: a directory, or the address of a bucket (see below)
    #[arg(long = "repository", value_name = "URL")]
    pub(super) url: String,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

impl RepositoryArgs {
    /// Opens it.
    pub(super) async fn open(&self) -> Result<Arc<Repository>, CliError> {
        self.access.open(&self.url).await
    }
}

/// What every repository option says about itself.
pub(super) const REPOSITORY_HELP: &str = "\
Repositories: a directory (also on NFS), s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX. Credentials come \
from the environment as the providers' own tools have them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, \
AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_SERVICE_ACCOUNT; AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY.";

impl AccessArgs {
    /// The place; `create` makes a missing directory.
    pub(super) fn location(&self, url: &str, create: bool) -> Location {
        Location {
            url: url.to_owned(),
            s3_endpoint: self.s3_endpoint.clone(),
            s3_region: self.s3_region.clone(),
            ca_file: self.ca_file.clone(),
            create,
        }
    }

    /// Opens a repository.
    pub(super) async fn open(&self, url: &str) -> Result<Arc<Repository>, CliError> {
        let storage = self.location(url, false).open()?;
        Ok(Repository::open(storage, self.passphrase()?).await?)
    }

    /// The passphrase of a repository that exists.
    pub(super) fn passphrase(&self) -> Result<Passphrase, CliError> {
        match given(self.passphrase_file.as_ref(), PASSPHRASE)? {
            Some(passphrase) => Ok(passphrase),
            None => ask("passphrase of the repository: ", "--passphrase-file", PASSPHRASE),
        }
    }

    /// The passphrase of a new repository; typed twice.
    pub(super) fn new_passphrase(&self) -> Result<Passphrase, CliError> {
        match given(self.passphrase_file.as_ref(), PASSPHRASE)? {
            Some(passphrase) => Ok(passphrase),
            None => ask_twice("--passphrase-file", PASSPHRASE),
        }
    }
}

/// A passphrase from a file or the environment.
pub(super) fn given(file: Option<&PathBuf>, variable: &str) -> Result<Option<Passphrase>, CliError> {
    let text = match file {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| {
                CliError::Usage(format!("the passphrase file {} cannot be read: {error}", path.display()))
            })?;
            Some(text.strip_suffix('\n').unwrap_or(&text).trim_end_matches('\r').to_owned())
        }
        None => std::env::var(variable).ok(),
    };
    Ok(text.map(Passphrase::new).transpose()?)
}

fn ask(prompt: &str, option: &str, variable: &str) -> Result<Passphrase, CliError> {
    if !std::io::stdin().is_terminal() {
        return Err(CliError::Usage(format!(
            "the repository needs a passphrase: give it with {option} FILE or ${variable}"
        )));
    }
    let typed = rpassword::prompt_password(prompt)
        .map_err(|error| CliError::Usage(format!("no passphrase could be read from the terminal: {error}")))?;
    Ok(Passphrase::new(typed)?)
}

/// For a passphrase that nobody can look up later. `option` and `variable` are the other ways to give it.
pub(super) fn ask_twice(option: &str, variable: &str) -> Result<Passphrase, CliError> {
    let first = ask("new passphrase (without it the backups are lost): ", option, variable)?;
    if ask("once more: ", option, variable)? != first {
        return Err(CliError::Usage("the two passphrases differ".into()));
    }
    Ok(first)
}
