//! What a storage, or a holder of the key, may put before the parsers: nothing makes them panic or take memory that
//! the limits do not allow.

use super::{
    RepositoryError,
    chunk::{self, ChunkId},
    index::IndexReader,
    key::{KeySlot, MasterKey, Passphrase, unhex},
    location::Location,
    manifest::ManifestName,
    reader::VolumeReader,
    repository::{Repository, chunk_name, chunk_of_name},
    storage::Storage,
};
use crate::backup::BackupId;
use bytes::Bytes;
use futures::StreamExt;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

fn passphrase() -> Passphrase {
    Passphrase::new("x".into()).unwrap()
}

fn memory() -> Storage {
    Location { url: "memory:///p".into(), ..Location::default() }.open().unwrap()
}

async fn repository() -> Arc<Repository> {
    Repository::init(memory(), passphrase(), 64 << 10).await.unwrap()
}

/// JSON that resembles what a slot or config holds.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        // Cheap ones too, so that some get as far as the derivation.
        (0_u32..64).prop_map(Value::from),
        "[0-9a-f]{0,40}".prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        Just(Value::from("argon2id")),
        Just(Value::from("00".repeat(16))),
        Just(Value::from("ab".repeat(77))),
        Just(Value::from("2026-11-25T01:02:03Z")),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| prop::collection::vec(inner, 0..4).prop_map(Value::from))
}

/// A document with some fields replaced, removed or added.
fn changed(document: Value, changes: Vec<(usize, Option<Value>)>) -> Value {
    let mut document = document;
    for (at, change) in changes {
        let Some(object) = document.as_object_mut() else { break };
        let fields: Vec<_> = object.keys().cloned().collect();
        let kdf = fields.len() + 5;
        match (at % kdf, change) {
            (field, Some(value)) if field < fields.len() => drop(object.insert(fields[field].clone(), value)),
            (field, None) if field < fields.len() => drop(object.remove(&fields[field])),
            (field, value) => {
                let names = ["algorithm", "memory_kib", "iterations", "parallelism", "salt"];
                if let Some(kdf) = object.get_mut("kdf").and_then(Value::as_object_mut) {
                    kdf.insert(names[field - fields.len()].into(), value.unwrap_or_default());
                }
            }
        }
    }
    document
}

fn changes() -> impl Strategy<Value = Vec<(usize, Option<Value>)>> {
    prop::collection::vec((any::<usize>(), prop::option::of(value())), 0..4)
}

fn slot() -> Value {
    // Cheap to try.
    json!({
        "id": "0011223344556677", "created": "2026-11-25T01:02:03Z", "label": "me", "sealed": "ab".repeat(77),
        "kdf": { "algorithm": "argon2id", "memory_kib": 32, "iterations": 1, "parallelism": 1, "salt": "00".repeat(16) },
    })
}

/// Whether trying it is quick: the limits themselves allow a gibibyte.
fn is_cheap(slot: &KeySlot) -> bool {
    let (memory, passes) = (u64::from(slot.kdf.memory_kib), u64::from(slot.kdf.iterations));
    memory > 1 << 20 || memory.saturating_mul(passes) <= 1 << 12
}

