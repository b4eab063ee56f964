//! JSON lines with limits: what QEMU sends is untrusted, neither an endless line nor a short one that unfolds into
//! millions of values must eat memory.

use serde::de::Error as _;
use serde_json::Value;

/// The longest line that is accepted, in bytes. `query-qmp-schema`, the longest answer, has 250 KiB in QEMU 11; libvirt
/// passes on 4 MiB at most.
pub const MAX_LINE: usize = 4 << 20;

/// The most memory that one message may take once it is parsed, in bytes as [`weight`] counts them.
/// `query-qmp-schema` takes 7 MiB.
pub const MAX_WEIGHT: usize = 64 << 20;

/// What is wrong with the input.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// No end of line within the limit.
    #[error("a line of more than {limit} bytes")]
    TooLong {
        /// Bytes.
        limit: usize,
    },
    /// A line with so many values that they would take more memory than is allowed.
    #[error("a line of {length} bytes that needs more than {MAX_WEIGHT} bytes of memory")]
    TooHeavy {
        /// Bytes of the line.
        length: usize,
    },
    /// A line is not a JSON object.
    #[error("a line that is not a JSON object: {excerpt}")]
    NotAnObject {
        /// Its beginning, printable.
        excerpt: String,
    },
}

/// Splits a byte stream into JSON objects. Holds at most one line, and what was pushed at once.
#[derive(Debug)]
pub struct LineDecoder {
    buffer: Vec<u8>,
    /// Where the line under way begins; what is before it goes with the next push.
    start: usize,
    /// Up to here there is no line end.
    searched: usize,
    limit: usize,
    weight: usize,
}

impl LineDecoder {
    /// A decoder for lines of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, searched: 0, limit, weight: 0 }
    }

    /// Takes more input.
    pub fn push(&mut self, bytes: &[u8]) {
        // Here and not for every line: thousands of short lines at once would be moved thousands of times.
        self.buffer.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, `None` when more input is needed.
    pub fn next_message(&mut self) -> Result<Option<Value>, CodecError> {
        loop {
            let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.buffer.len();
                let too_long = self.buffer.len() - self.start > self.limit;
                return if too_long { Err(CodecError::TooLong { limit: self.limit }) } else { Ok(None) };
            };
            let end = self.searched + end + 1;
            let line = &self.buffer[self.start..end];
            (self.start, self.searched) = (end, end);
            if line.len() > self.limit {
                return Err(CodecError::TooLong { limit: self.limit });
            }
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            self.weight = weight(line);
            if self.weight > MAX_WEIGHT {
                return Err(CodecError::TooHeavy { length: line.len() });
            }
            return match serde_json::from_slice(line) {
                Ok(message @ Value::Object(_)) => Ok(Some(message)),
                _ => Err(CodecError::NotAnObject { excerpt: excerpt(line) }),
            };
        }
    }

    /// The memory that the message returned last takes at most, in bytes.
    pub fn weight(&self) -> usize {
        self.weight
    }
}

impl Default for LineDecoder {
    fn default() -> Self {
        Self::new(MAX_LINE)
    }
}

/// Parses untrusted JSON that came by another way than a line.
pub(super) fn parse(json: &str) -> Result<Value, serde_json::Error> {
    if weight(json.as_bytes()) > MAX_WEIGHT {
        let text = format!("an answer of {} bytes that needs more than {MAX_WEIGHT} bytes of memory", json.len());
        return Err(serde_json::Error::custom(text));
    }
    serde_json::from_str(json)
}

/// The most memory that a [`Value`] of this JSON takes, in bytes, without parsing it: 16 MiB of small objects would
/// become more than a gigabyte.
fn weight(json: &[u8]) -> usize {
    // A map allocates a node of eleven keys and values with its first entry, a vector room for four values. Further
    // entries take their share of a node that may be half empty, and a key.
    const OBJECT: usize = 700;
    const ARRAY: usize = 160;
    const ENTRY: usize = 200;
    // The bytes themselves, as strings that may have grown by doubling.
    let mut sum = 2 * json.len();
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'{' => sum += OBJECT,
            b'[' => sum += ARRAY,
            b',' => sum += ENTRY,
            b'"' => {
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'"' => break,
                        b'\\' => drop(bytes.next()),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    sum
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
    fn a_line_that_unfolds_into_too_many_values_is_refused_before_it_is_parsed() {
        for value in ["{\"\":0}", "[]", "[[[[0]]]]", "0"] {
            let count = (MAX_LINE - 20) / (value.len() + 1);
            let line = format!("{{\"return\":[{}]}}\n", vec![value; count].join(","));
            let mut decoder = LineDecoder::default();
            decoder.push(line.as_bytes());
            let length = line.len() - 1;
            assert_eq!(decoder.next_message(), Err(CodecError::TooHeavy { length }), "{value}");
        }
        // The same signs in a string weigh nothing.
        let line = format!("{{\"return\":\"{}\"}}\n", "\\\"{[,".repeat(MAX_LINE / 6));
        let mut decoder = LineDecoder::default();
        decoder.push(line.as_bytes());
        assert!(decoder.next_message().unwrap().is_some());
        assert!(decoder.weight() < 3 * MAX_LINE);
    }

    #[test]
    fn a_flood_of_short_lines_takes_time_by_its_length() {
        let mut decoder = LineDecoder::default();
        let begun = std::time::Instant::now();
        decoder.push(&b"{}\n".repeat(1 << 20));
        while decoder.next_message().unwrap().is_some() {}
        // Moving the rest for every line would take minutes.
        assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", begun.elapsed());
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
