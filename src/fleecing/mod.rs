//! The fleecing session: a point in time of all disks of a running VM, readable while the guest goes on writing.
//!
//! Order of a session: prepare everything that can wait, freeze, cut, thaw, export, read, prove that the snapshot was
//! not broken, commit, take everything out of QEMU again. See `docs/architecture.md`.

mod disk;
mod end_mark;
mod engine;
mod error;
pub mod guardian;
mod journal;
pub mod names;
mod quiesce;
mod recovery;
mod session;
mod storage;
mod teardown;
mod watch;

pub use disk::{BlockGraph, Disks, SkippedDevice, Volume};
pub use engine::{Engine, EngineChoice, View, choose};
pub use error::SessionError;
pub use journal::{Begin, Entry, Journal, Leftover};
pub use quiesce::{Quiesce, QuiesceOutcome, Wish};
pub use recovery::{Head, Recovered, recover};
pub use session::{Cut, Outcome, Request, Session, SessionDisk};
pub use storage::{Budget, FleeceDirectory, VmLock, budget};
pub use teardown::{Observation, remove_all, settle_bitmaps};
