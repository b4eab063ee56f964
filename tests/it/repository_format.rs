//! The format of a repository, held against a reader that shares no code with the library: every shape of volume is
//! restored by both, byte for byte.

use crate::repository_scene::{CHUNK, Content, RepositoryScene};
use std::{collections::HashSet, fs, path::Path};
use virt_fleece::{
    extent::{ByteRange, Piece},
    repository::{Manifest, RepositoryError},
};

/// Chunks of one leaf page.
const LEAF: usize = 1024;

/// Bytes that do not compress.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ (mixed >> 27)).to_le_bytes()
    };
    (0..length.div_ceil(8)).flat_map(|_| next()).take(length).collect()
}

/// Bytes that compress, every chunk others.
fn text(length: usize) -> Vec<u8> {
    (0..length).map(|at| b"the quick brown fox "[at % 20] ^ ((at / CHUNK) as u8)).collect()
}

/// Mostly zeroes: data in the first chunk, around the border of the leaves, and at the odd end.
fn sparse(chunks: usize) -> Vec<u8> {
    let mut disk = vec![0; chunks * CHUNK + 513];
    disk[..CHUNK].copy_from_slice(&noise(CHUNK, 1));
    let border = LEAF * CHUNK;
    disk[border - 5..border + 7].fill(0xAB);
    let end = disk.len();
    disk[end - 1] = 1;
    disk
}

/// One volume of every shape.
fn disks() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("empty", Vec::new()),
        ("one-byte", vec![7]),
        ("one-zero", vec![0]),
        ("one-chunk", noise(CHUNK, 2)),
        ("odd", text(5 * CHUNK + 1234)),
        ("zero", vec![0; 3 * CHUNK + 1]),
        ("noise", noise(4 * CHUNK + 1, 3)),
        // 2.25 leaves.
        ("sparse", sparse(2 * LEAF + 256)),
        // Zero but for the middle leaf.
        ("island", {
            let mut disk = vec![0; 3 * LEAF * CHUNK];
            disk[(LEAF + 500) * CHUNK + 3] = 9;
            disk
        }),
    ]
}

fn check(scene: &RepositoryScene, manifest: &Manifest, disks: &[(&str, Vec<u8>)]) {
    for (name, disk) in disks {
        let volume = manifest.volume(name).unwrap();
        let read = scene.read(volume).unwrap();
        assert!(read == *disk, "the library restores volume {name}");
        let read = scene.read_independently(&manifest.backup.id, name).unwrap();
        assert!(read == *disk, "the independent reader restores volume {name}");
    }
}

#[test]
fn both_readers_restore_every_shape_of_volume() {
    let disks = disks();
    for level in [0, 1] {
        let scene = RepositoryScene::new();
        let volumes = disks.iter().map(|(name, disk)| Content::whole(name, disk)).collect();
        let manifest = scene.backup("web", 1, level, volumes);
        check(&scene, &manifest, &disks);
        let listed = scene.independent(["list"]).unwrap();
        assert!(listed.contains(manifest.backup.id.as_str()), "{listed}");
    }
}

#[test]
fn compressed_chunks_are_read_by_both() {
    let scene = RepositoryScene::new();
    let disks =
        vec![("text", text(3 * CHUNK + 5)), ("noise", noise(2 * CHUNK, 5)), ("short", b"aaaaaaaaaaaaaaaa".into())];
    let volumes = disks.iter().map(|(name, disk)| Content::whole(name, disk)).collect();
    let manifest = scene.backup("web", 1, 1, volumes);
    check(&scene, &manifest, &disks);
    let stored = manifest.volume("text").unwrap().stored_bytes;
    assert!(stored < CHUNK as u64, "{stored} bytes");
}

