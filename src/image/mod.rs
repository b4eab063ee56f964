//! Where disk content goes and comes from: qcow2 files and chains of them, raw files, block devices.

mod error;
mod sink;

pub use error::ImageError;
pub use sink::{ImageSink, SinkSummary};
