//! Sealing: authenticated encryption of whole objects.
//!
//! Every object gets a key of its own, derived from the key of its kind and 24 random bytes, so that no nonce is ever
//! used twice however many objects and writers there are. What the object is (kind, repository, name) is bound into the
//! seal: an object that was moved, swapped or taken from another repository does not open. `docs/format.md` is the
//! specification.

use super::RepositoryError;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroizing;

/// First bytes of every sealed object.
const MAGIC: &[u8; 4] = b"VFR1";
const SALT: usize = 24;
const HEADER: usize = MAGIC.len() + 1 + SALT;
const TAG: usize = 16;
/// Bytes that sealing adds.
pub(super) const OVERHEAD: usize = HEADER + TAG;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ObjectKind {
    /// A chunk of a disk, or a page of an index.
    Chunk = 1,
    /// A backup.
    Manifest = 2,
    /// The master key in a key slot.
    Key = 3,
    /// A running session.
    Session = 4,
    /// The state of a prune.
    Prune = 5,
}

/// Seals and opens objects of one kind in one repository.
pub(super) struct Sealer {
    kind: ObjectKind,
    key: Zeroizing<[u8; 32]>,
    repository: [u8; 16],
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl Sealer {
    pub(super) fn new(kind: ObjectKind, key: Zeroizing<[u8; 32]>, repository: [u8; 16]) -> Self {
        Self { kind, key, repository }
    }

    /// Seals content as the object `name`.
    pub(super) fn seal(&self, name: &[u8], content: &[u8]) -> Result<Vec<u8>, RepositoryError> {
        let mut salt = [0; SALT];
        getrandom::fill(&mut salt).map_err(|error| RepositoryError::Local {
            attempt: "take randomness from the system",
            source: std::io::Error::other(error),
        })?;
        self.seal_salted(name, content, salt)
    }

    /// With a salt that must be used for nothing else.
    fn seal_salted(&self, name: &[u8], content: &[u8], salt: [u8; SALT]) -> Result<Vec<u8>, RepositoryError> {
        let mut object = Vec::with_capacity(content.len() + OVERHEAD);
        object.extend_from_slice(MAGIC);
        object.push(self.kind as u8);
        object.extend_from_slice(&salt);
        object.extend_from_slice(content);
        let (_, body) = object.split_at_mut(HEADER);
        let tag = self
            .object_key(&salt)
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key([0; NONCE_LEN]), Aad::from(self.bound(name)), body)
            .map_err(|_| RepositoryError::Invalid("an object of this size cannot be sealed".into()))?;
        object.extend_from_slice(tag.as_ref());
        Ok(object)
    }

    /// Opens the object `name`; `label` names it in errors.
    pub(super) fn open(&self, name: &[u8], object: &[u8], label: &str) -> Result<Vec<u8>, RepositoryError> {
        let damaged = |detail: &str| RepositoryError::damaged(label, detail);
        if object.len() < OVERHEAD {
            return Err(damaged(&format!("it has {} bytes, fewer than any sealed object", object.len())));
        }
        let (header, body) = object.split_at(HEADER);
        if &header[..4] != MAGIC {
            return Err(damaged("it is no sealed object of a format that is known"));
        }
        if header[4] != self.kind as u8 {
            return Err(damaged("it is an object of another kind"));
        }
        let mut body = body.to_vec();
        let mut salt = [0; SALT];
        salt.copy_from_slice(&header[5..]);
        let length = self
            .object_key(&salt)
            .open_in_place(Nonce::assume_unique_for_key([0; NONCE_LEN]), Aad::from(self.bound(name)), &mut body)
            .map_err(|_| damaged("its seal is broken: changed, misplaced, or sealed with another key"))?
            .len();
        body.truncate(length);
        Ok(body)
    }

    /// The same nonce is right because the key is never used again: 192 random bits go into it.
    fn object_key(&self, salt: &[u8; SALT]) -> LessSafeKey {
        let key = Zeroizing::new(*blake3::keyed_hash(&self.key, salt).as_bytes());
        // The length is right by its type.
        #[allow(clippy::expect_used)]
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_slice()).expect("a key of 32 bytes"))
    }

    fn bound(&self, name: &[u8]) -> Vec<u8> {
        let mut bound = Vec::with_capacity(MAGIC.len() + 17 + name.len());
        bound.extend_from_slice(MAGIC);
        bound.push(self.kind as u8);
        bound.extend_from_slice(&self.repository);
        bound.extend_from_slice(name);
        bound
    }
}

#[cfg(test)]
impl Sealer {
    /// Seals with a salt that is known: for test vectors.
    pub(super) fn seal_for_a_vector(&self, name: &[u8], content: &[u8], salt: [u8; SALT]) -> Vec<u8> {
        self.seal_salted(name, content, salt).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer(kind: ObjectKind, repository: u8) -> Sealer {
        Sealer::new(kind, Zeroizing::new([7; 32]), [repository; 16])
    }

    #[test]
    fn any_flipped_bit_and_any_other_place_is_found() {
        let sealed = sealer(ObjectKind::Chunk, 1).seal(b"name", b"some content").unwrap();
        assert_eq!(sealer(ObjectKind::Chunk, 1).open(b"name", &sealed, "x").unwrap(), b"some content");
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(sealer(ObjectKind::Chunk, 1).open(b"name", &flipped, "x").is_err(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert!(sealer(ObjectKind::Chunk, 1).open(b"name", &sealed[..length], "x").is_err(), "{length} bytes");
        }
        assert!(sealer(ObjectKind::Chunk, 1).open(b"other", &sealed, "x").is_err());
        assert!(sealer(ObjectKind::Manifest, 1).open(b"name", &sealed, "x").is_err());
        assert!(sealer(ObjectKind::Chunk, 2).open(b"name", &sealed, "x").is_err());
    }

    #[test]
    fn the_same_content_never_looks_the_same() {
        let sealer = sealer(ObjectKind::Chunk, 1);
        assert_ne!(sealer.seal(b"n", b"content").unwrap(), sealer.seal(b"n", b"content").unwrap());
    }
}
