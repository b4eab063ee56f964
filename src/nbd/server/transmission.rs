//! The transmission phase: requests are answered as they become ready, several at a time.

use super::super::wire::*;
use super::{
    Export, Fault, MAX_REQUEST, Settled, Source, Unserved,
    reply::{Answer, Reply},
};
use crate::extent::{ByteRange, Run};
use bytes::Buf;
use std::sync::Arc;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::unix::OwnedWriteHalf,
    sync::{Mutex, Semaphore},
    task::JoinSet,
};

/// What is outstanding on one connection, in units of [`UNIT`]: twice the longest request. A client that does not
/// receive its replies waits, and costs no more memory than that.
const BUDGET: u32 = 2 * MAX_REQUEST / UNIT;
const UNIT: u32 = 4 << 10;
/// What every request costs at least, which bounds their number to 256.
const LEAST: u32 = 64;
/// Extents in one answer: a client asks again for the rest.
const MAX_EXTENTS_SENT: usize = 8 << 10;

/// A request as it came.
#[derive(Debug, Clone, Copy)]
struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl Request {
    const LENGTH: usize = 28;

    fn parse(bytes: [u8; Self::LENGTH]) -> Result<Self, Fault> {
        let mut bytes = bytes.as_slice();
        let magic = bytes.get_u32();
        if magic != MAGIC_REQUEST {
            return Err(Fault::Protocol(format!("a request with magic {magic:#x}")));
        }
        let (flags, command, cookie) = (bytes.get_u16(), bytes.get_u16(), bytes.get_u64());
        Ok(Self { flags, command, cookie, offset: bytes.get_u64(), length: bytes.get_u32() })
    }

    fn cost(self) -> u32 {
        match self.command {
            CMD_READ | CMD_CACHE => (self.length.min(MAX_REQUEST) / UNIT).max(LEAST),
            _ => LEAST,
        }
    }

    /// The range, when it is within the disk.
    fn range(self, size: u64) -> Option<ByteRange> {
        ByteRange::with_length(self.offset, self.length.into()).filter(|range| range.end() <= size)
    }
}

/// Answers until the client leaves.
pub(super) async fn run<S: Source>(
    mut reader: impl AsyncRead + Unpin,
    writer: OwnedWriteHalf,
    export: Arc<Export<S>>,
    settled: Settled,
) -> Result<(), Fault> {
    let budget = Arc::new(Semaphore::new(BUDGET as usize));
    let writer = Arc::new(Mutex::new(writer));
    // Dropped, and with it all that is under way, when the connection ends.
    let mut answers: JoinSet<Result<(), Fault>> = JoinSet::new();
    loop {
        let mut bytes = [0; Request::LENGTH];
        let mut have = 0;
        while have < bytes.len() {
            tokio::select! {
                read = reader.read(&mut bytes[have..]) => match read? {
                    // Without a good-bye; nobody is there for what is under way.
                    0 if have == 0 => return Ok(()),
                    0 => return Err(Fault::Protocol("half a request".into())),
                    read => have += read,
                },
                Some(answered) = answers.join_next() => finished(answered)?,
            }
        }
        let request = Request::parse(bytes)?;
        match request.command {
            CMD_DISCONNECT => break,
            CMD_WRITE if request.length > MAX_REQUEST => {
                return Err(Fault::Protocol(format!("a write of {} bytes", request.length)));
            }
            CMD_WRITE => skip(&mut reader, request.length).await?,
            _ => {}
        }
        let budget = Arc::clone(&budget);
        let permit = loop {
            tokio::select! {
                permit = Arc::clone(&budget).acquire_many_owned(request.cost()) => break permit,
                Some(answered) = answers.join_next() => finished(answered)?,
            }
        };
        let (export, writer) = (Arc::clone(&export), Arc::clone(&writer));
        answers.spawn(async move {
            let reply = answer(request, &export, settled).await;
            send(&mut *writer.lock().await, reply).await?;
            drop(permit);
            Ok(())
        });
    }
    // What was asked for before the good-bye is answered.
    while let Some(answered) = answers.join_next().await {
        finished(answered)?;
    }
    Ok(())
}

fn finished(answered: Result<Result<(), Fault>, tokio::task::JoinError>) -> Result<(), Fault> {
    // A request without an answer would make the client wait for ever: better no connection.
    answered.map_err(|error| Fault::Io(std::io::Error::other(error)))?
}

/// Reads what nobody wants.
async fn skip(reader: &mut (impl AsyncRead + Unpin), length: u32) -> Result<(), Fault> {
    let skipped = tokio::io::copy(&mut reader.take(length.into()), &mut tokio::io::sink()).await?;
    if skipped == u64::from(length) { Ok(()) } else { Err(Fault::Protocol("half a write".into())) }
}

async fn send(writer: &mut OwnedWriteHalf, reply: Reply) -> Result<(), Fault> {
    let mut buffers = reply.into_iter();
    while let Some(first) = buffers.next() {
        // The head and the data behind it in one system call.
        let mut both = first.chain(buffers.next().unwrap_or_default());
        writer.write_all_buf(&mut both).await?;
    }
    Ok(())
}

async fn answer<S: Source>(request: Request, export: &Export<S>, settled: Settled) -> Reply {
    let answer = Answer { cookie: request.cookie, structured: settled.structured };
    let known_flags = match request.command {
        CMD_READ if settled.structured => CMD_FLAG_DF,
        CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
        CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES => return answer.error(EPERM, None),
        _ => 0,
    };
    let Some(range) = request.range(export.source.size()).filter(|_| request.flags & !known_flags == 0) else {
        return answer.error(EINVAL, None);
    };
    let unreadable = |bad: Unserved| answer.error(EIO, Some(bad.offset));
    match request.command {
        CMD_READ if request.length <= MAX_REQUEST => match export.source.read(range).await {
            Ok(pieces) => answer.content(pieces, request.flags & CMD_FLAG_DF != 0),
            Err(bad) => unreadable(bad),
        },
        CMD_CACHE if request.length <= MAX_REQUEST => match export.source.read(range).await {
            Ok(_) => answer.done(),
            Err(bad) => answer.error(EIO, Some(bad.offset)),
        },
        CMD_BLOCK_STATUS if settled.allocation => {
            let most = if request.flags & CMD_FLAG_REQ_ONE == 0 { MAX_EXTENTS_SENT } else { 1 };
            match export.source.zeroes(range, most).await {
                Ok(runs) if runs.is_empty() => answer.status(&[Run { length: range.len(), set: false }]),
                Ok(runs) => answer.status(&runs),
                Err(bad) => unreadable(bad),
            }
        }
        _ => answer.error(EINVAL, None),
    }
}
