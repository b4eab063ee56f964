//! Messages between driver and mover: JSON lines on a Unix socket, descriptors beside them.
//!
//! Neither side trusts the other: lines and queues are bounded, and what cannot be read ends the connection.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};
use tokio::{io::Interest, net::UnixStream};

/// Longest message, in bytes: room for the definition of a VM and hundreds of volumes.
const MAX_MESSAGE: usize = 4 << 20;
/// Descriptors that may wait for the message that they belong to.
const MAX_FDS: usize = 4;
/// Taken from the socket at once.
const READ: usize = 64 << 10;

/// Why two sides do not understand each other.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed.
    #[error("the connection between agent and mover broke")]
    Io(#[from] io::Error),
    /// The other side ended the connection.
    #[error("the other side ended the connection between agent and mover")]
    Closed,
    /// What it said makes no sense.
    #[error("the other side of the connection between agent and mover broke the protocol: {0}")]
    Protocol(String),
}

/// One end of a connection.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    received: Vec<u8>,
    /// Bytes of `received` that hold no line end.
    searched: usize,
    fds: VecDeque<OwnedFd>,
}

impl Channel {
    /// On a socket.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new(), searched: 0, fds: VecDeque::new() }
    }

    /// Two ends in one process.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((Self::new(one), Self::new(other)))
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a message, and a descriptor with it. Not to be cancelled: a half message would be glued to the next one.
    pub async fn send(&mut self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> Result<(), ChannelError> {
        let mut line = serde_json::to_vec(message).map_err(|error| ChannelError::Protocol(error.to_string()))?;
        line.push(b'\n');
        if line.len() > MAX_MESSAGE {
            return Err(ChannelError::Protocol(format!("a message of {} bytes", line.len())));
        }
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        let mut sent = 0;
        while sent < line.len() {
            self.stream.writable().await?;
            let result = self.stream.try_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if sent == 0 && !fds.is_empty() {
                    control.push(SendAncillaryMessage::ScmRights(&fds));
                }
                let rest = IoSlice::new(&line[sent..]);
                rustix::net::sendmsg(&self.stream, &[rest], &mut control, SendFlags::NOSIGNAL).map_err(Into::into)
            });
            match result {
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next message. May be cancelled: nothing is lost.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> Result<T, ChannelError> {
        loop {
            let found = self.received[self.searched..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = found.map(|end| end + self.searched) {
                let message = serde_json::from_slice(&self.received[..end]);
                self.received.drain(..=end);
                self.searched = 0;
                return message.map_err(|error| ChannelError::Protocol(error.to_string()));
            }
            self.searched = self.received.len();
            if self.searched > MAX_MESSAGE {
                return Err(ChannelError::Protocol(format!("a message of more than {MAX_MESSAGE} bytes")));
            }
            self.stream.readable().await?;
            match self.stream.try_io(Interest::READABLE, || read(&self.stream)) {
                Ok((bytes, fds)) => {
                    if bytes.is_empty() {
                        return Err(ChannelError::Closed);
                    }
                    self.received.extend_from_slice(&bytes);
                    self.fds.extend(fds);
                    if self.fds.len() > MAX_FDS {
                        return Err(ChannelError::Protocol("too many descriptors".into()));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The descriptor that came with the message received last.
    pub fn take_fd(&mut self) -> Result<OwnedFd, ChannelError> {
        self.fds.pop_front().ok_or_else(|| ChannelError::Protocol("a descriptor is missing".into()))
    }
}

fn read(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; READ];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message =
        rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    bytes.truncate(message.bytes);
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    Ok((bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[tokio::test]
    async fn messages_and_descriptors_arrive_in_order() {
        let (mut one, mut other) = Channel::pair().unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        let long = "x".repeat(300_000);
        let sender = tokio::spawn(async move {
            one.send(&"first", None).await.unwrap();
            one.send(&"with a pipe", Some(read.as_fd())).await.unwrap();
            one.send(&long, None).await.unwrap();
        });
        assert_eq!(other.receive::<String>().await.unwrap(), "first");
        assert_eq!(other.receive::<String>().await.unwrap(), "with a pipe");
        let got = other.take_fd().unwrap();
        rustix::io::write(&write, b"!").unwrap();
        let mut byte = [0; 1];
        rustix::io::read(&got, &mut byte).unwrap();
        assert_eq!(&byte, b"!");
        assert_eq!(other.receive::<String>().await.unwrap().len(), 300_000);
        sender.await.unwrap();
        assert!(matches!(other.receive::<String>().await, Err(ChannelError::Closed)));
        assert!(other.take_fd().is_err());
    }

    #[tokio::test]
    async fn nonsense_and_endless_lines_are_refused() {
        use tokio::io::AsyncWriteExt;
        let (mut one, mut other) = Channel::pair().unwrap();
        one.stream.write_all(b"{\n").await.unwrap();
        assert!(matches!(other.receive::<String>().await, Err(ChannelError::Protocol(_))));
        let flood = tokio::spawn(async move {
            let junk = vec![b'a'; 1 << 20];
            while one.stream.write_all(&junk).await.is_ok() {}
        });
        assert!(matches!(other.receive::<String>().await, Err(ChannelError::Protocol(_))));
        drop(other);
        flood.await.unwrap();
    }
}
