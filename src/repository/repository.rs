//! A repository that is open: its keys, its names, its chunks.

use super::{
    RepositoryError,
    chunk::{self, ChunkId, IdKey, MAX_CHUNK_SIZE, MIN_CHUNK_SIZE},
    key::{self, KeySlot, MasterKey, Passphrase},
    seal::{self, ObjectKind, Sealer},
    storage::Storage,
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{fmt, sync::Arc};
use zeroize::Zeroizing;

/// Version of the format: `docs/format.md`.
pub const REPOSITORY_VERSION: u32 = 1;
const FORMAT: &str = "virt-fleece repository";
const CONFIG: &str = "repository.json";
const MAX_CONFIG: u64 = 16 << 10;
/// Most key slots: each costs as much to try as it says.
const MAX_SLOTS: usize = 64;

/// `repository.json`: what has to be known before a key is there.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    format: String,
    version: u32,
    /// 16 random bytes, hex.
    id: String,
    chunk_size: u64,
    /// As it is written: the code must not depend on how another version of this program prints a time.
    created: String,
    /// Keyed BLAKE3 over the other fields, hex.
    mac: String,
}

impl Config {
    fn mac(&self, master: &MasterKey) -> blake3::Hash {
        let text = format!("{}\n{}\n{}\n{}\n{}\n", self.format, self.version, self.id, self.chunk_size, self.created);
        blake3::keyed_hash(&master.derive("config"), text.as_bytes())
    }

    /// Whether it is what was written. Takes the same time whatever is wrong.
    fn is_authentic(&self, master: &MasterKey) -> bool {
        let bytes = key::unhex(&self.mac).and_then(|mac| <[u8; 32]>::try_from(mac).ok());
        bytes.is_some_and(|mac| blake3::Hash::from_bytes(mac) == self.mac(master))
    }
}

fn is_chunk_size(bytes: u64) -> bool {
    bytes.is_power_of_two() && (MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&bytes)
}

/// An open repository.
pub struct Repository {
    storage: Storage,
    id: [u8; 16],
    chunk_size: u64,
    created: Timestamp,
    master: MasterKey,
    ids: IdKey,
    vm_tags: Zeroizing<[u8; 32]>,
    chunks: Sealer,
    manifests: Sealer,
    sessions: Sealer,
    prunes: Sealer,
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repository").field("url", &self.storage.url()).finish_non_exhaustive()
    }
}

impl Repository {
    /// Makes a repository in an empty place. The config is written last: its presence makes the repository.
    pub async fn init(storage: Storage, passphrase: Passphrase, chunk_size: u64) -> Result<Arc<Self>, RepositoryError> {
        if !is_chunk_size(chunk_size) {
            return Err(RepositoryError::Invalid(format!(
                "a chunk size is a power of two from {} KiB to {} MiB, not {chunk_size} bytes",
                MIN_CHUNK_SIZE >> 10,
                MAX_CHUNK_SIZE >> 20
            )));
        }
        let not_empty = |found: String| RepositoryError::NotEmpty { url: storage.url().to_owned(), found };
        if let Some(object) = storage.list("").try_next().await? {
            return Err(not_empty(object.name));
        }
        let mut id = [0; 16];
        key::random(&mut id)?;
        let master = MasterKey::generate()?;
        let created = Timestamp::now();
        let mut config = Config {
            format: FORMAT.into(),
            version: REPOSITORY_VERSION,
            id: key::hex(&id),
            chunk_size,
            created: created.to_string(),
            mac: String::new(),
        };
        config.mac = config.mac(&master).to_hex().to_string();
        let slot = wrap(master.clone(), passphrase, String::new(), id).await?;
        storage.create(&slot_name(&slot.id), json(&slot)).await?;
        if !storage.create(CONFIG, json(&config)).await? {
            // Somebody was faster; the slot belongs to nothing.
            storage.delete(&slot_name(&slot.id)).await?;
            return Err(not_empty(CONFIG.into()));
        }
        Ok(Arc::new(Self::with_key(storage, id, chunk_size, created, master)))
    }

