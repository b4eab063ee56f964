//! kubectl and Helm of the test cluster.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// What the API server, or the client, says of a request that it refuses.
pub(crate) type Refused = String;

/// An object that a token is bound to: it is void once that is deleted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BoundTo<'a> {
    /// A pod, which must be the service account's. If it is on a node, the token tells that too.
    Pod(&'a str),
    /// A node.
    Node(&'a str),
}

/// A version of Helm: charts have to work with both.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Helm {
    /// Helm 3
    Three,
    /// Helm 4
    Four,
}

impl Helm {
    /// The program.
    fn name(self) -> &'static str {
        match self {
            Self::Three => "helm3",
            Self::Four => "helm",
        }
    }
}

/// kubectl as somebody.
#[derive(Debug, Clone)]
pub(crate) struct Kubectl {
    /// The cluster's directory.
    directory: PathBuf,
    /// Who that is.
    kubeconfig: PathBuf,
}

impl Kubectl {
    /// kubectl with this kubeconfig.
    pub(super) fn new(directory: &Path, kubeconfig: PathBuf) -> Self {
        Self { directory: directory.to_owned(), kubeconfig }
    }

    /// The kubeconfig, for other clients.
    pub(crate) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A command with these arguments, for callers who want more than its output.
    pub(crate) fn command(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
        let mut command = self.program("kubectl");
        // An API server that is away must not make a test hang.
        command.arg("--request-timeout=30s").args(arguments);
        command
    }

    /// Runs it and returns what it prints; panics with what it says when it fails.
    pub(crate) fn run(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
        super::succeed(&mut self.command(arguments))
    }

    /// Runs it and returns what it prints, or what it says of its failure.
    pub(crate) fn attempt(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String, Refused> {
        super::text(&self.command(arguments).output().expect("running kubectl"))
    }

    /// `kubectl get` of one object or a list, as JSON.
    pub(crate) fn get(&self, arguments: &[&str]) -> Value {
        let json = self.run([&["get", "-o", "json"], arguments].concat());
        serde_json::from_str(&json).expect("JSON of kubectl")
    }

    /// Applies manifests (YAML or JSON); unknown fields are refused.
    pub(crate) fn apply(&self, manifests: &str) {
        self.try_apply(manifests).unwrap_or_else(|error| panic!("{error}: {manifests}"));
    }

    /// As [`Kubectl::apply`], or what was said against them.
    pub(crate) fn try_apply(&self, manifests: &str) -> Result<String, Refused> {
        self.feed(["apply", "--server-side", "--validate=strict", "-f", "-"], manifests)
    }

    /// Runs it with this input.
    pub(crate) fn feed(
        &self,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
        input: &str,
    ) -> Result<String, Refused> {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("running kubectl");
        // Its end before it has read all shows in its status.
        child.stdin.take().expect("a pipe").write_all(input.as_bytes()).ok();
        super::text(&child.wait_with_output().expect("kubectl's output"))
    }

    /// Merges into an object: `patch(&["vmi", "a"], json)`. This is how an instance of `KubeVirt` gets its status, which
    /// is no subresource there.
    pub(crate) fn patch(&self, object: &[&str], patch: &Value) {
        self.run([&["patch", "--type=merge", "-p", &patch.to_string()], object].concat());
    }

    /// Merges into the status of an object, as its controller would: `patch_status(&["vm", "a"], json)`.
    pub(crate) fn patch_status(&self, object: &[&str], status: &Value) {
        let patch = serde_json::json!({ "status": status }).to_string();
        self.run([&["patch", "--subresource=status", "--type=merge", "-p", &patch], object].concat());
    }

    /// A token of a service account, from the `TokenRequest` API.
    pub(crate) fn token(&self, namespace: &str, account: &str, bound: Option<BoundTo<'_>>) -> String {
        let mut arguments = vec!["-n", namespace, "create", "token", account];
        match bound {
            None => {}
            Some(BoundTo::Pod(name)) => {
                arguments.extend(["--bound-object-kind=Pod", "--bound-object-name", name]);
            }
            Some(BoundTo::Node(name)) => {
                arguments.extend(["--bound-object-kind=Node", "--bound-object-name", name]);
            }
        }
        self.run(arguments).trim().to_owned()
    }

    /// Who the API server says this is: `status.userInfo` of a `SelfSubjectReview`.
    pub(crate) fn who_am_i(&self) -> Value {
        let json = self.run(["auth", "whoami", "-o", "json"]);
        let review: Value = serde_json::from_str(&json).expect("JSON of kubectl");
        review["status"]["userInfo"].clone()
    }

    /// Runs Helm as the same user.
    pub(crate) fn helm(
        &self,
        helm: Helm,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<String, Refused> {
        super::text(&self.program(helm.name()).args(arguments).output().expect("running Helm"))
    }

    /// A client of the cluster's directory. It keeps what it caches there, and knows nothing of whoever runs the tests.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.directory.join("bin").join(name));
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.env("HOME", &self.directory).arg("--kubeconfig").arg(&self.kubeconfig);
        command.stdin(Stdio::null());
        command
    }
}
