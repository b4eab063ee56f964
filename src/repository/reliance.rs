//! What a backup takes from the one before is as safe from a prune as what it writes: while a list of condemned chunks is
//! out, it is held.

use super::{
    Base, ChunkPipeline, Location, MANIFEST_VERSION, Manifest, Passphrase, PruneOptions, PruneProgress, Repository,
    RepositoryError, RepositorySession, StoredVolume, VolumeReader, VolumeWriter,
    plan::{PLAN, Plan, PlanState},
    process::Process,
};
use crate::{
    backup::{BackupId, BackupRecord},
    extent::Piece,
    image::ImageSink,
};
use futures::TryStreamExt;
use jiff::Timestamp;
use std::{sync::Arc, time::Duration};

const CHUNK: u64 = 64 << 10;
/// Three leaves.
const SIZE: u64 = 2500 * CHUNK;

async fn repository() -> Arc<Repository> {
    let storage = Location { url: "memory:///".into(), ..Location::default() }.open().unwrap();
    Repository::init(storage, Passphrase::new("x".into()).unwrap(), CHUNK).await.unwrap()
}

/// Stores a volume; the calls block.
async fn store(session: &Arc<RepositorySession>, pieces: Vec<(u64, u8)>, base: Option<Base>) -> StoredVolume {
    let mut writer = Box::new(VolumeWriter::new(ChunkPipeline::new(Arc::clone(session), 1), SIZE, base));
    let written = tokio::task::spawn_blocking(move || {
        for (chunk, byte) in pieces {
            let bytes = vec![byte; CHUNK as usize].into();
            writer.write(Piece::Data { offset: chunk * CHUNK, bytes }).unwrap();
        }
        writer.finish().unwrap()
    });
    StoredVolume {
        name: "disk".into(),
        virtual_size: SIZE,
        root: written.await.unwrap().content.unwrap(),
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
    }
}

fn manifest(sequence: u64, volume: StoredVolume) -> Manifest {
    let now = Timestamp::now();
    let backup = BackupRecord {
        id: BackupId::generate().unwrap(),
        vm: "web".into(),
        vm_uuid: None,
        parent: None,
        sequence,
        bitmap_line: String::new(),
        point_in_time: now,
        started: now,
        finished: now,
        engine: String::new(),
        transfer: String::new(),
        qemu_version: String::new(),
        cut_microseconds: 0,
        quiesce: serde_json::Value::Null,
        skipped: Vec::new(),
        tool_version: String::new(),
    };
    Manifest { format_version: MANIFEST_VERSION, backup, volumes: vec![volume] }
}

async fn start(repository: &Arc<Repository>) -> Arc<RepositorySession> {
    Arc::new(RepositorySession::start(Arc::clone(repository)).await.unwrap())
}

/// A first backup with data in the first and third leaf.
async fn first(repository: &Arc<Repository>) -> Manifest {
    let session = start(repository).await;
    let volume = store(&session, vec![(0, 1), (2, 2), (2400, 3)], None).await;
    let first = manifest(1, volume);
    session.commit(&first, std::time::Duration::from_secs(60)).await.unwrap();
    first
}

/// Publishes a list with all that there is, as a prune does that read the backups before the first one was there.
async fn condemn_everything(repository: &Repository, waits_for: Option<Vec<String>>) {
    let mut condemned = Vec::new();
    for object in repository.storage().list_all("chunks").await.unwrap() {
        condemned.extend(super::repository::chunk_of_name(&object.name));
    }
    // A process that has ended: the next prune takes it up.
    let process = Process { started_ticks: 1, ..Process::current() };
    let mut plan = Plan {
        id: "0011223344556677".into(),
        process,
        started: Timestamp::now(),
        state: PlanState::Marked,
        parts: 0,
        condemned: 0,
        bytes: 0,
        waits_for,
    };
    plan.write_list(repository, &condemned).await.unwrap();
    repository.storage().put(PLAN, plan.sealed(repository).unwrap().into()).await.unwrap();
}

async fn prune(repository: &Arc<Repository>) -> u64 {
    let options = PruneOptions { dry_run: false, wait: Duration::ZERO };
    repository.prune(options, &PruneProgress::default()).await.unwrap().deleted_chunks
}

async fn reads(repository: &Arc<Repository>, manifest: &Manifest) -> Result<(), RepositoryError> {
    let reader = VolumeReader::new(Arc::clone(repository), &manifest.volumes[0])?;
    reader.pieces().try_for_each(|_| async { Ok(()) }).await
}

fn base(repository: &Repository, manifest: &Manifest, unchanged_is_inherited: bool) -> Base {
    let volume = &manifest.volumes[0];
    Base { shape: volume.shape(repository), root: volume.root().unwrap(), unchanged_is_inherited }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_outlives_its_base_that_is_forgotten_while_it_runs() {
    for inherited in [true, false] {
        let repository = repository().await;
        let below = first(&repository).await;
        condemn_everything(&repository, Some(Vec::new())).await;
        let session = start(&repository).await;
        assert!(session.adopt(&below).await.unwrap());
        // Changed in the first leaf, which has an inherited chunk; the third one is inherited as a whole.
        let pieces = if inherited { vec![(0, 9)] } else { vec![(0, 1), (2, 2), (2400, 3)] };
        let volume = store(&session, pieces, Some(base(&repository, &below, inherited))).await;
        repository.forget("web", &below.backup.id).await.unwrap();
        prune(&repository).await;
        let second = manifest(2, volume);
        session.commit(&second, std::time::Duration::from_secs(60)).await.unwrap();
        reads(&repository, &second).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_that_was_pruned_before_it_was_adopted_is_none() {
    let repository = repository().await;
    let below = first(&repository).await;
    condemn_everything(&repository, Some(Vec::new())).await;
    let session = start(&repository).await;
    assert!(session.newest("web").await.unwrap().is_some());
    let late = start(&repository).await;
    session.end().await;
    repository.forget("web", &below.backup.id).await.unwrap();
    assert!(prune(&repository).await > 0);
    assert!(!late.adopt(&below).await.unwrap());
    assert!(late.newest("web").await.unwrap().is_none());
    late.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_whose_prune_died_before_it_looked_for_sessions_is_waited_for() {
    let repository = repository().await;
    let below = first(&repository).await;
    // It does not know the list that comes later.
    let session = start(&repository).await;
    condemn_everything(&repository, None).await;
    repository.forget("web", &below.backup.id).await.unwrap();
    assert_eq!(prune(&repository).await, 0);
    let volume = store(&session, vec![(0, 1), (2, 2), (2400, 3)], None).await;
    let second = manifest(2, volume);
    session.commit(&second, std::time::Duration::from_secs(60)).await.unwrap();
    assert_eq!(prune(&repository).await, 0, "everything is needed again");
    reads(&repository, &second).await.unwrap();
}
