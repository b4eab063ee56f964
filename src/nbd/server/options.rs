//! The payloads of options: lengths that a client claims are proved before they are used.

use super::super::wire::BASE_ALLOCATION;

/// Reads numbers and texts from the front of a payload.
#[derive(Debug, Clone, Copy)]
struct Payload<'a>(&'a [u8]);

impl<'a> Payload<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn text(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.take(length as usize)
    }

    /// Nothing may be left.
    fn end(self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

/// `NBD_OPT_INFO` and `NBD_OPT_GO`: the export, and what the client wants to know.
pub(super) fn info(payload: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut payload = Payload(payload);
    let name = payload.text()?;
    let count = payload.u16()?;
    let wanted = (0..count).map(|_| payload.u16()).collect::<Option<_>>()?;
    payload.end()?;
    Some((name, wanted))
}

/// Which contexts a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Contexts<'a> {
    pub(super) export: &'a [u8],
    /// No query at all.
    pub(super) is_empty: bool,
    /// One of them is `base:allocation`.
    pub(super) allocation: bool,
    /// One of them is the whole namespace `base:`.
    pub(super) base: bool,
}

/// `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
pub(super) fn contexts(payload: &[u8]) -> Option<Contexts<'_>> {
    let mut payload = Payload(payload);
    let export = payload.text()?;
    let count = payload.u32()?;
    let mut contexts = Contexts { export, is_empty: count == 0, allocation: false, base: false };
    // Each query takes four bytes at least, so the payload bounds them.
    for _ in 0..count {
        let query = payload.text()?;
        contexts.allocation |= query == BASE_ALLOCATION.as_bytes();
        contexts.base |= query == b"base:";
    }
    payload.end()?;
    Some(contexts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
    }

    #[test]
    fn what_is_well_formed_is_read() {
        let payload = [text("disk"), vec![0, 2, 0, 3, 0, 1]].concat();
        assert_eq!(info(&payload), Some((b"disk".as_slice(), vec![3, 1])));
        assert_eq!(info(&payload[..payload.len() - 1]), None);
        assert_eq!(info(&[payload, vec![0]].concat()), None);
        let payload = [text(""), vec![0, 0, 0, 2], text("qemu:x"), text("base:allocation")].concat();
        let read = contexts(&payload).unwrap();
        assert!(read.allocation && !read.base && !read.is_empty && read.export.is_empty());
        assert_eq!(contexts(&[text(""), vec![0xff; 4]].concat()), None);
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_read_but_never_panics(payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = info(&payload);
            let _ = contexts(&payload);
        }
    }
}
