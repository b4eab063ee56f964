//! Byte ranges of a disk, and the stream of pieces in which its content travels. Pure: no I/O.

mod piece;
mod range;

pub use piece::Piece;
pub use range::ByteRange;