proptest! {
    #[test]
    fn no_slot_panics(changes in changes()) {
        let document = changed(slot(), changes).to_string();
        if let Ok(slot) = serde_json::from_str::<KeySlot>(&document)
            && is_cheap(&slot)
            && let Ok(opened) = slot.unwrap(&passphrase(), [1; 16])
        {
            prop_assert!(opened.is_none());
        }
    }

    #[test]
    fn no_rubbish_is_a_slot(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(serde_json::from_slice::<KeySlot>(&bytes).is_err());
    }

    #[test]
    fn no_config_panics(changes in changes()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let config = json!({
            "format": "virt-fleece repository", "version": 1, "id": "00".repeat(16), "chunk_size": 65536,
            "created": "2026-11-25T01:02:03Z", "mac": "00".repeat(32),
        });
        runtime.block_on(async {
            let storage = memory();
            let config = changed(config, changes).to_string();
            storage.put("repository.json", config.into()).await.unwrap();
            storage.put("keys/0011223344556677.json", slot().to_string().into()).await.unwrap();
            let opened = Repository::open(storage, passphrase()).await;
            prop_assert!(matches!(
                opened,
                Err(RepositoryError::Damaged { .. } | RepositoryError::TooNew { .. }
                    | RepositoryError::WrongPassphrase { .. })
            ), "{:?}", opened);
            Ok(())
        })?;
    }

    #[test]
    fn hex_has_one_form(text in "[0-9a-fA-F+x]{0,6}|.{0,6}") {
        match unhex(&text) {
            Some(bytes) => prop_assert_eq!(super::key::hex(&bytes), text),
            None => prop_assert!(!text.len().is_multiple_of(2) || !text.bytes().all(|b| b"0123456789abcdef".contains(&b))),
        }
    }

    #[test]
    fn names_of_chunks_have_one_form(name in "chunks/[0-9a-f]{1,3}/[0-9a-fA-F]{62,66}|.{0,80}") {
        if let Some(id) = chunk_of_name(&name) {
            prop_assert_eq!(chunk_name(id), name);
        }
    }
}

#[tokio::test]
async fn too_many_slots_are_not_tried() {
    let repository = repository().await;
    for number in 0..64 {
        repository.storage().put(&format!("keys/{number}.json"), Bytes::from_static(b"{}")).await.unwrap();
    }
    let storage = repository.storage().clone();
    assert!(matches!(Repository::open(storage, passphrase()).await, Err(RepositoryError::Damaged { .. })));
    assert!(matches!(repository.add_key(passphrase(), String::new()).await, Err(RepositoryError::Invalid(_))));
}

/// A slot with a key of another length, such as a forger needs who tries many passphrases at once.
#[test]
fn a_slot_has_room_for_the_key_only() {
    let slot = KeySlot::wrap(&MasterKey::generate().unwrap(), &passphrase(), "", [1; 16]).unwrap();
    for length in [0, 1, 44, 76, 78, 4096] {
        let mut other = slot.clone();
        other.sealed = "ab".repeat(length);
        other.kdf.memory_kib = 1 << 20;
        // Refused before a gibibyte is filled.
        let begun = std::time::Instant::now();
        assert!(matches!(other.unwrap(&passphrase(), [1; 16]), Err(RepositoryError::Damaged { .. })), "{length}");
        assert!(begun.elapsed() < std::time::Duration::from_millis(100));
    }
}

/// Writes a manifest as a holder of the key could, and reads it.
async fn manifest(
    repository: &Arc<Repository>,
    length: Option<u64>,
    document: &Value,
) -> Result<super::Manifest, RepositoryError> {
    let id: BackupId = "20261125T010203Z-00ff00ff".parse().unwrap();
    let object = repository.manifest_name("web", &id);
    let document = document.to_string();
    let mut content = length.unwrap_or(document.len() as u64).to_le_bytes().to_vec();
    content.extend(chunk::pack(document.as_bytes(), 3));
    let sealed = repository.manifests().seal(object.as_bytes(), &content).unwrap();
    repository.storage().put(&object, sealed.into()).await.unwrap();
    repository.read_manifest(&ManifestName { id, object }).await
}

fn document(volumes: &Value) -> Value {
    json!({
        "format_version": 1, "id": "20261125T010203Z-00ff00ff", "vm": "web", "sequence": 1, "bitmap_line": "00ff00ff",
        "point_in_time": "2026-11-25T01:02:03Z", "started": "2026-11-25T01:02:03Z",
        "finished": "2026-11-25T01:02:03Z", "engine": "job", "transfer": "pull", "qemu_version": "10.0.0",
        "cut_microseconds": 1, "quiesce": {}, "tool_version": "0", "volumes": volumes,
    })
}

fn volume(size: u64, root: &str) -> Value {
    json!({
        "name": "disk", "virtual_size": size, "root": root, "source_format": "raw", "bitmap": "b", "dirty_bytes": 0,
        "read_bytes": 0, "data_bytes": 0, "zero_bytes": 0, "new_bytes": 0, "stored_bytes": 0,
    })
}

