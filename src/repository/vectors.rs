//! The test vectors of `docs/format.md`: made here, and compared with what the document says.

use super::{
    chunk::{self, ChunkId},
    index::page_bytes,
    key::{Kdf, KeySlot, MasterKey, Passphrase, hex},
    location::Location,
    repository::{Repository, chunk_name},
    seal::{ObjectKind, Sealer},
};
use std::fmt::Write as _;

const DOCUMENT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/format.md"));
const BEGIN: &str = "<!-- vectors: made by src/repository/vectors.rs -->\n```\n";
const END: &str = "```\n<!-- end of vectors -->";

/// Bytes that count up.
fn counting<const N: usize>(from: u8) -> [u8; N] {
    std::array::from_fn(|at| from + at as u8)
}

/// The vectors as text: a name, and bytes in hex or text in quotes, a line each.
fn vectors() -> String {
    let (id, salt) = (counting::<16>(0x40), counting::<24>(0x80));
    let master = counting::<32>(0);
    let key = MasterKey::for_vectors(master);
    let storage = Location { url: "memory:///".into(), ..Location::default() }.open().unwrap();
    let (repository, config) = Repository::for_vectors(storage, id, key.clone());
    let mut text = String::new();
    let mut line = |name: &str, value: &str| writeln!(text, "{name:<28}{value}").unwrap();

    line("master key", &hex(&master));
    line("repository id", &repository.id());
    for purpose in ["config", "chunk id", "vm tag", "chunk", "manifest", "session", "prune"] {
        line(&format!("key of {purpose}"), &hex(key.derive(purpose).as_slice()));
    }
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    line("repository.json", &config.to_string());

    let content = b"some content";
    let chunk = repository.chunk_id(content);
    line("content", "\"some content\"");
    line("chunk id", &chunk.to_hex());
    line("object", &chunk_name(chunk));
    let chunks = Sealer::new(ObjectKind::Chunk, key.derive("chunk"), id);
    let packed = chunk::pack(content, 0);
    line("packed", &hex(&packed));
    line("salt", &hex(&salt));
    line("sealed", &hex(&chunks.seal_for_a_vector(chunk.as_bytes(), &packed, salt)));
    let page = page_bytes(&[chunk, ChunkId::ZERO]);
    line("page of it and a zero chunk", &hex(&page));
    line("id of the page", &repository.chunk_id(&page).to_hex());

    let backup = "20261125T010203Z-00ff00ff".parse().unwrap();
    let name = repository.manifest_name("web", &backup);
    line("manifest of VM \"web\"", &name);
    // Not a manifest, but sealed like one.
    let document = b"{}";
    let mut content = (document.len() as u64).to_le_bytes().to_vec();
    content.extend(chunk::pack(document, 0));
    line("sealed document \"{}\"", &hex(&repository.manifests().seal_for_a_vector(name.as_bytes(), &content, salt)));

    let (kdf, wrapping) = Kdf::for_vectors(&Passphrase::new("correct horse".into()).unwrap(), counting(0xC0));
    line("passphrase", "\"correct horse\"");
    line("argon2id key", &hex(wrapping.as_slice()));
    let slot = "0011223344556677";
    let sealed = Sealer::new(ObjectKind::Key, wrapping, id).seal_for_a_vector(slot.as_bytes(), &master, salt);
    let created = "2026-11-25T01:02:03.5Z".parse().unwrap();
    let slot = KeySlot { id: slot.into(), created, label: String::new(), kdf, sealed: hex(&sealed) };
    line(&format!("keys/{}.json", slot.id), &serde_json::to_string(&slot).unwrap());
    text
}

#[test]
fn the_document_has_these_vectors() {
    let made = vectors();
    let written = DOCUMENT.split_once(BEGIN).and_then(|(_, rest)| rest.split_once(END)).map(|(text, _)| text);
    assert!(written == Some(made.as_str()), "docs/format.md needs these vectors:\n{made}");
}
