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
                while end < self.size && matches!(self.find(end / CLUSTER)?.1, Cluster::Unallocated | Cluster::Zero) {
                    end += CLUSTER;
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
