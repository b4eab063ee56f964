//! Where disk content goes and comes from: qcow2 files and chains of them, raw files, block devices.

mod directory;
mod error;
mod manifest;
pub mod qcow2;
mod raw;
mod restore;
mod sink;
mod verify;

pub use directory::{ChainDirectory, Inventory, PartialBackup, VmDirectory, look_for_backup};
pub use error::ImageError;
pub use manifest::{FORMAT_VERSION, Manifest, ManifestVolume};
pub use raw::RawSink;
pub use restore::{
    Part, PieceSource, RestoreFormat, RestoreTarget, RestoredVolume, Take, check_target, is_device, open_device,
    restore_source, restore_volume,
};
pub use sink::{ForeignError, ImageSink, SinkSummary};
pub use verify::{VerifiedBackup, verify_backup, volume_chain};

use std::{fs::File, os::unix::fs::FileExt, path::Path};

/// Size in bytes and BLAKE3 of a file: what `b3sum` prints.
pub fn digest(file: &File, path: &Path) -> Result<(u64, String), ImageError> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 4 << 20];
    let mut at = 0;
    loop {
        let count = file.read_at(&mut buffer, at).map_err(ImageError::io("read", path))?;
        if count == 0 {
            return Ok((at, hasher.finalize().to_hex().to_string()));
        }
        hasher.update_rayon(&buffer[..count]);
        at += count as u64;
    }
}
