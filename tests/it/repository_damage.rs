//! A storage that is not to be trusted: whatever it does to an object is found, by the library and by the independent
//! reader, and nobody panics.

use crate::repository_scene::{CHUNK, Content, RepositoryScene};
use std::{
    fs,
    path::{Path, PathBuf},
};
use virt_fleece::repository::{Manifest, RepositoryError};

/// Bytes of the seal around a chunk: magic, kind, salt; tag.
const HEADER: usize = 4 + 1 + 24;
const TAG: usize = 16;

/// A repository with two backups of two VMs, one of them with a volume of two leaves.
struct Damage {
    scene: RepositoryScene,
    manifests: [Manifest; 2],
}

impl Damage {
    fn new() -> Self {
        let scene = RepositoryScene::new();
        let mut large = vec![0; 1030 * CHUNK];
        large[..CHUNK].fill(1);
        large[1025 * CHUNK..1026 * CHUNK].fill(2);
        let first = scene.backup("web", 1, 1, vec![Content::whole("large", &large)]);
        let second = scene.backup("db", 1, 0, vec![Content::whole("small", &vec![3; CHUNK])]);
        Self { scene, manifests: [first, second] }
    }

    fn manifest_file(&self, backup: usize) -> PathBuf {
        let record = &self.manifests[backup].backup;
        self.scene.file(&self.scene.repository.manifest_name(&record.vm, &record.id))
    }

    fn root_file(&self, backup: usize) -> PathBuf {
        self.scene.chunk_file(&self.manifests[backup].volumes[0].root)
    }

    /// Files of chunks and pages with at least this many bytes of content.
    fn chunk_files(&self) -> Vec<PathBuf> {
        let directories = fs::read_dir(self.scene.file("chunks")).unwrap().map(|entry| entry.unwrap().path());
        directories.flat_map(|path| fs::read_dir(path).unwrap()).map(|entry| entry.unwrap().path()).collect()
    }

    /// Reads everything as `restore` does.
    fn read(&self) -> Result<(), RepositoryError> {
        for manifest in &self.manifests {
            let (vm, id) = (manifest.backup.vm.as_str(), manifest.backup.id.as_str());
            let found = self.scene.runtime.block_on(self.scene.repository.find(Some(vm), id))?;
            self.scene.read(&found.volumes[0])?;
        }
        Ok(())
    }

