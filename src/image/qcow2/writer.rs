//! Writes an image from front to back.
//!
//! Layout, in this order: header (one cluster, written last), data clusters with each L2 table behind the data that it
//! describes, L1 table, refcount blocks, refcount table. Everything but the header is appended, so memory stays small
//! (two bytes for each 64 KiB of file), and a file that was cut short has no header and cannot be taken for an image.

use super::format::*;
use crate::{
    extent::Piece,
    image::{ImageError, ImageSink, SinkSummary},
};
use std::{fs::File, os::unix::fs::FileExt, path::PathBuf};

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 20;
static ZEROES: [u8; CLUSTER as usize] = [0; CLUSTER as usize];

/// What kind of image is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Qcow2Options {
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// The image below, relative to this one's directory; what is not written comes from there. Without one, what is
    /// not written is zero.
    pub backing: Option<String>,
    /// Compress with zstd (readable by QEMU since 5.1).
    pub compress: bool,
}

/// The sink of one image file.
#[derive(Debug)]
pub struct Qcow2Writer {
    file: File,
    path: PathBuf,
    options: Qcow2Options,
    /// Bytes not yet written, and their place in the file.
    buffer: Vec<u8>,
    buffer_at: u64,
    /// One count for each cluster of the file.
    refcounts: Vec<u16>,
    l1: Vec<u64>,
    l2: Vec<u64>,
    /// The L1 entry that `l2` belongs to.
    l2_index: u64,
    l2_used: bool,
    /// First byte of the disk that a piece may still cover.
    next: u64,
    data_bytes: u64,
    zero_bytes: u64,
}

impl Qcow2Writer {
    /// Writes into this file, which must be empty. `path` is for messages.
    pub fn new(file: File, path: PathBuf, options: Qcow2Options) -> Self {
        let l1_entries = options.virtual_size.div_ceil(CLUSTER * L2_ENTRIES);
        Self {
            file,
            path,
            buffer: Vec::with_capacity(BUFFER + CLUSTER as usize),
            buffer_at: CLUSTER,
            refcounts: vec![1],
            l1: vec![0; usize::try_from(l1_entries).unwrap_or(0)],
            l2: vec![0; L2_ENTRIES as usize],
            l2_index: 0,
            l2_used: false,
            next: 0,
            data_bytes: 0,
            zero_bytes: 0,
            options,
        }
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let end = offset + bytes.len() as u64;
        self.expect(offset, end)?;
        for (index, cluster) in bytes.chunks(CLUSTER as usize).enumerate() {
            let at = offset + index as u64 * CLUSTER;
            if *cluster == ZEROES[..cluster.len()] {
                self.zero_bytes += cluster.len() as u64;
                self.set_zero(at)?;
                continue;
            }
            self.data_bytes += cluster.len() as u64;
            let entry = match self.compressed(cluster)? {
                Some(entry) => entry,
                None => self.append_cluster(cluster)? | FLAG_COPIED,
            };
            self.set(at, entry)?;
        }
        self.next = end;
        Ok(())
    }

    fn zero(&mut self, start: u64, end: u64) -> Result<(), ImageError> {
        self.expect(start, end)?;
        self.zero_bytes += end - start;
        if self.options.backing.is_some() {
            for at in (start..end).step_by(CLUSTER as usize) {
                self.set_zero(at)?;
            }
        }
        self.next = end;
        Ok(())
    }

    /// Pieces are in order and made of whole clusters; only the disk's end may lie within one.
    fn expect(&self, start: u64, end: u64) -> Result<(), ImageError> {
        let size = self.options.virtual_size;
        let fits = start >= self.next
            && end <= size
            && start.is_multiple_of(CLUSTER)
            && (end.is_multiple_of(CLUSTER) || end == size);
        if fits { Ok(()) } else { Err(ImageError::BadPiece { path: self.path.clone(), offset: start }) }
    }

