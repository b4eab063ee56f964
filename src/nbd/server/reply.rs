//! Answers to requests, as they go over the wire.

use super::super::wire::*;
use crate::extent::{ByteRange, Piece, Run};
use bytes::{Bytes, BytesMut};

/// The id of `base:allocation`, as the handshake gave it.
const ALLOCATION_ID: u32 = 1;

/// An answer: buffers that follow each other on the wire.
pub(super) type Reply = Vec<Bytes>;

/// Makes the answers to one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answer {
    pub(super) cookie: u64,
    pub(super) structured: bool,
}

impl Answer {
    /// It failed; `offset` where the first bad byte is known.
    pub(super) fn error(self, errno: u32, offset: Option<u64>) -> Reply {
        if !self.structured {
            return vec![self.simple(errno)];
        }
        let mut payload = errno.to_be_bytes().to_vec();
        // No text: numbers say it all, and clients print them.
        payload.extend(0_u16.to_be_bytes());
        payload.extend(offset.into_iter().flat_map(u64::to_be_bytes));
        let kind = if offset.is_some() { CHUNK_ERROR_OFFSET } else { CHUNK_ERROR_ANY };
        vec![self.chunk(kind, true, &payload, 0)]
    }

    /// It is done, and there is nothing to say.
    pub(super) fn done(self) -> Reply {
        vec![if self.structured { self.chunk(CHUNK_NONE, true, &[], 0) } else { self.simple(0) }]
    }

    /// The content of a range. `whole`: in one chunk.
    pub(super) fn content(self, pieces: Vec<Piece>, whole: bool) -> Reply {
        if !self.structured {
            let mut reply = vec![self.simple(0)];
            reply.extend(pieces.into_iter().map(plain));
            return reply;
        }
        let mut pieces = joined(pieces);
        if whole && pieces.len() > 1 {
            let offset = pieces.first().and_then(Piece::range).map_or(0, ByteRange::start);
            let mut bytes = BytesMut::new();
            pieces.into_iter().for_each(|piece| match piece {
                Piece::Data { bytes: data, .. } => bytes.extend_from_slice(&data),
                Piece::Zero(range) => bytes.resize(bytes.len() + range.len() as usize, 0),
            });
            pieces = vec![Piece::Data { offset, bytes: bytes.freeze() }];
        }
        let last = pieces.len().saturating_sub(1);
        let mut reply = Reply::new();
        for (number, piece) in pieces.into_iter().enumerate() {
            match piece {
                Piece::Data { offset, bytes } => {
                    reply.push(self.chunk(CHUNK_DATA, number == last, &offset.to_be_bytes(), bytes.len()));
                    reply.push(bytes);
                }
                Piece::Zero(range) => {
                    let mut payload = range.start().to_be_bytes().to_vec();
                    payload.extend((range.len() as u32).to_be_bytes());
                    reply.push(self.chunk(CHUNK_HOLE, number == last, &payload, 0));
                }
            }
        }
        reply
    }

    /// The state of consecutive ranges.
    pub(super) fn status(self, runs: &[Run]) -> Reply {
        let mut payload = ALLOCATION_ID.to_be_bytes().to_vec();
        for run in runs {
            let state = if run.set { STATE_HOLE | STATE_ZERO } else { 0 };
            payload.extend((run.length as u32).to_be_bytes());
            payload.extend(state.to_be_bytes());
        }
        vec![self.chunk(CHUNK_BLOCK_STATUS, true, &payload, 0)]
    }

    fn simple(self, errno: u32) -> Bytes {
        let mut reply = MAGIC_SIMPLE.to_be_bytes().to_vec();
        reply.extend(errno.to_be_bytes());
        reply.extend(self.cookie.to_be_bytes());
        reply.into()
    }

    /// The head of a chunk, with the part of its payload that is here; `more` bytes of it follow.
    fn chunk(self, kind: u16, done: bool, payload: &[u8], more: usize) -> Bytes {
        let mut chunk = MAGIC_STRUCTURED.to_be_bytes().to_vec();
        chunk.extend((if done { CHUNK_DONE } else { 0 }).to_be_bytes());
        chunk.extend(kind.to_be_bytes());
        chunk.extend(self.cookie.to_be_bytes());
        chunk.extend(((payload.len() + more) as u32).to_be_bytes());
        chunk.extend(payload);
        chunk.into()
    }
}

fn plain(piece: Piece) -> Bytes {
    match piece {
        Piece::Data { bytes, .. } => bytes,
        Piece::Zero(range) => vec![0; range.len() as usize].into(),
    }
}

/// Zeroes that follow each other are one piece.
fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        if let (Some(Piece::Zero(before)), Piece::Zero(range)) = (joined.last_mut(), &piece)
            && let Some(both) = ByteRange::new(before.start(), range.end())
        {
            *before = both;
        } else {
            joined.push(piece);
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces() -> Vec<Piece> {
        vec![
            Piece::Zero(ByteRange::new(10, 20).unwrap()),
            Piece::Zero(ByteRange::new(20, 30).unwrap()),
            Piece::Data { offset: 30, bytes: Bytes::from_static(b"abc") },
        ]
    }

    #[test]
    fn holes_and_data_are_chunks_and_only_the_last_is_the_last() {
        let reply = Answer { cookie: 7, structured: true }.content(pieces(), false);
        assert_eq!(reply.len(), 3);
        assert_eq!(reply[0][4..8], [0, 0, 0, CHUNK_HOLE as u8]);
        assert_eq!(reply[0][20..], [0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 20]);
        assert_eq!((reply[1][4..8].to_vec(), reply[1][19]), (vec![0, 1, 0, CHUNK_DATA as u8], 8 + 3));
        assert_eq!(reply[2], b"abc".as_slice());
    }

    #[test]
    fn one_chunk_when_that_is_asked_for() {
        let reply = Answer { cookie: 7, structured: true }.content(pieces(), true);
        assert_eq!(reply[0][20..], 10_u64.to_be_bytes());
        assert_eq!(reply[1], [&[0; 20], b"abc".as_slice()].concat());
        let reply = Answer { cookie: 7, structured: true }.content(pieces()[..2].to_vec(), true);
        assert_eq!((reply.len(), reply[0][7]), (1, CHUNK_HOLE as u8));
    }

    #[test]
    fn simple_replies_are_bytes() {
        let reply = Answer { cookie: 7, structured: false }.content(pieces(), false).concat();
        assert_eq!((reply.len(), &reply[36..]), (16 + 23, b"abc".as_slice()));
    }
}
