//! An NBD server by hand: an honest handshake, then whatever the script says.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

pub(crate) const READ: u16 = 0;
pub(crate) const DISCONNECT: u16 = 2;
pub(crate) const STATUS: u16 = 7;
pub(crate) const TRIM: u16 = 4;
/// Ids of the contexts.
pub(crate) const ALLOCATION: u32 = 5;
pub(crate) const BITMAP: u32 = 6;

/// Flags of an export: it has flags, is read-only, and can be asked not to fragment.
const READ_ONLY: u16 = 1 | 1 << 1 | 1 << 7;
/// The same of one that takes discards.
pub(crate) const TAKES_TRIMS: u16 = 1 | 1 << 5 | 1 << 7;

/// A request of the client.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    pub(crate) command: u16,
    /// The answer is to be one extent.
    pub(crate) one: bool,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Request {
    /// One chunk of the answer.
    pub(crate) fn chunk(self, done: bool, kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut out = 0x668e_33ef_u32.to_be_bytes().to_vec();
        out.extend(u16::from(done).to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(self.cookie.to_be_bytes());
        out.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        out.extend(payload);
        out
    }

    /// Data at an offset.
    pub(crate) fn data(self, done: bool, offset: u64, bytes: &[u8]) -> Vec<u8> {
        self.chunk(done, 1, &[&offset.to_be_bytes(), bytes].concat())
    }

    /// Zeroes at an offset.
    pub(crate) fn hole(self, done: bool, offset: u64, length: u32) -> Vec<u8> {
        self.chunk(done, 2, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat())
    }

    /// An error.
    pub(crate) fn error(self, errno: u32) -> Vec<u8> {
        self.chunk(true, 0x8001, &[&errno.to_be_bytes()[..], &[0, 2], b"no"].concat())
    }

    /// An answer without content, as QEMU gives it to a discard.
    pub(crate) fn simple(self, errno: u32) -> Vec<u8> {
        let head = [0x6744_6698_u32, errno].map(u32::to_be_bytes).concat();
        [&head[..], &self.cookie.to_be_bytes()].concat()
    }

    /// A whole, honest answer to a read.
    pub(crate) fn honest(self) -> Vec<u8> {
        let bytes: Vec<u8> = (self.offset..self.offset + self.length).map(content).collect();
        self.data(true, self.offset, &bytes)
    }

    /// Block status of one context: lengths and flags. Only the first when it was asked for alone.
    pub(crate) fn status(self, done: bool, context: u32, extents: &[(u64, u32)]) -> Vec<u8> {
        let extents = if self.one { &extents[..1] } else { extents };
        let mut payload = context.to_be_bytes().to_vec();
        for &(length, flags) in extents {
            payload.extend(u32::try_from(length).unwrap().to_be_bytes());
            payload.extend(flags.to_be_bytes());
        }
        self.chunk(done, 5, &payload)
    }

    /// Block status that says: data, all of it.
    pub(crate) fn all_data(self) -> Vec<u8> {
        self.status(true, ALLOCATION, &[(self.length, 0)])
    }
}

/// What [`Request::honest`] holds at an offset: the number of its 64 KiB granule plus 1.
pub(crate) fn content(offset: u64) -> u8 {
    (offset / 65_536 % 250) as u8 + 1
}

/// Serves one client that reads an export of `size` bytes; `script` gets each request and says what to send. `None`
/// closes the connection.
pub(crate) fn serve(size: u64, script: impl FnMut(Request) -> Option<Vec<u8>> + Send + 'static) -> UnixStream {
    serve_as(size, READ_ONLY, script)
}

/// The same with other flags of the export.
pub(crate) fn serve_as(
    size: u64,
    flags: u16,
    mut script: impl FnMut(Request) -> Option<Vec<u8>> + Send + 'static,
) -> UnixStream {
    let (client, mut server) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        if handshake_as(&mut server, size, flags).await.is_none() {
            return;
        }
        while let Some(request) = receive(&mut server).await {
            let Some(reply) = script(request) else { return };
            if server.write_all(&reply).await.is_err() {
                return;
            }
        }
    });
    client
}

/// The next request, `None` at the end.
pub(crate) async fn receive(server: &mut UnixStream) -> Option<Request> {
    assert_eq!(server.read_u32().await.ok()?, 0x2560_9513);
    let flags = server.read_u16().await.ok()?;
    let command = server.read_u16().await.ok()?;
    let cookie = server.read_u64().await.ok()?;
    let offset = server.read_u64().await.ok()?;
    let length = u64::from(server.read_u32().await.ok()?);
    let known = match command {
        READ => flags == 1 << 2,
        STATUS => flags & !(1 << 3) == 0,
        _ => flags == 0,
    };
    assert!(known, "command {command} with flags {flags:#x}");
    Some(Request { command, one: flags & 1 << 3 != 0, cookie, offset, length })
}

/// A reply to an option, honest or not.
pub(crate) fn option_reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    out.extend(payload);
    out
}

/// The server's greeting and the client's flags.
pub(crate) async fn greet(server: &mut UnixStream) -> Option<()> {
    server.write_all(b"NBDMAGICIHAVEOPT\0\x03").await.ok()?;
    server.read_u32().await.ok().map(drop)
}

/// The client's next option and its data.
pub(crate) async fn next_option(server: &mut UnixStream) -> Option<(u32, Vec<u8>)> {
    server.read_u64().await.ok()?;
    let option = server.read_u32().await.ok()?;
    let length = server.read_u32().await.ok()?;
    let mut data = vec![0; length as usize];
    server.read_exact(&mut data).await.ok()?;
    Some((option, data))
}

/// What an honest server answers to an option.
pub(crate) fn honest_option(option: u32, data: &[u8], size: u64) -> Vec<u8> {
    match option {
        8 => option_reply(option, 1, b""),
        10 => {
            let mut out = option_reply(10, 4, &[&ALLOCATION.to_be_bytes()[..], b"base:allocation"].concat());
            if data.windows(11).any(|word| word == b"qemu:dirty-") {
                out.extend(option_reply(10, 4, &[&BITMAP.to_be_bytes()[..], b"qemu:dirty-bitmap:b"].concat()));
            }
            out.extend(option_reply(10, 1, b""));
            out
        }
        7 => {
            let mut info = vec![0, 0];
            info.extend(size.to_be_bytes());
            info.extend(READ_ONLY.to_be_bytes());
            let blocks = [&[0, 3][..], &[1_u32, 4096, 32 << 20].map(u32::to_be_bytes).concat()].concat();
            [option_reply(7, 3, &info), option_reply(7, 3, &blocks), option_reply(7, 1, b"")].concat()
        }
        other => panic!("option {other}"),
    }
}

/// The whole honest handshake.
pub(crate) async fn handshake(server: &mut UnixStream, size: u64) -> Option<()> {
    handshake_as(server, size, READ_ONLY).await
}

async fn handshake_as(server: &mut UnixStream, size: u64, flags: u16) -> Option<()> {
    greet(server).await?;
    loop {
        let (option, data) = next_option(server).await?;
        let mut reply = honest_option(option, &data, size);
        if option == 7 {
            // Behind the head of the reply, its kind, and the size.
            reply[30..32].copy_from_slice(&flags.to_be_bytes());
        }
        server.write_all(&reply).await.ok()?;
        if option == 7 {
            return Some(());
        }
    }
}