    fn set_zero(&mut self, at: u64) -> Result<(), ImageError> {
        if self.options.backing.is_some() { self.set(at, FLAG_ZERO) } else { Ok(()) }
    }

    fn set(&mut self, at: u64, entry: u64) -> Result<(), ImageError> {
        let cluster = at / CLUSTER;
        if cluster / L2_ENTRIES != self.l2_index {
            self.flush_l2()?;
            self.l2_index = cluster / L2_ENTRIES;
        }
        self.l2[(cluster % L2_ENTRIES) as usize] = entry;
        self.l2_used = true;
        Ok(())
    }

    fn flush_l2(&mut self) -> Result<(), ImageError> {
        if self.l2_used {
            let table: Vec<u8> = self.l2.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            let offset = self.append_cluster(&table)?;
            self.l1[usize::try_from(self.l2_index).unwrap_or(usize::MAX)] = offset | FLAG_COPIED;
            self.l2.fill(0);
            self.l2_used = false;
        }
        Ok(())
    }

    /// The entry of the compressed cluster, `None` where compression does not pay.
    fn compressed(&mut self, cluster: &[u8]) -> Result<Option<u64>, ImageError> {
        if !self.options.compress {
            return Ok(None);
        }
        let mut whole = cluster.to_vec();
        whole.resize(CLUSTER as usize, 0);
        let packed = zstd::bulk::compress(&whole, 1).map_err(ImageError::io("compress", &self.path))?;
        if packed.len() > CLUSTER as usize - 4096 {
            return Ok(None);
        }
        let offset = self.end();
        let last = offset + packed.len() as u64 - 1;
        self.buffer.extend_from_slice(&packed);
        for cluster in offset / CLUSTER..=last / CLUSTER {
            self.count(cluster);
        }
        self.flush_buffer(BUFFER)?;
        Ok(Some(FLAG_COMPRESSED | (last / 512 - offset / 512) << COMPRESSED_SHIFT | offset))
    }

    /// Appends one cluster, padded with zeroes; its offset.
    fn append_cluster(&mut self, bytes: &[u8]) -> Result<u64, ImageError> {
        self.pad();
        let offset = self.end();
        self.buffer.extend_from_slice(bytes);
        self.pad();
        self.count(offset / CLUSTER);
        self.flush_buffer(BUFFER)?;
        Ok(offset)
    }

    fn end(&self) -> u64 {
        self.buffer_at + self.buffer.len() as u64
    }

    fn pad(&mut self) {
        let padding = self.end().next_multiple_of(CLUSTER) - self.end();
        self.buffer.resize(self.buffer.len() + padding as usize, 0);
    }

    fn count(&mut self, cluster: u64) {
        let cluster = usize::try_from(cluster).unwrap_or(usize::MAX);
        if self.refcounts.len() <= cluster {
            self.refcounts.resize(cluster + 1, 0);
        }
        self.refcounts[cluster] += 1;
    }

