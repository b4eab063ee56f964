//! Sinks that check, and sinks that misbehave.

use std::sync::{Arc, Mutex};
use virt_fleece::{
    extent::Piece,
    image::{ImageError, ImageSink, SinkSummary},
};

/// What a [`MemorySink`] was given.
#[derive(Debug, Default)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    pub(super) reached: u64,
    pub(super) finished: bool,
}

/// Applies pieces to bytes in memory, and insists on the contract: ascending, no overlap, whole 64 KiB.
pub(super) struct MemorySink(Arc<Mutex<Image>>);

impl MemorySink {
    /// A sink over what the parent backup holds.
    pub(super) fn over(parent: Vec<u8>) -> (Box<Self>, Arc<Mutex<Image>>) {
        let image = Arc::new(Mutex::new(Image { bytes: parent, ..Image::default() }));
        (Box::new(Self(Arc::clone(&image))), image)
    }
}

impl ImageSink for MemorySink {
    fn write(&mut self, piece: Piece) -> Result<(), ImageError> {
        let range = piece.range().expect("no empty piece");
        let mut image = self.0.lock().unwrap();
        assert!(range.start() >= image.reached && range.start().is_multiple_of(65_536), "{range}");
        assert!(range.end().is_multiple_of(65_536) || range.end() == image.bytes.len() as u64, "{range}");
        image.reached = range.end();
        let target = usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap();
        match piece {
            Piece::Data { bytes, .. } => image.bytes[target].copy_from_slice(&bytes),
            Piece::Zero(_) => image.bytes[target].fill(0),
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<SinkSummary, ImageError> {
        self.0.lock().unwrap().finished = true;
        Ok(NOTHING)
    }
}

pub(super) const NOTHING: SinkSummary =
    SinkSummary { data_bytes: 0, zero_bytes: 0, new_bytes: 0, stored_bytes: 0, content: None };

/// Does what the function says with each piece.
pub(super) struct FnSink<F>(pub(super) F);

impl<F: FnMut() -> Result<(), ImageError> + Send> ImageSink for FnSink<F> {
    fn write(&mut self, _: Piece) -> Result<(), ImageError> {
        (self.0)()
    }

    fn finish(self: Box<Self>) -> Result<SinkSummary, ImageError> {
        Ok(NOTHING)
    }
}
