//! A cluster without nodes: a real etcd and a real kube-apiserver, as processes of the test.
//!
//! `tests/cluster/README.md` says what it leaves out: there are no controllers, so nothing owned is collected, no
//! namespace ends, and a pod that a test creates never runs. The scripts of that directory prepare it; here its
//! servers are children of the test, which a test can kill and start again and which never outlive it.
#![allow(dead_code, reason = "a test bed offers more than the tests of the day take")]

mod client;
mod server;
mod tests;

pub(crate) use client::{BoundTo, Helm, Kubectl};
pub(crate) use server::Server;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use std::{env, fs};

use tempfile::TempDir;

/// A running cluster; dropping it kills the servers and removes what they hold.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// Holds keys, data and logs: `tests/cluster/prepare` made it.
    directory: TempDir,
    /// Where the API server keeps everything.
    etcd: server::Process,
    /// The API server.
    api_server: server::Process,
}

impl Cluster {
    /// Starts an empty one and waits until it serves.
    pub(crate) fn start() -> Self {
        // etcd keeps its data in memory where it can: what is lost with the machine is not in the tests.
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { env::temp_dir() };
        remove_leftovers(&parent);
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent).expect("a directory");
        script("prepare", directory.path(), &[]);
        let etcd = server::Process::start(directory.path(), Server::Etcd);
        let api_server = server::Process::start(directory.path(), Server::ApiServer);
        let cluster = Self { directory, etcd, api_server };
        cluster.wait_until_ready();
        cluster
    }

    /// The API server's URL.
    pub(crate) fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.read("port").trim())
    }

    /// The certificate (PEM) of the authority that signed the API server's.
    pub(crate) fn authority(&self) -> String {
        self.read("pki/ca.crt")
    }

    /// The kubeconfig of the administrator; it names no other file.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("admin.kubeconfig")
    }

    /// kubectl as the administrator.
    pub(crate) fn admin(&self) -> Kubectl {
        Kubectl::new(self.directory.path(), self.kubeconfig())
    }

    /// kubectl as a user in groups, by a certificate: `user("system:node:a", &["system:nodes"])` is the kubelet of
    /// node `a`.
    pub(crate) fn user(&self, name: &str, groups: &[&str]) -> Kubectl {
        let kubeconfig = script("credential", self.directory.path(), &[&[name], groups].concat());
        self.client("user", &kubeconfig)
    }

    /// kubectl with a token, such as [`Kubectl::token`] makes.
    pub(crate) fn bearer(&self, token: &str) -> Kubectl {
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: cluster\n\
             contexts: [{{name: cluster, context: {{cluster: cluster, user: user}}}}]\n\
             clusters: [{{name: cluster, cluster: {{server: '{}', certificate-authority: '{}'}}}}]\n\
             users: [{{name: user, user: {{token: '{token}'}}}}]\n",
            self.url(),
            self.directory.path().join("pki/ca.crt").display(),
        );
        self.client("token", &kubeconfig)
    }

    /// Creates a namespace, with the service account `default` that the controllers of a whole cluster would put there.
    pub(crate) fn create_namespace(&self, name: &str) {
        script("namespace", self.directory.path(), &[name]);
    }

    /// Installs KubeVirt's resources, in the shapes that the tests need, and waits until they are served.
    pub(crate) fn install_kubevirt(&self) {
        let directory = scripts().join("kubevirt");
        let directory = directory.to_str().expect("a path in UTF-8");
        self.admin().run(["apply", "--server-side", "-f", directory]);
        // kubectl fails rather than waits while a definition has no conditions at all.
        let wait = ["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"];
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(error) = self.admin().attempt(wait) {
            assert!(Instant::now() < deadline, "{error}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Registers a node. Nothing runs there.
    pub(crate) fn create_node(&self, name: &str) {
        self.admin().apply(&format!("{{apiVersion: v1, kind: Node, metadata: {{name: {name}}}}}"));
    }

    /// SIGKILL: what etcd holds stays.
    pub(crate) fn kill(&mut self, server: Server) {
        self.process(server).kill();
    }

    /// Starts a server again that was killed, on the same port, and waits until the cluster serves.
    pub(crate) fn restart(&mut self, server: Server) {
        let directory = self.directory.path().to_owned();
        *self.process(server) = server::Process::start(&directory, server);
        self.wait_until_ready();
    }

    /// Starts both servers again after both were killed.
    pub(crate) fn restart_all(&mut self) {
        self.etcd = server::Process::start(self.directory.path(), Server::Etcd);
        self.restart(Server::ApiServer);
    }

    /// What a server has printed.
    pub(crate) fn log(&self, server: Server) -> String {
        self.read(&server.log())
    }

    /// Waits until the API server answers and has what every cluster has.
    pub(crate) fn wait_until_ready(&self) {
        let pids = [self.etcd.pid(), self.api_server.pid()];
        script("ready", self.directory.path(), &[&pids[0], &pids[1]]);
    }

    /// The process of a server.
    fn process(&mut self, server: Server) -> &mut server::Process {
        match server {
            Server::Etcd => &mut self.etcd,
            Server::ApiServer => &mut self.api_server,
        }
    }

    /// kubectl with a kubeconfig of these contents.
    fn client(&self, prefix: &str, kubeconfig: &str) -> Kubectl {
        let file = tempfile::Builder::new().prefix(prefix).suffix(".kubeconfig").tempfile_in(self.directory.path());
        let (_, path) = file.expect("a file").keep().expect("a file that stays");
        fs::write(&path, kubeconfig).expect("a kubeconfig");
        Kubectl::new(self.directory.path(), path)
    }

    /// A file of the directory.
    fn read(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}

/// What the directories of clusters are called; the process id of their test follows.
const PREFIX: &str = "virt-fleece-cluster-";

/// Removes the directories of tests that were killed: their servers are gone, but not the memory that the files take.
fn remove_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).expect("a directory").flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Another test may be at it, too.
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

/// The directory of the scripts.
fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster")
}

/// Runs a script of `tests/cluster` on a cluster's directory; panics with what it says when it fails.
fn script(name: &str, directory: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(scripts().join(name));
    succeed(command.arg(directory).args(arguments))
}

/// Runs a command and returns what it prints; panics with what it says when it fails.
fn succeed(command: &mut Command) -> String {
    match text(&command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))) {
        Ok(output) => output,
        Err(error) => panic!("{command:?}: {error}"),
    }
}

/// What a command has printed, or what it says of its failure.
fn text(output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}
