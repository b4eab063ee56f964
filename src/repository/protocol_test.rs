//! Plays sessions and prunes out of order: every request to the storage takes a random (virtual) time, sessions and
//! prunes die or stand still at any of them. Whatever the order, every backup that was committed is whole, and what
//! nobody needs is gone in the end.

use super::{
    ChunkPipeline, Manifest, Passphrase, PruneOptions, PruneProgress, Repository, RepositoryError, RepositorySession,
    Storage, StoredVolume, VolumeReader,
    chunk::{ChunkId, MIN_CHUNK_SIZE},
    manifest::MANIFEST_VERSION,
};
use crate::backup::{BackupId, BackupRecord};
use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use jiff::Timestamp;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// Contents that backups are made of: few, so that they meet all the time.
const CONTENTS: u64 = 10;
/// Chunks of a volume.
const CHUNKS: usize = 4;

/// splitmix64
#[derive(Debug, Clone, Copy)]
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// A storage whose requests take their time, with a clock of its own.
#[derive(Debug)]
struct Slow {
    inner: InMemory,
    random: Mutex<Random>,
    began: Instant,
    written: Mutex<HashMap<Path, Duration>>,
    /// Writes of this session stand still.
    frozen: Mutex<HashSet<String>>,
}

impl std::fmt::Display for Slow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("slow")
    }
}

impl Slow {
    fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: InMemory::new(),
            random: Mutex::new(Random(seed)),
            began: Instant::now(),
            written: Mutex::default(),
            frozen: Mutex::default(),
        })
    }

    async fn wait(&self) {
        let delay = {
            let mut random = self.random.lock().unwrap();
            // Mostly short, now and then long: the order is what matters.
            match random.next(12) {
                0 => random.next(20_000),
                1..4 => random.next(2_000),
                _ => random.next(200),
            }
        };
        sleep(Duration::from_millis(delay)).await;
    }

    fn dated(&self, mut meta: ObjectMeta) -> ObjectMeta {
        let written = self.written.lock().unwrap().get(&meta.location).copied().unwrap_or_default();
        meta.last_modified = <_ as Default>::default();
        meta.last_modified += written + Duration::from_secs(1_000_000);
        meta
    }
}

