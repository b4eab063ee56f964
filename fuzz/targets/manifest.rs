//! A manifest of a backup: what is taken for one can be written and read again, and its names stay in its directory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::{Component, Path};
use virt_fleece::image::Manifest;

fuzz_target!(|input: &[u8]| {
    let path = Path::new("manifest.json");
    let Ok(manifest) = Manifest::parse(input, path) else { return };
    for volume in &manifest.volumes {
        let mut parts = Path::new(&volume.file).components();
        assert!(matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)), "{}", volume.file);
        assert!(manifest.volume(&volume.name).is_some());
    }
    let written = serde_json::to_vec(&manifest).expect("a manifest that cannot be written");
    let again = Manifest::parse(&written, path).expect("a manifest that cannot be read again");
    assert_eq!((again.id, again.volumes), (manifest.id, manifest.volumes));
});
