//! Keys: one random master key, wrapped in any number of slots.
//!
//! The master key never changes and never leaves memory unwrapped. A slot is a small JSON object that holds it sealed
//! with a key made from a passphrase; slots come and go without touching any backup.

use super::{
    RepositoryError,
    seal::{OVERHEAD, ObjectKind, Sealer},
};
use argon2::{Algorithm, Argon2, Params, Version};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use zeroize::Zeroizing;

/// Largest slot that is read, in bytes.
pub(super) const MAX_SLOT: u64 = 64 << 10;
/// Bytes of the salt of a slot.
const SALT: usize = 16;
/// Bytes of the master key, sealed. AES-GCM does not commit to its key: a forger can make one ciphertext open under as
/// many keys as it has blocks, and learn from each answer which passphrases are none. So a slot has no room for more.
const SEALED: usize = OVERHEAD + 32;
/// The most memory that a slot may ask for, in KiB: a forged slot must not take the machine down.
const MAX_MEMORY_KIB: u32 = 1 << 20;
const MAX_ITERATIONS: u32 = 32;
const MAX_PARALLELISM: u32 = 16;
/// What new slots cost to try: 64 MiB, 3 passes (the second recommendation of RFC 9106, section 4).
const MEMORY_KIB: u32 = 64 << 10;
const ITERATIONS: u32 = 3;
const PARALLELISM: u32 = 4;

/// A secret that a person knows. Shows nothing when printed, and is wiped from memory.
#[derive(Clone, PartialEq, Eq)]
pub struct Passphrase(Zeroizing<String>);

impl Passphrase {
    /// Takes a passphrase; an empty one is refused.
    pub fn new(text: String) -> Result<Self, RepositoryError> {
        let text = Zeroizing::new(text);
        if text.is_empty() {
            return Err(RepositoryError::Invalid("the passphrase is empty".into()));
        }
        Ok(Self(text))
    }
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

/// The key of everything in a repository.
#[derive(Clone)]
pub(super) struct MasterKey(Zeroizing<[u8; 32]>);

impl MasterKey {
    pub(super) fn generate() -> Result<Self, RepositoryError> {
        let mut key = Zeroizing::new([0; 32]);
        random(key.as_mut_slice())?;
        Ok(Self(key))
    }

    /// The key for one purpose.
    pub(super) fn derive(&self, purpose: &str) -> Zeroizing<[u8; 32]> {
        // One context per purpose, as BLAKE3 asks for: constant, unique, application-specific.
        Zeroizing::new(blake3::derive_key(&format!("virt-fleece repository v1 {purpose}"), self.0.as_slice()))
    }
}

pub(super) fn random(bytes: &mut [u8]) -> Result<(), RepositoryError> {
    getrandom::fill(bytes).map_err(|error| RepositoryError::Local {
        attempt: "take randomness from the system",
        source: std::io::Error::other(error),
    })
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes of lower-case hex digits; anything else would be a second way to write the same.
pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

/// A key slot as it is stored. Nothing in it is secret, nothing in it is trusted.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeySlot {
    /// 16 hex digits; the name of its object.
    pub id: String,
    /// When it was made.
    pub created: Timestamp,
    /// What people call it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// How the passphrase becomes a key.
    pub kdf: Kdf,
    /// The master key, sealed; hex.
    pub sealed: String,
}

/// Argon2id (RFC 9106), version 0x13.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kdf {
    /// `argon2id`.
    pub algorithm: String,
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes.
    pub iterations: u32,
    /// Lanes.
    pub parallelism: u32,
    /// 16 random bytes, hex.
    pub salt: String,
}

impl KeySlot {
    /// Wraps the master key.
    pub(super) fn wrap(
        master: &MasterKey,
        passphrase: &Passphrase,
        label: &str,
        repository: [u8; 16],
    ) -> Result<Self, RepositoryError> {
        let (mut id, mut salt) = ([0; 8], [0; SALT]);
        random(&mut id)?;
        random(&mut salt)?;
        let kdf = Kdf {
            algorithm: "argon2id".into(),
            memory_kib: MEMORY_KIB,
            iterations: ITERATIONS,
            parallelism: PARALLELISM,
            salt: hex(&salt),
        };
        let id = hex(&id);
        let sealed = Sealer::new(ObjectKind::Key, kdf.key(passphrase, &id)?, repository)
            .seal(id.as_bytes(), master.0.as_slice())?;
        Ok(Self { id, created: Timestamp::now(), label: label.to_owned(), kdf, sealed: hex(&sealed) })
    }