    /// Opens a repository.
    pub async fn open(storage: Storage, passphrase: Passphrase) -> Result<Arc<Self>, RepositoryError> {
        let config = storage.get(CONFIG, MAX_CONFIG).await?;
        let config = config.ok_or_else(|| RepositoryError::Missing { url: storage.url().to_owned() })?;
        let damaged = |detail: String| RepositoryError::damaged(CONFIG, detail);
        let version: Version = serde_json::from_slice(&config).map_err(|error| damaged(error.to_string()))?;
        if version.format != FORMAT {
            return Err(damaged("it is not a repository of this program".into()));
        }
        if version.version > REPOSITORY_VERSION {
            let (found, known) = (version.version, REPOSITORY_VERSION);
            return Err(RepositoryError::TooNew { object: CONFIG.into(), found, known });
        }
        let config: Config = serde_json::from_slice(&config).map_err(|error| damaged(error.to_string()))?;
        let id = key::unhex(&config.id).and_then(|id| id.try_into().ok());
        let id: [u8; 16] = id.ok_or_else(|| damaged("its id is not 32 hex digits".into()))?;
        // Before anything is done with them, though a right one is authentic: whoever has the key may write others.
        if !is_chunk_size(config.chunk_size) {
            return Err(damaged(format!("it claims chunks of {} bytes", config.chunk_size)));
        }
        let created = config.created.parse().map_err(|_| damaged("it does not say when it was made".into()))?;
        let master = unlock(&storage, passphrase, id).await?;
        if !config.is_authentic(&master) {
            return Err(damaged("it was changed: its authentication code is wrong".into()));
        }
        Ok(Arc::new(Self::with_key(storage, id, config.chunk_size, created, master)))
    }

    fn with_key(storage: Storage, id: [u8; 16], chunk_size: u64, created: Timestamp, master: MasterKey) -> Self {
        let sealer = |kind, purpose: &str| Sealer::new(kind, master.derive(purpose), id);
        Self {
            storage,
            id,
            chunk_size,
            created,
            ids: IdKey(master.derive("chunk id")),
            vm_tags: master.derive("vm tag"),
            chunks: sealer(ObjectKind::Chunk, "chunk"),
            manifests: sealer(ObjectKind::Manifest, "manifest"),
            sessions: sealer(ObjectKind::Session, "session"),
            prunes: sealer(ObjectKind::Prune, "prune"),
            master,
        }
    }

    /// Where it is.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Its id, 32 hex digits.
    pub fn id(&self) -> String {
        key::hex(&self.id)
    }

    /// Bytes of a chunk.
    pub fn chunk_size(&self) -> u64 {
        self.chunk_size
    }

    /// When it was made.
    pub fn created(&self) -> Timestamp {
        self.created
    }

    /// The key slots, oldest first.
    pub async fn key_slots(&self) -> Result<Vec<KeySlot>, RepositoryError> {
        slots(&self.storage).await
    }

    /// Adds a passphrase.
    pub async fn add_key(&self, passphrase: Passphrase, label: String) -> Result<KeySlot, RepositoryError> {
        if self.storage.list_all("keys").await?.len() >= MAX_SLOTS {
            return Err(RepositoryError::Invalid(format!(
                "there are {MAX_SLOTS} key slots already, no more are possible"
            )));
        }
        let slot = wrap(self.master.clone(), passphrase, label, self.id).await?;
        self.storage.create(&slot_name(&slot.id), json(&slot)).await?;
        Ok(slot)
    }

    /// Removes a key slot; the last one stays.
    pub async fn remove_key(&self, slot: &str) -> Result<(), RepositoryError> {
        let slots = self.key_slots().await?;
        if !slots.iter().any(|known| known.id == slot) {
            let known = slots.iter().map(|slot| slot.id.as_str()).collect::<Vec<_>>().join(", ");
            return Err(RepositoryError::NotFound { what: format!("key slot {slot}"), known });
        }
        if slots.len() == 1 {
            return Err(RepositoryError::LastKey { slot: slot.to_owned() });
        }
        let name = slot_name(slot);
        let content = self.storage.require(&name, key::MAX_SLOT).await?;
        self.storage.delete(&name).await?;
        // Somebody else may have removed the others meanwhile, and none of two that do so knows which one was last.
        let left = self.key_slots().await;
        if left.as_ref().is_ok_and(|left| !left.is_empty()) {
            return Ok(());
        }
        self.storage.put_durably(&name, content).await?;
        left?;
        Err(RepositoryError::LastKey { slot: slot.to_owned() })
    }

    /// The id of content.
    pub fn chunk_id(&self, content: &[u8]) -> ChunkId {
        self.ids.id(content)
    }

    /// Reads a chunk of exactly `length` bytes, and proves that it is the right one.
    pub async fn read_chunk(self: &Arc<Self>, id: ChunkId, length: u64) -> Result<Vec<u8>, RepositoryError> {
        let name = chunk_name(id);
        let limit = length + 1 + seal::OVERHEAD as u64;
        let object = self.storage.require(&name, limit).await?;
        let this = Arc::clone(self);
        let opened = tokio::task::spawn_blocking(move || {
            let mut object = Vec::from(object);
            let packed = this.chunks.open_in_place(id.as_bytes(), &mut object, &name)?;
            let content = chunk::unpack(packed, length as usize, &name)?;
            if this.ids.id(&content) == id {
                Ok(content)
            } else {
                Err(RepositoryError::damaged(name, "its content is not what its name says"))
            }
        });
        opened.await.map_err(|_| RepositoryError::WorkerDied)?
    }

