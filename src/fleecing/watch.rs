//! Watching a session while its data is read: is the fleece about to be full, is the snapshot still whole.

use super::{Budget, Engine, Session, SessionError, storage::HEADROOM_MIN};
use crate::qmp::command::{BlockNodeInfo, JobInfo, QueryJobs, QueryNamedBlockNodes};
use std::{collections::HashMap, time::Duration};
use tokio::time::sleep;

/// Between two looks at the fleece while data is read.
const POLL: Duration = Duration::from_millis(200);
/// The same where a full fleece hits the guest.
const CLOSE_POLL: Duration = Duration::from_millis(50);
/// Where a full fleece hits the guest, the session is given up when less is free on its file system, in bytes: others
/// write there too. Half of what is left free at the beginning, and more than a guest writes between two looks.
const FLOOR: u64 = HEADROOM_MIN / 2;
/// Between the two looks of the detector. A break is sticky: progress stands still while the dirty count grows.
const RECHECK: Duration = Duration::from_millis(100);

impl Session {
    /// Returns only when the session must be given up.
    pub async fn watch(&self) -> SessionError {
        loop {
            if let Err(error) = self.check().await {
                return error;
            }
            sleep(if self.engine.guest_safe { POLL } else { CLOSE_POLL }).await;
        }
    }

    /// One look: space, jobs, and whether old data could be kept so far.
    pub async fn check(&self) -> Result<(), SessionError> {
        self.check_space()?;
        if self.engine.engine == Engine::Filter {
            // A broken filter shows in failing reads.
            return Ok(());
        }
        if let Err(first) = self.check_jobs().await {
            // Progress is read after the dirty count, but a single look may still fall between the two counters.
            if !matches!(first, SessionError::SnapshotBroken { .. }) {
                return Err(first);
            }
            sleep(RECHECK).await;
            return self.check_jobs().await;
        }
        Ok(())
    }

    /// The last look, after the last byte was read and before anything is committed: twice, some time apart.
    pub async fn prove_unbroken(&self) -> Result<(), SessionError> {
        self.check().await?;
        sleep(RECHECK).await;
        self.check().await
    }

    fn check_space(&self) -> Result<(), SessionError> {
        let Budget::Watched { limit } = self.budget else { return Ok(()) };
        let used = self.disks.iter().map(|disk| disk.fleece.allocated());
        let used: u64 = used.sum::<std::io::Result<u64>>().map_err(SessionError::local("measuring the fleece"))?;
        // Where a full fleece hits the guest, stop well before.
        let mark = if self.engine.guest_safe { limit } else { limit / 10 * 7 };
        if used > mark {
            return Err(SessionError::FleeceFull { limit });
        }
        if !self.engine.guest_safe {
            let available = self.directory.available()?;
            if available < FLOOR {
                return Err(SessionError::FleeceSqueezed { available });
            }
        }
        Ok(())
    }

    /// The guest's first write to a cluster marks it in the new bitmap *and* is counted by the job once the old data is
    /// safe. So dirty bytes above the job's progress are old data that was lost. Undocumented behaviour of QEMU (seen
    /// on 10.0 to 11.1): a test for every flavour guards it.
    async fn check_jobs(&self) -> Result<(), SessionError> {
        let attempt = || SessionError::qmp("checking the snapshot");
        let nodes = self.qmp.execute(&QueryNamedBlockNodes { flat: Some(true) }).await.map_err(attempt())?;
        let jobs = self.qmp.execute(&QueryJobs {}).await.map_err(attempt())?;
        let nodes: HashMap<&str, &BlockNodeInfo> = nodes.iter().map(|node| (node.node_name.as_str(), node)).collect();
        let jobs: HashMap<&str, &JobInfo> = jobs.iter().map(|job| (job.id.as_str(), job)).collect();
        let new_bitmap = self.new_bitmap();
        for disk in &self.disks {
            let volume = disk.volume.name.clone();
            let id = disk.slot.fleece_job(self.backup());
            let lost = |detail: &str| SessionError::JobLost {
                volume: volume.clone(),
                job: id.clone(),
                detail: detail.to_owned(),
            };
            let job = jobs.get(id.as_str()).ok_or_else(|| lost("it is gone"))?;
            if !matches!(job.status.as_str(), "running" | "paused" | "ready" | "standby" | "created") {
                return Err(lost(job.error.as_deref().unwrap_or(&job.status)));
            }
            let bitmaps = nodes.get(disk.volume.format_node.as_str()).map(|node| node.dirty_bitmaps.as_slice());
            let bitmap = bitmaps.unwrap_or_default().iter().find(|b| b.name.as_deref() == Some(&new_bitmap));
            let Some(bitmap) = bitmap else {
                let detail = "its dirty bitmap was removed while the backup ran".to_owned();
                return Err(SessionError::SnapshotBroken { volume, detail });
            };
            // Behind a discard the guest's writes mark the bitmap and copy nothing. There the snapshot is one whose reads
            // fail when it is broken, so that nothing is lost without a detector.
            if bitmap.count > job.current_progress && !self.discards() {
                let detail = format!(
                    "the guest changed {} bytes since the point in time, but only {} bytes of old data could be kept \
                     (is the file system of the fleece full or failing?)",
                    bitmap.count, job.current_progress
                );
                return Err(SessionError::SnapshotBroken { volume, detail });
            }
        }
        Ok(())
    }
}
