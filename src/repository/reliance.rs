//! What a backup takes from the one before is as safe from a prune as what it writes: while a list of condemned chunks is
//! out, it is held.

use super::{
    Base, ChunkPipeline, Location, MANIFEST_VERSION, Manifest, Passphrase, PruneOptions, PruneProgress, PruneSummary,
    Repository, RepositoryError, RepositorySession, StoredVolume, VolumeReader, VolumeWriter,
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
/// How long a commit may take.
const LIMIT: Duration = Duration::from_secs(60);
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
        definition: None,
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
    session.commit(&first, LIMIT).await.unwrap();
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

async fn try_prune(repository: &Arc<Repository>) -> Result<PruneSummary, RepositoryError> {
    let options = PruneOptions { dry_run: false, wait: Duration::ZERO };
    repository.prune(options, &PruneProgress::default()).await
}

async fn prune(repository: &Arc<Repository>) -> u64 {
    try_prune(repository).await.unwrap().deleted_chunks
}

async fn load(repository: &Repository) -> Plan {
    Plan::load(repository).await.unwrap().unwrap()
}

async fn save(repository: &Repository, plan: &Plan) {
    repository.storage().put(PLAN, plan.sealed(repository).unwrap().into()).await.unwrap();
}

/// All objects of prunes.
async fn prune_objects(repository: &Repository) -> Vec<String> {
    repository.storage().list_all("prune").await.unwrap().into_iter().map(|object| object.name).collect()
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
        session.commit(&second, LIMIT).await.unwrap();
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
    session.commit(&second, LIMIT).await.unwrap();
    assert_eq!(prune(&repository).await, 0, "everything is needed again");
    reads(&repository, &second).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_holds_much_holds_all() {
    let repository = repository().await;
    let session = start(&repository).await;
    let pieces: Vec<_> = (0..200).map(|chunk| (chunk, chunk as u8 + 1)).collect();
    let below = manifest(1, store(&session, pieces.clone(), None).await);
    session.commit(&below, LIMIT).await.unwrap();
    condemn_everything(&repository, Some(Vec::new())).await;
    let session = start(&repository).await;
    // Without the base: each chunk is looked for by itself.
    let volume = store(&session, pieces, None).await;
    repository.forget("web", &below.backup.id).await.unwrap();
    let sessions = repository.running_sessions().await.unwrap();
    let object = sessions[0].2.as_ref().unwrap();
    assert!(object.holds_all && object.holds.len() < 100, "{} holds", object.holds.len());
    let summary = try_prune(&repository).await.unwrap();
    assert_eq!((summary.deleted_chunks, summary.rescued_chunks), (0, summary.condemned_chunks));
    let second = manifest(2, volume);
    session.commit(&second, LIMIT).await.unwrap();
    reads(&repository, &second).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_that_is_not_whole_is_used_by_nobody_and_made_anew() {
    let repository = repository().await;
    let below = first(&repository).await;
    for damage in ["a part is missing", "a part is too long", "too few", "flipped"] {
        condemn_everything(&repository, Some(Vec::new())).await;
        let mut plan = load(&repository).await;
        let part = plan.part_name(0);
        let storage = repository.storage();
        match damage {
            "a part is missing" => storage.delete(&part).await.unwrap(),
            "a part is too long" => {
                let object = storage.require(&part, 1 << 20).await.unwrap();
                let mut ids = repository.prunes().open(part.as_bytes(), &object, &part).unwrap();
                ids.push(0);
                let sealed = repository.prunes().seal(part.as_bytes(), &ids).unwrap();
                storage.put(&part, sealed.into()).await.unwrap();
            }
            "too few" => {
                plan.condemned += 1;
                save(&repository, &plan).await;
            }
            _ => storage.put(&part, b"no list".as_slice().into()).await.unwrap(),
        }
        let refused = RepositorySession::start(Arc::clone(&repository)).await.unwrap_err();
        assert!(matches!(refused, RepositoryError::Damaged { .. }), "{damage}: {refused}");
        assert!(repository.running_sessions().await.unwrap().is_empty(), "{damage}: the session stays");
        let summary = try_prune(&repository).await.unwrap();
        assert!(!summary.resumed && summary.deleted_chunks == 0, "{damage}: {summary:?}");
        assert_eq!(prune_objects(&repository).await, Vec::<String>::new(), "{damage}");
        reads(&repository, &below).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_runs_on_another_machine_counts_as_running() {
    let repository = repository().await;
    let below = first(&repository).await;
    let foreign = Process { boot_id: "another boot".into(), started_ticks: 1, ..Process::current() };
    assert_eq!(foreign.has_ended(), None);
    for state in [PlanState::Marking, PlanState::Sweeping] {
        condemn_everything(&repository, Some(Vec::new())).await;
        let plan = Plan { process: foreign.clone(), state, ..load(&repository).await };
        save(&repository, &plan).await;
        let busy = try_prune(&repository).await.unwrap_err();
        assert!(matches!(busy, RepositoryError::Busy { .. }), "{state:?}: {busy}");
        assert!(busy.to_string().contains(&foreign.to_string()), "{state:?}: {busy}");
        assert!(!prune_objects(&repository).await.iter().any(|name| name.contains("clock")), "{state:?}");
    }
    repository.storage().delete(PLAN).await.unwrap();

    // A session, too; its sign of life is young.
    let session = start(&repository).await;
    let name = session.name().to_owned();
    let (_, _, object) = repository.running_sessions().await.unwrap().remove(0);
    session.end().await;
    let object = super::session::SessionObject { process: foreign.clone(), ..object.unwrap() };
    let sealed = repository.sessions().seal(name.as_bytes(), &serde_json::to_vec(&object).unwrap()).unwrap();
    repository.storage().put(&name, sealed.into()).await.unwrap();
    repository.forget("web", &below.backup.id).await.unwrap();
    let waits = try_prune(&repository).await.unwrap();
    assert_eq!((waits.deleted_chunks, waits.waits_for.len()), (0, 1), "{waits:?}");
    assert!(waits.waits_for[0].starts_with(&foreign.to_string()), "{waits:?}");
    // Of a process that ended here, nobody waits.
    let ended = super::session::SessionObject { process: Process { started_ticks: 1, ..Process::current() }, ..object };
    let sealed = repository.sessions().seal(name.as_bytes(), &serde_json::to_vec(&ended).unwrap()).unwrap();
    repository.storage().put(&name, sealed.into()).await.unwrap();
    let done = try_prune(&repository).await.unwrap();
    assert!(done.resumed && done.deleted_chunks > 0 && done.waits_for.is_empty(), "{done:?}");
    assert!(repository.running_sessions().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_key_that_can_be_read_stays() {
    let repository = repository().await;
    let slot = repository.key_slots().await.unwrap().remove(0);
    // One that cannot be read is none.
    repository.storage().put("keys/0011223344556677.json", b"{".as_slice().into()).await.unwrap();
    let refused = repository.remove_key(&slot.id).await.unwrap_err();
    assert!(matches!(refused, RepositoryError::LastKey { .. }), "{refused}");
    let second = repository.add_key(Passphrase::new("y".into()).unwrap(), String::new()).await.unwrap();
    // Two that each remove another one at the same time.
    let (one, other) = tokio::join!(repository.remove_key(&slot.id), repository.remove_key(&second.id));
    assert!(one.is_err() || other.is_err());
    assert!(!repository.key_slots().await.unwrap().is_empty());
}
