//! Numbers of the NBD protocol (`proto.md` of the `NetworkBlockDevice` project).

pub(super) const MAGIC_INIT: u64 = 0x4e42_444d_4147_4943;
pub(super) const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
pub(super) const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(super) const MAGIC_REQUEST: u32 = 0x2560_9513;
pub(super) const MAGIC_SIMPLE: u32 = 0x6744_6698;
pub(super) const MAGIC_STRUCTURED: u32 = 0x668e_33ef;

/// Both sides know fixed newstyle; the server sends no 124 zeroes.
pub(super) const FLAGS_HANDSHAKE: u16 = 0b11;

/// Of [`FLAGS_HANDSHAKE`]: no 124 zeroes.
pub(super) const FLAG_NO_ZEROES: u32 = 0b10;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUPPORTED: u32 = REP_ERROR | 1;
pub(super) const REP_ERR_INVALID: u32 = REP_ERROR | 3;
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR | 6;
pub(super) const REP_ERR_TOO_BIG: u32 = REP_ERROR | 9;
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_DESCRIPTION: u16 = 2;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const EXPORT_HAS_FLAGS: u16 = 1;
pub(super) const EXPORT_READ_ONLY: u16 = 1 << 1;
pub(super) const EXPORT_SEND_TRIM: u16 = 1 << 5;
pub(super) const EXPORT_SEND_DF: u16 = 1 << 7;
pub(super) const EXPORT_MULTI_CONN: u16 = 1 << 8;
pub(super) const EXPORT_SEND_CACHE: u16 = 1 << 10;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISCONNECT: u16 = 2;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_CACHE: u16 = 5;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

/// One chunk must answer the request. Without it QEMU looks for holes first, once for every read.
pub(super) const CMD_FLAG_DF: u16 = 1 << 2;
/// One extent is enough.
pub(super) const CMD_FLAG_REQ_ONE: u16 = 1 << 3;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;

pub(super) const CHUNK_DONE: u16 = 1;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
pub(super) const CHUNK_BLOCK_STATUS: u16 = 5;
pub(super) const CHUNK_ERROR: u16 = 1 << 15;
pub(super) const CHUNK_ERROR_ANY: u16 = CHUNK_ERROR | 1;
pub(super) const CHUNK_ERROR_OFFSET: u16 = CHUNK_ERROR | 2;

/// The context that tells holes.
pub(super) const BASE_ALLOCATION: &str = "base:allocation";
/// `base:allocation`: nothing is allocated.
pub(super) const STATE_HOLE: u32 = 1;

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
