//! What roles give, asked of the API server.

use super::{OPERATOR, account, backup, client, installed, wait};
use crate::cluster::{Cluster, Kubectl};
use kube::{
    Api,
    api::PostParams,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde_json::json;

/// Whether somebody may do this, in the API server's own judgement. Resources are written as `PLURAL[.GROUP][/SUBRESOURCE]`.
struct Judge(Api<DynamicObject>);

impl Judge {
    /// The API server, asked by somebody about their own rights.
    async fn of(who: &Kubectl) -> Self {
        let kind = GroupVersionKind::gvk("authorization.k8s.io", "v1", "SelfSubjectAccessReview");
        let resource = ApiResource::from_gvk_with_plural(&kind, "selfsubjectaccessreviews");
        Self(Api::all_with(client(who).await, &resource))
    }

    async fn allows(&self, namespace: &str, verb: &str, resource: &str, name: &str) -> bool {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let (resource, group) = resource.split_once('.').unwrap_or((resource, ""));
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "metadata": {},
            "spec": { "resourceAttributes": { "namespace": namespace, "verb": verb, "group": group,
                "resource": resource, "subresource": subresource, "name": name } },
        });
        let review = serde_json::from_value(review).expect("a review");
        let answer = self.0.create(&PostParams::default(), &review).await.expect("an answer");
        answer.data["status"]["allowed"] == true
    }
}

/// Whether somebody may do this.
fn may(who: &Kubectl, namespace: &str, verb: &str, resource: &str) -> bool {
    wait(async { Judge::of(who).await.allows(namespace, verb, resource, "").await })
}

