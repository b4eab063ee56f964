//! What is on the disks that are measured: as much of each kind, in extents of 8 MiB.
//!
//! A third random bytes, which nothing compresses; a third the programs and libraries of this machine; a third zeroes,
//! every other extent of them a hole.

use crate::nbd::servers::Random;
use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

const EXTENT: usize = 8 << 20;

/// Makes a raw image.
pub(super) fn mixed(path: &Path, size: u64) {
    let image = File::create(path).unwrap();
    image.set_len(size).unwrap();
    let mut random = Random(7);
    let mut files = Files::new();
    let mut extent = vec![0; EXTENT];
    for (number, offset) in (0..size).step_by(EXTENT).enumerate() {
        match number % 6 {
            0 | 3 => random.fill(&mut extent),
            1 | 4 => files.fill(&mut extent),
            2 => extent.fill(0),
            _ => continue,
        }
        let length = EXTENT.min((size - offset) as usize);
        image.write_all_at(&extent[..length], offset).unwrap();
    }
}

/// Random bytes.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Random(seed).fill(&mut bytes);
    bytes
}

/// The files of this machine's programs, one behind the other.
struct Files {
    /// Yet to come, last first.
    left: Vec<PathBuf>,
    open: Vec<u8>,
}

impl Files {
    fn new() -> Self {
        let mut left = Vec::new();
        for directory in ["/usr/lib/x86_64-linux-gnu", "/usr/bin", "/usr/lib"] {
            collect(Path::new(directory), &mut left);
        }
        // What is below two of the directories counts once.
        let mut seen = std::collections::HashSet::new();
        left.retain(|path| seen.insert(path.clone()));
        left.reverse();
        Self { left, open: Vec::new() }
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        while self.open.len() < bytes.len() {
            let path = self.left.pop().expect("this machine has more than 512 MiB of programs");
            self.open.extend(fs::read(path).unwrap_or_default());
        }
        let rest = self.open.split_off(bytes.len());
        bytes.copy_from_slice(&self.open);
        self.open = rest;
    }
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::path);
    for entry in entries {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            collect(&entry.path(), files);
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
}
