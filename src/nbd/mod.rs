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
mod server;
mod wire;

pub use client::{Chunk, Content, NbdClient, StatusExtent};
pub use error::NbdError;
pub use server::{Export, MAX_REQUEST, PrivateSocket, ServeError, Source, Unserved, Until, serve};
pub(crate) use wire::{STATE_DIRTY, STATE_ZERO};

/// Bytes of one read request. Small requests keep QEMU's memory small (KubeVirt budgets 50 MiB for all of QEMU's
/// overhead) and fit the credit.
pub const REQUEST: u64 = 64 << 10;

/// Reply bytes that may be outstanding on one connection: what the server's send buffer holds in any case.
///
/// QEMU up to 10.1 leaves its Unix sockets at `net.core.wmem_default`, newer ones ask for more but never get less.
/// A quarter is left for the kernel's bookkeeping of each buffer.
pub fn credit() -> u64 {
    let default = std::fs::read_to_string("/proc/sys/net/core/wmem_default").ok();
    credit_of(default.and_then(|text| text.trim().parse().ok()).unwrap_or(0))
}

fn credit_of(wmem_default: u64) -> u64 {
    (wmem_default / 4 * 3).max(REQUEST)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_usual_buffer_allows_two_requests() {
        assert_eq!(super::credit_of(212_992) / (super::REQUEST + 64), 2);
        assert_eq!(super::credit_of(0), super::REQUEST);
    }
}
