//! What a mover pod is told by the controller, and what it says at its end.
//!
//! The configuration comes in the environment variable [`MOVER_CONFIG`], secrets as files or variables beside it: it
//! names no secret's content. The outcome goes into the pod's termination message, so that it outlives mover, agent and
//! API server: with it the controller completes a backup whose agent died between the commit and its report.

use serde::{Deserialize, Serialize};

/// Environment variable that holds a [`MoverConfig`] as JSON.
pub const MOVER_CONFIG: &str = "VIRT_FLEECE_MOVER";
/// Where the kubelet reads the termination message; [`TERMINATION_LOG`] names another file.
pub const DEFAULT_TERMINATION_LOG: &str = "/dev/termination-log";
/// Environment variable with the path of the termination message, for where there is no kubelet.
pub const TERMINATION_LOG: &str = "VIRT_FLEECE_TERMINATION_LOG";
/// Name of the pod's volume that holds the mover's socket.
pub const SOCKET_VOLUME: &str = "virt-fleece-mover";
/// Name of the socket in it.
pub const SOCKET_NAME: &str = "mover.sock";
/// Bytes that a termination message may have (kubelet, `MaxContainerTerminationMessageLength`).
pub const MAX_TERMINATION_MESSAGE: usize = 4096;

/// What a mover does, and with which target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MoverConfig {
    /// What it does.
    pub task: MoverTask,
    /// With which target.
    pub target: MoverTarget,
}

/// What a mover does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum MoverTask {
    /// Serves one backup of one VM on a Unix socket; ends with it.
    Backup {
        /// The socket's path.
        socket: String,
        /// Name of the VM in the repository: the agent may back up no other one with this mover.
        vm: String,
        /// UID of the VM: a backup of a VM of another UID and the same name is no parent.
        vm_uid: String,
        /// UID of the `VirtualMachineBackup`, for the logs.
        backup_uid: String,
        /// Paths of the disks of a stopped VM, by volume: a block device, or a directory that holds `disk.img`.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        offline: Vec<OfflineVolume>,
        /// File with the definition of the VM (JSON) that goes into the backup.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        definition_file: Option<String>,
        /// Ends when no agent has come for so many seconds.
        wait_seconds: u64,
    },
    /// Opens the repository, making it where that is wanted, and says what is in it.
    Probe,
    /// Forgets backups.
    Forget {
        /// Name of the VM in the repository.
        vm: String,
        /// Ids of the backups.
        backups: Vec<String>,
    },
}

/// A disk of a stopped VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OfflineVolume {
    /// Name of the volume.
    pub name: String,
    /// A block device, or a directory that holds `disk.img`.
    pub path: String,
}

/// Where a mover's data goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum MoverTarget {
    /// A repository. Credentials come from the environment, by the names of the providers' own tools.
    Repository {
        /// A directory, or `s3://BUCKET/PREFIX`.
        url: String,
        /// S3 server that is not Amazon's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        s3_endpoint: Option<String>,
        /// S3 region.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        s3_region: Option<String>,
        /// PEM file with certificates to trust besides the system's.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ca_file: Option<String>,
        /// File with the passphrase.
        passphrase_file: String,
        /// Make the repository when there is none.
        create: bool,
        /// Level of zstd; 0 does not compress.
        compression_level: i32,
    },
    /// A directory of qcow2 images.
    Qcow2Directory {
        /// Its path.
        path: String,
        /// Compress the images.
        compress: bool,
    },
}

/// How a mover ended; its termination message, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum MoverOutcome {
    /// The backup is complete and durable.
    Committed {
        /// Its id.
        backup_id: String,
        /// The instant from which it is, RFC 3339.
        point_in_time: String,
        /// Number among the backups of the VM.
        sequence: u64,
        /// Every volume was read by its dirty bitmap.
        incremental: bool,
        /// Bytes that it added to the target.
        stored_bytes: u64,
    },
    /// What a probe found.
    Probed {
        /// Id of the repository.
        repository_id: String,
        /// Complete backups.
        backups: u64,
        /// VMs that have backups.
        virtual_machines: u64,
        /// Bytes that all backups have together.
        logical_bytes: u64,
        /// Bytes of the repository.
        stored_bytes: u64,
        /// Backups that cannot be read.
        damaged: u64,
    },
    /// The backups are forgotten, or were gone already.
    Forgotten,
    /// It was told to give up, or nobody came.
    Abandoned {
        /// Why.
        message: String,
    },
    /// It failed.
    Failed {
        /// Stable word.
        reason: String,
        /// For people.
        message: String,
        /// Whether another attempt may succeed.
        retryable: bool,
    },
}

impl MoverOutcome {
    /// As a termination message: shortened to what fits.
    pub fn to_message(&self) -> String {
        let text = serde_json::to_string(self).unwrap_or_default();
        if text.len() <= MAX_TERMINATION_MESSAGE {
            return text;
        }
        let short = |text: &str| text.chars().take(500).collect::<String>();
        let cut = match self.clone() {
            Self::Failed { reason, message, retryable } => {
                Self::Failed { reason: short(&reason), message: short(&message), retryable }
            }
            Self::Abandoned { message } => Self::Abandoned { message: short(&message) },
            other => other,
        };
        serde_json::to_string(&cut).unwrap_or_default()
    }

    /// Reads a termination message. `None`: it is not one of ours (the kubelet puts the end of the log there when the
    /// mover was killed).
    pub fn from_message(message: &str) -> Option<Self> {
        (message.len() <= MAX_TERMINATION_MESSAGE).then(|| serde_json::from_str(message).ok()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_fit_into_a_termination_message_and_read_back() {
        let long = MoverOutcome::Failed { reason: "X".into(), message: "\u{7}é".repeat(4000), retryable: true };
        let text = long.to_message();
        assert!(text.len() <= MAX_TERMINATION_MESSAGE, "{}", text.len());
        assert!(matches!(MoverOutcome::from_message(&text), Some(MoverOutcome::Failed { retryable: true, .. })));
        assert_eq!(MoverOutcome::from_message("panicked at src/main.rs"), None);
        assert_eq!(
            MoverOutcome::Forgotten.to_message(),
            r#"{"outcome":"forgotten"}"#,
            "the controller of another version reads it"
        );
    }
}
