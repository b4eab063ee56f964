//! Memory and contexts that sealing and opening chunks need over and over.
//!
//! Fresh memory costs more than most of what is done in it: the kernel clears each page when it is touched first.

use super::{
    RepositoryError,
    chunk::{self, ChunkId, Compressor, Decompressor},
    repository::{Repository, chunk_name},
    seal::{HEADER, TAG},
};
use bytes::Bytes;
use std::sync::{Mutex, PoisonError};

/// Where content begins in its buffer: behind the header of the seal and the byte that says how it is packed, at a
/// place that vector instructions like.
const START: usize = 64;
/// Where the sealed object begins.
const OBJECT: usize = START - 1 - HEADER;

/// For one chunk after the other, up to three times as large as a chunk.
#[derive(Default)]
pub(super) struct Workbench {
    /// Content, with room for what sealing adds.
    plain: Vec<u8>,
    /// A sealed object: made, or to be opened.
    object: Vec<u8>,
    /// What was decompressed.
    unpacked: Vec<u8>,
    compressor: Compressor,
    decompressor: Decompressor,
}

impl Workbench {
    /// Takes content.
    pub(super) fn put(&mut self, pieces: &[Bytes]) {
        self.plain.resize(START, 0);
        self.plain[START - 1] = chunk::STORED;
        for piece in pieces {
            self.plain.extend_from_slice(piece);
        }
    }

    /// The content that it took.
    pub(super) fn content(&self) -> &[u8] {
        &self.plain[START..]
    }

    /// Packs and seals the content, once. Much work: not for a thread of the runtime.
    pub(super) fn seal(&mut self, repository: &Repository, id: ChunkId, level: i32) -> Result<&[u8], RepositoryError> {
        let Self { plain, object, compressor, .. } = self;
        let content = &plain[START..];
        if object.len() < HEADER + content.len() + TAG {
            object.resize(HEADER + content.len() + TAG, 0);
        }
        let compressed = chunk::compress(content, level, compressor, &mut object[HEADER..]);
        let sealed = if let Some(length) = compressed {
            &mut object[..HEADER + length + TAG]
        } else {
            plain.resize(plain.len() + TAG, 0);
            &mut plain[OBJECT..]
        };
        repository.chunks().seal_in_place(id.as_bytes(), sealed)?;
        Ok(sealed)
    }

    /// Where to put an object that is to be opened.
    pub(super) fn object(&mut self) -> &mut Vec<u8> {
        &mut self.object
    }

    /// Opens the object as a chunk of exactly `length` bytes, once, and proves that it is the right one. Much work: not
    /// for a thread of the runtime.
    pub(super) fn open(&mut self, repository: &Repository, id: ChunkId, length: u64) -> Result<&[u8], RepositoryError> {
        let name = chunk_name(id);
        let packed = repository.chunks().open_in_place(id.as_bytes(), &mut self.object, &name)?;
        let content = chunk::unpacked(packed, length as usize, &name, &mut self.decompressor, &mut self.unpacked)?;
        if repository.chunk_id(content) != id {
            return Err(RepositoryError::damaged(name, "its content is not what its name says"));
        }
        Ok(content)
    }
}

/// Those that nobody uses at the moment; the last one that was used comes first, it is in the processor's cache.
#[derive(Default)]
pub(super) struct Workbenches(Mutex<Vec<Workbench>>);

impl Workbenches {
    /// One for a while; to be given back, or lost.
    pub(super) fn take(&self) -> Workbench {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Back again.
    pub(super) fn give(&self, workbench: Workbench) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(workbench);
    }
}
