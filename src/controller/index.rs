//! Which backups an event is about, without looking at all of them: the finished ones are many.

use super::target;
use crate::{
    api::{BackupPhase, VirtualMachineBackup},
    kubevirt::VirtualMachineInstanceMigration,
};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Namespace and name.
pub(super) type Key = (String, String);

/// Namespace and name of an object.
pub(super) fn key_of(metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Key {
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

/// Nothing follows for this backup, unless it is deleted.
pub(super) fn is_finished(backup: &VirtualMachineBackup) -> bool {
    backup.status.as_ref().and_then(|status| status.phase).is_some_and(BackupPhase::is_terminal)
}

#[derive(Debug, Default)]
struct Inner {
    /// All backups, by UID.
    backups: HashMap<String, Key>,
    /// VM and repository of those that are not finished, by UID.
    unfinished: HashMap<String, (Key, Option<String>)>,
    /// UIDs of those that are not finished.
    by_vm: HashMap<Key, BTreeSet<String>>,
    by_repository: HashMap<String, BTreeSet<String>>,
    /// Migrations that are not over, by instance.
    migrations: HashMap<Key, BTreeSet<String>>,
}

/// The index. Kept by the watches.
#[derive(Debug, Default)]
pub(super) struct Index(Mutex<Inner>);

fn remove<K: Eq + Hash>(map: &mut HashMap<K, BTreeSet<String>>, key: &K, value: &str) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

impl Inner {
    fn forget_unfinished(&mut self, uid: &str) {
        if let Some((vm, repository)) = self.unfinished.remove(uid) {
            remove(&mut self.by_vm, &vm, uid);
            if let Some(repository) = repository {
                remove(&mut self.by_repository, &repository, uid);
            }
        }
    }

    fn keys(&self, uids: Option<&BTreeSet<String>>) -> Vec<Key> {
        uids.into_iter().flatten().filter_map(|uid| self.backups.get(uid).cloned()).collect()
    }
}

impl Index {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A backup is there, or changed.
    pub(super) fn enter(&self, backup: &VirtualMachineBackup) {
        let Some(uid) = backup.metadata.uid.clone() else { return };
        let (namespace, name) = key_of(&backup.metadata);
        let mut inner = self.inner();
        inner.backups.insert(uid.clone(), (namespace.clone(), name));
        if is_finished(backup) {
            inner.forget_unfinished(&uid);
        } else if !inner.unfinished.contains_key(&uid) {
            // What these depend on is fixed.
            let repository = backup.spec.repository_ref.as_ref().map(|reference| target::key(reference, &namespace));
            let vm = (namespace, backup.spec.source.name.clone());
            inner.by_vm.entry(vm.clone()).or_default().insert(uid.clone());
            if let Some(repository) = &repository {
                inner.by_repository.entry(repository.clone()).or_default().insert(uid.clone());
            }
            inner.unfinished.insert(uid, (vm, repository));
        }
    }

    /// A backup is gone.
    pub(super) fn leave(&self, uid: &str) {
        let mut inner = self.inner();
        inner.backups.remove(uid);
        inner.forget_unfinished(uid);
    }

    /// These are all backups: what else was known is gone. UIDs of the lost ones.
    pub(super) fn retain(&self, present: &HashSet<String>) -> Vec<String> {
        let lost: Vec<_> = self.inner().backups.keys().filter(|uid| !present.contains(*uid)).cloned().collect();
        lost.iter().for_each(|uid| self.leave(uid));
        lost
    }

    /// The backup of this UID.
    pub(super) fn by_uid(&self, uid: &str) -> Option<Key> {
        self.inner().backups.get(uid).cloned()
    }

    /// Those of a VM that are not finished.
    pub(super) fn of_vm(&self, vm: &Key) -> Vec<Key> {
        let inner = self.inner();
        inner.keys(inner.by_vm.get(vm))
    }

    /// Those of a repository that are not finished.
    pub(super) fn of_repository(&self, key: &str) -> Vec<Key> {
        let inner = self.inner();
        inner.keys(inner.by_repository.get(key))
    }

    /// How many are not finished.
    pub(super) fn unfinished(&self) -> usize {
        self.inner().unfinished.len()
    }

    /// A migration is there, or changed, or is gone. Its instance.
    pub(super) fn note_migration(&self, migration: &VirtualMachineInstanceMigration, gone: bool) -> Key {
        let (namespace, name) = key_of(&migration.metadata);
        let instance = (namespace, migration.spec.vmi_name.clone());
        let mut inner = self.inner();
        if gone || !migration.is_active() {
            remove(&mut inner.migrations, &instance, &name);
        } else {
            inner.migrations.entry(instance.clone()).or_default().insert(name);
        }
        instance
    }

    /// All migrations are told anew.
    pub(super) fn forget_migrations(&self) {
        self.inner().migrations.clear();
    }

    /// A migration of an instance that is not over.
    pub(super) fn migration(&self, instance: &Key) -> Option<String> {
        self.inner().migrations.get(instance)?.first().cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn backup(uid: &str, vm: &str, phase: Option<&str>) -> VirtualMachineBackup {
        serde_json::from_value(json!({
            "apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
            "metadata": {"name": format!("b-{uid}"), "namespace": "n", "uid": uid},
            "spec": {"source": {"name": vm}, "repositoryRef": {"name": "r"}},
            "status": phase.map(|phase| json!({"phase": phase})),
        }))
        .unwrap()
    }

    #[test]
    fn finished_backups_are_no_part_of_a_vm_s() {
        let index = Index::default();
        let vm = ("n".to_owned(), "web".to_owned());
        index.enter(&backup("1", "web", None));
        index.enter(&backup("2", "web", Some("Running")));
        index.enter(&backup("3", "web", Some("Completed")));
        index.enter(&backup("4", "other", Some("Pending")));
        assert_eq!(index.of_vm(&vm).len(), 2);
        assert_eq!(index.of_repository("BackupRepository n/r").len(), 3);
        index.enter(&backup("2", "web", Some("Failed")));
        assert_eq!(index.of_vm(&vm), [("n".into(), "b-1".into())]);
        assert_eq!(index.by_uid("3"), Some(("n".into(), "b-3".into())));
        let mut lost = index.retain(&["3".to_owned(), "4".to_owned()].into());
        lost.sort();
        assert_eq!(lost, ["1", "2"]);
        assert!(index.of_vm(&vm).is_empty() && index.by_uid("1").is_none());
        assert_eq!(index.unfinished(), 1);
    }

    #[test]
    fn migrations_that_are_over_are_none() {
        let migration = |name: &str, phase: &str| -> VirtualMachineInstanceMigration {
            serde_json::from_value(json!({"metadata": {"name": name, "namespace": "n"},
                "spec": {"vmiName": "web"}, "status": {"phase": phase}}))
            .unwrap()
        };
        let (index, web) = (Index::default(), ("n".to_owned(), "web".to_owned()));
        assert_eq!(index.note_migration(&migration("m", "Pending"), false), web);
        assert_eq!(index.migration(&web).as_deref(), Some("m"));
        index.note_migration(&migration("m", "Succeeded"), false);
        assert_eq!(index.migration(&web), None);
        index.note_migration(&migration("m", "Running"), false);
        index.note_migration(&migration("m", "Running"), true);
        assert_eq!(index.migration(&web), None);
    }
}
