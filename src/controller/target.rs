//! Where a backup goes, and in whose namespace its mover runs: with the credentials. Pure.
//!
//! This is where tenants are kept apart: a name is looked up in the namespace of the backup and nowhere else, or it is
//! a repository of the cluster that allows this namespace.

use super::{decision::RepositoryFact, machine::Obstacle, reasons::reason};
use crate::{
    api::{
        AllowedNamespaces, BackupRepositorySpec, BackupTarget, ConditionStatus, RepositoryReference, RepositoryStatus,
        VirtualMachineBackupSpec, find_condition, kinds,
    },
    mover::config::MoverTarget,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use std::collections::BTreeMap;

/// Part of the place of a cluster's repository that probes use; no namespace has such a name.
const OWN_PART: &str = "_operator";
/// Where a repository's volume is mounted.
pub(super) const REPOSITORY_PATH: &str = "/repository";
/// Where a volume for qcow2 images is mounted.
pub(super) const TARGET_PATH: &str = "/target";
/// Where the passphrase is mounted.
pub(super) const PASSPHRASE_DIRECTORY: &str = "/run/virt-fleece/passphrase";
/// Where certificates are mounted.
pub(super) const CA_DIRECTORY: &str = "/run/virt-fleece/ca";
/// Name of a mounted secret's file.
pub(super) const SECRET_FILE: &str = "value";

/// Where a backup goes.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Target {
    /// A repository.
    Repository {
        /// What identifies it, for limits and messages.
        key: String,
        /// Its spec.
        spec: Box<BackupRepositorySpec>,
        /// Part of it that is used: a namespace's in a repository of the cluster.
        part: Option<String>,
    },
    /// qcow2 images on a claim.
    Qcow2(BackupTarget),
}

/// What a repository looks like to a backup.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    /// Its spec.
    pub(super) spec: &'a BackupRepositorySpec,
    /// Its status.
    pub(super) status: Option<&'a RepositoryStatus>,
    /// Of the cluster: who may use it.
    pub(super) allowed: Option<&'a AllowedNamespaces>,
}

impl Target {
    /// How many backups it takes at a time.
    pub(super) fn limit(&self) -> Option<(String, usize)> {
        match self {
            Self::Repository { key, spec, .. } => Some((key.clone(), spec.max_concurrent_backups as usize)),
            Self::Qcow2(_) => None,
        }
    }

    /// As the mover is told.
    pub(super) fn config(&self, create: bool) -> MoverTarget {
        match self {
            Self::Repository { spec, part, .. } => MoverTarget::Repository {
                url: url(spec, part.as_deref()),
                s3_endpoint: spec.s3.as_ref().and_then(|s3| s3.endpoint.clone()),
                s3_region: spec.s3.as_ref().and_then(|s3| s3.region.clone()),
                ca_file: spec
                    .s3
                    .as_ref()
                    .and_then(|s3| s3.ca_secret_ref.as_ref())
                    .map(|_| format!("{CA_DIRECTORY}/{SECRET_FILE}")),
                passphrase_file: format!("{PASSPHRASE_DIRECTORY}/{SECRET_FILE}"),
                create: create && spec.create,
                compression_level: spec.compression_level,
            },
            Self::Qcow2(target) => MoverTarget::Qcow2Directory { path: TARGET_PATH.into(), compress: target.compress },
        }
    }
}

/// The part of a cluster's repository that its probe opens.
pub(super) fn probed_part(of_cluster: bool) -> Option<String> {
    of_cluster.then(|| OWN_PART.to_owned())
}

/// The place as the mover opens it.
fn url(spec: &BackupRepositorySpec, part: Option<&str>) -> String {
    let (beginning, inner) = match (&spec.s3, &spec.persistent_volume_claim) {
        (Some(s3), _) => (format!("s3://{}", s3.bucket), s3.prefix.as_deref()),
        (None, Some(claim)) => (REPOSITORY_PATH.to_owned(), claim.path.as_deref()),
        // The rules of the definition do not allow it.
        (None, None) => (REPOSITORY_PATH.to_owned(), None),
    };
    [Some(beginning.as_str()), inner, part].into_iter().flatten().collect::<Vec<_>>().join("/")
}

/// The place as people see it.
pub(super) fn location(spec: &BackupRepositorySpec) -> String {
    match &spec.persistent_volume_claim {
        Some(claim) => match &claim.path {
            Some(path) => format!("pvc://{}/{path}", claim.claim_name),
            None => format!("pvc://{}", claim.claim_name),
        },
        None => url(spec, None),
    }
}

