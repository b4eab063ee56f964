//! A repository in a directory, made through the library: what the tests of the format share.
#![allow(clippy::unwrap_used, reason = "in helpers of tests, too, a panic is how a test fails")]

use crate::bed::flavour::tool;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use virt_fleece::{
    backup::{BackupId, BackupRecord},
    extent::{ByteRange, Piece},
    image::ImageSink as _,
    repository::{
        Base, ChunkPipeline, Location, MANIFEST_VERSION, Manifest, Passphrase, Repository, RepositoryError,
        RepositorySession, StoredVolume, VolumeReader, VolumeWriter,
    },
};

/// Opens every repository of the tests.
pub(crate) const PASSPHRASE: &str = "correct horse battery staple ü";
/// The smallest there is, so that small disks have large indexes.
pub(crate) const CHUNK: usize = 64 << 10;

/// A repository, and a runtime to use it on.
pub(crate) struct RepositoryScene {
    pub(crate) directory: TempDir,
    pub(crate) repository: Arc<Repository>,
    pub(crate) runtime: Runtime,
}

/// A volume to be backed up.
pub(crate) struct Content {
    pub(crate) name: &'static str,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// What is sent.
    pub(crate) pieces: Vec<Piece>,
    /// Below it.
    pub(crate) base: Option<Base>,
}

impl Content {
    /// A whole disk; chunks of zeroes are declared, others come as data.
    pub(crate) fn whole(name: &'static str, disk: &[u8]) -> Self {
        let pieces = disk.chunks(CHUNK).enumerate().map(|(chunk, content)| {
            let offset = (chunk * CHUNK) as u64;
            if content.iter().all(|byte| *byte == 0) {
                Piece::Zero(ByteRange::with_length(offset, content.len() as u64).unwrap())
            } else {
                Piece::Data { offset, bytes: content.to_vec().into() }
            }
        });
        Self { name, size: disk.len() as u64, pieces: pieces.collect(), base: None }
    }
}

impl RepositoryScene {
    /// A new repository.
    pub(crate) fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let directory = TempDir::new().unwrap();
        let storage = location(directory.path()).open().unwrap();
        let repository = runtime.block_on(Repository::init(storage, passphrase(), CHUNK as u64)).unwrap();
        Self { directory, repository, runtime }
    }

    /// Opens it as a new process would.
    pub(crate) fn open(&self) -> Result<Arc<Repository>, RepositoryError> {
        self.runtime.block_on(Repository::open(location(self.directory.path()).open()?, passphrase()))
    }

    /// Makes a backup.
    pub(crate) fn backup(&self, vm: &str, sequence: u64, level: i32, volumes: Vec<Content>) -> Manifest {
        let session = self.runtime.block_on(RepositorySession::start(Arc::clone(&self.repository))).unwrap();
        let session = Arc::new(session);
        let pipeline = ChunkPipeline::new(Arc::clone(&session), level);
        let volumes = volumes.into_iter().map(|volume| self.store(&pipeline, volume)).collect();
        let manifest = Manifest { format_version: MANIFEST_VERSION, backup: record(vm, sequence), volumes };
        self.runtime.block_on(session.commit(&manifest, std::time::Duration::from_secs(60))).unwrap();
        manifest
    }

    fn store(&self, pipeline: &Arc<ChunkPipeline>, volume: Content) -> StoredVolume {
        let mut writer = {
            let _runtime = self.runtime.enter();
            Box::new(VolumeWriter::new(Arc::clone(pipeline), volume.size, volume.base))
        };
        // This thread is none of the runtime's: the writer's calls may block.
        for piece in volume.pieces {
            writer.write(piece).unwrap();
        }
        let sink = writer.finish().unwrap();
        StoredVolume {
            name: volume.name.into(),
            virtual_size: volume.size,
            root: sink.content.unwrap(),
            parent: None,
            full_reason: Some("FirstBackup".into()),
            source_format: "raw".into(),
            bitmap: "a-bitmap".into(),
            dirty_bytes: volume.size,
            read_bytes: volume.size,
            data_bytes: sink.data_bytes,
            zero_bytes: sink.zero_bytes,
            new_bytes: sink.new_bytes,
            stored_bytes: sink.stored_bytes,
        }
    }

    /// What a following backup of this volume stands on.
    pub(crate) fn base(&self, volume: &StoredVolume) -> Base {
        Base { shape: volume.shape(&self.repository), root: volume.root().unwrap(), unchanged_is_inherited: true }
    }

    /// Restores a volume with the library.
    pub(crate) fn read(&self, volume: &StoredVolume) -> Result<Vec<u8>, RepositoryError> {
        let reader = VolumeReader::new(Arc::clone(&self.repository), volume)?;
        let mut disk = Vec::new();
        self.runtime.block_on(async {
            use futures::TryStreamExt as _;
            let mut pieces = std::pin::pin!(reader.pieces());
            while let Some(piece) = pieces.try_next().await? {
                let range = piece.range().unwrap();
                assert_eq!(range.start(), disk.len() as u64, "pieces follow each other");
                match piece {
                    Piece::Data { bytes, .. } => disk.extend_from_slice(&bytes),
                    Piece::Zero(range) => disk.resize(range.end() as usize, 0),
                }
            }
            Ok(disk)
        })
    }

    /// The file of an object.
    pub(crate) fn file(&self, object: &str) -> PathBuf {
        self.directory.path().join(object)
    }

    /// The file of a chunk or page.
    pub(crate) fn chunk_file(&self, hex: &str) -> PathBuf {
        self.file(&format!("chunks/{}/{hex}", &hex[..2]))
    }

    /// Runs the independent reader; `Err` is what it says when it fails.
    pub(crate) fn independent<const N: usize>(&self, arguments: [&str; N]) -> Result<String, String> {
        let secrets = TempDir::new().unwrap();
        let file = secrets.path().join("passphrase");
        fs::write(&file, format!("{PASSPHRASE}\n")).unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader/virt_fleece_reader.py");
        let mut command = Command::new(tool("REPOSITORY_READER_PYTHON"));
        command.arg("-I").arg(script).arg(self.directory.path()).arg("--passphrase-file").arg(file).args(arguments);
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Restores a volume with the independent reader.
    pub(crate) fn read_independently(&self, backup: &BackupId, volume: &str) -> Result<Vec<u8>, String> {
        let outputs = TempDir::new().unwrap();
        let output = outputs.path().join("disk");
        let path = output.to_str().unwrap();
        self.independent(["restore", "--backup", backup.as_str(), "--volume", volume, path])?;
        Ok(fs::read(output).unwrap())
    }
}

/// A repository's place.
pub(crate) fn location(directory: &Path) -> Location {
    Location { url: directory.to_str().unwrap().into(), create: true, ..Location::default() }
}

fn passphrase() -> Passphrase {
    Passphrase::new(PASSPHRASE.into()).unwrap()
}

fn record(vm: &str, sequence: u64) -> BackupRecord {
    let now = jiff::Timestamp::now();
    BackupRecord {
        id: BackupId::generate().unwrap(),
        vm: vm.into(),
        vm_uuid: None,
        parent: None,
        sequence,
        bitmap_line: "00ff00ff".into(),
        point_in_time: now,
        started: now,
        finished: now,
        engine: "job".into(),
        transfer: "pull".into(),
        qemu_version: "10.0.0".into(),
        cut_microseconds: 1,
        quiesce: serde_json::json!({ "state": "not_frozen", "why": "a test" }),
        skipped: Vec::new(),
        tool_version: "0".into(),
        definition: None,
    }
}