#[async_trait]
impl ObjectStore for Slow {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.wait().await;
        while self.frozen.lock().unwrap().contains(location.as_ref()) {
            sleep(Duration::from_secs(7)).await;
        }
        let result = self.inner.put_opts(location, payload, opts).await?;
        self.written.lock().unwrap().insert(location.clone(), self.began.elapsed());
        self.wait().await;
        Ok(result)
    }

    async fn put_multipart_opts(&self, to: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.wait().await;
        let mut got = self.inner.get_opts(location, options).await?;
        got.meta = self.dated(got.meta);
        self.wait().await;
        Ok(got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let delay = self.random.lock().unwrap().next(3_000);
        let slow = locations.then(move |location| async move {
            sleep(Duration::from_millis(delay)).await;
            location
        });
        self.inner.delete_stream(slow.boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let delay = self.random.lock().unwrap().next(3_000);
        // One consistent view, as S3 gives, but an old one by the time it is used.
        let dates = self.written.lock().unwrap().clone();
        let listed = self.inner.list(prefix).map(move |meta| {
            meta.map(|mut meta| {
                meta.last_modified = <_ as Default>::default();
                meta.last_modified +=
                    dates.get(&meta.location).copied().unwrap_or_default() + Duration::from_secs(1_000_000);
                meta
            })
        });
        let late = futures::stream::once(async move {
            sleep(Duration::from_millis(delay)).await;
            futures::stream::empty()
        });
        listed.chain(late.flatten()).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

fn content(number: u64) -> Vec<u8> {
    let mut content = vec![0; MIN_CHUNK_SIZE as usize];
    content[..8].copy_from_slice(&(number + 1).to_le_bytes());
    content
}

fn manifest(vm: &str, sequence: u64, root: ChunkId) -> Manifest {
    let now = Timestamp::UNIX_EPOCH;
    Manifest {
        format_version: MANIFEST_VERSION,
        backup: BackupRecord {
            id: BackupId::generate().unwrap(),
            vm: vm.into(),
            vm_uuid: None,
            parent: None,
            sequence,
            bitmap_line: "0".into(),
            point_in_time: now,
            started: now,
            finished: now,
            engine: "job".into(),
            transfer: "pull".into(),
            qemu_version: String::new(),
            cut_microseconds: 0,
            quiesce: serde_json::Value::Null,
            skipped: Vec::new(),
            tool_version: String::new(),
            definition: None,
        },
        volumes: vec![StoredVolume {
            name: "v".into(),
            virtual_size: MIN_CHUNK_SIZE * CHUNKS as u64,
            root: root.to_hex(),
            parent: None,
            full_reason: None,
            source_format: "raw".into(),
            bitmap: String::new(),
            dirty_bytes: 0,
            read_bytes: 0,
            data_bytes: 0,
            zero_bytes: 0,
            new_bytes: 0,
            stored_bytes: 0,
        }],
    }
}

/// One backup, which inherits some chunks from the one before, as an incremental one does.
async fn back_up(
    repository: &Arc<Repository>,
    slow: &Slow,
    vm: &str,
    mut random: Random,
) -> Result<(), RepositoryError> {
    let session = Arc::new(RepositorySession::start(Arc::clone(repository)).await?);
    let latest = session.newest(vm).await?;
    let sequence = latest.as_ref().map_or(1, |latest| latest.backup.sequence + 1);
    let mut inherited = vec![ChunkId::ZERO; CHUNKS];
    if let Some(latest) = &latest {
        let mut reader = VolumeReader::new(Arc::clone(repository), &latest.volumes[0])?;
        for (chunk, id) in inherited.iter_mut().enumerate() {
            *id = reader.chunk_id(chunk as u64).await?;
        }
    }
    let pipeline = ChunkPipeline::new(Arc::clone(&session), 1);
    for id in &mut inherited {
        if random.next(3) > 0 {
            *id = pipeline.store_plain(content(random.next(CONTENTS)), None).await?;
        }
        sleep(Duration::from_millis(random.next(90_000))).await;
    }
    if random.next(8) == 0 {
        // Stands still, sign of life included, for longer than anybody waits.
        slow.frozen.lock().unwrap().insert(session.name().to_owned());
        sleep(Duration::from_secs(random.next(3 * 3600))).await;
        slow.frozen.lock().unwrap().remove(session.name());
    }
    let root = pipeline.store_plain(super::index::page_bytes(&inherited), None).await?;
    // Given up in the middle now and then.
    let limit = Duration::from_secs(if random.next(3) == 0 { random.next(30) } else { 600 });
    session.commit(&manifest(vm, sequence, root), limit).await
}

/// Every backup that is there is whole.
async fn assert_whole(repository: &Arc<Repository>, when: &str) {
    let catalogue = repository.catalogue(None).await.unwrap();
    assert!(catalogue.damaged.is_empty(), "{when}: {:?}", catalogue.damaged);
    for manifest in catalogue.manifests {
        let mut reader = VolumeReader::new(Arc::clone(repository), &manifest.volumes[0]).unwrap();
        for chunk in 0..CHUNKS as u64 {
            let read = async {
                let id = reader.chunk_id(chunk).await?;
                if !id.is_zero() {
                    repository.read_chunk(id, MIN_CHUNK_SIZE).await?;
                }
                Ok::<_, RepositoryError>(())
            };
            if let Err(error) = read.await {
                // It may have been forgotten and pruned while this looked at it.
                let there = repository.has_backup(&manifest.backup.vm, &manifest.backup.id).await.unwrap();
                assert!(!there, "{when}: backup {} lost chunk {chunk}: {error}", manifest.backup.id);
            }
        }
    }
}

async fn play(seed: u64) {
    let slow = Slow::new(seed);
    let store: Arc<dyn ObjectStore> = Arc::<Slow>::clone(&slow);
    let storage = Storage::new(Arc::clone(&store), store, Path::default(), "memory", None);
    let passphrase = Passphrase::new("x".into()).unwrap();
    let repository = Repository::init(storage, passphrase, MIN_CHUNK_SIZE).await.unwrap();
    let mut random = Random(seed.wrapping_mul(77));
    let mut actors = Vec::new();
    for actor in 0..3 {
        let (repository, slow) = (Arc::clone(&repository), Arc::clone(&slow));
        let mut random = Random(random.next(u64::MAX));
        actors.push(tokio::spawn(async move {
            let vm = format!("vm{}", actor % 2);
            for _ in 0..6 {
                let run = back_up(&repository, &slow, &vm, Random(random.next(u64::MAX)));
                if random.next(4) == 0 {
                    // Killed somewhere.
                    let _ = tokio::time::timeout(Duration::from_millis(random.next(120_000)), run).await;
                } else if let Err(error) = run.await {
                    assert!(
                        matches!(
                            error,
                            RepositoryError::SessionLost { .. }
                                | RepositoryError::Busy { .. }
                                | RepositoryError::Local { .. }
                        ),
                        "seed {seed}: {error}"
                    );
                }
                sleep(Duration::from_secs(random.next(200))).await;
            }
        }));
    }
    for _ in 0..2 {
        let repository = Arc::clone(&repository);
        let mut random = Random(random.next(u64::MAX));
        actors.push(tokio::spawn(async move {
            for _ in 0..8 {
                // Most of what there is: what comes next wants chunks that are condemned.
                if let Ok(catalogue) = repository.catalogue(None).await {
                    for victim in catalogue.manifests.iter().map(|manifest| &manifest.backup) {
                        if random.next(4) > 0 {
                            repository.forget(&victim.vm, &victim.id).await.unwrap();
                        }
                    }
                }
                let options = PruneOptions { dry_run: false, wait: Duration::from_secs(random.next(900)) };
                let progress = PruneProgress::default();
                let prune = repository.prune(options, &progress);
                if random.next(4) == 0 {
                    let _ = tokio::time::timeout(Duration::from_millis(random.next(60_000)), prune).await;
                } else {
                    let _ = prune.await;
                }
                assert_whole(&repository, &format!("seed {seed}")).await;
                sleep(Duration::from_secs(random.next(300))).await;
            }
        }));
    }
    for actor in actors {
        actor.await.unwrap();
    }
    // Everybody is done or dead: in the end nothing is left that nobody needs.
    sleep(Duration::from_secs(3600)).await;
    for _ in 0..2 {
        let options = PruneOptions { dry_run: false, wait: Duration::from_secs(7200) };
        repository.prune(options, &PruneProgress::default()).await.unwrap();
    }
    assert_whole(&repository, &format!("seed {seed}, in the end")).await;
    let again = PruneOptions { dry_run: true, wait: Duration::ZERO };
    let left = repository.prune(again, &PruneProgress::default()).await.unwrap();
    assert_eq!(left.condemned_chunks, 0, "seed {seed}: garbage is left");
}

#[test]
fn no_order_of_events_loses_a_chunk() {
    let rounds = std::env::var("VIRT_FLEECE_PROTOCOL_ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
    let first = std::env::var("VIRT_FLEECE_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let first = first.unwrap_or_else(|| u64::from(getrandom::u32().unwrap()));
    for seed in first..first + rounds.unwrap_or(100) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(play(seed))));
        if let Err(panic) = played {
            eprintln!("VIRT_FLEECE_TEST_SEED={seed} VIRT_FLEECE_PROTOCOL_ROUNDS=1 plays it again");
            std::panic::resume_unwind(panic);
        }
    }
}
