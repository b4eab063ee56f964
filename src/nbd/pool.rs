//! Memory for replies, used again and again: fresh memory costs as much as receiving the bytes.

use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};

/// Buffers that are kept: what a reader has under way at most, with some to spare.
const KEPT: usize = 128;

/// Buffers that nobody uses. The last one that was used is taken first: it is in the processor's cache.
#[derive(Debug, Clone, Default)]
pub(super) struct BufferPool(Arc<Mutex<Vec<Vec<u8>>>>);

impl BufferPool {
    /// An empty buffer with room for this many bytes.
    pub(super) fn take(&self, length: usize) -> Vec<u8> {
        let mut buffer = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        buffer.clear();
        buffer.reserve_exact(length);
        buffer
    }

    /// The content of a buffer, which comes back when the last part of it is dropped.
    pub(super) fn freeze(&self, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Pooled { buffer, pool: self.clone() })
    }
}

/// A buffer of a pool.
struct Pooled {
    buffer: Vec<u8>,
    pool: BufferPool,
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        let mut free = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < KEPT {
            free.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_its_last_part() {
        let pool = BufferPool::default();
        let mut buffer = pool.take(1000);
        let place = buffer.as_ptr();
        buffer.extend_from_slice(&[7; 1000]);
        let bytes = pool.freeze(buffer);
        let part = bytes.slice(10..20);
        drop(bytes);
        let other = pool.take(1000);
        assert_ne!(other.as_ptr(), place);
        assert_eq!(part, [7; 10].as_slice());
        drop(part);
        let again = pool.take(500);
        assert_eq!((again.as_ptr(), again.len()), (place, 0));
    }
}
