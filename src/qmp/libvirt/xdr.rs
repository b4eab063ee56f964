//! XDR (RFC 4506), the part that libvirt's RPC uses: big-endian words, everything padded to four bytes.
//!
//! The decoder takes no length on trust: every length is checked against the caller's limit and against what is left
//! of the input before anything is allocated, so an answer can never cost more memory than its own size.

/// What is wrong with the input, or with what should be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// The input ends within a value.
    #[error("{needed} bytes needed, {left} left")]
    Truncated {
        /// Bytes that the value needs.
        needed: usize,
        /// Bytes that are there.
        left: usize,
    },
    /// A string, an opaque or an array is longer than its type allows.
    #[error("a length of {length}, the limit is {limit}")]
    TooLong {
        /// Bytes or elements.
        length: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// A string is not UTF-8. XDR says ASCII, libvirt sends what its XML holds, and that is UTF-8.
    #[error("a string that is not UTF-8")]
    NotUtf8,
    /// The word before an optional value is neither 0 nor 1.
    #[error("{0} where only 0 or 1 may be")]
    NotBool(u32),
    /// The value ends before the input does.
    #[error("{0} bytes too many")]
    Trailing(usize),
}

/// Builds a message.
#[derive(Debug, Default)]
pub struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    /// An empty message.
    pub fn new() -> Self {
        Self::default()
    }

    /// An unsigned word.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    /// A signed word; enumerations too.
    pub fn i32(&mut self, value: i32) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    /// An unsigned hyper.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    /// Bytes whose number both sides know.
    pub fn fixed_opaque(&mut self, value: &[u8]) -> &mut Self {
        self.raw(value);
        self.bytes.resize(self.bytes.len() + padding(value.len()), 0);
        self
    }

    /// Bytes with their number, at most `limit`.
    pub fn opaque(&mut self, value: &[u8], limit: usize) -> Result<&mut Self, XdrError> {
        let length = length_word(value.len(), limit)?;
        Ok(self.u32(length).fixed_opaque(value))
    }

    /// A string of at most `limit` bytes.
    pub fn string(&mut self, value: &str, limit: usize) -> Result<&mut Self, XdrError> {
        self.opaque(value.as_bytes(), limit)
    }

    /// A value that may be absent (XDR's pointer).
    pub fn optional<T>(
        &mut self,
        value: Option<T>,
        encode: impl FnOnce(&mut Self, T) -> Result<(), XdrError>,
    ) -> Result<&mut Self, XdrError> {
        match value {
            None => Ok(self.u32(0)),
            Some(value) => {
                encode(self.u32(1), value)?;
                Ok(self)
            }
        }
    }

    /// At most `limit` elements with their number.
    pub fn array<T>(
        &mut self,
        values: &[T],
        limit: usize,
        mut encode: impl FnMut(&mut Self, &T) -> Result<(), XdrError>,
    ) -> Result<&mut Self, XdrError> {
        let length = length_word(values.len(), limit)?;
        self.u32(length);
        for value in values {
            encode(self, value)?;
        }
        Ok(self)
    }

    /// What was built.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }
}

/// Reads a message, front to back.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// A decoder at the beginning of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// An unsigned word.
    pub fn u32(&mut self) -> Result<u32, XdrError> {
        self.word().map(u32::from_be_bytes)
    }

    /// A signed word; enumerations too.
    pub fn i32(&mut self) -> Result<i32, XdrError> {
        self.word().map(i32::from_be_bytes)
    }

    /// An unsigned hyper.
    pub fn u64(&mut self) -> Result<u64, XdrError> {
        self.word().map(u64::from_be_bytes)
    }

    /// `length` bytes. The padding's content is not looked at: libvirt's own decoder does not either.
    pub fn fixed_opaque(&mut self, length: usize) -> Result<&'a [u8], XdrError> {
        let value = self.take(length)?;
        self.take(padding(length))?;
        Ok(value)
    }

    /// At most `limit` bytes with their number.
    pub fn opaque(&mut self, limit: usize) -> Result<&'a [u8], XdrError> {
        let length = self.length(limit)?;
        self.fixed_opaque(length)
    }

    /// A string of at most `limit` bytes.
    pub fn string(&mut self, limit: usize) -> Result<&'a str, XdrError> {
        std::str::from_utf8(self.opaque(limit)?).map_err(|_| XdrError::NotUtf8)
    }

    /// A value that may be absent.
    pub fn optional<T>(
        &mut self,
        decode: impl FnOnce(&mut Self) -> Result<T, XdrError>,
    ) -> Result<Option<T>, XdrError> {
        match self.u32()? {
            0 => Ok(None),
            1 => decode(self).map(Some),
            other => Err(XdrError::NotBool(other)),
        }
    }

    /// At most `limit` elements. Each takes at least one word, so a count that the input cannot hold is refused before
    /// anything is reserved.
    pub fn array<T>(
        &mut self,
        limit: usize,
        mut decode: impl FnMut(&mut Self) -> Result<T, XdrError>,
    ) -> Result<Vec<T>, XdrError> {
        let length = self.length(limit)?;
        let needed = length.saturating_mul(4);
        if needed > self.rest.len() {
            return Err(XdrError::Truncated { needed, left: self.rest.len() });
        }
        (0..length).map(|_| decode(self)).collect()
    }

    /// What has not been read.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Whether everything has been read.
    pub fn finish(self) -> Result<(), XdrError> {
        if self.rest.is_empty() { Ok(()) } else { Err(XdrError::Trailing(self.rest.len())) }
    }

    fn length(&mut self, limit: usize) -> Result<usize, XdrError> {
        let length = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if length > limit { Err(XdrError::TooLong { length, limit }) } else { Ok(length) }
    }

    fn word<const N: usize>(&mut self) -> Result<[u8; N], XdrError> {
        let left = self.rest.len();
        let (word, rest) = self.rest.split_first_chunk().ok_or(XdrError::Truncated { needed: N, left })?;
        self.rest = rest;
        Ok(*word)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], XdrError> {
        let left = self.rest.len();
        let (value, rest) = self.rest.split_at_checked(length).ok_or(XdrError::Truncated { needed: length, left })?;
        self.rest = rest;
        Ok(value)
    }
}

