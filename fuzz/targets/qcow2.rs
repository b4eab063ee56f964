//! A chain of two qcow2 images.
//!
//! Images are mostly zeroes, so the input lists what is not: patches of a header (image and cluster, offset within the
//! cluster, length) and bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::PathBuf,
};
use virt_fleece::image::qcow2::{CLUSTER, ChainReader, Qcow2Image};

/// Clusters of an image.
const CLUSTERS: u64 = 16;
/// More than any answer that this target waits for.
const MAX_PIECES: usize = 4096;

fn images(mut input: &[u8]) -> [File; 2] {
    let images = [(); 2].map(|()| {
        let file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("memory"));
        file.set_len(CLUSTERS * CLUSTER).expect("memory");
        file
    });
    while let Some((&[at, high, low, length], rest)) = input.split_first_chunk() {
        let (bytes, rest) = rest.split_at(usize::from(length).min(rest.len()));
        let offset = u64::from(at & 0xf) * CLUSTER + u64::from(u16::from_be_bytes([high, low]));
        let fits = bytes.len().min((CLUSTERS * CLUSTER - offset) as usize);
        images[usize::from(at >> 7)].write_all_at(&bytes[..fits], offset).expect("memory");
        input = rest;
    }
    images
}

fuzz_target!(|input: &[u8]| {
    let files = images(input);
    let open = |file: &File| Qcow2Image::open(&PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())));
    // A chain needs the first image only.
    let Ok(top) = open(&files[0]) else { return };
    let mut chain = vec![top];
    chain.extend(open(&files[1]));
    let mut reader = ChainReader::new(chain);
    let mut reached = 0;
    for _ in 0..MAX_PIECES {
        match reader.next_piece() {
            Ok(Some(piece)) => {
                let range = piece.range().expect("an empty piece");
                assert_eq!(range.start(), reached);
                reached = range.end();
                assert!(reached <= reader.size());
            }
            Ok(None) => return assert_eq!(reached, reader.size()),
            Err(_) => return,
        }
    }
});