    /// What stands for a VM's name in names of objects, so that the storage does not learn it: 32 hex digits.
    pub(super) fn vm_tag(&self, vm: &str) -> String {
        key::hex(&blake3::keyed_hash(&self.vm_tags, vm.as_bytes()).as_bytes()[..16])
    }

    pub(super) fn chunks(&self) -> &Sealer {
        &self.chunks
    }

    pub(super) fn manifests(&self) -> &Sealer {
        &self.manifests
    }

    pub(super) fn sessions(&self) -> &Sealer {
        &self.sessions
    }

    pub(super) fn prunes(&self) -> &Sealer {
        &self.prunes
    }
}

#[derive(Deserialize)]
struct Version {
    format: String,
    version: u32,
}

/// Name of a chunk's object.
pub(super) fn chunk_name(id: ChunkId) -> String {
    let hex = id.to_hex();
    format!("chunks/{}/{hex}", &hex[..2])
}

#[cfg(test)]
impl Repository {
    /// One with known keys, and its `repository.json`: for test vectors.
    pub(super) fn for_vectors(storage: Storage, id: [u8; 16], master: MasterKey) -> (Self, String) {
        let created = "2026-11-25T01:02:03.5Z".to_owned();
        let (format, version, chunk_size) = (FORMAT.into(), REPOSITORY_VERSION, MIN_CHUNK_SIZE);
        let mut config = Config { format, version, id: key::hex(&id), chunk_size, created, mac: String::new() };
        config.mac = config.mac(&master).to_hex().to_string();
        let document = String::from_utf8(json(&config).to_vec()).unwrap();
        let created = config.created.parse().unwrap();
        (Self::with_key(storage, id, chunk_size, created, master), document)
    }
}

/// The chunk that an object's name stands for.
pub(super) fn chunk_of_name(name: &str) -> Option<ChunkId> {
    let (directory, hex) = name.strip_prefix("chunks/")?.split_once('/')?;
    let id = ChunkId::from_hex(hex)?;
    (hex.get(..2) == Some(directory)).then_some(id)
}

fn is_slot_id(id: &str) -> bool {
    key::unhex(id).is_some_and(|id| id.len() == 8)
}

fn slot_name(id: &str) -> String {
    format!("keys/{id}.json")
}

pub(super) fn json<T: Serialize>(document: &T) -> Bytes {
    serde_json::to_vec_pretty(document).unwrap_or_default().into()
}

async fn slots(storage: &Storage) -> Result<Vec<KeySlot>, RepositoryError> {
    let objects: Vec<_> = storage.list("keys").take(MAX_SLOTS + 1).try_collect().await?;
    if objects.len() > MAX_SLOTS {
        return Err(RepositoryError::damaged("keys", format!("there are more than {MAX_SLOTS} key slots")));
    }
    let mut slots = Vec::new();
    for object in objects {
        let bytes = match storage.get(&object.name, key::MAX_SLOT).await {
            Ok(Some(bytes)) => bytes,
            // Removed since it was listed.
            Ok(None) => continue,
            Err(RepositoryError::Damaged { .. }) => Bytes::new(),
            Err(error) => return Err(error),
        };
        match serde_json::from_slice::<KeySlot>(&bytes) {
            // The id is shown to people.
            Ok(slot) if is_slot_id(&slot.id) && slot_name(&slot.id) == object.name => slots.push(slot),
            // One that is damaged must not keep the others from opening.
            _ => tracing::warn!(object = object.name, "a key slot is damaged"),
        }
    }
    slots.sort_by(|left, right| (left.created, &left.id).cmp(&(right.created, &right.id)));
    Ok(slots)
}

async fn wrap(
    master: MasterKey,
    passphrase: Passphrase,
    label: String,
    repository: [u8; 16],
) -> Result<KeySlot, RepositoryError> {
    let wrapped = tokio::task::spawn_blocking(move || KeySlot::wrap(&master, &passphrase, &label, repository));
    wrapped.await.map_err(|_| RepositoryError::WorkerDied)?
}

async fn unlock(storage: &Storage, passphrase: Passphrase, repository: [u8; 16]) -> Result<MasterKey, RepositoryError> {
    let slots = slots(storage).await?;
    let tried = slots.len();
    if tried == 0 {
        return Err(RepositoryError::damaged("keys", "no key slot is left: nothing can be read"));
    }
    let unlocked = tokio::task::spawn_blocking(move || {
        let mut failure = None;
        for slot in slots {
            match slot.unwrap(&passphrase, repository) {
                Ok(Some(master)) => return Ok(master),
                Ok(None) => {}
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or(RepositoryError::WrongPassphrase { slots: tried }))
    });
    unlocked.await.map_err(|_| RepositoryError::WorkerDied)?
}
