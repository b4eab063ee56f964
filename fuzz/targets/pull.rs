//! A whole pull from an NBD server: what reaches the sink is in order, without gaps in a full pull, and complete when
//! the pull says so.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use virt_fleece::{
    extent::Piece,
    image::{ImageError, ImageSink, SinkSummary},
    mover::{PullProgress, PullRequest, pull},
};

/// Checks the contract of pieces, and counts.
struct Checker {
    full: bool,
    reached: Arc<AtomicU64>,
}

impl ImageSink for Checker {
    fn write(&mut self, piece: Piece) -> Result<(), ImageError> {
        let range = piece.range().expect("an empty piece");
        let reached = self.reached.swap(range.end(), Ordering::Relaxed);
        if range.start() < reached || self.full && range.start() != reached {
            // A panic of this thread alone would be taken for a failing target.
            eprintln!("{range} after {reached}");
            std::process::abort();
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<SinkSummary, ImageError> {
        Ok(SinkSummary { data_bytes: 0, zero_bytes: 0, new_bytes: 0, stored_bytes: 0, content: None })
    }
}

fuzz_target!(|input: &[u8]| {
    // The first byte says whether the pull is an incremental one.
    let Some((kind, server)) = input.split_first() else { return };
    let bitmap = (kind % 2 == 1).then(|| "b".to_owned());
    let full = bitmap.is_none();
    let request = PullRequest {
        export: "disk".into(),
        size: None,
        bitmap,
        unit: 64 << 10,
        always: None,
        bandwidth: None,
        credit: None,
        discard: true,
    };
    let reached = Arc::new(AtomicU64::new(0));
    let sink = Box::new(Checker { full, reached: Arc::clone(&reached) });
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let stream = tokio::io::join(server, tokio::io::sink());
    if let Ok(summary) = runtime.block_on(pull(stream, &request, sink, &PullProgress::default())) {
        assert!(!full || reached.load(Ordering::Relaxed) == summary.size);
        assert!(summary.read_bytes <= summary.size);
    }
});
