//! A repository in a directory or in a real S3 server, and the commands of the product against it.

use crate::{
    bed::{
        cli::Cli,
        s3::{S3Server, environment},
        s3_proxy::S3Proxy,
    },
    scene::{Scene, VOLUMES},
};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The passphrase of every repository.
pub(crate) const PASSPHRASE: &str = "an unlikely passphrase";
/// The bucket of every S3 server.
const BUCKET: &str = "backups";

/// A repository.
#[derive(Debug)]
pub(crate) struct Store {
    /// Its address.
    pub(crate) url: String,
    directory: TempDir,
    environment: Vec<(String, String)>,
    /// The server, and what is between it and us.
    pub(crate) s3: Option<(S3Server, S3Proxy)>,
}

impl Store {
    /// In a directory.
    pub(crate) fn directory(chunk_size: u64) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let url = directory.path().join("repository").display().to_string();
        Self { url, directory, environment: Vec::new(), s3: None }.init(chunk_size)
    }

    /// Below this directory.
    pub(crate) fn within(parent: &Path, chunk_size: u64) -> Self {
        let directory = tempfile::tempdir_in(parent).expect("a directory");
        let url = directory.path().join("repository").display().to_string();
        Self { url, directory, environment: Vec::new(), s3: None }.init(chunk_size)
    }

    /// In an S3 server, behind a proxy.
    pub(crate) fn s3(chunk_size: u64) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let server = S3Server::start(directory.path());
        server.create_bucket(BUCKET);
        let proxy = S3Proxy::start(server.address());
        let environment =
            environment(&proxy.endpoint()).into_iter().map(|(name, value)| (name.into(), value)).collect();
        Self { url: format!("s3://{BUCKET}/some/prefix"), directory, environment, s3: Some((server, proxy)) }
            .init(chunk_size)
    }

    /// In a new directory below this one.
    pub(crate) fn below(parent: &Path, chunk_size: u64) -> Self {
        let url = parent.join("repository").display().to_string();
        Self { url, directory: tempfile::tempdir().expect("a directory"), environment: Vec::new(), s3: None }
            .init(chunk_size)
    }

    /// In place of the proxy nobody listens any more.
    pub(crate) fn refuse_connections(&mut self) {
        let (server, proxy) = self.s3.take().expect("a server");
        drop(proxy);
        // What is between us and the server has an address of its own, which nobody else uses now.
        let unused = S3Proxy::start(server.address());
        self.s3 = Some((server, unused));
    }

    /// A new proxy is before the server, which runs.
    pub(crate) fn accept_connections(&mut self) {
        let (_, proxy) = self.s3.as_ref().expect("a server");
        self.environment =
            environment(&proxy.endpoint()).into_iter().map(|(name, value)| (name.into(), value)).collect();
    }

    /// The proxy before the server.
    pub(crate) fn proxy(&self) -> &S3Proxy {
        &self.s3.as_ref().expect("a server").1
    }

    fn init(self, chunk_size: u64) -> Self {
        let size = chunk_size.to_string();
        self.cli(["repository", "init", "--chunk-size", &size]).run().success();
        self
    }

    /// Where the objects are, as files.
    pub(crate) fn path(&self) -> PathBuf {
        match &self.s3 {
            Some((server, _)) => server.bucket(BUCKET).join("some/prefix"),
            None => PathBuf::from(&self.url),
        }
    }

    /// All files with chunks.
    pub(crate) fn chunks(&self) -> Vec<PathBuf> {
        files(&self.path().join("chunks"))
    }

    /// A command with the options that name the repository.
    pub(crate) fn cli<const N: usize>(&self, command: [&str; N]) -> Cli {
        self.with(Cli::new(command))
    }

    /// Adds these options.
    pub(crate) fn with(&self, mut cli: Cli) -> Cli {
        for (name, value) in &self.environment {
            cli = cli.env(name, value);
        }
        cli.env("VIRT_FLEECE_PASSPHRASE", PASSPHRASE).arg("--repository").arg(&self.url)
    }

    /// `virt-fleece backup` of a scene's VM.
    pub(crate) fn backup(&self, scene: &Scene) -> Cli {
        self.backup_as(scene, "web")
    }

    /// The same under another name.
    pub(crate) fn backup_as(&self, scene: &Scene, vm: &str) -> Cli {
        self.with(scene.vm_command("backup")).arg("--vm").arg(vm).arg("-o").arg("json")
    }

    /// Restores a backup; the bytes of its disks in the order of [`VOLUMES`].
    pub(crate) fn restored(&self, id: &str) -> Vec<Vec<u8>> {
        let to = tempfile::tempdir_in(self.directory.path()).expect("a directory");
        self.cli(["restore", "--backup", id]).arg("--output").arg(to.path()).run().success();
        VOLUMES.iter().map(|volume| std::fs::read(to.path().join(format!("{volume}.raw"))).expect("restored")).collect()
    }
}

/// All files below a directory.
pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}
