//! `BackupRepository` and `ClusterBackupRepository`: where backups are kept.

use super::Condition;
use k8s_openapi::{
    api::core::v1::ResourceRequirements,
    apimachinery::pkg::apis::meta::v1::{LabelSelector, Time},
};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// A repository of backups for the virtual machines of this namespace.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "virtfleece.io",
    version = "v1alpha1",
    kind = "BackupRepository",
    plural = "backuprepositories",
    namespaced,
    status = "RepositoryStatus",
    shortname = "vfrepo",
    category = "virtfleece",
    derive = "PartialEq",
    doc = "A repository of backups for the virtual machines of this namespace: deduplicated, compressed, encrypted.",
    validation = Rule::new("self.metadata.name.size() <= 200").message("the name may have at most 200 characters: pods are named after it"),
    printcolumn(name = "Location", type_ = "string", json_path = ".status.location"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Backups", type_ = "integer", json_path = ".status.backups"),
    printcolumn(name = "Stored", type_ = "string", json_path = ".status.stored", description = "Size of the repository"),
    printcolumn(name = "Ratio", type_ = "string", json_path = ".status.deduplicationRatio", description = "Bytes of all backups by bytes stored"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#, priority = 1),
    printcolumn(name = "Checked", type_ = "date", json_path = ".status.lastProbe", priority = 1, description = "When it was last reached")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.s3) != has(self.persistentVolumeClaim)").message("name one place: either s3 or persistentVolumeClaim"),
    validation = Rule::new("has(self.s3) == has(oldSelf.s3) && (!has(self.s3) || (self.s3.bucket == oldSelf.s3.bucket && has(self.s3.prefix) == has(oldSelf.s3.prefix) && (!has(self.s3.prefix) || self.s3.prefix == oldSelf.s3.prefix))) && (!has(self.persistentVolumeClaim) || self.persistentVolumeClaim == oldSelf.persistentVolumeClaim)")
        .message("the place of a repository is fixed (its endpoint and credentials are not); create another repository"),
)]
pub struct BackupRepositorySpec {
    /// A bucket of Amazon S3, or of a server that speaks its protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Location>,
    /// A directory on a volume. Use one that all nodes can mount (ReadWriteMany), such as NFS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimLocation>,
    /// The passphrase that the repository's key is wrapped with. Keep a copy outside the cluster: without it all
    /// backups are lost.
    pub passphrase_secret_ref: SecretKeyReference,
    /// Makes the repository when there is none at its place.
    #[serde(default = "yes")]
    pub create: bool,
    /// Level of zstd; 0 does not compress.
    #[serde(default = "default_level")]
    #[schemars(range(min = 0, max = 19))]
    pub compression_level: i32,
    /// Backups that may run at the same time; more wait.
    #[serde(default = "default_parallel")]
    // The API server knows no unsigned formats, and warns of each.
    #[schemars(with = "i32", range(min = 1, max = 1000))]
    pub max_concurrent_backups: u32,
    /// How often the repository is asked whether it answers, and for its size, such as "1h".
    #[serde(default = "default_interval")]
    #[x_kube(validation = Rule::new("duration(self) >= duration('1m')").message("a duration of at least a minute, such as 1h"))]
    #[schemars(length(max = 32))]
    pub probe_interval: String,
    /// The pods that move data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mover: Option<MoverTemplate>,
}

/// A repository of backups for the virtual machines of several namespaces.
///
/// Each namespace has a repository of its own in it, with a key of its own: data is never deduplicated across
/// namespaces, since that would tell one tenant what another has.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "virtfleece.io",
    version = "v1alpha1",
    kind = "ClusterBackupRepository",
    plural = "clusterbackuprepositories",
    status = "RepositoryStatus",
    shortname = "cvfrepo",
    category = "virtfleece",
    derive = "PartialEq",
    doc = "A repository of backups for the virtual machines of several namespaces, with one key and one deduplication domain for each.",
    validation = Rule::new("self.metadata.name.size() <= 200").message("the name may have at most 200 characters: pods are named after it"),
    printcolumn(name = "Location", type_ = "string", json_path = ".status.location"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#, priority = 1)
)]
#[serde(rename_all = "camelCase")]
pub struct ClusterBackupRepositorySpec {
    /// The repository itself. Its secrets and claims are those of the operator's own namespace.
    #[serde(flatten)]
    pub repository: BackupRepositorySpec,
    /// The namespaces that may use it. Without it nobody may.
    #[serde(default)]
    pub allowed_namespaces: AllowedNamespaces,
}

/// Namespaces that may use a repository: those named, and those selected.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AllowedNamespaces {
    /// By name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1000))]
    pub names: Vec<String>,
    /// By labels; an empty selector selects all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
}

/// A place in a bucket.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct S3Location {
    /// The bucket.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9][a-z0-9.-]*[a-z0-9]$"))]
    pub bucket: String,
    /// What the names of all objects begin with, without a slash at either end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$"))]
    #[x_kube(validation = Rule::new("!self.split('/').exists(part, part == '.' || part == '..')").message("no part of a prefix may be `.` or `..`"))]
    pub prefix: Option<String>,
    /// Address of a server that is not Amazon's, such as <https://minio.example:9000>; buckets are then in the path.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024), regex(pattern = r"^https?://[^/@?#\s]+/?$"))]
    pub endpoint: Option<String>,
    /// Region.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub region: Option<String>,
    /// Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN where it is needed.
    pub credentials_secret_ref: SecretReference,
    /// Secret key with certificates (PEM) that the server may show besides the system's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKeyReference>,
}

/// A directory on a volume.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClaimLocation {
    /// Name of the PersistentVolumeClaim.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
    /// Directory on the volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$"))]
    #[x_kube(validation = Rule::new("!self.split('/').exists(part, part == '.' || part == '..')").message("no part of a path may be `.` or `..`"))]
    pub path: Option<String>,
}

/// A secret in the namespace of the repository.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretReference {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// A key of a secret in the namespace of the repository.
#[derive(KubeSchema, Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyReference {
    /// Name of the secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key in it.
    #[serde(default = "default_key")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

/// How the pods that move data are made.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MoverTemplate {
    /// Requests and limits of the mover's container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
}

/// What is known of a repository.
#[derive(KubeSchema, Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RepositoryStatus {
    /// Generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Reachable, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Where it is, as `virt-fleece --repository` takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
    /// Random id of the repository.
    #[serde(default, rename = "repositoryID", skip_serializing_if = "Option::is_none")]
    pub repository_id: Option<String>,
    /// Complete backups in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backups: Option<i64>,
    /// Virtual machines that have backups in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_machines: Option<i64>,
    /// Size of the repository, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_bytes: Option<i64>,
    /// The same for people, such as "1.2Ti".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<String>,
    /// Bytes that all backups have, by bytes that are stored, such as "12.4".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deduplication_ratio: Option<String>,
    /// When it was last reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_probe: Option<Time>,
}

fn yes() -> bool {
    true
}

fn default_level() -> i32 {
    1
}

fn default_parallel() -> u32 {
    10
}

fn default_interval() -> String {
    "1h".into()
}

fn default_key() -> String {
    "passphrase".into()
}