/// What identifies a repository.
pub(super) fn key(reference: &RepositoryReference, namespace: &str) -> String {
    match reference.kind {
        crate::api::RepositoryKind::BackupRepository => format!("BackupRepository {namespace}/{}", reference.name),
        crate::api::RepositoryKind::ClusterBackupRepository => format!("ClusterBackupRepository {}", reference.name),
    }
}

/// Finds the target of a backup. `candidate`: the repository that the reference names in the backup's own namespace, or
/// the one of the cluster; `labels`: those of the namespace.
pub(super) fn resolve(
    spec: &VirtualMachineBackupSpec,
    namespace: &str,
    candidate: Option<Candidate<'_>>,
    labels: Option<&BTreeMap<String, String>>,
) -> (Option<Target>, RepositoryFact) {
    if let Some(target) = &spec.target {
        return (Some(Target::Qcow2(target.clone())), RepositoryFact::Ready);
    }
    let Some(reference) = &spec.repository_ref else {
        let message = "neither repositoryRef nor target is set";
        return (None, RepositoryFact::Obstacle(Obstacle::lasting(reason::REPOSITORY_NOT_FOUND, message)));
    };
    let key = key(reference, namespace);
    let Some(found) = candidate else {
        let message = format!("there is no {key}: create it, or name another one in a new backup");
        return (None, RepositoryFact::Obstacle(Obstacle::lasting(reason::REPOSITORY_NOT_FOUND, message)));
    };
    let part = found.allowed.map(|_| namespace.to_owned());
    if found.allowed.is_some_and(|allowed| !allows(allowed, namespace, labels)) {
        let message = format!("{key} is not for namespace {namespace}: see its spec.allowedNamespaces");
        return (None, RepositoryFact::Obstacle(Obstacle::lasting(reason::REPOSITORY_NOT_ALLOWED, message)));
    }
    let target = Target::Repository { key: key.clone(), spec: Box::new(found.spec.clone()), part };
    let ready = found.status.and_then(|status| find_condition(&status.conditions, kinds::READY));
    let fact = match ready {
        Some(ready) if ready.status == ConditionStatus::True.as_str() => RepositoryFact::Ready,
        Some(ready) => {
            let message = format!("{key} is not ready: {}: {}", ready.reason, ready.message);
            RepositoryFact::Obstacle(Obstacle::passing(reason::REPOSITORY_NOT_READY, message))
        }
        None => {
            let message = format!("{key} was not probed yet");
            RepositoryFact::Obstacle(Obstacle::passing(reason::REPOSITORY_NOT_READY, message))
        }
    };
    (Some(target), fact)
}

/// Whether a namespace may use a repository: by name, or by labels. Labels that are not known select nothing.
pub(super) fn allows(allowed: &AllowedNamespaces, namespace: &str, labels: Option<&BTreeMap<String, String>>) -> bool {
    allowed.names.iter().any(|name| name == namespace)
        || allowed.selector.as_ref().zip(labels).is_some_and(|(selector, labels)| selects(selector, labels))
}

fn selects(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value))
        && selector.match_expressions.iter().flatten().all(|requirement| meets(requirement, labels))
}

fn meets(requirement: &LabelSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&requirement.key);
    let listed = || value.is_some_and(|value| requirement.values.iter().flatten().any(|listed| listed == value));
    match requirement.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        // What is not understood allows nothing.
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "tables read better so")]
pub(super) mod samples {
    use super::*;
    use serde_json::{Value, json};

    /// The spec of a repository in a bucket, with changes.
    pub(in crate::controller) fn repository(changes: Value) -> BackupRepositorySpec {
        let mut spec = json!({"s3": {"bucket": "backups", "prefix": "a/b",
            "credentialsSecretRef": {"name": "s3"}}, "passphraseSecretRef": {"name": "passphrase"}});
        if let Value::Object(changes) = changes {
            for (key, value) in changes {
                spec[key] = value;
            }
        }
        serde_json::from_value(spec).unwrap()
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "tables read better so")]
mod tests {
    use super::{samples::repository, *};
    use serde_json::{Value, json};

    fn spec(value: Value) -> VirtualMachineBackupSpec {
        serde_json::from_value(value).unwrap()
    }