#[test]
fn an_incremental_backup_inherits_and_grows() {
    let scene = RepositoryScene::new();
    let mut disks = vec![("sparse", sparse(LEAF + 10)), ("odd", text(5 * CHUNK + 1234))];
    let first = scene.backup("web", 1, 1, disks.iter().map(|(name, disk)| Content::whole(name, disk)).collect());
    let before = disks.clone();

    let mut volumes = Vec::new();
    for (name, disk) in &mut disks {
        let old = disk.len();
        // What changed: chunk 3; what grew: into the next leaf, and the chunk that held the old end.
        disk.resize(old + 70 * CHUNK + 99, 0);
        disk[3 * CHUNK..4 * CHUNK].copy_from_slice(&noise(CHUNK, 8));
        let seam = old / CHUNK * CHUNK;
        disk[old..old + 20].fill(0xCD);
        let pieces = vec![
            Piece::Data { offset: 3 * CHUNK as u64, bytes: disk[3 * CHUNK..4 * CHUNK].to_vec().into() },
            Piece::Data { offset: seam as u64, bytes: disk[seam..seam + CHUNK].to_vec().into() },
            Piece::Zero(ByteRange::new((seam + CHUNK) as u64, disk.len() as u64).unwrap()),
        ];
        let base = Some(scene.base(first.volume(name).unwrap()));
        volumes.push(Content { name, size: disk.len() as u64, pieces, base });
    }
    let second = scene.backup("web", 2, 1, volumes);
    check(&scene, &second, &disks);
    check(&scene, &first, &before);
    assert!(second.volume("sparse").unwrap().new_bytes <= 2 * CHUNK as u64, "what is inherited is not sent");
}

/// What no piece covers is as it was, also in the chunk that held the end of the smaller disk.
#[test]
fn growth_that_nobody_mentions_is_zero() {
    for (old, new) in [
        (CHUNK / 2, 3 * CHUNK),
        (LEAF * CHUNK - 9, LEAF * CHUNK),
        (LEAF * CHUNK + 5, 2 * LEAF * CHUNK + 5),
        (LEAF * CHUNK + 5, (LEAF + 1) * CHUNK),
    ] {
        let scene = RepositoryScene::new();
        let mut disk = vec![0; old];
        disk[0] = 3;
        disk[old - 3..].fill(0xEF);
        let first = scene.backup("web", 1, 1, vec![Content::whole("disk", &disk)]);
        let base = Some(scene.base(first.volume("disk").unwrap()));
        disk.resize(new, 0);
        let content = Content { name: "disk", size: new as u64, pieces: Vec::new(), base };
        let second = scene.backup("web", 2, 1, vec![content]);
        assert!(scene.read(second.volume("disk").unwrap()).unwrap() == disk, "from {old} to {new} bytes");
    }
}

#[test]
fn equal_content_is_stored_once_whatever_the_volume() {
    let scene = RepositoryScene::new();
    let disk = [noise(CHUNK, 1), noise(CHUNK, 1), noise(CHUNK, 2)].concat();
    scene.backup("web", 1, 1, vec![Content::whole("a", &disk), Content::whole("b", &disk)]);
    let files = |directory: &Path| {
        let directories = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        directories
            .flat_map(|path| fs::read_dir(path).unwrap())
            .map(|entry| entry.unwrap().path())
            .collect::<HashSet<_>>()
    };
    // Two chunks and one page.
    assert_eq!(files(&scene.file("chunks")).len(), 3);
    scene.backup("db", 1, 1, vec![Content::whole("c", &disk)]);
    assert_eq!(files(&scene.file("chunks")).len(), 3);
}

#[test]
fn nothing_that_identifies_a_vm_is_readable() {
    let scene = RepositoryScene::new();
    let manifest = scene.backup("very-secret-name", 1, 0, vec![Content::whole("secret-volume", &text(CHUNK))]);
    let name = scene.repository.manifest_name("very-secret-name", &manifest.backup.id);
    assert!(!name.contains("secret"));
    let object = fs::read(scene.file(&name)).unwrap();
    for word in ["very-secret-name", "secret-volume", "format_version"] {
        assert!(!object.windows(word.len()).any(|window| window == word.as_bytes()), "{word}");
    }
    assert!(matches!(
        scene.runtime.block_on(scene.repository.find(Some("another"), manifest.backup.id.as_str())),
        Err(RepositoryError::NotFound { .. })
    ));
}
