//! A stand-in for the kubelet and the scheduler: runs the pods that movers are as processes.
//!
//! It gives them what they would have of a kubelet: volumes in the kubelet's directory, environment and files from
//! secrets and annotations, the user of their security context, the termination message, a read-only root. What it
//! leaves out: images, control groups, network and pid namespaces, seccomp, limits, probes, restarts.

use super::pod::{Container, volumes};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::json;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Child,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Between two looks at the pods.
const EVERY: Duration = Duration::from_millis(100);
/// From SIGTERM to SIGKILL; a pod asks for more, a test has less time.
const GRACE: Duration = Duration::from_secs(3);

/// What all threads of a kubelet share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Directories and files behind claims, by namespace and name.
    pub(super) claims: Mutex<HashMap<(String, String), PathBuf>>,
    /// Processes of pods, by namespace and name.
    pids: Mutex<HashMap<(String, String), u32>>,
    stop: AtomicBool,
    /// Pods are not started while this is set.
    pub(super) held: AtomicBool,
}

/// The kubelet of a node.
#[derive(Debug)]
pub(crate) struct Kubelet {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Kubelet {
    /// Starts it. `takes_all`: also pods that may run anywhere.
    pub(super) fn start(node: &str, directory: &Path, kubeconfig: &Path, takes_all: bool) -> Self {
        let shared = Arc::new(Shared::default());
        let looks = Looks {
            node: node.to_owned(),
            directory: directory.to_owned(),
            kubeconfig: kubeconfig.to_owned(),
            takes_all,
            shared: Arc::clone(&shared),
            running: HashMap::new(),
        };
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(looks.go_on());
        });
        Self { shared, thread: Some(thread) }
    }

    /// What is behind a claim: a directory, or a file that stands for a block device.
    pub(crate) fn claim(&self, namespace: &str, name: &str, path: &Path) {
        let key = (namespace.to_owned(), name.to_owned());
        self.shared.claims.lock().expect("claims").insert(key, path.to_owned());
    }

    /// The process of a pod that runs.
    pub(crate) fn pid_of(&self, namespace: &str, name: &str) -> Option<u32> {
        self.shared.pids.lock().expect("pids").get(&(namespace.to_owned(), name.to_owned())).copied()
    }

    /// Lets pods wait, or go on.
    pub(crate) fn hold(&self, held: bool) {
        self.shared.held.store(held, Ordering::Relaxed);
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A pod that runs.
#[derive(Debug)]
struct RunningPod {
    process: Child,
    termination: PathBuf,
    ending: Option<Instant>,
}

struct Looks {
    node: String,
    directory: PathBuf,
    kubeconfig: PathBuf,
    takes_all: bool,
    shared: Arc<Shared>,
    running: HashMap<String, RunningPod>,
}

impl Looks {
    async fn go_on(mut self) {
        let client = client(&self.kubeconfig).await;
        while !self.shared.stop.load(Ordering::Relaxed) {
            // An API server that is away is none of its business.
            if let Err(error) = self.look(&client).await
                && !matches!(error, kube::Error::Service(_) | kube::Error::HyperError(_))
            {
                eprintln!("kubelet of {}: {error}", self.node);
            }
            tokio::time::sleep(EVERY).await;
        }
        for (_, mut pod) in self.running.drain() {
            let _ = pod.process.kill();
            let _ = pod.process.wait();
        }
    }

    async fn look(&mut self, client: &Client) -> Result<(), kube::Error> {
        self.reap(client).await?;
        let all: Api<Pod> = Api::all(client.clone());
        for pod in all.list(&ListParams::default()).await? {
            let (uid, api) = (pod.uid().unwrap_or_default(), api_of(client, &pod));
            let spec = pod.spec.clone().unwrap_or_default();
            let phase = pod.status.as_ref().and_then(|status| status.phase.clone()).unwrap_or_default();
            if pod.metadata.deletion_timestamp.is_some() && spec.node_name.as_deref() == Some(&self.node) {
                self.end(&api, &pod).await?;
            } else if spec.node_name.is_none() && phase == "Pending" && self.fits(&pod) {
                let binding = json!({
                    "apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod.name_any()},
                    "target": {"apiVersion": "v1", "kind": "Node", "name": self.node},
                });
                let created: Result<serde_json::Value, _> =
                    api.create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding).await;
                drop(created);
            } else if spec.node_name.as_deref() == Some(&self.node)
                && phase == "Pending"
                && !self.running.contains_key(&uid)
                && is_container_of_ours(&pod)
                && !self.shared.held.load(Ordering::Relaxed)
            {
                self.begin(client, &api, &pod).await?;
            }
        }
        Ok(())
    }

    /// Whether the pod may run here: it has to be on this node by its affinity, or does not care.
    fn fits(&self, pod: &Pod) -> bool {
        let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
        let node = affinity.and_then(|affinity| affinity.node_affinity.as_ref());
        let Some(node) = node else { return self.takes_all };
        let text = serde_json::to_string(node).expect("JSON");
        text.contains(&format!("\"{}\"", self.node))
    }

    async fn begin(&mut self, client: &Client, api: &Api<Pod>, pod: &Pod) -> Result<(), kube::Error> {
        let uid = pod.uid().unwrap_or_default();
        let volumes = match volumes(client, &self.directory, &self.shared, pod).await {
            Ok(volumes) => volumes,
            // As a kubelet: it waits for secrets and claims that are missing.
            Err(missing) => {
                eprintln!("kubelet of {}: pod {}: {missing}", self.node, pod.name_any());
                return Ok(());
            }
        };
        let container = Container::new(client, pod, &volumes).await;
        let Ok(container) = container else { return Ok(()) };
        let directory = self.directory.join("pods").join(&uid);
        let (process, termination) = container.start(&directory);
        let key = (pod.namespace().unwrap_or_default(), pod.name_any());
        self.shared.pids.lock().expect("pids").insert(key, process.id());
        self.running.insert(uid, RunningPod { process, termination, ending: None });
        let state = json!({"running": {"startedAt": jiff::Timestamp::now().to_string()}});
        report(api, pod, "Running", &state).await
    }

    /// Tells how pods ended whose processes did.
    async fn reap(&mut self, client: &Client) -> Result<(), kube::Error> {
        let mut ended = Vec::new();
        for (uid, pod) in &mut self.running {
            if let Ok(Some(status)) = pod.process.try_wait() {
                ended.push((uid.clone(), status, pod.termination.clone()));
            }
        }
        let all: Api<Pod> = Api::all(client.clone());
        for (uid, status, termination) in ended {
            let found =
                all.list(&ListParams::default()).await?.into_iter().find(|pod| pod.uid().as_ref() == Some(&uid));
            if let Some(pod) = found {
                let message = std::fs::read_to_string(&termination).unwrap_or_default();
                let code = status.code().unwrap_or(137);
                let now = jiff::Timestamp::now().to_string();
                let state = json!({"terminated": {
                    "exitCode": code, "reason": if code == 0 { "Completed" } else { "Error" }, "message": message,
                    "startedAt": now, "finishedAt": now,
                }});
                let phase = if code == 0 { "Succeeded" } else { "Failed" };
                report(&api_of(client, &pod), &pod, phase, &state).await?;
                let key = (pod.namespace().unwrap_or_default(), pod.name_any());
                self.shared.pids.lock().expect("pids").remove(&key);
            }
            self.running.remove(&uid);
        }
        Ok(())
    }

    /// A pod that is to go: its process first.
    async fn end(&mut self, api: &Api<Pod>, pod: &Pod) -> Result<(), kube::Error> {
        let uid = pod.uid().unwrap_or_default();
        if let Some(running) = self.running.get_mut(&uid) {
            let pid = rustix::process::Pid::from_child(&running.process);
            let signal = match running.ending {
                None => rustix::process::Signal::TERM,
                Some(since) if since.elapsed() > GRACE => rustix::process::Signal::KILL,
                Some(_) => return Ok(()),
            };
            running.ending.get_or_insert_with(Instant::now);
            let _ = rustix::process::kill_process(pid, signal);
            return Ok(());
        }
        if !is_container_of_ours(pod) {
            return Ok(());
        }
        let _ = std::fs::remove_dir_all(self.directory.join("pods").join(&uid));
        let parameters = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(uid), resource_version: None }),
            ..DeleteParams::default()
        };
        match api.delete(&pod.name_any(), &parameters).await {
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
            done => done.map(drop),
        }
    }
}

/// Launchers and agents are the tests' own.
fn is_container_of_ours(pod: &Pod) -> bool {
    pod.labels().get("app.kubernetes.io/component").is_some_and(|component| component == "mover")
}

fn api_of(client: &Client, pod: &Pod) -> Api<Pod> {
    Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default())
}

async fn report(api: &Api<Pod>, pod: &Pod, phase: &str, state: &serde_json::Value) -> Result<(), kube::Error> {
    let name = pod.spec.as_ref().and_then(|spec| spec.containers.first()).map(|it| it.name.clone());
    let status = json!({"status": {
        "phase": phase,
        "containerStatuses": [{
            "name": name, "state": state, "ready": phase == "Running", "restartCount": 0, "image": "", "imageID": "",
        }],
        "conditions": [{"type": "Ready", "status": if phase == "Running" { "True" } else { "False" }}],
    }});
    api.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Merge(&status)).await.map(drop)
}

/// A client with the credentials of a file.
pub(super) async fn client(kubeconfig: &Path) -> Client {
    let file = Kubeconfig::read_from(kubeconfig).expect("a kubeconfig");
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.expect("a kubeconfig");
    Client::try_from(config).expect("a client")
}
