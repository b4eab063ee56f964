//! Numbers of the NBD protocol (`proto.md` of the `NetworkBlockDevice` project).

pub(super) const MAGIC_INIT: u64 = 0x4e42_444d_4147_4943;
pub(super) const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
pub(super) const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(super) const MAGIC_REQUEST: u32 = 0x2560_9513;
pub(super) const MAGIC_STRUCTURED: u32 = 0x668e_33ef;

/// Both sides know fixed newstyle; the server sends no 124 zeroes.
pub(super) const FLAGS_HANDSHAKE: u16 = 0b11;

pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERROR: u32 = 1 << 31;
pub(super) const INFO_EXPORT: u16 = 0;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_DISCONNECT: u16 = 2;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

/// The answer is one chunk. Without it QEMU looks for holes first, once for every read.
pub(super) const FLAG_DONT_FRAGMENT: u16 = 1 << 2;
/// One extent for each context.
pub(super) const FLAG_ONE_EXTENT: u16 = 1 << 3;
/// In the export's flags: [`FLAG_DONT_FRAGMENT`] is understood.
pub(super) const EXPORT_DONT_FRAGMENT: u16 = 1 << 7;

pub(super) const CHUNK_DONE: u16 = 1;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
pub(super) const CHUNK_BLOCK_STATUS: u16 = 5;
pub(super) const CHUNK_ERROR: u16 = 1 << 15;

/// `base:allocation`: reads as zeroes.
pub(crate) const STATE_ZERO: u32 = 2;
/// `qemu:dirty-bitmap:`: changed.
pub(crate) const STATE_DIRTY: u32 = 1;

/// The longest option reply that is accepted, in bytes.
pub(super) const MAX_OPTION_REPLY: u32 = 64 << 10;
/// Replies to one option; QEMU sends one for each context or piece of information, nbdkit the like.
pub(super) const MAX_REPLIES: u32 = 256;
/// The largest export, in bytes: what an offset of a file can be.
pub(super) const MAX_SIZE: u64 = i64::MAX.cast_unsigned();
/// Extents in one block status answer: QEMU sends at most 131072 a context.
pub(super) const MAX_EXTENTS: u32 = 256 << 10;
