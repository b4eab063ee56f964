//! A repository in a directory, with backups that were made up.

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use tempfile::TempDir;
use virt_fleece::backup::{BackupId, BackupRecord};
use virt_fleece::repository::{
    Location, MANIFEST_VERSION, Manifest, Passphrase, Repository, RepositorySession, StoredVolume,
};

use crate::bed::cli::Cli;

/// The passphrase of the repository.
pub(crate) const PASSPHRASE: &str = "correct-horse";

/// A place for a repository.
#[derive(Debug)]
pub(crate) struct RepositoryScene {
    /// Removed at the end.
    _directory: TempDir,
    /// Where the repository is, or will be.
    path: PathBuf,
}

impl RepositoryScene {
    /// Bytes of the one volume of every backup.
    pub(crate) const VOLUME_SIZE: u64 = 10 << 20;

    /// A place where nothing is yet.
    pub(crate) fn new(name: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("virt-fleece-").tempdir().expect("a directory");
        let path = directory.path().canonicalize().expect("a path").join(name);
        Self { _directory: directory, path }
    }

    /// The repository's directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The command with these arguments, on this repository, with its passphrase.
    pub(crate) fn run<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Cli {
        self.with_passphrase(arguments, Some(PASSPHRASE))
    }

    /// `virt-fleece repository …`
    pub(crate) fn repository<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Cli {
        self.run(std::iter::once("repository").chain(arguments))
    }

    /// The same with another passphrase, or with none.
    pub(crate) fn with_passphrase<'a>(
        &self,
        arguments: impl IntoIterator<Item = &'a str>,
        passphrase: Option<&str>,
    ) -> Cli {
        let cli = Cli::new(arguments).arg("--repository").arg(&self.path);
        match passphrase {
            Some(passphrase) => cli.env("VIRT_FLEECE_PASSPHRASE", passphrase),
            None => cli,
        }
    }

    /// Makes the repository.
    pub(crate) fn init(&self) {
        block_on(async {
            let location = Location { create: true, ..self.location() };
            let storage = location.open().expect("a storage");
            Repository::init(storage, passphrase(), 1 << 20).await.expect("a repository");
        });
    }

    /// Adds backups of a VM, as of these instants; their sequences follow those that are there. One volume of zeroes.
    pub(crate) fn commit(&self, vm: &str, times: &[&str]) -> Vec<BackupId> {
        block_on(async {
            let storage = self.location().open().expect("a storage");
            let repository = Repository::open(storage, passphrase()).await.expect("a repository");
            let known = repository.catalogue(Some(vm)).await.expect("a catalogue").manifests.len();
            let mut ids = Vec::new();
            for (sequence, time) in (known as u64 + 1..).zip(times) {
                let manifest = manifest(vm, sequence, time.parse().expect("a time"));
                let session = RepositorySession::start(repository.clone()).await.expect("a session");
                session.commit(&manifest, std::time::Duration::from_secs(60)).await.expect("a commit");
                ids.push(manifest.backup.id);
            }
            ids
        })
    }

    /// Flips a bit in the manifest of a VM's backup with this number.
    pub(crate) fn damage(&self, vm: &str, sequence: u64) -> BackupId {
        let (object, id) = block_on(async {
            let storage = self.location().open().expect("a storage");
            let repository = Repository::open(storage, passphrase()).await.expect("a repository");
            let manifests = repository.catalogue(Some(vm)).await.expect("a catalogue").manifests;
            let found = manifests.into_iter().find(|manifest| manifest.backup.sequence == sequence);
            let id = found.expect("the backup").backup.id;
            (repository.manifest_name(vm, &id), id)
        });
        let path = self.path.join(object);
        let mut content = fs::read(&path).expect("a manifest");
        let middle = content.len() / 2;
        content[middle] ^= 1;
        fs::write(path, content).expect("writing a manifest");
        id
    }

    /// The backups of a VM that are there by their names, damaged or not.
    pub(crate) fn ids(&self, vm: &str) -> Vec<String> {
        let directory = block_on(async {
            let storage = self.location().open().expect("a storage");
            let repository = Repository::open(storage, passphrase()).await.expect("a repository");
            let id = id(1, Timestamp::UNIX_EPOCH);
            self.path.join(repository.manifest_name(vm, &id)).parent().map(Path::to_owned).expect("a directory")
        });
        let entries = fs::read_dir(directory).into_iter().flatten();
        let mut ids: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        ids.sort();
        ids
    }

    fn location(&self) -> Location {
        Location { url: self.path.to_str().expect("a path of text").into(), ..Location::default() }
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(work)
}

fn passphrase() -> Passphrase {
    Passphrase::new(PASSPHRASE.into()).expect("a passphrase")
}

fn id(sequence: u64, at: Timestamp) -> BackupId {
    format!("{}-{sequence:08x}", at.strftime("%Y%m%dT%H%M%SZ")).parse().expect("an id")
}

fn manifest(vm: &str, sequence: u64, at: Timestamp) -> Manifest {
    Manifest {
        format_version: MANIFEST_VERSION,
        backup: BackupRecord {
            id: id(sequence, at),
            vm: vm.to_owned(),
            vm_uuid: None,
            parent: None,
            sequence,
            bitmap_line: "0123abcd".into(),
            point_in_time: at,
            started: at,
            finished: at,
            engine: "job".into(),
            transfer: "pull".into(),
            qemu_version: "10.1.0".into(),
            cut_microseconds: 1000,
            quiesce: serde_json::json!({ "state": "not_frozen" }),
            skipped: Vec::new(),
            tool_version: "0".into(),
            definition: None,
        },
        volumes: vec![StoredVolume {
            name: "rootdisk".into(),
            virtual_size: RepositoryScene::VOLUME_SIZE,
            // The index of zeroes: no chunk is needed.
            root: "0".repeat(64),
            parent: None,
            full_reason: Some("Requested".into()),
            source_format: "raw".into(),
            bitmap: "vf-0123abcd-x".into(),
            dirty_bytes: 0,
            read_bytes: RepositoryScene::VOLUME_SIZE,
            data_bytes: 0,
            zero_bytes: RepositoryScene::VOLUME_SIZE,
            new_bytes: 0,
            stored_bytes: 0,
        }],
    }
}