#[tokio::test]
async fn absurd_manifests_are_refused() {
    let repository = repository().await;
    let zero = "00".repeat(32);
    let good = document(&json!([volume(1 << 40, &zero)]));
    manifest(&repository, None, &good).await.unwrap();
    let mut newer = good.clone();
    newer["format_version"] = 2.into();
    // Fields of a version that is not known yet.
    newer["volumes"] = Value::Null;
    assert!(matches!(manifest(&repository, None, &newer).await, Err(RepositoryError::TooNew { .. })));
    let mut unknown = good.clone();
    unknown["a_field_of_the_future"] = json!({ "x": [1] });
    manifest(&repository, None, &unknown).await.unwrap();

    let other = |field: &str, value: Value| {
        let mut document = good.clone();
        document[field] = value;
        document
    };
    for bad in [
        other("id", "20261125T010203Z-00ff00fe".into()),
        other("id", "../../../etc/passwd".into()),
        other("vm", "db".into()),
        other("volumes", json!([volume((1 << 56) + 1, &zero)])),
        other("volumes", json!([volume(1, "")])),
        other("volumes", json!([volume(1, &"AA".repeat(32))])),
        other("volumes", json!([volume(1, &zero), volume(2, &zero)])),
        json!([]),
        Value::Null,
    ] {
        let read = manifest(&repository, None, &bad).await;
        assert!(matches!(read, Err(RepositoryError::Damaged { .. })), "{bad}: {read:?}");
    }
    for length in [0, 1, (16 << 20) + 1, u64::MAX, good.to_string().len() as u64 + 1] {
        let read = manifest(&repository, Some(length), &good).await;
        assert!(matches!(read, Err(RepositoryError::Damaged { .. })), "{length}: {read:?}");
    }
}

/// The greatest volume there may be: as a hole it is nothing, and an index that is no index ends it.
#[tokio::test]
async fn absurd_volumes_take_no_memory() {
    let repository = repository().await;
    let largest = manifest(&repository, None, &document(&json!([volume(1 << 56, &"00".repeat(32))]))).await.unwrap();
    let reader = VolumeReader::new(Arc::clone(&repository), &largest.volumes[0]).unwrap();
    assert_eq!(reader.shape().levels(), 4);
    let pieces: Vec<_> = reader.pieces().take(1000).collect().await;
    assert!(pieces.iter().all(Result::is_ok));
    let mut index = IndexReader::new(reader.shape(), ChunkId::ZERO);
    assert!(index.id(&repository, 0, (1 << 40) - 1).await.unwrap().is_zero());
    assert!(index.id(&repository, 0, 1 << 40).await.is_err());

    // A page of the right name with another number of ids.
    let short = vec![7; 32 * 5];
    let id = repository.chunk_id(&short);
    let mut workbench = super::workbench::Workbench::default();
    workbench.put(&[short.into()]);
    let sealed = workbench.seal(&repository, id, 1).unwrap().to_vec();
    repository.storage().put(&chunk_name(id), sealed.into()).await.unwrap();
    for size in [1, 1 << 30, 1 << 56] {
        let volume = manifest(&repository, None, &document(&json!([volume(size, &id.to_hex())]))).await.unwrap();
        let reader = VolumeReader::new(Arc::clone(&repository), &volume.volumes[0]).unwrap();
        let first = Box::pin(reader.pieces()).next().await.unwrap();
        assert!(matches!(first, Err(RepositoryError::Damaged { .. })), "{size}: {first:?}");
    }
}

/// A chunk whose compressed form claims gigabytes.
#[test]
fn bombs_are_refused() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let mut packed = vec![1];
    packed.extend_from_slice(&bomb);
    assert!(packed.len() < 64 << 10);
    let refused = chunk::unpack(&packed, 64 << 10, "x");
    assert!(matches!(refused, Err(RepositoryError::Damaged { .. })));
    // A frame that does not say how large it is.
    let mut streamed = vec![1];
    streamed.extend(zstd::stream::encode_all(&vec![0; 64 << 20][..], 1).unwrap());
    assert!(matches!(chunk::unpack(&streamed, 64 << 10, "x"), Err(RepositoryError::Damaged { .. })));
}
