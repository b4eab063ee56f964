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

/// First byte of the packed form of content that is stored as it is, and of what is compressed.
pub(super) const STORED: u8 = 0;
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
pub(super) fn pack(content: &[u8], level: i32) -> Vec<u8> {
    let mut packed = vec![0; content.len() + 1];
    let length = compress(content, level, &mut None, &mut packed).unwrap_or_else(|| {
        packed[0] = STORED;
        packed[1..].copy_from_slice(content);
        content.len() + 1
    });
    packed.truncate(length);
    packed
}

/// A zstd context: making one costs more than compressing a small chunk.
pub(super) type Compressor = Option<zstd::bulk::Compressor<'static>>;
/// The same for the way back.
pub(super) type Decompressor = Option<zstd::bulk::Decompressor<'static>>;

/// The compressed form of content, at the beginning of a buffer that has at least its length; how long it is. `None`
/// for content that is stored as it is.
pub(super) fn compress(content: &[u8], level: i32, compressor: &mut Compressor, packed: &mut [u8]) -> Option<usize> {
    if level == 0 || content.is_empty() {
        return None;
    }
    if compressor.is_none() {
        *compressor = zstd::bulk::Compressor::new(level).ok();
    }
    packed[0] = ZSTD;
    // Room for one byte less than the content: what does not fit does not shrink.
    let length = compressor.as_mut()?.compress_to_buffer(content, &mut packed[1..content.len()]).ok()?;
    Some(length + 1)
}

/// Undoes [`pack`] for content of exactly `length` bytes.
pub(super) fn unpack(packed: &[u8], length: usize, label: &str) -> Result<Vec<u8>, RepositoryError> {
    let mut room = Vec::new();
    let in_room = unpack_into(packed, length, label, &mut None, &mut room)?;
    Ok(if in_room { room } else { packed[1..].to_vec() })
}

/// Undoes [`pack`] for content of exactly `length` bytes; whether it is in the room, or follows the first byte.
fn unpack_into(
    packed: &[u8],
    length: usize,
    label: &str,
    decompressor: &mut Decompressor,
    room: &mut Vec<u8>,
) -> Result<bool, RepositoryError> {
    let damaged = |detail: String| RepositoryError::damaged(label, detail);
    let (found, in_room) = match packed.split_first() {
        Some((&STORED, content)) => (content.len(), false),
        Some((&ZSTD, compressed)) => {
            let prepared = decompressor.take().map_or_else(zstd::bulk::Decompressor::new, Ok);
            let prepared = decompressor.insert(prepared.map_err(RepositoryError::local("prepare to decompress"))?);
            room.clear();
            room.reserve_exact(length);
            let found = prepared
                .decompress_to_buffer(compressed, room)
                .map_err(|error| damaged(format!("it does not decompress to {length} bytes: {error}")))?;
            (found, true)
        }
        Some((method, _)) => return Err(damaged(format!("it is packed by the unknown method {method}"))),
        None => return Err(damaged("it is empty".into())),
    };
    if found != length {
        return Err(damaged(format!("it holds {found} bytes, not {length}")));
    }
    Ok(in_room)
}

/// Undoes [`pack`] for content of exactly `length` bytes without fresh memory: it is in `packed` or in `room`.
pub(super) fn unpacked<'a>(
    packed: &'a [u8],
    length: usize,
    label: &str,
    decompressor: &mut Decompressor,
    room: &'a mut Vec<u8>,
) -> Result<&'a [u8], RepositoryError> {
    let in_room = unpack_into(packed, length, label, decompressor, room)?;
    Ok(if in_room { room } else { &packed[1..] })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_packed_unpacks(content in proptest::collection::vec(0_u8..4, 0..5000), level in 0..4) {
            let packed = pack(&content, level);
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
        assert_eq!(pack(&content, 1)[0], STORED);
    }
}
