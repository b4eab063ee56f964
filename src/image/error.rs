//! Errors of images and chains.

use crate::reason::{Reason, Retry};
use std::{io, path::PathBuf};

/// Why an image or a chain could not be written, read or trusted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file or directory failed.
    #[error("cannot {attempt} {path}")]
    Io {
        /// What was attempted: `write`, `read`, `create`, …
        attempt: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Pieces came in a way that the sink does not take.
    #[error("{path}: content out of order or off a cluster border at {offset}")]
    BadPiece {
        /// The image.
        path: PathBuf,
        /// Byte offset.
        offset: u64,
    },
    /// A file is not what it has to be.
    #[error("{path} is damaged: {detail}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A file was written by a newer version.
    #[error("{path} has format version {found}, this program knows up to {known}: use a newer virt-fleece")]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest that is known.
        known: u32,
    },
    /// A name cannot be a file name.
    #[error("{what} `{name}` cannot be a file name; use letters, digits, `-`, `_` and `.`")]
    BadName {
        /// What is named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Something that was asked for does not exist.
    #[error("there is no {what} in {path}; there is: {known}")]
    NotFound {
        /// What.
        what: String,
        /// Where.
        path: PathBuf,
        /// What there is.
        known: String,
    },
    /// The target exists.
    #[error("{path} exists; name another one, or use --force to overwrite it")]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The target lies among the backups.
    #[error("{path} lies in the directory of the backups; restore to another place")]
    InsideBackups {
        /// The target.
        path: PathBuf,
    },
    /// The target is too small.
    #[error("{path} has {available} bytes, the volume needs {needed}")]
    TooSmall {
        /// The target.
        path: PathBuf,
        /// Its bytes.
        available: u64,
        /// The volume's bytes.
        needed: u64,
    },
    /// Somebody else works on the VM's backups.
    #[error("another backup of this VM into {path} is running; wait for it")]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// A source or sink that is no image failed.
    #[error(transparent)]
    Foreign(super::ForeignError),
    /// The user or a signal ended it.
    #[error("interrupted; nothing that looks whole was left behind")]
    Interrupted,
}

impl ImageError {
    /// For `map_err`.
    pub fn io(attempt: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { attempt, path, source }
    }

    /// The file is not what it has to be.
    pub fn damaged(path: impl Into<PathBuf>, detail: impl Into<String>) -> Self {
        Self::Damaged { path: path.into(), detail: detail.into() }
    }

    /// Whether a backup is not to be trusted, rather than unreachable.
    pub fn is_integrity(&self) -> bool {
        match self {
            Self::Damaged { .. } => true,
            Self::Foreign(error) => matches!(error.reason(), "Damaged" | "ObjectMissing"),
            _ => false,
        }
    }
}

impl Reason for ImageError {
    fn reason(&self) -> &str {
        match self {
            Self::Io { source, .. } if source.raw_os_error() == Some(28) => "TargetFull",
            Self::Io { .. } => "TargetIo",
            Self::BadPiece { .. } => "InternalError",
            Self::Damaged { .. } => "Damaged",
            Self::TooNew { .. } => "FormatTooNew",
            Self::BadName { .. } => "BadName",
            Self::NotFound { .. } => "NotFound",
            Self::Exists { .. } => "TargetExists",
            Self::InsideBackups { .. } => "TargetInsideBackups",
            Self::TooSmall { .. } => "TargetTooSmall",
            Self::Busy { .. } => "Busy",
            Self::Foreign(error) => error.reason(),
            Self::Interrupted => "Interrupted",
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Io { .. } | Self::Busy { .. } => Retry::Backoff,
            Self::Foreign(error) => error.retry(),
            _ => Retry::Terminal,
        }
    }
}