    fn ready(status: &str) -> RepositoryStatus {
        serde_json::from_value(json!({"conditions": [{"type": "Ready", "status": status, "reason": "WrongPassphrase",
            "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}))
        .unwrap()
    }

    fn why(fact: &RepositoryFact) -> &str {
        match fact {
            RepositoryFact::Ready => "ready",
            RepositoryFact::Obstacle(obstacle) => obstacle.reason,
        }
    }

    #[test]
    fn a_repository_is_usable_when_it_is_there_allowed_and_ready() {
        let wanted = spec(json!({"source": {"name": "web"}, "repositoryRef": {"name": "r"}}));
        let repository = repository(json!({}));
        let (yes, no) = (ready("True"), ready("False"));
        let of = |status, allowed| Some(Candidate { spec: &repository, status, allowed });
        let nobody = AllowedNamespaces::default();
        let team = AllowedNamespaces { names: vec!["team".into()], selector: None };
        let cases = [
            (None, "RepositoryNotFound"),
            (of(None, None), "RepositoryNotReady"),
            (of(Some(&no), None), "RepositoryNotReady"),
            (of(Some(&yes), None), "ready"),
            (of(Some(&yes), Some(&nobody)), "RepositoryNotAllowed"),
            (of(Some(&yes), Some(&team)), "ready"),
        ];
        for (candidate, expected) in cases {
            let (target, fact) = resolve(&wanted, "team", candidate, None);
            assert_eq!(why(&fact), expected);
            if expected == "RepositoryNotAllowed" {
                assert_eq!(target, None, "nothing of it may be used");
            }
        }
        let (_, fact) = resolve(&wanted, "other-team", of(Some(&yes), Some(&team)), None);
        assert_eq!(why(&fact), "RepositoryNotAllowed");
    }

    #[test]
    fn namespaces_are_selected_by_labels() {
        let labels: BTreeMap<String, String> = [("tier".to_owned(), "gold".to_owned())].into();
        let cases = [
            (json!({}), true),
            (json!({"matchLabels": {"tier": "gold"}}), true),
            (json!({"matchLabels": {"tier": "tin"}}), false),
            (json!({"matchExpressions": [{"key": "tier", "operator": "In", "values": ["gold"]}]}), true),
            (json!({"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["gold"]}]}), false),
            (json!({"matchExpressions": [{"key": "x", "operator": "NotIn", "values": ["gold"]}]}), true),
            (json!({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}), true),
            (json!({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}), false),
            (json!({"matchExpressions": [{"key": "tier", "operator": "Resembles"}]}), false),
        ];
        for (selector, expected) in cases {
            let allowed: AllowedNamespaces = serde_json::from_value(json!({"selector": selector})).unwrap();
            assert_eq!(allows(&allowed, "n", Some(&labels)), expected, "{selector}");
            assert!(!allows(&allowed, "n", None), "labels that are not known");
        }
        assert!(!allows(&AllowedNamespaces::default(), "n", Some(&labels)));
    }

    #[test]
    fn each_namespace_has_its_own_part_of_a_cluster_s_repository() {
        let cases = [
            (repository(json!({})), None, "s3://backups/a/b", "s3://backups/a/b"),
            (repository(json!({})), Some("team"), "s3://backups/a/b/team", "s3://backups/a/b"),
            (
                repository(json!({"s3": null, "persistentVolumeClaim": {"claimName": "c"}})),
                Some("team"),
                "/repository/team",
                "pvc://c",
            ),
            (
                repository(json!({"s3": null, "persistentVolumeClaim": {"claimName": "c", "path": "x/y"}})),
                None,
                "/repository/x/y",
                "pvc://c/x/y",
            ),
        ];
        for (spec, part, expected, shown) in cases {
            assert_eq!(url(&spec, part), expected);
            assert_eq!(location(&spec), shown);
        }
        assert_eq!(probed_part(true).as_deref(), Some("_operator"));
        assert_eq!(probed_part(false), None);
    }

    #[test]
    fn a_mover_makes_a_repository_only_where_that_is_wanted() {
        let of = |create| Target::Repository {
            key: "k".into(),
            spec: Box::new(repository(json!({"create": create}))),
            part: None,
        };
        let creates =
            |target: &Target, create| matches!(target.config(create), MoverTarget::Repository { create: true, .. });
        assert!(creates(&of(true), true) && !creates(&of(true), false) && !creates(&of(false), true));
    }
}