/// Checks a table of `verbs resource yes-or-no`.
#[track_caller]
fn check(who: &Kubectl, namespace: &str, table: &[(&str, &str, bool)]) {
    let wrong = wait(async {
        let judge = Judge::of(who).await;
        let mut wrong = Vec::new();
        for (verbs, resource, wanted) in table {
            for verb in verbs.split_whitespace() {
                if judge.allows(namespace, verb, resource, "").await != *wanted {
                    wrong.push(format!("{verb} {resource} in {namespace}: {}", !wanted));
                }
            }
        }
        wrong
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
}

const BACKUPS: &str = "virtualmachinebackups.virtfleece.io";
const REPOSITORIES: &str = "backuprepositories.virtfleece.io";
const CLUSTER_REPOSITORIES: &str = "clusterbackuprepositories.virtfleece.io";
const CHANGES: &str = "create update patch delete deletecollection";

#[test]
fn the_operators_accounts_may_what_is_written_down() {
    let cluster = installed();
    let controller = account(&cluster, "virt-fleece-controller", None);
    check(
        &controller,
        "team-a",
        &[
            ("get list watch patch", BACKUPS, true),
            ("create update delete deletecollection", BACKUPS, false),
            ("patch", &format!("{BACKUPS}/status"), true),
            ("update", &format!("{BACKUPS}/finalizers"), false),
            ("get list watch", REPOSITORIES, true),
            ("patch", &format!("{REPOSITORIES}/status"), true),
            (CHANGES, REPOSITORIES, false),
            ("get list watch", CLUSTER_REPOSITORIES, true),
            (CHANGES, CLUSTER_REPOSITORIES, false),
            ("get list watch create delete", "pods", true),
            ("update patch deletecollection", "pods", false),
            ("create get", "pods/exec", false),
            ("get", "pods/log", false),
            ("get list watch create", "secrets", false),
            ("get list", "nodes", false),
            ("get list", "persistentvolumeclaims", true),
            ("watch create delete", "persistentvolumeclaims", false),
            ("get", "controllerrevisions.apps", true),
            ("get list watch", "namespaces", true),
            ("get list watch", "virtualmachines.kubevirt.io", true),
            (CHANGES, "virtualmachines.kubevirt.io", false),
            (CHANGES, "virtualmachineinstances.kubevirt.io", false),
            ("create", "events.events.k8s.io", true),
            ("get list watch create update patch", "leases.coordination.k8s.io", false),
            ("create", "serviceaccounts/token", false),
            ("create bind escalate", "clusterroles.rbac.authorization.k8s.io", false),
            ("impersonate", "users", false),
        ],
    );
    let lease = |name: &str, verb: &str| {
        wait(async { Judge::of(&controller).await.allows(OPERATOR, verb, "leases.coordination.k8s.io", name).await })
    };
    for verb in ["get", "update"] {
        assert!(lease("virt-fleece-controller", verb) && !lease("another", verb), "{verb}");
    }
    assert!(!lease("virt-fleece-controller", "delete"));

    let agent = account(&cluster, "virt-fleece-agent", None);
    check(
        &agent,
        OPERATOR,
        &[
            ("get list watch", BACKUPS, true),
            (CHANGES, BACKUPS, false),
            ("patch", &format!("{BACKUPS}/status"), true),
            ("update", &format!("{BACKUPS}/status"), false),
            ("get list watch create", REPOSITORIES, false),
            ("get list watch", CLUSTER_REPOSITORIES, false),
            ("get list watch", "pods", true),
            (CHANGES, "pods", false),
            ("create", "pods/exec", false),
            ("get list watch", "virtualmachineinstances.kubevirt.io", true),
            (CHANGES, "virtualmachineinstances.kubevirt.io", false),
            (CHANGES, "virtualmachineinstancemigrations.kubevirt.io", false),
            ("get list watch", "secrets", false),
            ("get list watch", "configmaps", false),
            ("create patch", "events.events.k8s.io", false),
            ("get create update", "leases.coordination.k8s.io", false),
            ("get list patch", "nodes", false),
            ("create", "serviceaccounts/token", false),
        ],
    );
}

/// A user whose rights in a namespace are those of the cluster's role of this name: what its controllers would put
/// together from the labels.
fn member(cluster: &Cluster, name: &str, namespace: &str, role: &str) -> Kubectl {
    let label = format!("rbac.authorization.k8s.io/aggregate-to-{role}=true");
    let roles = cluster.admin().get(&["clusterroles", "-l", &label]);
    for part in roles["items"].as_array().expect("roles") {
        let part = part["metadata"]["name"].as_str().expect("a name");
        let binding = format!("{name}-{}", part.replace(':', "-"));
        let (role, user) = (format!("--clusterrole={part}"), format!("--user={name}"));
        cluster.admin().run(["-n", namespace, "create", "rolebinding", &binding, &role, &user]);
    }
    cluster.user(name, &[])
}

#[test]
fn tenants_have_their_own_backups_and_nobody_elses() {
    let cluster = installed();
    for namespace in ["team-a", "team-b"] {
        cluster.create_namespace(namespace);
        cluster.admin().apply(&backup(namespace, "one", "web"));
    }
    let viewer = member(&cluster, "viewer", "team-a", "view");
    let editor = member(&cluster, "editor", "team-a", "edit");
    let owner = member(&cluster, "owner", "team-a", "admin");
    super::until("the bindings are known", || may(&owner, "team-a", "get", BACKUPS));

    for kind in [BACKUPS, REPOSITORIES] {
        check(&viewer, "team-a", &[("get list watch", kind, true), (CHANGES, kind, false)]);
        for who in [&editor, &owner] {
            check(who, "team-a", &[("get list watch", kind, true), (CHANGES, kind, true)]);
        }
    }
    for who in [&viewer, &editor, &owner] {
        for kind in [BACKUPS, REPOSITORIES] {
            check(
                who,
                "team-a",
                &[
                    ("get update patch", &format!("{kind}/status"), false),
                    ("update patch", &format!("{kind}/finalizers"), false),
                ],
            );
            check(who, "team-b", &[("get list watch create update patch delete", kind, false)]);
            check(who, OPERATOR, &[("get list watch create update patch delete", kind, false)]);
        }
        check(who, "team-a", &[("get list watch create update patch delete", CLUSTER_REPOSITORIES, false)]);
        check(who, OPERATOR, &[("get list create delete", "pods", false), ("get list", "secrets", false)]);
        who.attempt(["-n", "team-b", "get", "vfb", "one"]).expect_err("another's backup");
        who.attempt(["get", "vfb", "-A"]).expect_err("everybody's backups");
    }
    // In deed, not only by the roles.
    editor.apply(&backup("team-a", "mine", "web"));
    let cancel = r#"{"spec":{"cancel":true}}"#;
    editor.run(["-n", "team-a", "patch", "vfb", "mine", "--type=merge", "-p", cancel]);
    let status = r#"{"status":{"phase":"Completed","repositoryVm":"team-b/db"}}"#;
    editor
        .attempt(["-n", "team-a", "patch", "vfb", "mine", "--subresource=status", "--type=merge", "-p", status])
        .expect_err("a status");
    // Neither kind of reference has a namespace in it.
    let reach = backup("team-a", "reach", "web").replace("name: main", "name: main, namespace: team-b");
    let error = editor.try_apply(&reach).expect_err("a repository of another namespace");
    assert!(error.contains("namespace"), "{error}");
    let reach = backup("team-a", "reach", "team-b/web");
    editor.try_apply(&reach).expect("a name that no VM can have");
    editor.run(["-n", "team-a", "delete", "vfb", "mine"]);
}
