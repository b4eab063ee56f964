//! Errors of a repository.

use crate::reason::{Reason, Retry};
use std::io::ErrorKind;

/// Why something in a repository could not be done.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The storage refused or failed, after its retries.
    #[error("cannot {attempt} {object} in the repository{}", way_out(source))]
    Storage {
        /// What was attempted: `read`, `write`, `list`, `delete`, …
        attempt: &'static str,
        /// The object, or what is listed.
        object: String,
        /// What the storage said.
        #[source]
        source: object_store::Error,
    },
    /// A local step failed.
    #[error("cannot {attempt}")]
    Local {
        /// What was attempted.
        attempt: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The address of a repository is not understood.
    #[error("`{url}` is no repository address ({why}); use a directory, s3://BUCKET/PREFIX, gs://… or az://…")]
    BadUrl {
        /// What was given.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// There is no repository.
    #[error("there is no repository at {url}; make one with `virt-fleece repository init --repository {url}`")]
    Missing {
        /// The address.
        url: String,
    },
    /// A repository cannot be made where something is.
    #[error("{url} is not empty ({found}); choose an empty directory or prefix for a new repository")]
    NotEmpty {
        /// The address.
        url: String,
        /// Something that is there.
        found: String,
    },
    /// A newer program wrote it.
    #[error("{object} has format version {found}, this program knows up to {known}: use a newer virt-fleece")]
    TooNew {
        /// What was read.
        object: String,
        /// Its version.
        found: u32,
        /// The newest that is known.
        known: u32,
    },
    /// No key slot opens with what was given.
    #[error("none of the {slots} key slots of the repository opens with this passphrase")]
    WrongPassphrase {
        /// Key slots tried.
        slots: usize,
    },
    /// The last key slot must stay.
    #[error("key slot {slot} is the last one: without it the repository could never be read again")]
    LastKey {
        /// The slot.
        slot: String,
    },
    /// An object is not what was written: flipped bits, another object in its place, a forgery, a wrong key.
    #[error("{object} is damaged: {detail}")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong.
        detail: String,
    },
    /// Something that was asked for does not exist.
    #[error("there is no {what} in the repository; there is: {known}")]
    NotFound {
        /// What.
        what: String,
        /// What there is.
        known: String,
    },
    /// A value cannot be taken.
    #[error("{0}")]
    Invalid(String),
    /// This run lost its place: its sign of life is too old, or was removed.
    #[error(
        "the repository no longer counts on this run ({why}): a prune may have removed what it relied on; run it again"
    )]
    SessionLost {
        /// What happened.
        why: String,
    },
    /// Another run works on it.
    #[error("{what} is under way ({holder}); wait for it")]
    Busy {
        /// What is running.
        what: &'static str,
        /// Who runs it.
        holder: String,
    },
    /// A part of the pipeline ended without a word.
    #[error("a worker of the repository died")]
    WorkerDied,
    /// The user or a signal ended it.
    #[error("interrupted; nothing that looks whole was left behind")]
    Interrupted,
}

impl RepositoryError {
    /// For `map_err`.
    pub(super) fn storage(
        attempt: &'static str,
        object: impl Into<String>,
    ) -> impl FnOnce(object_store::Error) -> Self {
        let object = object.into();
        move |source| Self::Storage { attempt, object, source }
    }

    /// For `map_err`.
    pub(super) fn local(attempt: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Local { attempt, source }
    }

    pub(super) fn damaged(object: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Damaged { object: object.into(), detail: detail.into() }
    }

    /// The object that it is about, where there is one.
    pub fn object(&self) -> Option<&str> {
        match self {
            Self::Storage { object, .. } | Self::Damaged { object, .. } | Self::TooNew { object, .. } => Some(object),
            _ => None,
        }
    }

    /// Whether the object is not there.
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Storage { source: object_store::Error::NotFound { .. }, .. })
    }

    /// Whether something in the repository is not to be trusted, rather than unreachable.
    pub fn is_integrity(&self) -> bool {
        matches!(self, Self::Damaged { .. } | Self::Storage { source: object_store::Error::NotFound { .. }, .. })
    }
}

/// What to do about an error of the storage, as the end of a sentence.
fn way_out(error: &object_store::Error) -> &'static str {
    match error {
        object_store::Error::NotFound { .. } => "",
        object_store::Error::PermissionDenied { .. } => ": these credentials may not do that there",
        object_store::Error::Unauthenticated { .. } => ": the credentials are not accepted",
        error => match local_reason(error) {
            "TargetFull" => {
                ": make space, say by `virt-fleece forget` and `virt-fleece repository prune`, which need some KiB themselves"
            }
            "PermissionDenied" => ": see who may write there, and whether it is mounted read-only",
            _ => ": see whether it can be reached and is well, then run it again",
        },
    }
}

/// What an error of the system below an error means.
fn local_reason(error: &(dyn std::error::Error + 'static)) -> &'static str {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            match error.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => return "TargetFull",
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => return "PermissionDenied",
                _ => {}
            }
        }
        next = error.source();
    }
    "TargetIo"
}

impl Reason for RepositoryError {
    fn reason(&self) -> &str {
        match self {
            Self::Storage { source, .. } => match source {
                object_store::Error::NotFound { .. } => "ObjectMissing",
                object_store::Error::PermissionDenied { .. } => "PermissionDenied",
                object_store::Error::Unauthenticated { .. } => "Unauthenticated",
                _ => local_reason(source),
            },
            Self::Local { source, .. } => local_reason(source),
            Self::BadUrl { .. } | Self::Invalid(_) => "Usage",
            Self::Missing { .. } => "RepositoryMissing",
            Self::NotEmpty { .. } => "TargetExists",
            Self::TooNew { .. } => "FormatTooNew",
            Self::WrongPassphrase { .. } => "WrongPassphrase",
            Self::LastKey { .. } => "LastKey",
            Self::Damaged { .. } => "Damaged",
            Self::NotFound { .. } => "NotFound",
            Self::SessionLost { .. } => "SessionLost",
            Self::Busy { .. } => "Busy",
            Self::WorkerDied => "InternalError",
            Self::Interrupted => "Interrupted",
        }
    }

    fn retry(&self) -> Retry {
        match self {
            Self::Storage {
                source:
                    object_store::Error::NotFound { .. }
                    | object_store::Error::PermissionDenied { .. }
                    | object_store::Error::Unauthenticated { .. },
                ..
            } => Retry::Terminal,
            Self::Storage { .. } | Self::Local { .. } | Self::SessionLost { .. } | Self::Busy { .. } => Retry::Backoff,
            _ => Retry::Terminal,
        }
    }
}