    fn flush_buffer(&mut self, at_least: usize) -> Result<(), ImageError> {
        if self.buffer.len() >= at_least.max(1) {
            self.file.write_all_at(&self.buffer, self.buffer_at).map_err(ImageError::io("write", &self.path))?;
            self.buffer_at += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<SinkSummary, ImageError> {
        self.flush_l2()?;
        let l1: Vec<u8> = self.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.pad();
        let l1_offset = self.end();
        for part in l1.chunks(CLUSTER as usize) {
            self.append_cluster(part)?;
        }
        let (table_offset, table_clusters) = self.append_refcounts();
        self.flush_buffer(0)?;
        let header = self.header(l1_offset, table_offset, table_clusters);
        let failed = || ImageError::io("write", &self.path);
        // Everything that the header points to is durable before the header makes it an image.
        self.file.sync_data().map_err(failed())?;
        self.file.write_all_at(&header, 0).map_err(failed())?;
        self.file.sync_all().map_err(failed())?;
        let (stored_bytes, digest) = crate::image::digest(&self.file, &self.path)?;
        Ok(SinkSummary {
            data_bytes: self.data_bytes,
            zero_bytes: self.zero_bytes,
            new_bytes: self.data_bytes,
            stored_bytes,
            content: Some(digest),
        })
    }

    /// Appends refcount blocks and their table, which count themselves as well; the table's offset and clusters.
    fn append_refcounts(&mut self) -> (u64, u32) {
        self.pad();
        let per_block = CLUSTER / 2;
        let per_table_cluster = CLUSTER / 8;
        let before = self.end() / CLUSTER;
        let (mut blocks, mut tables) = (1, 1);
        loop {
            let all = before + blocks + tables;
            let needed = (all.div_ceil(per_block), all.div_ceil(per_block).div_ceil(per_table_cluster));
            if needed == (blocks, tables) {
                break;
            }
            (blocks, tables) = needed;
        }
        for cluster in before..before + blocks + tables {
            self.count(cluster);
        }
        self.refcounts.resize(usize::try_from(blocks * per_block).unwrap_or(0), 0);
        let first_block = self.end();
        let counts: Vec<u8> = self.refcounts.iter().flat_map(|count| count.to_be_bytes()).collect();
        self.buffer.extend_from_slice(&counts);
        let table_offset = self.end();
        for block in 0..blocks {
            self.buffer.extend_from_slice(&(first_block + block * CLUSTER).to_be_bytes());
        }
        self.pad();
        (table_offset, u32::try_from(tables).unwrap_or(0))
    }

    fn header(&self, l1_offset: u64, table_offset: u64, table_clusters: u32) -> Vec<u8> {
        let backing = self.options.backing.as_deref().unwrap_or_default();
        let mut extensions = Vec::new();
        if !backing.is_empty() {
            extensions.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
            extensions.extend(5_u32.to_be_bytes());
            extensions.extend(b"qcow2\0\0\0");
        }
        extensions.extend([0; 8]);
        let backing_offset = if backing.is_empty() { 0 } else { u64::from(HEADER_LENGTH) + extensions.len() as u64 };
        let mut header = Vec::with_capacity(CLUSTER as usize);
        header.extend(MAGIC.to_be_bytes());
        header.extend(3_u32.to_be_bytes());
        header.extend(backing_offset.to_be_bytes());
        header.extend(u32::try_from(backing.len()).unwrap_or(0).to_be_bytes());
        header.extend(CLUSTER_BITS.to_be_bytes());
        header.extend(self.options.virtual_size.to_be_bytes());
        header.extend(0_u32.to_be_bytes());
        header.extend(u32::try_from(self.l1.len()).unwrap_or(0).to_be_bytes());
        header.extend(l1_offset.to_be_bytes());
        header.extend(table_offset.to_be_bytes());
        header.extend(table_clusters.to_be_bytes());
        header.extend([0; 12]);
        let incompatible = if self.options.compress { INCOMPATIBLE_COMPRESSION } else { 0 };
        header.extend(incompatible.to_be_bytes());
        header.extend([0; 16]);
        header.extend(REFCOUNT_ORDER.to_be_bytes());
        header.extend(HEADER_LENGTH.to_be_bytes());
        header.extend([if self.options.compress { COMPRESSION_ZSTD } else { 0 }, 0, 0, 0, 0, 0, 0, 0]);
        header.extend(extensions);
        header.extend(backing.as_bytes());
        header.resize(CLUSTER as usize, 0);
        header
    }
}

impl ImageSink for Qcow2Writer {
    fn write(&mut self, piece: Piece) -> Result<(), ImageError> {
        match piece {
            Piece::Data { offset, bytes } => self.data(offset, &bytes),
            Piece::Zero(range) => self.zero(range.start(), range.end()),
        }
    }

    fn finish(mut self: Box<Self>) -> Result<SinkSummary, ImageError> {
        self.complete()
    }
}
