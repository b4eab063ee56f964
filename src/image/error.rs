//! Errors of images and chains.

/// Why an image or a chain could not be written, read or trusted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {}
