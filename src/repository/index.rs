//! The index of a volume: which chunk is where.
//!
//! A tree of pages of at most [`FANOUT`] ids. Leaves name chunks of the disk, inner pages name pages, and a page is
//! stored as a chunk like any other: a region that did not change costs nothing, in any number of backups. A page of
//! zero ids is itself named by the zero id and not stored.

use super::{RepositoryError, chunk::ChunkId, repository::Repository};
use std::sync::Arc;

/// Ids in a page.
pub const FANOUT: u64 = 1024;
/// Largest volume, in bytes: what a tree of four levels holds with the smallest chunks.
pub(super) const MAX_VIRTUAL_SIZE: u64 = 1 << 56;

/// The form of a tree, which follows from the number of chunks alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of the volume.
    pub size: u64,
    /// Bytes of a chunk; the last one ends with the volume.
    pub chunk_size: u64,
}

impl Shape {
    /// Chunks of the volume.
    pub fn chunks(&self) -> u64 {
        self.size.div_ceil(self.chunk_size)
    }

    /// Bytes of a chunk.
    pub fn length(&self, chunk: u64) -> u64 {
        self.chunk_size.min(self.size - chunk * self.chunk_size)
    }

    /// Ids on a level: 0 are the chunks, 1 the leaves, and so on up to the level that has one.
    pub fn ids(&self, level: u32) -> u64 {
        (0..level).fold(self.chunks(), |ids, _| ids.div_ceil(FANOUT))
    }

    /// Levels of pages, at least one; the root is the one id on the highest level.
    pub fn levels(&self) -> u32 {
        (1..u32::MAX).find(|level| self.ids(*level) <= 1).unwrap_or(1)
    }

    /// Ids in page `page` of a level above 0.
    pub fn page_length(&self, level: u32, page: u64) -> u64 {
        FANOUT.min(self.ids(level - 1) - page * FANOUT)
    }
}

/// Ids of a page as they are stored.
pub(super) fn page_bytes(ids: &[ChunkId]) -> Vec<u8> {
    ids.iter().flat_map(|id| *id.as_bytes()).collect()
}

/// Reads a volume's index; keeps the last page of each level.
#[derive(Debug)]
pub struct IndexReader {
    shape: Shape,
    root: ChunkId,
    /// By level: number and ids of the page that was read last.
    cached: Vec<Option<(u64, Vec<ChunkId>)>>,
}

impl IndexReader {
    /// For a volume of this shape.
    pub fn new(shape: Shape, root: ChunkId) -> Self {
        Self { shape, root, cached: vec![None; shape.levels() as usize + 1] }
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The id with this number on this level.
    pub async fn id(
        &mut self,
        repository: &Arc<Repository>,
        level: u32,
        number: u64,
    ) -> Result<ChunkId, RepositoryError> {
        if number >= self.shape.ids(level) {
            return Err(RepositoryError::Invalid(format!("the index has no entry {number} on level {level}")));
        }
        // From the root down, so that a page is known before it is needed.
        let levels = self.shape.levels();
        let mut id = self.root;
        for page_level in (level + 1..=levels).rev() {
            if id.is_zero() {
                return Ok(ChunkId::ZERO);
            }
            let page = number / FANOUT.pow(page_level - level);
            let position = number / FANOUT.pow(page_level - level - 1) % FANOUT;
            id = self.page(repository, page_level, page, id).await?[position as usize];
        }
        Ok(id)
    }

    /// The ids in page `page` of a level above 0.
    pub async fn page_ids(
        &mut self,
        repository: &Arc<Repository>,
        level: u32,
        page: u64,
    ) -> Result<Vec<ChunkId>, RepositoryError> {
        let id = self.id(repository, level, page).await?;
        if id.is_zero() {
            return Ok(vec![ChunkId::ZERO; self.shape.page_length(level, page) as usize]);
        }
        Ok(self.page(repository, level, page, id).await?.to_vec())
    }

    async fn page(
        &mut self,
        repository: &Arc<Repository>,
        level: u32,
        page: u64,
        id: ChunkId,
    ) -> Result<&[ChunkId], RepositoryError> {
        let slot = level as usize;
        if self.cached[slot].as_ref().is_none_or(|(known, _)| *known != page) {
            let length = self.shape.page_length(level, page) * ChunkId::LENGTH as u64;
            let bytes = repository.read_chunk(id, length).await?;
            let ids = bytes.as_chunks::<32>().0.iter().map(|id| ChunkId::from_bytes(*id)).collect();
            self.cached[slot] = Some((page, ids));
        }
        Ok(self.cached[slot].as_ref().map_or(&[], |(_, ids)| ids))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        let shape = |size, chunk_size| Shape { size, chunk_size };
        assert_eq!(shape(0, 1 << 20).levels(), 1);
        assert_eq!(shape(1, 1 << 20).levels(), 1);
        assert_eq!(shape((1 << 20) + 1, 1 << 20).levels(), 1);
        assert_eq!(shape(1 << 30, 1 << 20).levels(), 1);
        assert_eq!(shape((1 << 30) + 1, 1 << 20).levels(), 2);
        let large = shape((1 << 40) + 5, 1 << 20);
        assert_eq!((large.chunks(), large.levels(), large.ids(1), large.ids(2)), ((1 << 20) + 1, 3, 1025, 2));
        assert_eq!((large.length(0), large.length(1 << 20)), (1 << 20, 5));
        assert_eq!((large.page_length(1, 0), large.page_length(1, 1024), large.page_length(3, 0)), (1024, 1, 2));
    }
}
