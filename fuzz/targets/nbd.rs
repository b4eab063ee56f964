//! What an NBD server sends: the handshake, then chunks until one is refused.
#![no_main]

use futures::FutureExt;
use libfuzzer_sys::fuzz_target;
use virt_fleece::nbd::{Content, NbdClient, REQUEST};

fuzz_target!(|server: &[u8]| {
    let contexts = ["base:allocation".to_owned(), "qemu:dirty-bitmap:b".to_owned()];
    let session = async {
        // What the client says goes nowhere; what the server says is there at once, so nothing is ever pending.
        let stream = tokio::io::join(server, tokio::io::sink());
        let Ok(mut client) = NbdClient::connect(stream, "disk", &contexts).await else { return };
        assert!(client.size() <= i64::MAX.cast_unsigned());
        while let Ok(chunk) = client.receive(REQUEST).await {
            match chunk.content {
                Content::Data { bytes, .. } => assert!(!bytes.is_empty() && bytes.len() as u64 <= REQUEST),
                Content::Status { context, extents } => {
                    assert!(context < contexts.len() && extents.iter().all(|extent| extent.length > 0));
                }
                Content::None | Content::Hole { .. } | Content::Error { .. } => {}
            }
        }
    };
    session.now_or_never().expect("a session that waits for nothing");
});
