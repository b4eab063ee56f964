//! What a pod of the stand-in is made of: volumes, environment, process.

use super::kubelet::Shared;
use k8s_openapi::api::core::v1::{Container as ContainerSpec, Pod, Secret, Volume};
use kube::{Api, Client, ResourceExt};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// A volume on the node.
#[derive(Debug, Clone)]
pub(super) struct Mounted {
    path: PathBuf,
    read_only: bool,
}

/// Puts the volumes of a pod where a kubelet does.
pub(super) async fn volumes(
    client: &Client,
    kubelet: &Path,
    shared: &Shared,
    pod: &Pod,
) -> Result<BTreeMap<String, Mounted>, String> {
    let directory = kubelet.join("pods").join(pod.uid().unwrap_or_default()).join("volumes");
    let group = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref()?.fs_group);
    let mut mounted = BTreeMap::new();
    for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
        let made = one(client, &directory, shared, pod, volume, group).await?;
        mounted.insert(volume.name.clone(), made);
    }
    Ok(mounted)
}

async fn one(
    client: &Client,
    directory: &Path,
    shared: &Shared,
    pod: &Pod,
    volume: &Volume,
    group: Option<i64>,
) -> Result<Mounted, String> {
    let namespace = pod.namespace().unwrap_or_default();
    let make = |kind: &str| {
        let path = directory.join(format!("kubernetes.io~{kind}")).join(&volume.name);
        fs::create_dir_all(&path).expect("a volume's directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("its rights");
        let group = group.map(|group| u32::try_from(group).expect("a group"));
        chown(&path, None, group).expect("its group");
        path
    };
    if volume.empty_dir.is_some() {
        return Ok(Mounted { path: make("empty-dir"), read_only: false });
    }
    if let Some(source) = &volume.secret {
        let name = source.secret_name.clone().unwrap_or_default();
        let data = secret(client, &namespace, &name).await?;
        let path = make("secret");
        let items = source.items.clone().unwrap_or_default();
        let wanted: Vec<(String, String)> = if items.is_empty() {
            data.keys().map(|key| (key.clone(), key.clone())).collect()
        } else {
            items.into_iter().map(|item| (item.key, item.path)).collect()
        };
        for (key, file) in wanted {
            let content = data.get(&key).ok_or_else(|| format!("secret {name} has no key {key}"))?;
            fs::write(path.join(file), content).expect("a secret's file");
        }
        return Ok(Mounted { path, read_only: true });
    }
    if let Some(source) = &volume.downward_api {
        let path = make("downward-api");
        for item in source.items.iter().flatten() {
            let field = item.field_ref.as_ref().map(|field| field.field_path.clone()).unwrap_or_default();
            let key = field.strip_prefix("metadata.annotations['").and_then(|rest| rest.strip_suffix("']"));
            let value = key.and_then(|key| pod.annotations().get(key)).cloned().unwrap_or_default();
            fs::write(path.join(&item.path), value).expect("a downward API file");
        }
        return Ok(Mounted { path, read_only: true });
    }
    if let Some(source) = &volume.persistent_volume_claim {
        let key = (namespace, source.claim_name.clone());
        let path = shared.claims.lock().expect("claims").get(&key).cloned();
        let path = path.ok_or_else(|| format!("claim {} is not there", source.claim_name))?;
        return Ok(Mounted { path, read_only: source.read_only == Some(true) });
    }
    Err(format!("volume {} is of a kind that the stand-in does not know", volume.name))
}

async fn secret(client: &Client, namespace: &str, name: &str) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let secret = api.get(name).await.map_err(|error| format!("secret {name}: {error}"))?;
    Ok(secret.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0)).collect())
}

/// A container that is to run.
#[derive(Debug)]
pub(super) struct Container {
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    mounts: Vec<String>,
    user: String,
}

