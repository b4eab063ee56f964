//! The machine as a whole: state, names, descriptors, object properties.

use super::{Empty, command};
use serde::Deserialize;
use serde_json::Value;

command!(
    /// Ends the negotiation.
    QmpCapabilities => "qmp_capabilities", Empty {}
);
command!(
    /// Which QEMU this is.
    QueryVersion => "query-version", VersionInfo {}
);
command!(
    /// Run state.
    QueryStatus => "query-status", StatusInfo {}
);
command!(
    /// The VM's name (`-name`).
    QueryName => "query-name", NameInfo {}
);
command!(
    /// The VM's UUID (`-uuid`); all zero when none was given.
    QueryUuid => "query-uuid", UuidInfo {}
);
command!(
    /// Everything that this QEMU's monitor takes and answers.
    QueryQmpSchema => "query-qmp-schema", Vec<Value> {}
);
command!(
    /// Stops the CPUs and waits for I/O under way.
    Stop => "stop", Empty {}
);
command!(
    /// Lets the CPUs run.
    Cont => "cont", Empty {}
);
command!(
    /// Reads a property of an object.
    QomGet => "qom-get", Value {
        /// Path or id of the object.
        path: String,
        /// Name of the property.
        property: String,
    }
);
command!(
    /// Sets a property of an object. `drive` of a disk must never be set to the node that is there already: that aborts
    /// QEMU 10.0.2 (assertion in `bdrv_replace_child_noperm`).
    QomSet => "qom-set", Empty {
        /// Path or id of the object.
        path: String,
        /// Name of the property.
        property: String,
        /// New value.
        value: Value,
    }
);
command!(
    /// Adds a passed descriptor to a set, which `/dev/fdset/N` opens.
    AddFd => "add-fd", Empty {
        /// Id of the set.
        fdset_id: i64,
        /// Free text, by which the owner knows the set again.
        opaque: String,
    }
);
command!(
    /// Removes a set as soon as nothing uses it.
    RemoveFd => "remove-fd", Empty {
        /// Id of the set.
        fdset_id: i64,
    }
);
command!(
    /// All descriptor sets.
    QueryFdsets => "query-fdsets", Vec<FdsetInfo> {}
);
command!(
    /// Gives a passed descriptor a name.
    GetFd => "getfd", Empty {
        /// The name.
        fdname: String,
    }
);
command!(
    /// Closes a named descriptor that nothing took.
    CloseFd => "closefd", Empty {
        /// The name.
        fdname: String,
    }
);

/// Answer of `query-version`.
#[derive(Debug, Clone, Deserialize)]
pub struct VersionInfo {
    /// Version in three numbers.
    pub qemu: VersionTriple,
    /// The distribution's suffix.
    #[serde(default)]
    pub package: String,
}

/// A version number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct VersionTriple {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
}

impl std::fmt::Display for VersionTriple {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Answer of `query-status`.
#[derive(Debug, Clone, Deserialize)]
pub struct StatusInfo {
    /// The CPUs run.
    pub running: bool,
    /// `running`, `paused`, `prelaunch`, `io-error`, …
    pub status: String,
}

/// Answer of `query-name`.
#[derive(Debug, Clone, Deserialize)]
pub struct NameInfo {
    /// The name, if there is one.
    pub name: Option<String>,
}

/// Answer of `query-uuid`.
#[derive(Debug, Clone, Deserialize)]
pub struct UuidInfo {
    /// The UUID.
    #[serde(rename = "UUID")]
    pub uuid: String,
}

/// A descriptor set.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdsetInfo {
    /// Id.
    pub fdset_id: i64,
    /// Its descriptors.
    #[serde(default)]
    pub fds: Vec<FdsetFd>,
}

/// A descriptor of a set.
#[derive(Debug, Clone, Deserialize)]
pub struct FdsetFd {
    /// The owner's text.
    pub opaque: Option<String>,
}
