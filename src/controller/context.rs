//! What all reconcilers share while this process leads. It is made anew with each lead, from lists that the API server
//! answers consistently: nothing that an earlier lead, or another process, believed is carried over.

use super::{
    Settings,
    admission::{Admission, Request},
    decision::{self, MoverFact, MoverState},
    events::Events,
    index::{Index, Key, is_finished, key_of},
    leader::Writer,
    machine::{Machine, UNREADABLE},
    metrics::{ControllerMetrics, VmLabels},
    mover_pod::{ANNOTATION_REPOSITORY, COMPONENT, CONTAINER, LABEL_NAME, MoverImage, NAME},
    sightings::Sightings,
    target::{self, Candidate, Target},
    watch::{Seen, Watch, follow, slim_metadata},
};
use crate::{
    api::{
        ANNOTATION_BACKUP, BackupRepository, ClusterBackupRepository, LABEL_COMPONENT, RepositoryKind,
        VirtualMachineBackup,
    },
    kubevirt::{VirtualMachine, VirtualMachineInstance, VirtualMachineInstanceMigration},
    mover::config::MoverOutcome,
};
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Namespace, Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client,
    core::PartialObjectMeta,
    runtime::{
        reflector::{ObjectRef, Store},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::task::JoinSet;

/// The objects as the watches keep them.
pub(super) struct Stores {
    pub(super) backups: Store<VirtualMachineBackup>,
    pub(super) repositories: Store<BackupRepository>,
    pub(super) cluster_repositories: Store<ClusterBackupRepository>,
    pub(super) pods: Store<Pod>,
    vms: Store<VirtualMachine>,
    instances: Store<VirtualMachineInstance>,
    migrations: Store<VirtualMachineInstanceMigration>,
    namespaces: Store<PartialObjectMeta<Namespace>>,
}

/// Who is to be looked at.
#[derive(Debug)]
pub(super) enum Wake {
    Backup(Key),
    Repository(Key),
    ClusterRepository(String),
}

/// Ways to the reconcilers.
#[derive(Debug, Clone)]
pub(super) struct Wakes {
    backups: UnboundedSender<ObjectRef<VirtualMachineBackup>>,
    repositories: UnboundedSender<ObjectRef<BackupRepository>>,
    cluster_repositories: UnboundedSender<ObjectRef<ClusterBackupRepository>>,
}

/// The other ends.
pub(super) struct Queues {
    pub(super) backups: UnboundedReceiver<ObjectRef<VirtualMachineBackup>>,
    pub(super) repositories: UnboundedReceiver<ObjectRef<BackupRepository>>,
    pub(super) cluster_repositories: UnboundedReceiver<ObjectRef<ClusterBackupRepository>>,
}

impl Wakes {
    pub(super) fn new() -> (Self, Queues) {
        let ((backups, a), (repositories, b), (cluster_repositories, c)) = (unbounded(), unbounded(), unbounded());
        let queues = Queues { backups: a, repositories: b, cluster_repositories: c };
        (Self { backups, repositories, cluster_repositories }, queues)
    }

    /// Has somebody looked at. A queue that is gone belongs to a lead that is over.
    pub(super) fn wake(&self, wake: Wake) {
        let _ = match wake {
            Wake::Backup((namespace, name)) => {
                self.backups.unbounded_send(ObjectRef::new(&name).within(&namespace)).map_err(drop)
            }
            Wake::Repository((namespace, name)) => {
                self.repositories.unbounded_send(ObjectRef::new(&name).within(&namespace)).map_err(drop)
            }
            Wake::ClusterRepository(name) => {
                self.cluster_repositories.unbounded_send(ObjectRef::new(&name)).map_err(drop)
            }
        };
    }
}

/// What all reconcilers share.
pub(super) struct Context {
    pub(super) client: Client,
    pub(super) writer: Writer,
    pub(super) settings: Arc<Settings>,
    pub(super) image: MoverImage,
    pub(super) stores: Stores,
    pub(super) index: Arc<Index>,
    pub(super) sightings: Arc<Sightings>,
    pub(super) events: Events,
    pub(super) metrics: ControllerMetrics,
    admission: Arc<Mutex<Admission>>,
    wakes: Wakes,
}

fn skip<K>(_: ObjectMeta, _: String) -> Option<K> {
    None
}

/// Puts what is wrong with an object where decisions see it.
fn marked(mut metadata: ObjectMeta, error: String) -> ObjectMeta {
    metadata.annotations = Some([(UNREADABLE.to_owned(), error)].into());
    metadata.managed_fields = None;
    metadata
}

fn slim_backup(backup: &mut VirtualMachineBackup) {
    slim_metadata(&mut backup.metadata);
    if is_finished(backup) {
        // Only its deletion is of interest.
        backup.metadata.annotations = None;
        backup.metadata.labels = None;
        backup.spec.volumes = None;
        if let Some(status) = &mut backup.status {
            (status.run, status.message, status.reason) = (None, None, None);
            status.assignment = None;
            status.conditions = Vec::new();
        }
    }
}

fn slim_pod(pod: &mut Pod) {
    slim_metadata(&mut pod.metadata);
    if let Some(annotations) = &mut pod.metadata.annotations {
        annotations.retain(|key, _| key == ANNOTATION_BACKUP || key == ANNOTATION_REPOSITORY);
    }
    if let Some(spec) = &mut pod.spec {
        let node = spec.node_name.take();
        *spec = k8s_openapi::api::core::v1::PodSpec { node_name: node, ..Default::default() };
    }
}

fn slim_vm(vm: &mut VirtualMachine) {
    slim_metadata(&mut vm.metadata);
    (vm.metadata.annotations, vm.metadata.labels) = (None, None);
    vm.spec = crate::kubevirt::VirtualMachineSpec::default();
}

fn slim_instance(instance: &mut VirtualMachineInstance) {
    slim_metadata(&mut instance.metadata);
    (instance.metadata.annotations, instance.metadata.labels) = (None, None);
    instance.spec = crate::kubevirt::VirtualMachineInstanceSpec::default();
}

/// The reference back from a pod of ours.
fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// Whom a change of a pod is of interest to.
fn pod_wakes(index: &Index, pod: &Pod) -> Vec<Wake> {
    if let Some((_, uid)) = annotation(pod, ANNOTATION_BACKUP).and_then(|value| value.split_once('/')) {
        return index.by_uid(uid).map(Wake::Backup).into_iter().collect();
    }
    let parts: Vec<_> = annotation(pod, ANNOTATION_REPOSITORY).unwrap_or("").split('/').collect();
    match parts[..] {
        ["BackupRepository", namespace, name] => vec![Wake::Repository((namespace.into(), name.into()))],
        ["ClusterBackupRepository", _, name] => vec![Wake::ClusterRepository(name.into())],
        _ => Vec::new(),
    }
}

fn backup_wakes(keys: Vec<Key>) -> Vec<Wake> {
    keys.into_iter().map(Wake::Backup).collect()
}

impl Context {
    /// Begins to watch. Returns when everything is known.
    pub(super) async fn start(
        client: Client,
        writer: Writer,
        settings: Arc<Settings>,
        metrics: ControllerMetrics,
        wakes: Wakes,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (index, sightings) = (Arc::new(Index::default()), Arc::new(Sightings::default()));
        let admission = Arc::new(Mutex::new(Admission::new(settings.max_backups_per_node)));
        let mut watches = Watches { client: &client, index: &index, wakes: &wakes, tasks };
        let on_backup = on_backup(Arc::clone(&index), Arc::clone(&sightings), Arc::clone(&admission));
        let backups = Watch { what: "VirtualMachineBackup", slim: slim_backup, unreadable: skip };
        let stores = Stores {
            backups: watches.all(backups, watcher::Config::default(), on_backup),
            repositories: watches.repositories(),
            cluster_repositories: watches.cluster_repositories(),
            pods: watches.pods(),
            vms: watches.vms(&metrics),
            instances: watches.instances(),
            migrations: watches.migrations(),
            namespaces: watches.namespaces(),
        };
        let image = MoverImage {
            image: settings.image.clone(),
            pull_policy: settings.image_pull_policy.clone(),
            pull_secrets: settings.image_pull_secrets.clone(),
        };
        let events = Events::new(client.clone(), &settings.identity, writer.clone());
        let context =
            Self { client, writer, settings, image, stores, index, sightings, events, metrics, admission, wakes };
        context.wait_until_known().await;
        context.enter_those_at_work();
        context
    }

    async fn wait_until_known(&self) {
        // A store whose watch ended will never be ready, and nothing is reconciled then either.
        let stores = &self.stores;
        let _ = tokio::join!(
            stores.backups.wait_until_ready(),
            stores.repositories.wait_until_ready(),
            stores.cluster_repositories.wait_until_ready(),
            stores.pods.wait_until_ready(),
            stores.vms.wait_until_ready(),
            stores.instances.wait_until_ready(),
            stores.migrations.wait_until_ready(),
            stores.namespaces.wait_until_ready(),
        );
    }

    /// Those whom an earlier lead gave a place keep it.
    fn enter_those_at_work(&self) {
        for backup in self.stores.backups.state() {
            let status = backup.status.as_ref();
            if let Some(time) = status.and_then(|status| status.completion_time.as_ref())
                && status.and_then(|status| status.phase) == Some(crate::api::BackupPhase::Completed)
            {
                let (namespace, _) = key_of(&backup.metadata);
                self.metrics.note_success(&namespace, &backup.spec.source.name, time.0.as_second());
            }
            let at_work = status.is_some_and(decision::in_progress);
            let mover = self.mover(&backup);
            let alive = mover.as_ref().is_some_and(|mover| !matches!(mover.state, MoverState::Ended(_)));
            if at_work || alive {
                let assigned = status.and_then(|status| status.assignment.as_ref());
                let node = assigned.map(|assignment| assignment.node_name.clone());
                let node = node.or_else(|| mover.and_then(|mover| mover.node));
                self.admission().enter(self.request(&backup, node));
            }
        }
    }

    /// The admission, to ask or to give back.
    pub(super) fn admission(&self) -> MutexGuard<'_, Admission> {
        self.admission.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request of a backup for a place.
    pub(super) fn request(&self, backup: &VirtualMachineBackup, node: Option<String>) -> Request {
        let (namespace, name) = key_of(&backup.metadata);
        let created = backup.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
        Request {
            uid: backup.metadata.uid.clone().unwrap_or_default(),
            namespace,
            name,
            created,
            vm: backup.spec.source.name.clone(),
            node,
            repository: self.target(backup).0.and_then(|target| target.limit()),
        }
    }

    /// It wants no place, or gives it back: those who may begin now are looked at.
    pub(super) fn give_back(&self, uid: &str, keeps_place: bool) {
        let next = {
            let mut admission = self.admission();
            let withdrawn = admission.withdraw(uid);
            let released = !keeps_place && admission.release(uid);
            let next = if withdrawn || released { admission.admissible() } else { Vec::new() };
            self.count(&admission);
            next
        };
        next.into_iter().for_each(|key| self.wakes.wake(Wake::Backup(key)));
    }

    /// Brings the metrics up to date.
    pub(super) fn count(&self, admission: &Admission) {
        let (at_work, queued) = admission.counts();
        self.metrics.at_work.set(i64::try_from(at_work).unwrap_or(i64::MAX));
        self.metrics.queued.set(i64::try_from(queued).unwrap_or(i64::MAX));
        self.metrics.unfinished.set(i64::try_from(self.index.unfinished()).unwrap_or(i64::MAX));
    }

    /// Where a backup goes, and whether it can.
    pub(super) fn target(&self, backup: &VirtualMachineBackup) -> (Option<Target>, decision::RepositoryFact) {
        let (namespace, _) = key_of(&backup.metadata);
        let Some(reference) = &backup.spec.repository_ref else {
            return target::resolve(&backup.spec, &namespace, None, None);
        };
        match reference.kind {
            RepositoryKind::BackupRepository => {
                let found = self.stores.repositories.get(&ObjectRef::new(&reference.name).within(&namespace));
                let candidate = found.as_ref().map(|repository| Candidate {
                    spec: &repository.spec,
                    status: repository.status.as_ref(),
                    allowed: None,
                });
                target::resolve(&backup.spec, &namespace, candidate, None)
            }
            RepositoryKind::ClusterBackupRepository => {
                let found = self.stores.cluster_repositories.get(&ObjectRef::new(&reference.name));
                let candidate = found.as_ref().map(|repository| Candidate {
                    spec: &repository.spec.repository,
                    status: repository.status.as_ref(),
                    allowed: Some(&repository.spec.allowed_namespaces),
                });
                let known = self.stores.namespaces.get(&ObjectRef::new(&namespace));
                let labels = known.as_ref().and_then(|namespace| namespace.metadata.labels.as_ref());
                target::resolve(&backup.spec, &namespace, candidate, labels)
            }
        }
    }

    /// The namespace of a backup's mover: that of the credentials.
    pub(super) fn mover_namespace(&self, backup: &VirtualMachineBackup) -> String {
        let of_cluster =
            backup.spec.repository_ref.as_ref().is_some_and(|r| r.kind == RepositoryKind::ClusterBackupRepository);
        if of_cluster { self.settings.namespace.clone() } else { key_of(&backup.metadata).0 }
    }

    /// The mover pod of a backup's last attempt.
    pub(super) fn mover(&self, backup: &VirtualMachineBackup) -> Option<MoverFact> {
        let (namespace, name) = key_of(&backup.metadata);
        let uid = backup.metadata.uid.as_deref().unwrap_or_default();
        let attempt = backup.status.as_ref().and_then(|status| status.attempts).filter(|attempts| *attempts > 0)?;
        self.pod_of_backup(backup, &super::names::mover(&namespace, &name, uid, attempt))
    }

    /// A pod of a backup.
    pub(super) fn pod_of_backup(&self, backup: &VirtualMachineBackup, name: &str) -> Option<MoverFact> {
        let (namespace, _) = key_of(&backup.metadata);
        let owner = format!("{namespace}/{}", backup.metadata.uid.as_deref().unwrap_or_default());
        let pod = self.stores.pods.get(&ObjectRef::new(name).within(&self.mover_namespace(backup)))?;
        Some(mover_fact(&pod, annotation(&pod, ANNOTATION_BACKUP) != Some(owner.as_str())))
    }

    /// What is known of a VM. The closure, since it borrows from several stores.
    pub(super) fn with_machine<T>(&self, key: &Key, look: impl FnOnce(Machine<'_>) -> T) -> T {
        let vm = self.stores.vms.get(&ObjectRef::new(&key.1).within(&key.0));
        let instance = self.stores.instances.get(&ObjectRef::new(&key.1).within(&key.0));
        let migration = self.index.migration(key);
        look(Machine { vm: vm.as_deref(), instance: instance.as_deref(), migration: migration.as_deref() })
    }

    /// UIDs of pods in the operator's namespace whose backup is gone, with their names.
    pub(super) fn orphans(&self) -> Vec<(String, String)> {
        let ours = |pod: &Arc<Pod>| pod.metadata.namespace.as_deref() == Some(&self.settings.namespace);
        let orphan = |pod: Arc<Pod>| {
            let (_, uid) = annotation(&pod, ANNOTATION_BACKUP)?.split_once('/')?;
            let gone = self.index.by_uid(uid).is_none() && pod.metadata.deletion_timestamp.is_none();
            gone.then(|| (pod.metadata.name.clone().unwrap_or_default(), pod.metadata.uid.clone().unwrap_or_default()))
        };
        self.stores.pods.state().into_iter().filter(ours).filter_map(orphan).collect()
    }
}

/// A pod as decisions see it.
pub(super) fn mover_fact(pod: &Pod, foreign: bool) -> MoverFact {
    let status = pod.status.as_ref();
    let container = status
        .and_then(|status| status.container_statuses.iter().flatten().find(|container| container.name == CONTAINER));
    let state = container.and_then(|container| container.state.as_ref());
    let phase = status.and_then(|status| status.phase.as_deref());
    let waiting = || {
        let reason = state.and_then(|state| state.waiting.as_ref());
        let texts = reason.map(|waiting| (waiting.reason.clone(), waiting.message.clone()));
        let texts = texts.or_else(|| {
            let conditions = status.iter().flat_map(|status| status.conditions.iter().flatten());
            let unscheduled = conditions.into_iter().find(|c| c.type_ == "PodScheduled" && c.status == "False");
            unscheduled.map(|condition| (condition.reason.clone(), condition.message.clone()))
        });
        let (reason, message) = texts?;
        let why = [reason, message].into_iter().flatten().collect::<Vec<_>>().join(": ");
        (!why.is_empty()).then_some(why)
    };
    let state = if let Some(ended) = state.and_then(|state| state.terminated.as_ref()) {
        MoverState::Ended(ended.message.as_deref().and_then(MoverOutcome::from_message))
    } else if matches!(phase, Some("Succeeded" | "Failed")) {
        // Evicted, say: there never was an end of the container.
        MoverState::Ended(None)
    } else if state.is_some_and(|state| state.running.is_some()) {
        MoverState::Running
    } else {
        MoverState::Pending(waiting())
    };
    MoverFact {
        uid: pod.metadata.uid.clone().unwrap_or_default(),
        foreign,
        deleting: pod.metadata.deletion_timestamp.is_some(),
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        state,
    }
}

/// What watches are started with.
struct Watches<'a> {
    client: &'a Client,
    index: &'a Arc<Index>,
    wakes: &'a Wakes,
    tasks: &'a mut JoinSet<()>,
}

impl Watches<'_> {
    /// Watches a kind in all namespaces. `on` says whom an event is of interest to.
    fn all<K>(
        &mut self,
        watch: Watch<K>,
        config: watcher::Config,
        on: impl FnMut(Seen<'_, K>) -> Vec<Wake> + Send + 'static,
    ) -> Store<K>
    where
        K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + Sync + 'static,
    {
        let wakes = self.wakes.clone();
        follow(self.tasks, Api::all(self.client.clone()), config, watch, on, move |wake| wakes.wake(wake))
    }

    fn pods(&mut self) -> Store<Pod> {
        let index = Arc::clone(self.index);
        let ours = watcher::Config::default().labels(&format!("{LABEL_NAME}={NAME},{LABEL_COMPONENT}={COMPONENT}"));
        self.all(Watch { what: "Pod", slim: slim_pod, unreadable: skip }, ours, move |seen| match seen {
            Seen::There(pod) | Seen::Gone(pod) => pod_wakes(&index, pod),
            _ => Vec::new(),
        })
    }

    fn vms(&mut self, metrics: &ControllerMetrics) -> Store<VirtualMachine> {
        let (index, last_success) = (Arc::clone(self.index), metrics.last_success.clone());
        let unreadable =
            |metadata, error| Some(VirtualMachine { metadata: marked(metadata, error), ..VirtualMachine::default() });
        let watch = Watch { what: "VirtualMachine", slim: slim_vm, unreadable };
        self.all(watch, watcher::Config::default(), move |seen| match seen {
            Seen::There(vm) => backup_wakes(index.of_vm(&key_of(&vm.metadata))),
            Seen::Gone(vm) => {
                let (namespace, vm) = key_of(&vm.metadata);
                last_success.remove(&VmLabels { namespace: namespace.clone(), vm: vm.clone() });
                backup_wakes(index.of_vm(&(namespace, vm)))
            }
            _ => Vec::new(),
        })
    }

    fn instances(&mut self) -> Store<VirtualMachineInstance> {
        let index = Arc::clone(self.index);
        let unreadable = |metadata, error| {
            Some(VirtualMachineInstance { metadata: marked(metadata, error), ..VirtualMachineInstance::default() })
        };
        let watch = Watch { what: "VirtualMachineInstance", slim: slim_instance, unreadable };
        self.all(watch, watcher::Config::default(), move |seen| match seen {
            Seen::There(vmi) | Seen::Gone(vmi) => backup_wakes(index.of_vm(&key_of(&vmi.metadata))),
            _ => Vec::new(),
        })
    }

    fn migrations(&mut self) -> Store<VirtualMachineInstanceMigration> {
        let index = Arc::clone(self.index);
        let slim = |migration: &mut VirtualMachineInstanceMigration| slim_metadata(&mut migration.metadata);
        let watch = Watch { what: "VirtualMachineInstanceMigration", slim, unreadable: skip };
        self.all(watch, watcher::Config::default(), move |seen| match seen {
            Seen::Restarted => {
                index.forget_migrations();
                Vec::new()
            }
            Seen::There(migration) => backup_wakes(index.of_vm(&index.note_migration(migration, false))),
            Seen::Gone(migration) => backup_wakes(index.of_vm(&index.note_migration(migration, true))),
            Seen::Synced => Vec::new(),
        })
    }

    fn repositories(&mut self) -> Store<BackupRepository> {
        let index = Arc::clone(self.index);
        let slim = |repository: &mut BackupRepository| slim_metadata(&mut repository.metadata);
        let watch = Watch { what: "BackupRepository", slim, unreadable: skip };
        self.all(watch, watcher::Config::default(), move |seen| match seen {
            Seen::There(repository) | Seen::Gone(repository) => {
                let key = key_of(&repository.metadata);
                let of_it = index.of_repository(&format!("BackupRepository {}/{}", key.0, key.1));
                backup_wakes(of_it).into_iter().chain([Wake::Repository(key)]).collect()
            }
            _ => Vec::new(),
        })
    }

    fn cluster_repositories(&mut self) -> Store<ClusterBackupRepository> {
        let index = Arc::clone(self.index);
        let slim = |repository: &mut ClusterBackupRepository| slim_metadata(&mut repository.metadata);
        let watch = Watch { what: "ClusterBackupRepository", slim, unreadable: skip };
        self.all(watch, watcher::Config::default(), move |seen| match seen {
            Seen::There(repository) | Seen::Gone(repository) => {
                let (_, name) = key_of(&repository.metadata);
                let of_it = index.of_repository(&format!("ClusterBackupRepository {name}"));
                backup_wakes(of_it).into_iter().chain([Wake::ClusterRepository(name)]).collect()
            }
            _ => Vec::new(),
        })
    }

    fn namespaces(&mut self) -> Store<PartialObjectMeta<Namespace>> {
        let slim = |namespace: &mut PartialObjectMeta<Namespace>| slim_metadata(&mut namespace.metadata);
        self.all(Watch { what: "Namespace", slim, unreadable: skip }, watcher::Config::default(), |_| Vec::new())
    }
}

/// Keeps index, admission and sightings in step with the backups.
fn on_backup(
    index: Arc<Index>,
    sightings: Arc<Sightings>,
    admission: Arc<Mutex<Admission>>,
) -> impl FnMut(Seen<'_, VirtualMachineBackup>) -> Vec<Wake> + Send {
    let leave = move |uid: &str| {
        sightings.forget(uid);
        let mut admission = admission.lock().unwrap_or_else(PoisonError::into_inner);
        admission.withdraw(uid);
        admission.release(uid);
        admission.admissible()
    };
    let mut listed = HashSet::new();
    move |seen| match seen {
        Seen::Restarted => {
            listed.clear();
            Vec::new()
        }
        Seen::There(backup) => {
            index.enter(backup);
            listed.extend(backup.metadata.uid.clone());
            vec![Wake::Backup(key_of(&backup.metadata))]
        }
        Seen::Gone(backup) => {
            let uid = backup.metadata.uid.as_deref().unwrap_or_default();
            index.leave(uid);
            listed.remove(uid);
            backup_wakes(leave(uid))
        }
        Seen::Synced => {
            let lost = index.retain(&listed);
            // Only between a list's beginning and its end.
            listed = HashSet::new();
            lost.iter().flat_map(|uid| backup_wakes(leave(uid))).collect()
        }
    }
}

#[cfg(test)]
#[allow(clippy::needless_pass_by_value, reason = "tables read better so")]
#[path = "context_tests.rs"]
mod tests;
