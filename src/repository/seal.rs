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
/// Bytes of a sealed object before its content, and behind it.
pub(super) const HEADER: usize = MAGIC.len() + 1 + SALT;
pub(super) const TAG: usize = 16;
/// Bytes that sealing adds.
pub(super) const OVERHEAD: usize = HEADER + TAG;

/// Content with room for what sealing adds.
fn object_of(content: &[u8]) -> Vec<u8> {
    let mut object = Vec::with_capacity(content.len() + OVERHEAD);
    object.resize(HEADER, 0);
    object.extend_from_slice(content);
    object.resize(content.len() + OVERHEAD, 0);
    object
}

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
        let mut object = object_of(content);
        self.seal_in_place(name, &mut object)?;
        Ok(object)
    }

    /// Seals the content that is in the midst of a buffer, behind [`HEADER`] bytes and before [`TAG`] bytes; the whole
    /// buffer becomes the object `name`.
    pub(super) fn seal_in_place(&self, name: &[u8], object: &mut [u8]) -> Result<(), RepositoryError> {
        let mut salt = [0; SALT];
        getrandom::fill(&mut salt).map_err(|error| RepositoryError::Local {
            attempt: "take randomness from the system",
            source: std::io::Error::other(error),
        })?;
        self.seal_salted(name, object, salt)
    }

    /// With a salt that must be used for nothing else.
    fn seal_salted(&self, name: &[u8], object: &mut [u8], salt: [u8; SALT]) -> Result<(), RepositoryError> {
        let refused = || RepositoryError::Invalid("an object of this size cannot be sealed".into());
        let (header, rest) = object.split_at_mut_checked(HEADER).ok_or_else(refused)?;
        let body = rest.len().checked_sub(TAG).ok_or_else(refused)?;
        let (body, end) = rest.split_at_mut(body);
        header[..MAGIC.len()].copy_from_slice(MAGIC);
        header[MAGIC.len()] = self.kind as u8;
        header[MAGIC.len() + 1..].copy_from_slice(&salt);
        let tag = self
            .object_key(&salt)
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key([0; NONCE_LEN]), Aad::from(self.bound(name)), body)
            .map_err(|_| refused())?;
        end.copy_from_slice(tag.as_ref());
        Ok(())
    }

    /// Opens the object `name`; `label` names it in errors.
    pub(super) fn open(&self, name: &[u8], object: &[u8], label: &str) -> Result<Vec<u8>, RepositoryError> {
        let mut object = object.to_vec();
        let content = self.open_in_place(name, &mut object, label)?;
        let length = content.len();
        object.copy_within(HEADER..HEADER + length, 0);
        object.truncate(length);
        Ok(object)
    }

    /// The same in the buffer that the object is in, of which nothing else is of use then: the content within it.
    pub(super) fn open_in_place<'a>(
        &self,
        name: &[u8],
        object: &'a mut [u8],
        label: &str,
    ) -> Result<&'a [u8], RepositoryError> {
        let damaged = |detail: &str| RepositoryError::damaged(label, detail);
        if object.len() < OVERHEAD {
            return Err(damaged(&format!("it has {} bytes, fewer than any sealed object", object.len())));
        }
        let (header, body) = object.split_at_mut(HEADER);
        if &header[..4] != MAGIC {
            return Err(damaged("it is no sealed object of a format that is known"));
        }
        if header[4] != self.kind as u8 {
            return Err(damaged("it is an object of another kind"));
        }
        let mut salt = [0; SALT];
        salt.copy_from_slice(&header[5..]);
        let opened = self.object_key(&salt).open_in_place(
            Nonce::assume_unique_for_key([0; NONCE_LEN]),
            Aad::from(self.bound(name)),
            body,
        );
        let broken = |_| damaged("its seal is broken: changed, misplaced, or sealed with another key");
        opened.map(|content| &*content).map_err(broken)
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
        let mut object = object_of(content);
        self.seal_salted(name, &mut object, salt).unwrap();
        object
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
