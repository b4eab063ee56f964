//! The flavours of QEMU and the other programs of the test bed.

use std::path::PathBuf;
use std::{env, fs};

/// A QEMU that the tests run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// QEMU 10.0 of Debian: `on-cbw-error` is missing in `blockdev-backup`.
    Qemu10,
    /// The newest QEMU.
    Next,
    /// A new QEMU with CentOS Stream's driver allow-list, as in stock `KubeVirt`.
    Allowlist,
}

impl Flavour {
    /// All flavours.
    pub(crate) fn all() -> [Self; 3] {
        [Self::Qemu10, Self::Next, Self::Allowlist]
    }

    /// The system emulator.
    pub(crate) fn binary(self) -> PathBuf {
        tool(self.variable())
    }

    /// Whether this flavour is set up; tests of one flavour just call [`Flavour::binary`] and fail without it.
    pub(crate) fn available(self) -> bool {
        assignment(self.variable()).is_some_and(|path| path.exists())
    }

    /// Its name in the bed's `env` file.
    fn variable(self) -> &'static str {
        match self {
            Self::Qemu10 => "QEMU_10",
            Self::Next => "QEMU_NEXT",
            Self::Allowlist => "QEMU_ALLOWLIST",
        }
    }
}

/// The path that the bed's `env` file assigns to this variable; panics when there is none.
pub(crate) fn tool(variable: &str) -> PathBuf {
    let path = assignment(variable);
    path.unwrap_or_else(|| panic!("{variable} is not in {}: run tests/bed/setup", bed().join("env").display()))
}

/// The bed's directory.
fn bed() -> PathBuf {
    let home = || PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/root".into()));
    env::var_os("VIRT_FLEECE_BED").map_or_else(|| home().join(".cache/virt-fleece-bed"), PathBuf::from)
}

/// The path assigned to a variable, if there is a bed and it has it.
fn assignment(variable: &str) -> Option<PathBuf> {
    let text = fs::read_to_string(bed().join("env")).ok()?;
    let mut lines = text.lines().filter_map(|line| line.trim().split_once('='));
    lines.find(|(name, _)| *name == variable).map(|(_, value)| PathBuf::from(value.trim()))
}
