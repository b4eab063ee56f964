//! A read that was asked for.

use crate::extent::ByteRange;
use bytes::Bytes;
use std::collections::BTreeMap;
use tokio::sync::OwnedSemaphorePermit;

/// A read under way.
#[derive(Debug)]
pub(super) struct Asked {
    /// Names it in the answer.
    pub(super) cookie: u64,
    pub(super) range: ByteRange,
    /// What came in one chunk.
    whole: Bytes,
    /// What comes in pieces; empty until the first does.
    pieces: Vec<u8>,
    /// Bytes received so far.
    pub(super) received: u64,
    /// Where they begin and end, as they came: in any order, but never twice.
    parts: BTreeMap<u64, u64>,
    /// The last chunk has come.
    pub(super) done: bool,
    buffer: OwnedSemaphorePermit,
}

impl Asked {
    /// Nothing has come yet.
    pub(super) fn new(cookie: u64, range: ByteRange, buffer: OwnedSemaphorePermit) -> Self {
        let (whole, pieces) = (Bytes::new(), Vec::new());
        Self { cookie, range, whole, pieces, received: 0, parts: BTreeMap::new(), done: false, buffer }
    }

    /// Notes that `length` bytes came for `offset`; `None` when they do not belong here.
    pub(super) fn take(&mut self, offset: u64, length: u64) -> Option<()> {
        let end = offset.checked_add(length)?;
        let last = self.parts.range(..end).next_back();
        if offset < self.range.start() || end > self.range.end() || last.is_some_and(|(_, last)| *last > offset) {
            return None;
        }
        if length > 0 {
            self.parts.insert(offset, end);
            self.received += length;
        }
        Some(())
    }

    /// Keeps bytes that [`Self::take`] allowed.
    pub(super) fn put(&mut self, offset: u64, bytes: Bytes) {
        if bytes.len() as u64 == self.range.len() {
            self.whole = bytes;
            return;
        }
        self.pieces.resize(usize::try_from(self.range.len()).unwrap_or(0), 0);
        let at = usize::try_from(offset - self.range.start()).unwrap_or(usize::MAX);
        self.pieces[at..at + bytes.len()].copy_from_slice(&bytes);
    }

    /// The content, once it is complete; what no bytes came for reads as zeroes.
    pub(super) fn finish(mut self) -> (Bytes, OwnedSemaphorePermit) {
        if self.whole.is_empty() {
            self.pieces.resize(usize::try_from(self.range.len()).unwrap_or(0), 0);
            self.whole = self.pieces.into();
        }
        (self.whole, self.buffer)
    }
}