    #[track_caller]
    fn must_be_found(&self, what: &str) {
        match self.read() {
            Err(RepositoryError::Damaged { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
    }

    #[track_caller]
    fn must_be_found_independently(&self, what: &str) {
        let mut failures = 0;
        for manifest in &self.manifests {
            match self.scene.read_independently(&manifest.backup.id, &manifest.volumes[0].name) {
                Ok(_) => {}
                Err(said) => {
                    assert!(said.contains("error: ") && !said.contains("Traceback"), "{what}: {said}");
                    failures += 1;
                }
            }
        }
        assert!(failures > 0, "{what}: the independent reader finds nothing");
    }
}

/// Changes a file, looks, and puts it back.
fn changed(path: &Path, change: impl FnOnce(&mut Vec<u8>), look: impl FnOnce()) {
    let before = fs::read(path).unwrap();
    let mut content = before.clone();
    change(&mut content);
    assert_ne!(content, before);
    fs::write(path, content).unwrap();
    look();
    fs::write(path, before).unwrap();
}

#[test]
fn flipped_bits_of_sealed_objects_are_found() {
    let damage = Damage::new();
    damage.read().unwrap();
    let mut paths = damage.chunk_files();
    // Three chunks; two leaves and a root of one volume, a leaf of the other.
    assert_eq!(paths.len(), 7);
    paths.extend([damage.manifest_file(0), damage.manifest_file(1)]);
    for path in paths {
        let length = fs::metadata(&path).unwrap().len() as usize;
        // Magic, kind, both ends of the salt, how it is packed, content, both ends of the tag.
        for at in [0, 3, 4, 5, HEADER - 1, HEADER, HEADER + 1, HEADER + 9, length - TAG - 1, length - TAG, length - 1] {
            let what = format!("byte {at} of {length} in {}", path.display());
            changed(&path, |content| content[at] ^= 0x10, || damage.must_be_found(&what));
        }
    }
    let independently = || damage.must_be_found_independently("a flipped bit");
    changed(&damage.root_file(0), |content| content[HEADER + 5] ^= 1, independently);
    changed(&damage.manifest_file(1), |content| content[HEADER + 5] ^= 1, independently);
    damage.read().unwrap();
}

#[test]
fn truncated_longer_and_missing_objects_are_found() {
    let damage = Damage::new();
    let mut paths = damage.chunk_files();
    paths.extend([damage.manifest_file(0), damage.manifest_file(1)]);
    for path in &paths {
        let length = fs::metadata(path).unwrap().len() as usize;
        for left in [0, 1, 4, HEADER, HEADER + TAG - 1, HEADER + TAG, HEADER + TAG + 1, length - 1] {
            let what = format!("{left} of {length} bytes of {}", path.display());
            changed(path, |content| content.truncate(left), || damage.must_be_found(&what));
        }
        let what = format!("{} is longer", path.display());
        changed(path, |content| content.push(0), || damage.must_be_found(&what));
        changed(path, |content| content.extend(vec![0; 20 << 20]), || damage.must_be_found(&what));
    }
    for path in damage.chunk_files() {
        let away = path.with_extension("away");
        fs::rename(&path, &away).unwrap();
        damage.must_be_found("a missing chunk");
        fs::rename(&away, &path).unwrap();
    }
    changed(
        &damage.root_file(1),
        |content| content.truncate(60),
        || damage.must_be_found_independently("a short page"),
    );
}

#[test]
fn objects_in_each_others_places_are_found() {
    let damage = Damage::new();
    let mut paths = damage.chunk_files();
    paths.push(damage.manifest_file(0));
    paths.push(damage.manifest_file(1));
    for path in &paths {
        for other in paths.iter().filter(|other| *other != path) {
            let what = format!("{} in the place of {}", other.display(), path.display());
            let other = fs::read(other).unwrap();
            changed(path, |content| *content = other, || damage.must_be_found(&what));
        }
    }
    let other = fs::read(damage.manifest_file(0)).unwrap();
    let look = || damage.must_be_found_independently("a manifest of another VM");
    changed(&damage.manifest_file(1), |content| *content = other, look);
    // Another backup id of the same VM.
    let renamed = damage.manifest_file(0).with_file_name("20200101T000000Z-00000000");
    fs::copy(damage.manifest_file(0), renamed).unwrap();
    let catalogue = damage.scene.runtime.block_on(damage.scene.repository.catalogue(None)).unwrap();
    assert_eq!((catalogue.manifests.len(), catalogue.damaged.len()), (2, 1));
}

#[test]
fn objects_of_another_repository_are_found() {
    let damage = Damage::new();
    let other = Damage::new();
    // The same passphrase and the same content, yet nothing fits.
    for (path, foreign) in [
        (damage.manifest_file(0), other.manifest_file(0)),
        (damage.root_file(0), other.root_file(0)),
        (damage.root_file(1), other.root_file(1)),
    ] {
        let foreign = fs::read(foreign).unwrap();
        changed(&path, |content| *content = foreign, || damage.must_be_found("an object of another repository"));
    }
    let slot = |damage: &Damage| fs::read_dir(damage.scene.file("keys")).unwrap().next().unwrap().unwrap().path();
    let foreign = slot(&other);
    fs::copy(&foreign, damage.scene.file("keys").join(foreign.file_name().unwrap())).unwrap();
    damage.scene.open().expect("a slot of another repository does no harm beside the right one");
    fs::remove_file(slot_of(&damage, &foreign)).unwrap();
    assert!(matches!(damage.scene.open(), Err(RepositoryError::WrongPassphrase { slots: 1 })));
    fs::copy(other.scene.file("repository.json"), damage.scene.file("repository.json")).unwrap();
    let opened = damage.scene.open().expect("the whole way in of another repository is another repository");
    assert_eq!(opened.id(), other.scene.repository.id());
    let read = damage.scene.runtime.block_on(opened.catalogue(None)).unwrap();
    assert_eq!((read.manifests.len(), read.damaged.len()), (0, 2), "in which nothing opens");
}

/// The slot that is not the foreign one.
fn slot_of(damage: &Damage, foreign: &Path) -> PathBuf {
    let entries = fs::read_dir(damage.scene.file("keys")).unwrap().map(|entry| entry.unwrap().path());
    entries.into_iter().find(|path| path.file_name() != foreign.file_name()).unwrap()
}

#[test]
fn a_changed_config_is_refused() {
    let scene = RepositoryScene::new();
    let path = scene.file("repository.json");
    let text = fs::read_to_string(&path).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (field, value) in config.as_object().unwrap() {
        let raw = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let begin = text.find(&raw).unwrap_or_else(|| panic!("{field} in {text}"));
        // A digit remains a digit.
        for at in [begin, begin + raw.len() - 1] {
            let look = || match scene.open() {
                Err(
                    RepositoryError::Damaged { .. }
                    | RepositoryError::WrongPassphrase { .. }
                    | RepositoryError::TooNew { .. },
                ) => {}
                other => panic!("{field} at {at}: {other:?}"),
            };
            changed(&path, |content| content[at] ^= 1, look);
        }
    }
    for cut in [0, 1, text.len() / 2, text.len() - 2] {
        let look = || assert!(matches!(scene.open(), Err(RepositoryError::Damaged { .. })));
        changed(&path, |content| content.truncate(cut), look);
    }
    for document in ["{}", "[]", "null", "{\"format\": \"x\"", "\u{0}", &"[".repeat(10_000)] {
        let look = || assert!(matches!(scene.open(), Err(RepositoryError::Damaged { .. })), "{document}");
        changed(&path, |content| *content = document.as_bytes().to_vec(), look);
    }
    // Upper case would be a second way to write the same id.
    let upper = text.replace(&scene.repository.id(), &scene.repository.id().to_uppercase());
    changed(&path, |content| *content = upper.into(), || assert!(scene.open().is_err()));
    let more = text.replacen('{', "{\"more\": 1,", 1);
    changed(&path, |content| *content = more.into(), || assert!(scene.open().is_err()));
    scene.open().unwrap();
}

#[test]
fn a_changed_key_slot_does_not_open_and_does_not_hinder_others() {
    let scene = RepositoryScene::new();
    let path = fs::read_dir(scene.file("keys")).unwrap().next().unwrap().unwrap().path();
    let text = fs::read_to_string(&path).unwrap();
    let slot: serde_json::Value = serde_json::from_str(&text).unwrap();
    let refused = |what: &str| match scene.open() {
        Err(RepositoryError::Damaged { .. } | RepositoryError::WrongPassphrase { .. }) => {}
        other => panic!("{what}: {other:?}"),
    };
    let sealed = slot["sealed"].as_str().unwrap();
    let begin = text.find(sealed).unwrap();
    // Magic, kind, salt, key, tag; every byte is two digits.
    for byte in [0, 4, 5, HEADER - 1, HEADER, HEADER + 31, HEADER + 32, HEADER + 32 + TAG - 1] {
        changed(&path, |content| content[begin + 2 * byte] ^= 1, || refused(&format!("byte {byte}")));
    }
    for field in ["algorithm", "salt"] {
        let at = text.find(slot["kdf"][field].as_str().unwrap()).unwrap();
        changed(&path, |content| content[at] ^= 1, || refused(field));
    }
    for (field, value) in [("memory_kib", "65544"), ("iterations", "4"), ("parallelism", "5")] {
        let number = slot["kdf"][field].to_string();
        let other = text.replace(&format!("\"{field}\": {number}"), &format!("\"{field}\": {value}"));
        changed(&path, |content| *content = other.into(), || refused(field));
    }
    let id = slot["id"].as_str().unwrap();
    let other = text.replace(id, "0123456789abcdef");
    changed(&path, |content| *content = other.into(), || refused("another id than its name says"));
    // Beside the good one lies rubbish of all sizes.
    let rubbish = scene.file("keys/00.json");
    for content in [Vec::new(), b"{".to_vec(), vec![b' '; 100 << 10]] {
        let length = content.len();
        fs::write(&rubbish, content).unwrap();
        assert!(scene.open().is_ok(), "beside {length} bytes of rubbish");
    }
}
