//! What the machine allows: the stages of a backup, each measured alone.

use super::measure::thread_cpu;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use std::{fs::File, hint::black_box, os::unix::fs::FileExt as _, path::Path};

const CHUNK: usize = virt_fleece::repository::DEFAULT_CHUNK_SIZE as usize;

/// CPU seconds of the stages.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stages {
    /// Naming.
    pub(super) blake3: f64,
    /// Compressing, level 1.
    pub(super) zstd: f64,
    /// Sealing what was compressed, and what was not.
    pub(super) seal: [f64; 2],
    /// Writing each to a file of its own.
    pub(super) write: [f64; 2],
    /// Bytes of data, and of what becomes of it.
    pub(super) bytes: [u64; 2],
}

/// Runs all the stages over the data of an image, one after the other, and writes to a directory.
pub(super) fn stages(image: &Path, directory: &Path) -> Stages {
    let file = File::open(image).unwrap();
    let size = file.metadata().unwrap().len();
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32]).unwrap());
    let mut compressor = zstd::bulk::Compressor::new(1).unwrap();
    let mut plain = vec![0; CHUNK];
    let mut packed = vec![0; zstd::zstd_safe::compress_bound(CHUNK)];
    let mut stages = Stages::default();
    for (number, offset) in (0..size).step_by(CHUNK).enumerate() {
        let length = CHUNK.min((size - offset) as usize);
        file.read_exact_at(&mut plain[..length], offset).unwrap();
        if plain[..length].iter().all(|byte| *byte == 0) {
            continue;
        }
        let begun = thread_cpu();
        black_box(blake3::keyed_hash(&[1; 32], &plain[..length]));
        let named = thread_cpu();
        let packed_length = compressor.compress_to_buffer(&plain[..length], &mut packed[..]).unwrap().min(length);
        stages.blake3 += named - begun;
        stages.zstd += thread_cpu() - named;
        stages.bytes[0] += length as u64;
        stages.bytes[1] += packed_length as u64;
        for (which, content) in [&mut packed[..packed_length], &mut plain[..length]].into_iter().enumerate() {
            let begun = thread_cpu();
            let nonce = Nonce::assume_unique_for_key([0; 12]);
            let _ = black_box(key.seal_in_place_separate_tag(nonce, Aad::empty(), content).unwrap());
            let sealed = thread_cpu();
            std::fs::write(directory.join(format!("{number}-{which}")), &*content).unwrap();
            stages.seal[which] += sealed - begun;
            stages.write[which] += thread_cpu() - sealed;
            std::fs::remove_file(directory.join(format!("{number}-{which}"))).unwrap();
        }
    }
    stages
}
