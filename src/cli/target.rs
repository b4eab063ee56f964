//! Options that name where a backup goes.

use super::{CliError, repository_args::AccessArgs};
use crate::{mover::TargetAccess, repository::Location};
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
#[group(required = true, multiple = false, args = ["qcow2_dir", "repository"])]
pub(super) struct TargetArgs {
    /// Directory for qcow2 images: one directory a VM, one a backup in it, one image a volume
    #[arg(long, value_name = "DIR")]
    qcow2_dir: Option<PathBuf>,
    /// Repository (deduplicated, compressed, encrypted): a directory, `s3://BUCKET/PREFIX`, `gs://…`, `az://…`
    #[arg(long, value_name = "URL")]
    repository: Option<String>,
    #[command(flatten)]
    access: AccessArgs,
    /// qcow2 images: compress with zstd
    #[arg(long, conflicts_with = "repository")]
    compress: bool,
    /// Repository: level of zstd from 1 to 19; 0 does not compress
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(i32).range(0..=19),
        conflicts_with = "qcow2_dir")]
    compression_level: i32,
}

impl TargetArgs {
    /// Where the repository is, when it is one.
    pub(super) fn location(&self) -> Option<Location> {
        self.repository.as_ref().map(|url| self.access.location(url, false))
    }

    /// The way to the target. Asks for a passphrase where it has to.
    pub(super) fn access(&self) -> Result<TargetAccess, CliError> {
        if let Some(url) = &self.repository {
            return Ok(TargetAccess::Repository {
                location: self.access.location(url, false),
                passphrase: self.access.passphrase()?,
                create: false,
                level: self.compression_level,
            });
        }
        let missing = || CliError::Usage("name a target: --qcow2-dir or --repository".into());
        let path = self.qcow2_dir.clone().ok_or_else(missing)?;
        Ok(TargetAccess::Chain { path, compress: self.compress })
    }
}
