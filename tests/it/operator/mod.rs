//! The whole operator: `kubectl apply` of a backup of a real VM on a stand-in node, with the real controller, agent and
//! mover, to a real S3 server; the oracle is the bytes of a restore from the repository alone.

mod backups;
mod demo;
mod faults;
mod more;

use crate::{
    bed::{cli::Cli, oracle::Stream, process, s3, s3_proxy::S3Proxy},
    cluster::{BoundTo, Cluster, Helm, Kubectl},
    node::{Node, VmDisk},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// The disks of every VM here: not a multiple of the cluster, on two controllers.
pub(super) const DISKS: [VmDisk; 2] = [
    VmDisk { name: "root", size: 64 << 20, scsi: false },
    VmDisk { name: "data", size: (48 << 20) + 5 * 512, scsi: true },
];
/// Namespace of the operator.
pub(super) const OPERATOR: &str = "virt-fleece";
/// The bucket.
const BUCKET: &str = "backups";
/// What the repositories' keys are wrapped with.
const PASSPHRASE: &str = "correct horse battery staple";
/// How long a small backup may take on a machine that does other things as well.
pub(super) const BACKUP_LIMIT: Duration = Duration::from_secs(180);

/// A cluster with the operator, and a bucket.
pub(super) struct Operator {
    controllers: Vec<Child>,
    pub(super) nodes: Vec<Node>,
    pub(super) cluster: Cluster,
    /// What the operator speaks to instead of the server.
    pub(super) proxy: S3Proxy,
    pub(super) s3: s3::S3Server,
    directory: TempDir,
}

/// What the writer of a VM does.
pub(super) fn stream(seed: u64) -> Stream {
    Stream { seed, threads: 4, zero: 10, disks: DISKS.iter().map(|disk| disk.size).collect() }
}

impl Operator {
    /// Starts everything, with an agent on each of these nodes.
    pub(super) fn start(nodes: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let s3 = s3::S3Server::start(directory.path());
        s3.create_bucket(BUCKET);
        let proxy = S3Proxy::start(s3.address());
        let cluster = Cluster::start();
        cluster.install_kubevirt();
        cluster.create_namespace(OPERATOR);
        // Definitions, rights and admission policies are those that users get.
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("charts/virt-fleece").display().to_string();
        let install = ["install", OPERATOR, &chart, "--namespace", OPERATOR];
        cluster.admin().helm(Helm::Four, install).unwrap_or_else(|error| panic!("helm install: {error}"));
        cluster.admin().run(["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"]);
        let mut operator = Self { controllers: Vec::new(), nodes: Vec::new(), cluster, proxy, s3, directory };
        for (number, name) in nodes.iter().enumerate() {
            let mut node = Node::start(&operator.cluster, name, number == 0);
            node.set_agent_credentials(agent_credentials(&operator.cluster, name).kubeconfig());
            node.start_agent();
            operator.nodes.push(node);
        }
        operator.start_controller("controller-0");
        operator
    }

    /// kubectl as the administrator.
    pub(super) fn admin(&self) -> Kubectl {
        self.cluster.admin()
    }

    /// Starts one more controller.
    pub(super) fn start_controller(&mut self, identity: &str) {
        let path = self.controller_log_path();
        let log = fs::File::options().create(true).append(true).open(path).expect("a log");
        let token = self.admin().token(OPERATOR, "virt-fleece-controller", None);
        let kubeconfig = self.cluster.bearer(&token).kubeconfig().to_owned();
        let controller = process::spawn_tethered(|command| {
            command.arg(env!("CARGO_BIN_EXE_virt-fleece")).args(["controller", "-v", "--namespace", OPERATOR]);
            command.args(["--identity", identity, "--image", "virt-fleece:test", "--listen", "127.0.0.1:0"]);
            command.env("KUBECONFIG", kubeconfig);
            command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        });
        self.controllers.push(controller.expect("a controller"));
    }

    /// SIGKILL to all controllers.
    pub(super) fn kill_controllers(&mut self) {
        for mut controller in self.controllers.drain(..) {
            process::kill9(&mut controller);
        }
    }

    fn controller_log_path(&self) -> PathBuf {
        self.directory.path().join("controller.log")
    }

    /// What was printed by everything, for a test that fails.
    pub(super) fn logs(&self) -> String {
        let mut text = format!("== controller\n{}", fs::read_to_string(self.controller_log_path()).unwrap_or_default());
        for node in &self.nodes {
            text.extend(["== agent of ", node.name(), "\n", &node.agent_log()]);
            for pod in fs::read_dir(node.directory().join("pods")).into_iter().flatten().flatten() {
                let uid = pod.file_name().into_string().unwrap_or_default();
                text.extend(["== pod ", &uid, "\n", &node.pod_log(&uid)]);
            }
        }
        text
    }

    /// A namespace with a repository `main` of its own in the bucket, ready to use.
    pub(super) fn tenant(&self, namespace: &str) {
        self.cluster.create_namespace(namespace);
        self.secrets(namespace);
        self.admin().apply(&self.repository(namespace, "main").to_string());
        self.wait(namespace, "vfrepo/main", "Ready", Duration::from_secs(90));
    }

    /// The secrets of a repository.
    pub(super) fn secrets(&self, namespace: &str) {
        self.admin().apply(
            &json!({
                "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "backup", "namespace": namespace},
                "stringData": {
                    "passphrase": PASSPHRASE,
                    "AWS_ACCESS_KEY_ID": s3::ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": s3::SECRET_KEY,
                },
            })
            .to_string(),
        );
    }

    /// A repository in the bucket.
    pub(super) fn repository(&self, namespace: &str, name: &str) -> Value {
        json!({
            "apiVersion": "virtfleece.io/v1alpha1", "kind": "BackupRepository",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "s3": {
                    "bucket": BUCKET, "prefix": format!("{namespace}/{name}"), "endpoint": self.proxy.endpoint(),
                    "region": s3::REGION, "credentialsSecretRef": {"name": "backup"},
                },
                "passphraseSecretRef": {"name": "backup"},
            },
        })
    }

    /// Creates a backup of a VM into the repository `main`, with more in its spec.
    pub(super) fn back_up(&self, namespace: &str, name: &str, vm: &str, more: &Value) {
        let mut spec = json!({"source": {"name": vm}, "repositoryRef": {"name": "main"}});
        for (key, value) in more.as_object().into_iter().flatten() {
            spec[key] = value.clone();
        }
        self.admin().apply(
            &json!({
                "apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
                "metadata": {"name": name, "namespace": namespace}, "spec": spec,
            })
            .to_string(),
        );
    }

    /// A backup as it is now.
    pub(super) fn backup(&self, namespace: &str, name: &str) -> Value {
        self.admin().get(&["-n", namespace, "vfb", name])
    }

    /// Waits for a condition as a user would.
    pub(super) fn wait(&self, namespace: &str, object: &str, condition: &str, limit: Duration) {
        let timeout = format!("--timeout={}s", limit.as_secs());
        let condition = format!("--for=condition={condition}");
        let arguments = ["-n", namespace, "wait", object, &condition, &timeout];
        let mut command = self.admin().command([""; 0]);
        // It may take longer than any single request.
        command.arg("--request-timeout=0").args(arguments);
        let output = command.output().expect("running kubectl");
        if !output.status.success() {
            let state = self.admin().run(["-n", namespace, "get", object, "-o", "yaml"]);
            panic!("{}\n{state}\n{}", String::from_utf8_lossy(&output.stderr), self.logs());
        }
    }

    /// Waits for a complete backup.
    pub(super) fn complete(&self, namespace: &str, name: &str) -> Value {
        self.wait(namespace, &format!("vfb/{name}"), "Complete", BACKUP_LIMIT);
        self.backup(namespace, name)
    }

    /// Waits until a backup satisfies a test.
    pub(super) fn until(
        &self,
        namespace: &str,
        name: &str,
        limit: Duration,
        what: &str,
        test: impl Fn(&Value) -> bool,
    ) -> Value {
        let deadline = Instant::now() + limit;
        loop {
            let backup = self.backup(namespace, name);
            if test(&backup) {
                return backup;
            }
            assert!(Instant::now() < deadline, "not {what}: {backup:#}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A command of the product on a repository, with nothing but its address and its secrets.
    pub(super) fn cli(&self, namespace: &str, repository: &str, arguments: &[&str]) -> Cli {
        let url = format!("s3://{BUCKET}/{namespace}/{repository}");
        let mut cli = Cli::new(arguments).arg("--repository").arg(url).env("VIRT_FLEECE_PASSPHRASE", PASSPHRASE);
        for (name, value) in s3::environment(&self.s3.endpoint()) {
            cli = cli.env(name, value);
        }
        cli
    }

    /// The disks of a VM as of a backup, restored from the repository.
    pub(super) fn restored(&self, namespace: &str, vm: &str, id: &str) -> Vec<Vec<u8>> {
        let to = tempfile::tempdir().expect("a directory");
        let vm = format!("{namespace}/{vm}");
        let restore = self.cli(namespace, "main", &["restore", "--vm", &vm, "--backup", id]);
        restore.arg("--output").arg(to.path()).run().success();
        DISKS.iter().map(|disk| fs::read(to.path().join(format!("{}.raw", disk.name))).expect("restored")).collect()
    }
}

/// What the agent of a node has: the token of its service account, bound to its pod, which says the node.
fn agent_credentials(cluster: &Cluster, node: &str) -> Kubectl {
    let name = format!("virt-fleece-agent-{node}");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": OPERATOR},
        "spec": {
            "nodeName": node, "serviceAccountName": "virt-fleece-agent",
            "containers": [{"name": "agent", "image": "virt-fleece"}],
        },
    });
    cluster.admin().apply(&pod.to_string());
    cluster.bearer(&cluster.admin().token(OPERATOR, "virt-fleece-agent", Some(BoundTo::Pod(&name))))
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.kill_controllers();
        self.nodes.clear();
    }
}

/// Id of a complete backup.
pub(super) fn id(backup: &Value) -> String {
    backup["status"]["backupID"].as_str().unwrap_or_else(|| panic!("no id: {backup:#}")).to_owned()
}

/// A condition's status and reason.
pub(super) fn condition<'a>(object: &'a Value, kind: &str) -> Option<(&'a str, &'a str)> {
    let conditions = object["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    Some((found["status"].as_str()?, found["reason"].as_str()?))
}
