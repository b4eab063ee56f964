//! How much the server's socket takes before somebody reads: asked of the kernel.
//!
//! A QEMU from 10.2 on enlarges the send buffers of its Unix sockets as far as `net.core.wmem_max` allows, an older one
//! does not, and neither says so. `sock_diag(7)` does: it names the peer of our socket and the buffers of that peer,
//! which belongs to our network namespace because the kernel makes it when we connect.

use rustix::{
    fd::OwnedFd,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
        netlink::{SOCK_DIAG, SocketAddrNetlink},
        recv, sendto, socket_with,
    },
};

/// `SOCK_DIAG_BY_FAMILY`, the type of a question and of its answer.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `UDIAG_SHOW_PEER`, and the type of the attribute that answers it.
const PEER: (u32, u16) = (4, 2);
/// The same for `UDIAG_SHOW_MEMINFO`.
const MEMORY: (u32, u16) = (0x20, 5);
/// Place of `SK_MEMINFO_SNDBUF` among the numbers of that answer.
const SEND_BUFFER: usize = 3;
/// Bytes of a netlink header, and of the fixed part of an answer behind it.
const HEADER: usize = 16;
const ANSWER: usize = 16;

/// Bytes of the send buffer of what the Unix socket with this inode is connected to; `None` when the kernel does not
/// tell.
pub(super) fn of_peer(inode: u64) -> Option<u64> {
    let inode = u32::try_from(inode).ok()?;
    let diagnosis =
        socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(SOCK_DIAG)).ok()?;
    let peer = number(&ask(&diagnosis, inode, PEER)?, 0)?;
    number(&ask(&diagnosis, peer, MEMORY)?, SEND_BUFFER).map(u64::from)
}

/// Asks for one attribute of a Unix socket.
fn ask(diagnosis: &OwnedFd, inode: u32, (show, attribute): (u32, u16)) -> Option<Vec<u8>> {
    let mut question = Vec::with_capacity(40);
    question.extend(40_u32.to_ne_bytes());
    question.extend(BY_FAMILY.to_ne_bytes());
    question.extend(REQUEST.to_ne_bytes());
    question.extend([0; 8]);
    question.extend([u8::try_from(AddressFamily::UNIX.as_raw()).ok()?, 0, 0, 0]);
    // In any state; whatever its cookie.
    for word in [u32::MAX, inode, show, u32::MAX, u32::MAX] {
        question.extend(word.to_ne_bytes());
    }
    sendto(diagnosis, &question, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)).ok()?;
    // The kernel has answered when the question is sent.
    let mut answer = [0; 4096];
    let (length, _) = recv(diagnosis, &mut answer[..], RecvFlags::DONTWAIT).ok()?;
    let answer = answer.get(..length)?;
    (half(answer, 4)? == BY_FAMILY).then_some(())?;
    let mut rest = answer.get(HEADER + ANSWER..)?;
    loop {
        let (length, kind) = (usize::from(half(rest, 0)?), half(rest, 2)?);
        let content = rest.get(4..length)?;
        if kind == attribute {
            return Some(content.to_vec());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// The 32-bit number in this place.
fn number(bytes: &[u8], place: usize) -> Option<u32> {
    bytes.get(place * 4..place * 4 + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use rustix::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn of_peer(socket: impl AsFd) -> Option<u64> {
        super::of_peer(rustix::fs::fstat(socket).unwrap().st_ino)
    }

    #[test]
    fn the_peers_buffer_is_known_and_not_our_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let (server, _) = listener.accept().unwrap();
        let before = of_peer(&client).unwrap();
        assert_eq!(before, rustix::net::sockopt::socket_send_buffer_size(&server).unwrap() as u64);
        rustix::net::sockopt::set_socket_send_buffer_size(&server, 50_000).unwrap();
        assert_eq!(of_peer(&client), Some(100_000), "the kernel doubles it");
        rustix::net::sockopt::set_socket_send_buffer_size(&client, 30_000).unwrap();
        assert_eq!(of_peer(&client), Some(100_000));
        assert_eq!(of_peer(&server), Some(60_000));
    }

    #[test]
    fn what_is_not_connected_has_no_answer() {
        assert_eq!(of_peer(std::fs::File::open("/dev/null").unwrap()), None);
    }
}
