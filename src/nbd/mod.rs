//! NBD client (fixed newstyle, structured replies, metadata contexts) over a Unix socket that is already connected, and
//! a server for one read-only export.
//!
//! QEMU writes replies from its main loop with blocking semantics towards the guest: a reply that does not fit into its
//! socket's send buffer, because nobody reads, hangs `stop`, live migration and every other drain (seen on 7.2, 10.0
//! and 11.1). So the reply bytes that are asked for and not yet read never exceed [`credit`], and the caller asks only
//! when it has a buffer for the reply. Then this holds even while this process is stopped by a signal.

mod client;
mod error;
mod handshake;
mod pool;
mod send_buffer;
mod server;
mod wire;

pub use client::{Chunk, Content, NbdClient, StatusExtent};
pub use error::NbdError;
pub use server::{Export, MAX_REQUEST, PrivateSocket, ServeError, Source, Unserved, Until, serve};
pub(crate) use wire::{STATE_DIRTY, STATE_ZERO};

/// Bytes of the shortest read request, other than at the end of a range: what every server's send buffer takes.
pub const REQUEST: u64 = 64 << 10;
/// Bytes of the longest. A request costs QEMU some switches between threads whatever its length, so that these cost it
/// half the time of the shortest; longer ones gain little, and cost memory: `KubeVirt` budgets 50 MiB for all of QEMU's
/// overhead.
pub const LONGEST_REQUEST: u64 = 512 << 10;
/// Reply bytes on one connection that are enough: more are not faster.
const MOST_CREDIT: u64 = 3 * LONGEST_REQUEST + 4096;

/// Reply bytes that may be outstanding on one connection, when nothing is known of it: what the server's send buffer
/// holds in any case.
///
/// QEMU up to 10.1 leaves its Unix sockets at `net.core.wmem_default`, newer ones ask for more but never get less.
pub fn credit() -> u64 {
    let default = std::fs::read_to_string("/proc/sys/net/core/wmem_default").ok();
    credit_of(default.and_then(|text| text.trim().parse().ok()).unwrap_or(0))
}

/// The same for the server that the Unix socket with this inode is connected to. To be asked after the handshake: a
/// server changes its buffer when it accepts the connection.
pub fn credit_of_peer(inode: u64) -> u64 {
    send_buffer::of_peer(inode).map_or_else(credit, credit_of)
}

/// A quarter is left for the kernel's bookkeeping of each buffer.
fn credit_of(send_buffer: u64) -> u64 {
    (send_buffer / 4 * 3).clamp(REQUEST, MOST_CREDIT)
}

/// Bytes of a read request under this credit: so many that two are under way, where that is possible.
pub fn request_length(credit: u64) -> u64 {
    (credit / 2 / REQUEST * REQUEST).clamp(REQUEST, LONGEST_REQUEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_buffer_allows_two_requests() {
        assert_eq!((credit_of(212_992) / (REQUEST + 64), request_length(credit_of(212_992))), (2, REQUEST));
        assert_eq!((credit_of(0), request_length(credit_of(0))), (REQUEST, REQUEST));
    }

    #[test]
    fn a_larger_buffer_allows_longer_requests() {
        // What QEMU 10.2 gets with the usual `wmem_max`, and with a large one.
        assert_eq!(request_length(credit_of(425_984)), 2 * REQUEST);
        let credit = credit_of(4 << 20);
        assert_eq!((request_length(credit), credit / (LONGEST_REQUEST + 64)), (LONGEST_REQUEST, 3));
    }
}
