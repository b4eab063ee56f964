//! What processes that were killed left in the storage besides sessions and plans, and the storage's clock, which leaves
//! such things, too.

use super::{RepositoryError, key, plan::Plan, prune::is_within_lease, repository::Repository};
use jiff::Timestamp;

/// Objects that ask for the time begin like this; in earlier versions there was one of this name.
const CLOCK: &str = "prune/clock";
/// Attempts to learn the time, while others clear up.
const CLOCK_ATTEMPTS: usize = 5;

impl Repository {
    /// The time by the clock of the storage.
    pub(super) async fn now(&self) -> Result<Timestamp, RepositoryError> {
        let mut attempt = 1;
        loop {
            let mut random = [0; 8];
            key::random(&mut random)?;
            // A name of its own: with a shared one, whoever is done takes it from under the others.
            let name = format!("{CLOCK}-{}", key::hex(&random));
            match self.storage().put_durably(&name, "now".into()).await {
                Ok(now) => {
                    self.storage().delete(&name).await?;
                    return Ok(now);
                }
                // A prune took it for a stray one.
                Err(error) if error.is_missing() && attempt < CLOCK_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes what dead processes left: parts of lists whose plan is gone, clocks, and files that were not written to
    /// their end. To be called by the only prune, with its plan.
    pub(super) async fn remove_strays(&self, plan: &Plan) -> Result<(), RepositoryError> {
        let mut removed = 0;
        for object in self.storage().list_all("prune").await? {
            if is_stray(&object.name, &plan.id) {
                self.storage().delete(&object.name).await?;
                removed += 1;
            }
        }
        // In a directory only: a write that goes on is younger than the lease.
        if self.storage().directory().is_some() {
            let now = self.now().await?;
            removed += self.storage().remove_unfinished(move |written| !is_within_lease(written, now)).await?;
        }
        if removed > 0 {
            tracing::info!(removed, "removed what processes that were killed had left");
        }
        Ok(())
    }
}

/// Whether an object belongs to no prune that counts. A plan has a new id each time, and there is one at a time: parts
/// of any other id than its own are of one that is over.
fn is_stray(name: &str, plan: &str) -> bool {
    if name.starts_with(CLOCK) {
        return true;
    }
    let Some((id, part)) = name.strip_prefix("prune/").and_then(|name| name.split_once('/')) else { return false };
    let is_part = key::unhex(id).is_some_and(|id| id.len() == 8) && part.parse::<usize>().is_ok();
    is_part && id != plan
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strays_are_told_from_what_counts_and_from_what_is_unknown() {
        let plan = "0011223344556677";
        for name in ["prune/8899aabbccddeeff/0", "prune/8899aabbccddeeff/12", "prune/clock", "prune/clock-00ff"] {
            assert!(is_stray(name, plan), "{name}");
        }
        for name in ["prune/plan", "prune/0011223344556677/0", "prune/other", "prune/8899aabbccddeeff/x", "prune/x/0"] {
            assert!(!is_stray(name, plan), "{name}");
        }
    }
}
