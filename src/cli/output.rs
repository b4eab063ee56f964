//! Results on standard output, as text or JSON.

use super::CliError;
use crate::reason::Reason;
use clap::ValueEnum;
use serde::Serialize;
use std::error::Error;

/// Form of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(super) enum Output {
    /// For people.
    #[default]
    Text,
    /// One JSON document, stable.
    Json,
}

impl Output {
    /// Prints the result: the document, or what `text` makes.
    pub(super) fn result<T: Serialize>(self, document: &T, text: impl FnOnce() -> String) {
        match self {
            Self::Text => println!("{}", text()),
            Self::Json => println!("{}", serde_json::to_string_pretty(document).unwrap_or_default()),
        }
    }

    /// Prints an error with its causes.
    pub(super) fn error(self, error: &CliError) {
        let mut causes = Vec::new();
        let mut source = error.source();
        while let Some(cause) = source {
            causes.push(cause.to_string());
            source = cause.source();
        }
        eprintln!("error: {error}");
        causes.iter().for_each(|cause| eprintln!("  caused by: {cause}"));
        if self == Self::Json {
            let document = serde_json::json!({
                "error": { "reason": error.reason(), "message": error.to_string(), "causes": causes }
            });
            println!("{document:#}");
        }
    }
}
