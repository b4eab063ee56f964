//! Raw files and block devices as sinks.

use super::{ImageError, ImageSink, SinkSummary, restore::Part};
use crate::extent::{ByteRange, Piece};
use rustix::fs::FallocateFlags;
use std::{
    fs::File,
    io::{Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt},
    path::PathBuf,
};

static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Writes a disk's content as it is.
#[derive(Debug)]
pub struct RawSink {
    file: File,
    path: PathBuf,
    /// The target held something before: what is zero must be made so.
    used: bool,
    data_bytes: u64,
    zero_bytes: u64,
    size: u64,
}

impl RawSink {
    /// An empty file, which gets the size of the volume and stays sparse.
    pub fn new(file: File, path: PathBuf, size: u64) -> Result<Self, ImageError> {
        file.set_len(size).map_err(ImageError::io("size", &path))?;
        Ok(Self { file, path, used: false, data_bytes: 0, zero_bytes: 0, size })
    }

    /// A block device, which must be large enough.
    pub fn device(mut file: File, path: PathBuf, size: u64) -> Result<Self, ImageError> {
        let kind = file.metadata().map_err(ImageError::io("open", &path))?.file_type();
        let available = file.seek(SeekFrom::End(0)).map_err(ImageError::io("measure", &path))?;
        if !kind.is_block_device() || available < size {
            return Err(ImageError::TooSmall { path, available, needed: size });
        }
        Ok(Self { file, path, used: true, data_bytes: 0, zero_bytes: 0, size })
    }

    /// Takes a part, in any order, from any thread; only a hole where the target is empty is no work.
    pub(super) fn place(&self, part: &Part<'_>) -> Result<(), ImageError> {
        match part {
            Part::Data { offset, bytes } => {
                self.file.write_all_at(bytes, *offset).map_err(ImageError::io("write", &self.path))
            }
            Part::Zero(range) => self.zero(*range),
        }
    }

    fn zero(&self, range: ByteRange) -> Result<(), ImageError> {
        if !self.used {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(&self.file, mode, range.start(), range.len()).is_ok() {
            return Ok(());
        }
        let mut at = range.start();
        while at < range.end() {
            let length = (range.end() - at).min(ZEROES.len() as u64);
            let zeroes = &ZEROES[..usize::try_from(length).unwrap_or(0)];
            self.file.write_all_at(zeroes, at).map_err(ImageError::io("write", &self.path))?;
            at += length;
        }
        Ok(())
    }
}

impl ImageSink for RawSink {
    fn write(&mut self, piece: Piece) -> Result<(), ImageError> {
        match piece {
            Piece::Data { offset, bytes } => {
                self.data_bytes += bytes.len() as u64;
                self.place(&Part::Data { offset, bytes: &bytes })
            }
            Piece::Zero(range) => {
                self.zero_bytes += range.len();
                self.zero(range)
            }
        }
    }

    fn finish(self: Box<Self>) -> Result<SinkSummary, ImageError> {
        self.file.sync_all().map_err(ImageError::io("write", &self.path))?;
        Ok(SinkSummary {
            data_bytes: self.data_bytes,
            zero_bytes: self.zero_bytes,
            new_bytes: self.data_bytes,
            stored_bytes: self.size,
            content: None,
        })
    }
}
