//! Requests and their replies.

use super::{NbdError, handshake, wire::*};
use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::UnixStream,
};

/// A piece of an answer. Chunks of different requests may be mixed.
#[derive(Debug)]
pub struct Chunk {
    /// The request.
    pub cookie: u64,
    /// Its last chunk.
    pub done: bool,
    /// What it says.
    pub content: Content,
}

/// What a chunk says.
#[derive(Debug)]
pub enum Content {
    /// Nothing.
    None,
    /// Bytes at an offset.
    Data {
        /// Byte offset.
        offset: u64,
        /// The bytes.
        bytes: Bytes,
    },
    /// Zeroes at an offset.
    Hole {
        /// Byte offset.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// State of the ranges from the request's offset on.
    Status {
        /// Index of the context, in the order in which they were asked for.
        context: usize,
        /// Consecutive ranges.
        extents: Vec<StatusExtent>,
    },
    /// The request failed.
    Error {
        /// NBD error number.
        errno: u32,
    },
}

/// Length and flags of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Bytes, at least 1.
    pub length: u64,
    /// Flags of the context.
    pub flags: u32,
}

/// A client in transmission phase. It does not limit what is outstanding: its user does.
#[derive(Debug)]
pub struct NbdClient<S = UnixStream> {
    stream: BufReader<S>,
    size: u64,
    unfragmented: bool,
    can_trim: bool,
    contexts: Vec<u32>,
    /// Requests that are not answered yet and whose answer has no content.
    plain: Vec<u64>,
    next_cookie: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> NbdClient<S> {
    /// Negotiates on a connected socket. All `contexts` must be there.
    pub async fn connect(stream: S, export: &str, contexts: &[String]) -> Result<Self, NbdError> {
        let mut stream = BufReader::with_capacity(16 << 10, stream);
        let settled = handshake::negotiate(&mut stream, export, contexts).await?;
        let handshake::Settled { size, unfragmented, trims: can_trim, contexts } = settled;
        Ok(Self { stream, size, unfragmented, can_trim, contexts, plain: Vec::new(), next_cookie: 1 })
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the export lets clients discard ranges.
    pub fn can_trim(&self) -> bool {
        self.can_trim
    }

    /// Asks for bytes; the cookie of the request. They come in one chunk where the server can be asked for that: it
    /// spares QEMU to look for holes, and an answer that was a hole at the moment of that look.
    pub async fn ask_read(&mut self, offset: u64, length: u32) -> Result<u64, NbdError> {
        let flags = if self.unfragmented { CMD_FLAG_DF } else { 0 };
        self.ask(CMD_READ, flags, offset, length).await
    }

    /// Asks for the state of a range.
    pub async fn ask_status(&mut self, offset: u64, length: u32) -> Result<u64, NbdError> {
        self.ask(CMD_BLOCK_STATUS, 0, offset, length).await
    }

    /// Asks for the state of the bytes at the beginning of a range: one extent of each context.
    pub async fn ask_first_status(&mut self, offset: u64, length: u32) -> Result<u64, NbdError> {
        self.ask(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, offset, length).await
    }

    /// Asks to discard a range. What was discarded can neither be read any more, nor its state be asked for.
    pub async fn ask_trim(&mut self, offset: u64, length: u32) -> Result<u64, NbdError> {
        let cookie = self.ask(CMD_TRIM, 0, offset, length).await?;
        self.plain.push(cookie);
        Ok(cookie)
    }

    /// Asks to overwrite a range with zeroes.
    pub async fn ask_zeroes(&mut self, offset: u64, length: u32) -> Result<u64, NbdError> {
        let cookie = self.ask(CMD_WRITE_ZEROES, 0, offset, length).await?;
        self.plain.push(cookie);
        Ok(cookie)
    }

    /// Says good-bye.
    pub async fn disconnect(mut self) -> Result<(), NbdError> {
        self.ask(CMD_DISCONNECT, 0, 0, 0).await.map(drop)
    }

    async fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> Result<u64, NbdError> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut request = [0; 28];
        request[0..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
        request[4..6].copy_from_slice(&flags.to_be_bytes());
        request[6..8].copy_from_slice(&command.to_be_bytes());
        request[8..16].copy_from_slice(&cookie.to_be_bytes());
        request[16..24].copy_from_slice(&offset.to_be_bytes());
        request[24..28].copy_from_slice(&length.to_be_bytes());
        self.stream.write_all(&request).await?;
        Ok(cookie)
    }

    /// The next chunk. `longest` bounds its data, in bytes: the longest request outstanding.
    pub async fn receive(&mut self, longest: u64) -> Result<Chunk, NbdError> {
        let magic = self.stream.read_u32().await?;
        if magic == MAGIC_SIMPLE && !self.plain.is_empty() {
            // QEMU's answer to what has no content, and to nothing else.
            let errno = self.stream.read_u32().await?;
            let cookie = self.stream.read_u64().await?;
            let known = self.plain.iter().position(|plain| *plain == cookie);
            let known = known.ok_or_else(|| NbdError::Protocol("a simple reply to a structured request".into()))?;
            self.plain.swap_remove(known);
            let content = if errno == 0 { Content::None } else { Content::Error { errno } };
            return Ok(Chunk { cookie, done: true, content });
        }
        if magic != MAGIC_STRUCTURED {
            return Err(NbdError::Protocol(format!("reply magic {magic:#x}")));
        }
        let flags = self.stream.read_u16().await?;
        let kind = self.stream.read_u16().await?;
        let cookie = self.stream.read_u64().await?;
        let length = self.stream.read_u32().await?;
        let bad = |what: &str| Err(NbdError::Protocol(format!("{what} chunk of {length} bytes")));
        let content = match kind {
            // One that is not the last says nothing, and could be repeated for ever.
            CHUNK_NONE if length == 0 && flags & CHUNK_DONE != 0 => Content::None,
            CHUNK_DATA => {
                if length <= 8 || u64::from(length) - 8 > longest {
                    return bad("a data");
                }
                let offset = self.stream.read_u64().await?;
                Content::Data { offset, bytes: self.bytes(length as usize - 8).await? }
            }
            CHUNK_HOLE => {
                if length != 12 {
                    return bad("a hole");
                }
                let (offset, length) = (self.stream.read_u64().await?, self.stream.read_u32().await?);
                if length == 0 {
                    return bad("an empty hole");
                }
                Content::Hole { offset, length }
            }
            CHUNK_BLOCK_STATUS => {
                if length < 12 || (length - 4) % 8 != 0 || (length - 4) / 8 > MAX_EXTENTS {
                    return bad("a block status");
                }
                self.status((length - 4) / 8).await?
            }
            kind if kind & CHUNK_ERROR != 0 => {
                if !(6..=64 << 10).contains(&length) {
                    return bad("an error");
                }
                let errno = self.stream.read_u32().await?;
                let mut rest = vec![0; length as usize - 4];
                self.stream.read_exact(&mut rest).await?;
                Content::Error { errno }
            }
            kind => return Err(NbdError::Protocol(format!("a chunk of type {kind}"))),
        };
        let done = flags & CHUNK_DONE != 0;
        self.plain.retain(|plain| *plain != cookie || !done);
        Ok(Chunk { cookie, done, content })
    }

    async fn bytes(&mut self, length: usize) -> Result<Bytes, NbdError> {
        let mut bytes = BytesMut::with_capacity(length);
        let mut rest = (&mut self.stream).take(length as u64);
        while bytes.len() < length {
            if rest.read_buf(&mut bytes).await? == 0 {
                return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
            }
        }
        Ok(bytes.freeze())
    }

    async fn status(&mut self, count: u32) -> Result<Content, NbdError> {
        let id = self.stream.read_u32().await?;
        let context = self.contexts.iter().position(|known| *known == id);
        let context = context.ok_or_else(|| NbdError::Protocol("a status of an unknown context".into()))?;
        let mut extents = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let length = u64::from(self.stream.read_u32().await?);
            let flags = self.stream.read_u32().await?;
            if length == 0 {
                return Err(NbdError::Protocol("an empty extent".into()));
            }
            extents.push(StatusExtent { length, flags });
        }
        Ok(Content::Status { context, extents })
    }
}