fn padding(length: usize) -> usize {
    length.wrapping_neg() % 4
}

fn length_word(length: usize, limit: usize) -> Result<u32, XdrError> {
    let refused = XdrError::TooLong { length, limit };
    if length > limit { Err(refused) } else { u32::try_from(length).map_err(|_| refused) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_examples_of_the_rfc_are_encoded_as_written_there() {
        // RFC 4506, section 7: the string "sillyprog" and the opaque "(quit)".
        let mut encoder = Encoder::new();
        encoder.string("sillyprog", 255).unwrap().opaque(b"(quit)", 65535).unwrap();
        assert_eq!(encoder.into_bytes(), b"\0\0\0\x09sillyprog\0\0\0\0\0\0\x06(quit)\0\0");
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_used() {
        let mut decoder = Decoder::new(&[0xff; 8]);
        assert_eq!(decoder.opaque(100), Err(XdrError::TooLong { length: 0xffff_ffff, limit: 100 }));
        let mut decoder = Decoder::new(&[0, 0x10, 0, 0]);
        assert_eq!(decoder.array(usize::MAX, Decoder::u32), Err(XdrError::Truncated { needed: 0x0040_0000, left: 0 }));
        assert!(Encoder::new().string("abc", 2).is_err());
    }

    #[test]
    fn missing_padding_is_a_truncation() {
        assert_eq!(Decoder::new(b"\0\0\0\x01a\0\0").opaque(4), Err(XdrError::Truncated { needed: 3, left: 2 }));
    }

    #[test]
    fn only_zero_and_one_announce_an_optional_value() {
        assert_eq!(Decoder::new(&[0, 0, 0, 2]).optional(Decoder::u32), Err(XdrError::NotBool(2)));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            a in any::<u32>(), b in any::<i32>(), c in any::<u64>(), text in "\\PC{0,40}",
            bytes in proptest::collection::vec(any::<u8>(), 0..40), list in proptest::collection::vec(any::<i32>(), 0..10),
            maybe in proptest::option::of(any::<u64>()),
        ) {
            let mut encoder = Encoder::new();
            encoder.u32(a).i32(b).u64(c).string(&text, 1000).unwrap().opaque(&bytes, 1000).unwrap();
            encoder.array(&list, 100, |e, v| { e.i32(*v); Ok(()) }).unwrap();
            encoder.optional(maybe, |e, v| { e.u64(v); Ok(()) }).unwrap().fixed_opaque(&bytes);
            let encoded = encoder.into_bytes();
            prop_assert_eq!(encoded.len() % 4, 0);
            let mut decoder = Decoder::new(&encoded);
            prop_assert_eq!(decoder.u32().unwrap(), a);
            prop_assert_eq!(decoder.i32().unwrap(), b);
            prop_assert_eq!(decoder.u64().unwrap(), c);
            prop_assert_eq!(decoder.string(1000).unwrap(), text.as_str());
            prop_assert_eq!(decoder.opaque(1000).unwrap(), bytes.as_slice());
            prop_assert_eq!(decoder.array(100, Decoder::i32).unwrap(), list);
            prop_assert_eq!(decoder.optional(Decoder::u64).unwrap(), maybe);
            prop_assert_eq!(decoder.fixed_opaque(bytes.len()).unwrap(), bytes.as_slice());
            decoder.finish().unwrap();
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::new(&bytes);
            while decoder.optional(|d| { d.string(1 << 20)?; d.array(1 << 20, |d| d.opaque(1 << 20).map(<[u8]>::len)) }).is_ok() {}
            let _ = decoder.finish();
        }
    }
}
