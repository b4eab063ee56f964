//! JSON lines with a limit: what QEMU sends is untrusted, an endless line must not eat memory.

use serde_json::Value;

/// The longest line that is accepted, in bytes. `query-qmp-schema`, the longest answer, has about 400 KiB.
pub const MAX_LINE: usize = 16 << 20;

/// What is wrong with the input.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// No end of line within the limit.
    #[error("a line of more than {limit} bytes")]
    TooLong {
        /// Bytes.
        limit: usize,
    },
    /// A line is not a JSON object.
    #[error("a line that is not a JSON object: {excerpt}")]
    NotAnObject {
        /// Its beginning, printable.
        excerpt: String,
    },
}

/// Splits a byte stream into JSON objects. Holds at most one line.
#[derive(Debug)]
pub struct LineDecoder {
    buffer: Vec<u8>,
    /// Bytes of the buffer that hold no line end.
    searched: usize,
    limit: usize,
}

impl LineDecoder {
    /// A decoder for lines of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), searched: 0, limit }
    }

    /// Takes more input.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, `None` when more input is needed.
    pub fn next_message(&mut self) -> Result<Option<Value>, CodecError> {
        loop {
            let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.buffer.len();
                let too_long = self.buffer.len() > self.limit;
                return if too_long { Err(CodecError::TooLong { limit: self.limit }) } else { Ok(None) };
            };
            let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
            self.searched = 0;
            if line.len() > self.limit {
                return Err(CodecError::TooLong { limit: self.limit });
            }
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            return match serde_json::from_slice(line) {
                Ok(message @ Value::Object(_)) => Ok(Some(message)),
                _ => Err(CodecError::NotAnObject { excerpt: excerpt(line) }),
            };
        }
    }
}

impl Default for LineDecoder {
    fn default() -> Self {
        Self::new(MAX_LINE)
    }
}

/// The beginning of untrusted input, safe to print.
fn excerpt(line: &[u8]) -> String {
    String::from_utf8_lossy(&line[..line.len().min(60)]).escape_debug().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_endless_line_is_refused() {
        let mut decoder = LineDecoder::new(1000);
        decoder.push(&[b'['; 1001]);
        assert_eq!(decoder.next_message(), Err(CodecError::TooLong { limit: 1000 }));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for line in ["[]\n", "{\n", "1\n", "\u{0}\n"] {
            let mut decoder = LineDecoder::default();
            decoder.push(line.as_bytes());
            assert!(decoder.next_message().is_err(), "{line:?}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_without_a_stack_overflow() {
        let mut decoder = LineDecoder::default();
        decoder.push("{\"a\":".repeat(100_000).as_bytes());
        decoder.push(b"\n");
        assert!(decoder.next_message().is_err());
    }

    proptest! {
        #[test]
        fn any_cut_of_the_stream_gives_the_same_messages(values in proptest::collection::vec(any::<u32>(), 0..20), cut in 1usize..50) {
            let stream: Vec<u8> = values.iter().flat_map(|v| format!("{{\"v\":{v}}}\r\n").into_bytes()).collect();
            let mut decoder = LineDecoder::default();
            let mut seen = Vec::new();
            for part in stream.chunks(cut) {
                decoder.push(part);
                while let Some(message) = decoder.next_message().unwrap() {
                    seen.push(u32::try_from(message["v"].as_u64().unwrap()).unwrap());
                }
            }
            prop_assert_eq!(seen, values);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            let mut decoder = LineDecoder::new(100);
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_message() {}
        }
    }
}
