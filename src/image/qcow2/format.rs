//! Numbers of the format.

/// Bytes of a cluster in the images that are written: one bit of the dirty bitmap.
pub const CLUSTER: u64 = 64 << 10;
pub(super) const CLUSTER_BITS: u32 = 16;
/// Entries of an L2 table.
pub(super) const L2_ENTRIES: u64 = CLUSTER / 8;
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// The longest L1 table, in bytes, as in QEMU: a disk of 2 PiB. A sparse file could claim any.
pub(super) const MAX_L1: u64 = 32 << 20;
/// Bytes of the largest disk.
pub const MAX_DISK: u64 = MAX_L1 / 8 * L2_ENTRIES * CLUSTER;
/// Up to and with `refcount_order` and `header_length`.
pub(super) const HEADER_V3: usize = 104;
/// The compression type follows the fixed header, padded to 8 bytes.
pub(super) const HEADER_LENGTH: u32 = 112;
/// Refcounts have 16 bits.
pub(super) const REFCOUNT_ORDER: u32 = 4;
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
pub(super) const COMPRESSION_ZSTD: u8 = 1;

/// The cluster is used by this table alone.
pub(super) const FLAG_COPIED: u64 = 1 << 63;
pub(super) const FLAG_COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes.
pub(super) const FLAG_ZERO: u64 = 1;
/// Bits of an entry that hold an offset.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// A compressed entry holds the offset below this bit and the number of further sectors above it.
pub(super) const COMPRESSED_SHIFT: u32 = 62 - (CLUSTER_BITS - 8);

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}