impl Container {
    /// The first container of a pod.
    pub(super) async fn new(client: &Client, pod: &Pod, volumes: &BTreeMap<String, Mounted>) -> Result<Self, String> {
        let spec = pod.spec.clone().unwrap_or_default();
        let container = spec.containers.first().cloned().unwrap_or_default();
        let mut arguments = container.command.clone().unwrap_or_default();
        // The image's program is ours, whatever it is called there.
        if !arguments.is_empty() {
            arguments.remove(0);
        }
        arguments.extend(container.args.clone().unwrap_or_default());
        let pod_context = spec.security_context.clone().unwrap_or_default();
        let context = container.security_context.clone().unwrap_or_default();
        let user = context.run_as_user.or(pod_context.run_as_user).unwrap_or(65532);
        let group = context.run_as_group.or(pod_context.run_as_group).or(pod_context.fs_group).unwrap_or(user);
        Ok(Self {
            arguments,
            environment: environment(client, pod, &container).await?,
            mounts: mounts(&container, volumes)?,
            user: format!("{user}:{group}"),
        })
    }

    /// Starts it. Its output goes to a file in the pod's directory; the second value is its termination message.
    pub(super) fn start(&self, directory: &Path) -> (Child, PathBuf) {
        let termination = directory.join("termination-log");
        fs::write(&termination, "").expect("a termination log");
        fs::set_permissions(&termination, fs::Permissions::from_mode(0o666)).expect("its rights");
        let root = directory.join("root");
        fs::create_dir_all(&root).expect("a root directory");
        let log = fs::File::create(directory.join("log")).expect("a log");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/node/container.sh");
        let process = crate::bed::process::spawn_tethered(|command: &mut Command| {
            command.args(["unshare", "--mount", "--propagation", "private", "bash"]).arg(script).arg(&root);
            command.arg(env!("CARGO_BIN_EXE_virt-fleece")).arg(&self.user).arg(&termination);
            command.args(&self.mounts).arg("--").args(&self.arguments);
            command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs(self.environment.clone());
            command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        });
        (process.expect("a container"), termination)
    }
}

fn mounts(container: &ContainerSpec, volumes: &BTreeMap<String, Mounted>) -> Result<Vec<String>, String> {
    let mounts = container.volume_mounts.iter().flatten().map(|it| (&it.name, &it.mount_path, it.read_only));
    let devices = container.volume_devices.iter().flatten().map(|it| (&it.name, &it.device_path, Some(true)));
    let mut arguments = Vec::new();
    for (name, target, read_only) in mounts.chain(devices) {
        let volume = volumes.get(name).ok_or_else(|| format!("volume {name} is not there"))?;
        let mode = if volume.read_only || read_only == Some(true) { ":ro" } else { "" };
        arguments.push(format!("{}:{target}{mode}", volume.path.display()));
    }
    Ok(arguments)
}

async fn environment(client: &Client, pod: &Pod, container: &ContainerSpec) -> Result<Vec<(String, String)>, String> {
    let mut environment = Vec::new();
    for variable in container.env.iter().flatten() {
        if let Some(value) = &variable.value {
            environment.push((variable.name.clone(), value.clone()));
            continue;
        }
        let Some(source) = &variable.value_from else { continue };
        if let Some(reference) = &source.secret_key_ref {
            let data = secret(client, &pod.namespace().unwrap_or_default(), &reference.name).await;
            let value = data.and_then(|data| {
                let value = data.get(&reference.key).cloned();
                value.ok_or_else(|| format!("secret {} has no key {}", reference.name, reference.key))
            });
            match value {
                Ok(value) => environment.push((variable.name.clone(), String::from_utf8_lossy(&value).into_owned())),
                Err(_) if reference.optional == Some(true) => {}
                Err(missing) => return Err(missing),
            }
        }
        if let Some(field) = &source.field_ref {
            let value = match field.field_path.as_str() {
                "metadata.name" => pod.name_any(),
                "metadata.namespace" => pod.namespace().unwrap_or_default(),
                other => return Err(format!("field {other} is not known to the stand-in")),
            };
            environment.push((variable.name.clone(), value));
        }
    }
    Ok(environment)
}
