//! Byte ranges of a disk, and the stream of pieces in which its content travels. Pure: no I/O.

mod piece;
mod plan;
mod range;

pub use piece::Piece;
pub use plan::{Run, Work, align, intersection, plan};
pub use range::ByteRange;
