//! Reads one image.

use super::format::*;
use crate::image::ImageError;
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Where a cluster's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// Not in this image: below it, or zero.
    Unallocated,
    /// Zeroes.
    Zero,
    /// At this offset of the file.
    Data(u64),
    /// Compressed: offset and length in the file.
    Compressed(u64, u64),
}

/// An image opened for reading.
#[derive(Debug)]
pub struct Qcow2Image {
    file: File,
    path: PathBuf,
    file_size: u64,
    virtual_size: u64,
    backing: Option<String>,
    l1: Vec<u64>,
    /// The L2 table read last.
    l2: Vec<u64>,
    l2_index: Option<u64>,
}

impl Qcow2Image {
    /// Opens and checks the header. Features that are not known, encryption, external data files and other cluster
    /// sizes than those that backups have are refused.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let file = File::open(path).map_err(ImageError::io("open", path))?;
        let file_size = file.metadata().map_err(ImageError::io("open", path))?.len();
        let damaged = |detail: &str| Err(ImageError::damaged(path, detail));
        let mut header = vec![0; CLUSTER as usize];
        if file_size < CLUSTER {
            return damaged("it is shorter than a qcow2 header: the backup that wrote it was cut short");
        }
        file.read_exact_at(&mut header, 0).map_err(ImageError::io("read", path))?;
        if be32(&header, 0) != MAGIC || be32(&header, 4) != 3 {
            return damaged("it has no qcow2 version 3 header");
        }
        let virtual_size = be64(&header, 24);
        let (l1_entries, l1_offset) = (u64::from(be32(&header, 36)), be64(&header, 40));
        let incompatible = be64(&header, 72);
        let header_length = be32(&header, 100) as usize;
        if be32(&header, 20) != CLUSTER_BITS || be32(&header, 32) != 0 || header_length < HEADER_V3 {
            return damaged("its cluster size, encryption or header is not what backups have");
        }
        let compression = if header_length > HEADER_V3 { header[HEADER_V3] } else { 0 };
        let expected = if compression == COMPRESSION_ZSTD { INCOMPATIBLE_COMPRESSION } else { 0 };
        if incompatible != expected || compression > COMPRESSION_ZSTD {
            return damaged("it uses features of qcow2 that backups do not have");
        }
        if l1_entries != virtual_size.div_ceil(CLUSTER * L2_ENTRIES)
            || l1_entries * 8 > MAX_L1
            || !l1_offset.is_multiple_of(CLUSTER)
            || l1_offset.checked_add(l1_entries * 8).is_none_or(|end| end > file_size)
        {
            return damaged("its L1 table does not fit");
        }
        let mut l1 = vec![0; usize::try_from(l1_entries * 8).unwrap_or(0)];
        file.read_exact_at(&mut l1, l1_offset).map_err(ImageError::io("read", path))?;
        let (backing_at, backing_length) = (be64(&header, 8), be32(&header, 16) as usize);
        let backing = match usize::try_from(backing_at).unwrap_or(usize::MAX) {
            0 => None,
            at => {
                let name = at.checked_add(backing_length).and_then(|end| header.get(at..end));
                match name.map(|name| String::from_utf8(name.to_vec())) {
                    Some(Ok(name)) if backing_length < 1024 => Some(name),
                    _ => return damaged("the name of its backing file does not fit"),
                }
            }
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            file_size,
            virtual_size,
            backing,
            l1: l1.chunks(8).map(|entry| be64(entry, 0)).collect(),
            l2: Vec::new(),
            l2_index: None,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the disk.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// The image below, as the header names it.
    pub fn backing(&self) -> Option<&str> {
        self.backing.as_deref()
    }

    /// How many clusters from this one on are in no table, so that nothing of them is in this image.
    pub(super) fn gap(&self, number: u64) -> u64 {
        match usize::try_from(number / L2_ENTRIES).ok().and_then(|index| self.l1.get(index)) {
            None => u64::MAX,
            Some(entry) if entry & OFFSET_MASK == 0 => L2_ENTRIES - number % L2_ENTRIES,
            Some(_) => 0,
        }
    }

    /// Where the cluster with this number is; [`Cluster::Unallocated`] behind the end.
    pub fn cluster(&mut self, number: u64) -> Result<Cluster, ImageError> {
        let index = number / L2_ENTRIES;
        let Some(entry) = usize::try_from(index).ok().and_then(|index| self.l1.get(index)) else {
            return Ok(Cluster::Unallocated);
        };
        let table = entry & OFFSET_MASK;
        if table == 0 {
            return Ok(Cluster::Unallocated);
        }
        if self.l2_index != Some(index) {
            self.check(table, CLUSTER)?;
            let mut bytes = vec![0; CLUSTER as usize];
            self.file.read_exact_at(&mut bytes, table).map_err(ImageError::io("read", &self.path))?;
            self.l2 = bytes.chunks(8).map(|entry| be64(entry, 0)).collect();
            self.l2_index = Some(index);
        }
        let entry = self.l2[(number % L2_ENTRIES) as usize];
        if entry & FLAG_COMPRESSED != 0 {
            let offset = entry & ((1 << COMPRESSED_SHIFT) - 1);
            let sectors = (entry & !FLAG_COMPRESSED & !FLAG_COPIED) >> COMPRESSED_SHIFT;
            let end = ((offset / 512 + sectors + 1) * 512).min(self.file_size);
            self.check(offset, end.saturating_sub(offset))?;
            return Ok(Cluster::Compressed(offset, end - offset));
        }
        if entry & FLAG_ZERO != 0 {
            return Ok(Cluster::Zero);
        }
        match entry & OFFSET_MASK {
            0 => Ok(Cluster::Unallocated),
            offset => {
                self.check(offset, CLUSTER)?;
                Ok(Cluster::Data(offset))
            }
        }
    }

    /// Reads bytes of the file.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        self.file.read_exact_at(into, offset).map_err(ImageError::io("read", &self.path))
    }

    /// Unpacks a compressed cluster.
    pub fn unpack(&self, offset: u64, length: u64) -> Result<Vec<u8>, ImageError> {
        let mut packed = vec![0; usize::try_from(length).unwrap_or(0)];
        self.read(offset, &mut packed)?;
        // The entry counts whole sectors: what follows the frame is the next cluster's.
        let mut cluster = vec![0; CLUSTER as usize];
        let mut decoder = zstd::stream::read::Decoder::with_buffer(packed.as_slice())
            .map_err(ImageError::io("unpack", &self.path))?
            .single_frame();
        match std::io::Read::read_exact(&mut decoder, &mut cluster) {
            Ok(()) => Ok(cluster),
            Err(error) => Err(ImageError::damaged(&self.path, format!("a compressed cluster at {offset}: {error}"))),
        }
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), ImageError> {
        let fits = length > 0 && offset.checked_add(length).is_some_and(|end| end <= self.file_size);
        if fits {
            Ok(())
        } else {
            Err(ImageError::damaged(&self.path, format!("an entry points to {offset}, outside of the file")))
        }
    }
}
