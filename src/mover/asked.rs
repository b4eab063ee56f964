//! A read that was asked for.

use crate::extent::ByteRange;
use std::collections::BTreeMap;
use tokio::sync::OwnedSemaphorePermit;

/// A read under way.
#[derive(Debug)]
pub(super) struct Asked {
    /// Names it in the answer.
    pub(super) cookie: u64,
    pub(super) range: ByteRange,
    pub(super) bytes: Vec<u8>,
    /// Bytes received so far.
    pub(super) received: u64,
    /// Where they begin and end, as they came: in any order, but never twice.
    parts: BTreeMap<u64, u64>,
    /// The last chunk has come.
    pub(super) done: bool,
    pub(super) buffer: OwnedSemaphorePermit,
}

impl Asked {
    /// Nothing has come yet.
    pub(super) fn new(cookie: u64, range: ByteRange, bytes: Vec<u8>, buffer: OwnedSemaphorePermit) -> Self {
        Self { cookie, range, bytes, received: 0, parts: BTreeMap::new(), done: false, buffer }
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
}
