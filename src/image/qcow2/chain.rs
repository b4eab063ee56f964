//! Reads a chain of images as one disk.

use super::{
    format::CLUSTER,
    image::{Cluster, Qcow2Image},
};
use crate::{
    extent::{ByteRange, Piece},
    image::ImageError,
};

/// Bytes of the longest piece.
const LONGEST: u64 = 1 << 20;

/// A chain, newest image first. The files are given, never looked up by the name in a header.
#[derive(Debug)]
pub struct ChainReader {
    images: Vec<Qcow2Image>,
    size: u64,
    next: u64,
}

impl ChainReader {
    /// Reads these images, newest first. The disk has the size of the newest.
    pub fn new(images: Vec<Qcow2Image>) -> Self {
        let size = images.first().map_or(0, Qcow2Image::virtual_size);
        Self { images, size, next: 0 }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// First byte that was not yet returned.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// The next piece, `None` at the end. Pieces cover the whole disk.
    pub fn next_piece(&mut self) -> Result<Option<Piece>, ImageError> {
        if self.next >= self.size {
            return Ok(None);
        }
        let start = self.next;
        let (image, cluster) = self.find(start / CLUSTER)?;
        let mut end = start + CLUSTER;
        let piece = match cluster {
            Cluster::Unallocated | Cluster::Zero => {
                while end < self.size {
                    // A disk of terabytes that is empty is not looked at cluster by cluster.
                    let gap = self.images.iter().map(|image| image.gap(end / CLUSTER)).min().unwrap_or(0);
                    if gap == 0 && !matches!(self.find(end / CLUSTER)?.1, Cluster::Unallocated | Cluster::Zero) {
                        break;
                    }
                    end = end.saturating_add(gap.max(1).saturating_mul(CLUSTER));
                }
                end = end.min(self.size);
                ByteRange::new(start, end).map(Piece::Zero)
            }
            Cluster::Data(offset) => {
                let follows = |at: u64| (image, Cluster::Data(offset + (at - start)));
                while end < self.size && end - start < LONGEST && self.find(end / CLUSTER)? == follows(end) {
                    end += CLUSTER;
                }
                end = end.min(self.size);
                let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
                self.images[image].read(offset, &mut bytes)?;
                Some(Piece::Data { offset: start, bytes: bytes.into() })
            }
            Cluster::Compressed(offset, length) => {
                let mut bytes = self.images[image].unpack(offset, length)?;
                end = end.min(self.size);
                bytes.truncate(usize::try_from(end - start).unwrap_or(0));
                Some(Piece::Data { offset: start, bytes: bytes.into() })
            }
        };
        self.next = end;
        Ok(piece)
    }

    /// The newest image that has the cluster, and where.
    fn find(&mut self, number: u64) -> Result<(usize, Cluster), ImageError> {
        for (index, image) in self.images.iter_mut().enumerate() {
            let cluster = image.cluster(number)?;
            if cluster != Cluster::Unallocated {
                return Ok((index, cluster));
            }
            // What lies behind the end of an image is zero, whatever is below it.
            if (number + 1) * CLUSTER > image.virtual_size().next_multiple_of(CLUSTER) {
                break;
            }
        }
        Ok((usize::MAX, Cluster::Unallocated))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, os::unix::fs::FileExt, path::Path, time::Instant};

    /// An image of so many bytes with an empty L1 table.
    fn empty(path: &Path, size: u64) -> Result<Qcow2Image, ImageError> {
        let l1_entries = size.div_ceil(CLUSTER * CLUSTER / 8);
        let mut header = vec![0; 112];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(20, &16_u32.to_be_bytes());
        put(24, &size.to_be_bytes());
        put(36, &u32::try_from(l1_entries).unwrap().to_be_bytes());
        put(40, &CLUSTER.to_be_bytes());
        put(100, &112_u32.to_be_bytes());
        let file = File::create(path).unwrap();
        file.set_len(CLUSTER + l1_entries * 8).unwrap();
        file.write_all_at(&header, 0).unwrap();
        Qcow2Image::open(path)
    }

    #[test]
    fn an_empty_disk_of_many_terabytes_is_read_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let (top, below) = (directory.path().join("top"), directory.path().join("below"));
        let size = (1 << 50) + 512;
        let mut reader = ChainReader::new(vec![empty(&top, size).unwrap(), empty(&below, 1 << 40).unwrap()]);
        let begun = Instant::now();
        assert_eq!(reader.next_piece().unwrap(), ByteRange::new(0, size).map(Piece::Zero));
        assert_eq!(reader.next_piece().unwrap(), None);
        assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    }

    #[test]
    fn a_table_that_only_a_sparse_file_can_hold_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let error = empty(&directory.path().join("image"), 1 << 60).unwrap_err();
        assert!(error.to_string().contains("L1 table"), "{error}");
    }
}
