//! Which backups of a VM a retention rule keeps.
//!
//! The parts of a rule count on their own, as restic's do, and a backup is kept when any of them wants it: `daily 7`
//! keeps the newest backup of each of the seven newest days *that have one*. Days without a backup do not count, so a
//! VM that was off for a year loses nothing by it.

use jiff::{Span, Timestamp, Zoned, tz::TimeZone};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// How many backups to keep; 0 everywhere keeps none for that reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Keep {
    /// The newest ones, whenever they were made.
    pub keep_last: u32,
    /// The newest of each hour, for the newest hours that have a backup.
    pub keep_hourly: u32,
    /// The same for days.
    pub keep_daily: u32,
    /// For ISO weeks, which begin on Monday.
    pub keep_weekly: u32,
    /// For months.
    pub keep_monthly: u32,
    /// For years.
    pub keep_yearly: u32,
}

/// A rule that cannot be followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// Nothing would be kept.
    #[error("the rule keeps nothing, so every backup would be forgotten; say how many to keep")]
    Empty,
    /// A time to keep that is zero or negative.
    #[error("the time within which all backups are kept has to be longer than zero")]
    Within,
}

/// What to keep, and where days begin. Never empty.
#[derive(Debug, Clone)]
pub struct RetentionRule {
    keep: Keep,
    within: Option<Span>,
    time_zone: TimeZone,
}

/// A backup of the VM that a rule is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatedBackup {
    /// Its id.
    pub id: String,
    /// Its number among the backups of the VM: says which one came later when a clock does not.
    pub sequence: u64,
    /// The instant from which it is.
    pub point_in_time: Timestamp,
}

/// What a rule says about a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The backup.
    pub id: String,
    /// All reasons to keep it: `newest`, `last`, `within 14d`, `daily 2026-11-20`, `weekly 2026-W47`, …
    /// None: it can go.
    pub reasons: Vec<String>,
}

impl Decision {
    /// Whether the backup is kept.
    pub fn is_kept(&self) -> bool {
        !self.reasons.is_empty()
    }
}

/// A kind of period.
struct Period {
    name: &'static str,
    /// How one is written, which is also what tells two of them apart.
    format: &'static str,
    limit: fn(&Keep) -> u32,
}

const PERIODS: [Period; 5] = [
    // The offset belongs to an hour because the clocks go back once a year: the same hour then comes twice.
    Period { name: "hourly", format: "%Y-%m-%d %H:00%:z", limit: |keep| keep.keep_hourly },
    Period { name: "daily", format: "%Y-%m-%d", limit: |keep| keep.keep_daily },
    Period { name: "weekly", format: "%G-W%V", limit: |keep| keep.keep_weekly },
    Period { name: "monthly", format: "%Y-%m", limit: |keep| keep.keep_monthly },
    Period { name: "yearly", format: "%Y", limit: |keep| keep.keep_yearly },
];

impl RetentionRule {
    /// A rule. `within` keeps everything up to that age, counted in calendar days and months of `time_zone`, in which
    /// days, weeks and months begin as well.
    pub fn new(keep: Keep, within: Option<Span>, time_zone: TimeZone) -> Result<Self, RuleError> {
        if within.is_some_and(|within| !within.is_positive()) {
            return Err(RuleError::Within);
        }
        if keep == Keep::default() && within.is_none() {
            return Err(RuleError::Empty);
        }
        Ok(Self { keep, within, time_zone })
    }

    /// Where days begin.
    pub fn time_zone(&self) -> &TimeZone {
        &self.time_zone
    }

    /// Decides on all backups of one VM, whatever their order; the answer has the oldest first.
    ///
    /// The newest backup by sequence is always kept: the next one builds on it. Ages count from the newest point in
    /// time, as a VM that is not backed up any more must not lose what it has, but from no later than `now`: one
    /// backup that was made while the clock was wrong must not make all others look old.
    pub fn decide(&self, backups: &[DatedBackup], now: Timestamp) -> Vec<Decision> {
        let mut backups: Vec<_> = backups.iter().collect();
        // Newest first. Times may be equal; ids are not.
        backups.sort_by(|left, right| right.order().cmp(&left.order()));
        let newest = backups.iter().max_by_key(|backup| (backup.sequence, &backup.id)).map(|backup| &backup.id);
        let kept_from = backups.first().map(|backup| self.kept_from(backup.point_in_time.min(now)));
        let mut seen: [HashSet<String>; PERIODS.len()] = Default::default();
        let mut decisions: Vec<_> = backups
            .iter()
            .enumerate()
            .map(|(position, backup)| {
                let mut reasons = Vec::new();
                if newest == Some(&backup.id) {
                    reasons.push("newest".to_owned());
                }
                if position < self.keep.keep_last as usize {
                    reasons.push("last".to_owned());
                }
                if let Some(within) = &self.within
                    && kept_from.is_some_and(|from| backup.point_in_time >= from)
                {
                    reasons.push(format!("within {within:#}"));
                }
                let local = backup.point_in_time.to_zoned(self.time_zone.clone());
                reasons.extend(self.periods(&local, &mut seen));
                Decision { id: backup.id.clone(), reasons }
            })
            .collect();
        decisions.reverse();
        decisions
    }

    /// The periods for which a backup is kept, given those that newer ones stand for.
    fn periods(&self, local: &Zoned, seen: &mut [HashSet<String>; PERIODS.len()]) -> Vec<String> {
        let mut reasons = Vec::new();
        for (kind, seen) in PERIODS.iter().zip(seen) {
            // All that were seen, not only the last one: where clocks go back over midnight, a day comes twice.
            if seen.len() < (kind.limit)(&self.keep) as usize {
                let period = local.strftime(kind.format).to_string();
                let reason = format!("{} {period}", kind.name);
                if seen.insert(period) {
                    reasons.push(reason);
                }
            }
        }
        reasons
    }

    /// The oldest point in time that is young enough.
    fn kept_from(&self, newest: Timestamp) -> Timestamp {
        let Some(within) = self.within else { return Timestamp::MAX };
        let from = newest.to_zoned(self.time_zone.clone()).checked_sub(within);
        // Longer than time itself.
        from.map_or(Timestamp::MIN, |from| from.timestamp())
    }
}

impl DatedBackup {
    fn order(&self) -> (Timestamp, u64, &str) {
        (self.point_in_time, self.sequence, &self.id)
    }
}

#[cfg(test)]
#[path = "retention_tests.rs"]
mod tests;
