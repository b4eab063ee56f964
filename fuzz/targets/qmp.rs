//! What QEMU says on its monitor: lines, cut anywhere, and each object as the answer to the commands whose answers are
//! large.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use virt_fleece::qmp::{Command, LineDecoder, MAX_WEIGHT, command::*};

fn answer<C: Command>(value: &Value) {
    let _ = serde_json::from_value::<C::Reply>(value.clone());
}

fuzz_target!(|input: &[u8]| {
    // The first byte says how the stream is cut.
    let Some((cut, stream)) = input.split_first() else { return };
    let mut decoder = LineDecoder::new(1 << 16);
    for part in stream.chunks(usize::from(*cut) * 16 + 1) {
        decoder.push(part);
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => {
                    assert!(message.is_object() && decoder.weight() <= MAX_WEIGHT);
                    let value = &message["return"];
                    answer::<QueryVersion>(value);
                    answer::<QueryStatus>(value);
                    answer::<QueryBlock>(value);
                    answer::<QueryNamedBlockNodes>(value);
                    answer::<QueryJobs>(value);
                    answer::<QueryBlockExports>(value);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
