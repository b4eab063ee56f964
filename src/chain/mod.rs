//! Planning, without I/O: which volume can be incremental, what becomes of dirty bitmaps after a run, and which backups a
//! retention rule keeps.
//!
//! Two bitmap generations exist per disk: the *new* one, started at the point in time, records what the next backup
//! has to read; the *previous* one says what this backup has to read. A successful backup removes the previous one, a
//! failed one merges the new one back into it. Both directions over-approximate, never under-approximate: a block
//! read twice costs time, a block forgotten costs data. Beside each stands an *end mark*, which tells whether the disk was
//! made smaller since.

mod bitmap;
mod plan;
mod retention;

pub use bitmap::{BitmapAction, BitmapName, GRANULARITY, ObservedBitmap, last_granule, settle};
pub use plan::{BackupType, FullReason, ParentVolume, VolumePlan, plan_volume};
pub use retention::{DatedBackup, Decision, Keep, RetentionRule, RuleError};
