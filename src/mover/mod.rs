//! Moves disk content: the pull pipeline from an NBD export into an image sink.