    /// The master key, or `None` when the passphrase is another one.
    pub(super) fn unwrap(
        &self,
        passphrase: &Passphrase,
        repository: [u8; 16],
    ) -> Result<Option<MasterKey>, RepositoryError> {
        let damaged = |detail: &str| RepositoryError::damaged(format!("key slot {}", self.id), detail);
        let sealed = unhex(&self.sealed).ok_or_else(|| damaged("its sealed key is not hexadecimal"))?;
        if sealed.len() != SEALED {
            return Err(damaged("its sealed key has the wrong length"));
        }
        let slot_sealer = Sealer::new(ObjectKind::Key, self.kdf.key(passphrase, &self.id)?, repository);
        let Ok(opened) = slot_sealer.open(self.id.as_bytes(), &sealed, "key slot") else {
            return Ok(None);
        };
        let opened = Zeroizing::new(opened);
        let key = opened.as_slice().try_into().map_err(|_| damaged("its key has the wrong length"))?;
        Ok(Some(MasterKey(Zeroizing::new(key))))
    }
}

impl Kdf {
    fn key(&self, passphrase: &Passphrase, slot: &str) -> Result<Zeroizing<[u8; 32]>, RepositoryError> {
        let damaged = |detail: &str| RepositoryError::damaged(format!("key slot {slot}"), detail);
        if self.algorithm != "argon2id" {
            return Err(damaged("its key derivation is unknown"));
        }
        if self.memory_kib > MAX_MEMORY_KIB || self.iterations > MAX_ITERATIONS || self.parallelism > MAX_PARALLELISM {
            return Err(damaged("it asks for more memory or time than any slot that this program makes"));
        }
        let salt = unhex(&self.salt).filter(|salt| salt.len() == SALT);
        let salt = salt.ok_or_else(|| damaged("its salt is not 16 bytes in hexadecimal"))?;
        let params = Params::new(self.memory_kib, self.iterations, self.parallelism, Some(32));
        let params = params.map_err(|_| damaged("its parameters are out of range"))?;
        let mut key = Zeroizing::new([0; 32]);
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into(passphrase.0.as_bytes(), &salt, key.as_mut_slice())
            .map_err(|_| damaged("its salt or parameters are out of range"))?;
        Ok(key)
    }
}

#[cfg(test)]
impl MasterKey {
    /// A key that is known: for test vectors.
    pub(super) fn for_vectors(key: [u8; 32]) -> Self {
        Self(Zeroizing::new(key))
    }
}

#[cfg(test)]
impl Kdf {
    /// Derivation of known cost and salt: for test vectors.
    pub(super) fn for_vectors(passphrase: &Passphrase, salt: [u8; SALT]) -> (Self, Zeroizing<[u8; 32]>) {
        let (memory_kib, iterations, parallelism) = (MEMORY_KIB, ITERATIONS, PARALLELISM);
        let kdf = Self { algorithm: "argon2id".into(), memory_kib, iterations, parallelism, salt: hex(&salt) };
        let key = kdf.key(passphrase, "vector").unwrap();
        (kdf, key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_opens_with_its_passphrase_in_its_repository_only() {
        let master = MasterKey::generate().unwrap();
        let passphrase = Passphrase::new("correct horse".into()).unwrap();
        let slot = KeySlot::wrap(&master, &passphrase, "", [1; 16]).unwrap();
        let slot: KeySlot = serde_json::from_str(&serde_json::to_string(&slot).unwrap()).unwrap();
        let opened = slot.unwrap(&passphrase, [1; 16]).unwrap().unwrap();
        assert_eq!(opened.0, master.0);
        assert!(slot.unwrap(&Passphrase::new("wrong".into()).unwrap(), [1; 16]).unwrap().is_none());
        assert!(slot.unwrap(&passphrase, [2; 16]).unwrap().is_none());
        assert!(!format!("{passphrase:?}").contains("horse"));
    }

    #[test]
    fn a_forged_slot_cannot_ask_for_the_whole_machine() {
        let master = MasterKey::generate().unwrap();
        let passphrase = Passphrase::new("x".into()).unwrap();
        let mut slot = KeySlot::wrap(&master, &passphrase, "", [1; 16]).unwrap();
        slot.kdf.memory_kib = u32::MAX;
        assert!(matches!(slot.unwrap(&passphrase, [1; 16]), Err(RepositoryError::Damaged { .. })));
    }
}
