//! Options that name where backups are, for commands that read them.

use super::{CliError, repository_args::AccessArgs};
use clap::Args;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
#[group(required = true, multiple = false, args = ["qcow2_dir", "repository"])]
pub(super) struct StoreArgs {
    /// Directory with qcow2 images
    #[arg(long, value_name = "DIR")]
    qcow2_dir: Option<PathBuf>,
    /// Repository: a directory, `s3://BUCKET/PREFIX`, `gs://…`, `az://…`
    #[arg(long, value_name = "URL")]
    repository: Option<String>,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

impl StoreArgs {
    /// The repository, when it is one.
    pub(super) fn repository(&self) -> Option<&str> {
        self.repository.as_deref()
    }

    /// The directory otherwise.
    pub(super) fn qcow2_dir(&self) -> Result<&Path, CliError> {
        let missing = || CliError::Usage("name the backups: --qcow2-dir or --repository".into());
        self.qcow2_dir.as_deref().ok_or_else(missing)
    }
}
