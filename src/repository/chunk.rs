//! Chunks: the unit of storage and of deduplication.

use super::RepositoryError;
use std::fmt;
use zeroize::Zeroizing;

/// Smallest chunk size that can be chosen, in bytes.
pub const MIN_CHUNK_SIZE: u64 = 64 << 10;
/// Largest.
pub const MAX_CHUNK_SIZE: u64 = 8 << 20;
/// The default: `docs/decisions/0007-chunk-size.md`.
pub const DEFAULT_CHUNK_SIZE: u64 = 512 << 10;

const STORED: u8 = 0;
const ZSTD: u8 = 1;

/// Keyed BLAKE3 of a chunk's content: without the repository's key nobody can tell which content it is. All zero bytes
/// stand for a chunk of zeroes, which is never stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId([u8; 32]);

impl ChunkId {
    /// Bytes of an id.
    pub const LENGTH: usize = 32;
    /// A chunk of zeroes, of whatever length.
    pub const ZERO: Self = Self([0; 32]);

    /// From the bytes of an index page or manifest.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// From 64 lower-case hex digits.
    pub fn from_hex(hex: &str) -> Option<Self> {
        // Upper case would be a second name of the same object.
        let lower = hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        lower.then(|| blake3::Hash::from_hex(hex).ok().map(|hash| Self(*hash.as_bytes()))).flatten()
    }

    /// 64 lower-case hex digits.
    pub fn to_hex(self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// Whether it stands for zeroes.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

/// The key that makes ids.
pub(super) struct IdKey(pub(super) Zeroizing<[u8; 32]>);

impl IdKey {
    /// The id of content; [`ChunkId::ZERO`] for zeroes.
    pub(super) fn id(&self, content: &[u8]) -> ChunkId {
        if is_zero(content) {
            return ChunkId::ZERO;
        }
        ChunkId(*blake3::keyed_hash(&self.0, content).as_bytes())
    }
}

/// Whether all bytes are zero.
pub(super) fn is_zero(content: &[u8]) -> bool {
    // Whole blocks at once: the compiler makes vector instructions of it, and data ends it at the first block.
    content.chunks(4096).all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
}

/// The plain form of a chunk before it is sealed: a byte that says how, and the content. `level` is zstd's, 0 stores
/// as it is; so is content that does not shrink.
pub(super) fn pack(content: &[u8], level: i32, compressor: &mut Option<zstd::bulk::Compressor<'static>>) -> Vec<u8> {
    if level != 0
        && !content.is_empty()
        && let Some(packed) = compress(content, level, compressor)
    {
        return packed;
    }
    let mut packed = Vec::with_capacity(content.len() + 1);
    packed.push(STORED);
    packed.extend_from_slice(content);
    packed
}

fn compress(content: &[u8], level: i32, compressor: &mut Option<zstd::bulk::Compressor<'static>>) -> Option<Vec<u8>> {
    if compressor.is_none() {
        *compressor = zstd::bulk::Compressor::new(level).ok();
    }
    let mut packed = vec![0; content.len()];
    packed[0] = ZSTD;
    // Room for one byte less than the content: what does not fit does not shrink.
    let length = compressor.as_mut()?.compress_to_buffer(content, &mut packed[1..]).ok()?;
    packed.truncate(length + 1);
    Some(packed)
}

/// Undoes [`pack`] for content of exactly `length` bytes.
pub(super) fn unpack(packed: &[u8], length: usize, label: &str) -> Result<Vec<u8>, RepositoryError> {
    let damaged = |detail: String| RepositoryError::damaged(label, detail);
    let content = match packed.split_first() {
        Some((&STORED, content)) => content.to_vec(),
        Some((&ZSTD, compressed)) => zstd::bulk::decompress(compressed, length)
            .map_err(|error| damaged(format!("it does not decompress to {length} bytes: {error}")))?,
        Some((method, _)) => return Err(damaged(format!("it is packed by the unknown method {method}"))),
        None => return Err(damaged("it is empty".into())),
    };
    if content.len() != length {
        return Err(damaged(format!("it holds {} bytes, not {length}", content.len())));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_packed_unpacks(content in proptest::collection::vec(0_u8..4, 0..5000), level in 0..4) {
            let packed = pack(&content, level, &mut None);
            prop_assert!(packed.len() <= content.len() + 1);
            prop_assert_eq!(unpack(&packed, content.len(), "x").unwrap(), content.clone());
            prop_assert!(unpack(&packed, content.len() + 1, "x").is_err());
            prop_assert!(content.is_empty() || unpack(&packed, content.len() - 1, "x").is_err());
        }

        #[test]
        fn garbage_does_not_unpack_to_more_than_was_asked_for(packed in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(content) = unpack(&packed, 100, "x") {
                prop_assert_eq!(content.len(), 100);
            }
        }
    }

    #[test]
    fn zeroes_are_told_from_data() {
        assert!(is_zero(&[]));
        for length in [1, 4095, 4096, 4097, 100_000] {
            let mut content = vec![0; length];
            assert!(is_zero(&content));
            for at in [0, length / 2, length - 1] {
                content[at] = 1;
                assert!(!is_zero(&content), "{at} of {length}");
                content[at] = 0;
            }
        }
    }

    #[test]
    fn incompressible_content_is_stored() {
        let mut content = vec![0; 100_000];
        getrandom::fill(&mut content).unwrap();
        assert_eq!(pack(&content, 1, &mut None)[0], STORED);
    }
}
