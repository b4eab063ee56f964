//! Jobs.

use super::{Empty, command};
use serde::{Deserialize, Serialize};

/// Starts a backup job.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevBackup {
    /// Id of the job.
    pub job_id: String,
    /// Node to read.
    pub device: String,
    /// Node to write.
    pub target: String,
    /// `none`: only keep old data; `full`; `bitmap`.
    pub sync: &'static str,
    /// Name of the filter that the job inserts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter_node_name: Option<String>,
    /// Since 10.1. Without it a failing copy fails the guest's write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_cbw_error: Option<&'static str>,
    /// For `sync=bitmap`: bitmap on `device`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    /// What becomes of the bitmap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmap_mode: Option<&'static str>,
    /// Bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speed: Option<u64>,
    /// Compress (qcow2 targets).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress: Option<bool>,
    /// `false`: a concluded job stays until it is dismissed, so its result can be read.
    pub auto_dismiss: bool,
    /// Tuning of the copy loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_perf: Option<BackupPerformance>,
}

impl crate::qmp::Command for BlockdevBackup {
    const NAME: &'static str = "blockdev-backup";
    type Reply = Empty;
}

/// Tuning of a backup job's copy loop.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BackupPerformance {
    /// Requests at once.
    pub max_workers: u16,
}

command!(
    /// Formats an image, as a job.
    BlockdevCreate => "blockdev-create", Empty {
        /// Id of the job.
        job_id: String,
        /// The format and its options.
        options: CreateOptions,
    }
);

/// Formats an image.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "driver", rename_all = "kebab-case")]
pub enum CreateOptions {
    /// A qcow2 image (version 3).
    #[serde(rename_all = "kebab-case")]
    Qcow2 {
        /// Node of the file.
        file: String,
        /// Bytes.
        size: u64,
        /// Bytes in a cluster.
        cluster_size: u32,
    },
}

command!(
    /// All jobs.
    QueryJobs => "query-jobs", Vec<JobInfo> {}
);
command!(
    /// All block jobs.
    QueryBlockJobs => "query-block-jobs", Vec<BlockJobInfo> {}
);
command!(
    /// Asks a job to end.
    JobCancel => "job-cancel", Empty {
        /// Its id.
        id: String,
    }
);
command!(
    /// Forgets a concluded job.
    JobDismiss => "job-dismiss", Empty {
        /// Its id.
        id: String,
    }
);

/// A job.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// `backup`, `create`, `mirror`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// `running`, `paused`, `ready`, `concluded`, …
    pub status: String,
    /// Units done. Bytes for backup jobs; copy-before-write counts as well.
    pub current_progress: u64,
    /// Units in all, as far as it is known.
    pub total_progress: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// A block job.
#[derive(Debug, Clone, Deserialize)]
pub struct BlockJobInfo {
    /// Its id.
    pub device: String,
    /// `backup`, `mirror`, `commit`, `stream`.
    #[serde(rename = "type")]
    pub kind: String,
}
