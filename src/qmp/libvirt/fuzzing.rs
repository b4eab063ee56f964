//! What is private here, for `fuzz/` only.

use super::{
    domain::{Domain, DomainState},
    message::{Body, MAX_STRING, decode_message},
    monitor::decode_reply,
    rpc::read_message,
    xdr::{Decoder, XdrError},
};
use futures::FutureExt;

/// Takes everything that a daemon could send: messages one after the other, and each payload as the result of every
/// procedure that is called.
pub fn daemon(mut stream: &[u8]) {
    // A slice is never pending.
    while let Some(Ok(bytes)) = read_message(&mut stream).now_or_never() {
        let Ok(message) = decode_message(&bytes) else { return };
        if let Body::Payload(payload) = message.body {
            results(payload);
        }
    }
}

fn results(payload: &[u8]) {
    let _ = whole(payload, |d| d.array(20, Decoder::i32));
    let _ = whole(payload, |d| d.i32().map(DomainState::from_wire));
    let domains = |d: &mut Decoder<'_>| Ok((d.array(16384, Domain::decode)?, d.u32()?));
    if let Ok((domains, _)) = whole(payload, domains) {
        assert!(domains.len() * 24 <= payload.len(), "domains out of nothing");
    }
    let _ = whole(payload, |d| d.optional(|d| d.string(MAX_STRING).map(str::len)));
    if let Ok(answer) = whole(payload, |d| d.string(MAX_STRING).map(str::to_owned)) {
        let _ = decode_reply("query", &answer);
    }
}

fn whole<'a, T>(payload: &'a [u8], read: impl FnOnce(&mut Decoder<'a>) -> Result<T, XdrError>) -> Result<T, XdrError> {
    let mut decoder = Decoder::new(payload);
    let value = read(&mut decoder)?;
    decoder.finish().map(|()| value)
}
