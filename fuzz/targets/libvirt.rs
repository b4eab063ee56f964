//! What a libvirt daemon sends: messages, and in them the results of every procedure that is called.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|stream: &[u8]| virt_fleece::qmp::libvirt::fuzzing::daemon(stream));
