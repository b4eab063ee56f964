//! The end of a session that made a backup.

use super::{
    RepositoryError,
    manifest::Manifest,
    session::{COMMIT_LIMIT_SECONDS, RepositorySession, boot_seconds},
};
use std::{sync::atomic::Ordering, time::Duration};

/// How long it may take to find out what became of a commit that failed.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to remove the session at the end.
const END_LIMIT: Duration = Duration::from_secs(10);

impl RepositorySession {
    /// Commits a backup and ends the session. Every chunk that it names was found by [`Self::is_missing`] or sent. After
    /// `limit` it is given up, unless it turns out to be complete; looking for that takes a minute more at most.
    ///
    /// A backup whose write seemed to fail may be there: the answer got lost, or came too late. It counts when it is
    /// seen and this session is alive, so that nobody takes the data of one that is listed for not backed up.
    pub async fn commit(&self, manifest: &Manifest, limit: Duration) -> Result<(), RepositoryError> {
        let attempt = async {
            self.repository.storage().flush().await?;
            self.prove_alive().await?;
            self.repository.write_manifest(manifest).await?;
            // Between the proof before and the manifest's arrival any time may have passed (a stopped process, a slow
            // storage). A prune removes a session that it takes for dead before it looks for manifests, so one that is
            // there while its session still is has been, or will be, seen.
            self.prove_alive().await
        };
        let committed = match tokio::time::timeout(limit, attempt).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => self.settle(manifest, error).await,
            Err(_) => {
                let source = std::io::ErrorKind::TimedOut.into();
                let attempt = "finish the backup in the repository";
                self.settle(manifest, RepositoryError::Local { attempt, source }).await
            }
        };
        if tokio::time::timeout(END_LIMIT, self.end()).await.is_err() {
            tracing::warn!("the session stays listed in the repository until its sign of life is too old");
        }
        committed
    }

    /// Finds out what became of a backup whose commit failed: it is complete, or the error is the answer.
    async fn settle(&self, manifest: &Manifest, error: RepositoryError) -> Result<(), RepositoryError> {
        // Of another one with the same id nothing is wanted, and one that was never sent is not there.
        if matches!(error, RepositoryError::Busy { .. } | RepositoryError::Invalid(_)) {
            return Err(error);
        }
        let (vm, id) = (&manifest.backup.vm, &manifest.backup.id);
        let look = async {
            if !self.repository.has_backup(vm, id).await? {
                return Ok(false);
            }
            let Err(lost) = self.prove_alive().await else { return Ok(true) };
            // Nobody may find a backup whose chunks a prune may have removed.
            self.repository.forget(vm, id).await?;
            Err(lost)
        };
        match tokio::time::timeout(SETTLE_LIMIT, look).await {
            Ok(Ok(true)) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the backup is complete, though its commit seemed to fail");
                Ok(())
            }
            Ok(Ok(false) | Err(RepositoryError::SessionLost { .. })) => Err(error),
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(
                    "whether backup {id} became complete cannot be seen now; should it be listed, `virt-fleece verify` \
                    tells whether it is whole, and the next backup does not build on it"
                );
                Err(error)
            }
        }
    }

    async fn prove_alive(&self) -> Result<(), RepositoryError> {
        let lost = |why: String| RepositoryError::SessionLost { why };
        // A prune that takes it for dead removes the object.
        if !self.repository.storage().exists(&self.inner.name).await? {
            return Err(lost("a prune took it for dead".into()));
        }
        let silent = boot_seconds() - self.inner.last_sign.load(Ordering::Acquire);
        if silent > COMMIT_LIMIT_SECONDS {
            return Err(lost(format!("no sign of life could be written for {silent} seconds")));
        }
        Ok(())
    }
}
