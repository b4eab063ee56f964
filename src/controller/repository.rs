//! Reconciles a repository, a namespace's or the cluster's: a short mover pod opens it, and what that finds becomes the
//! status. The controller itself never sees a credential.

use super::{
    ControllerError,
    context::{Context, mover_fact},
    decision::{MoverFact, MoverState},
    index::key_of,
    metrics::RepositoryLabels,
    mover_pod::{self, ANNOTATION_REPOSITORY, MoverPod, PodOwner, PodTask},
    names,
    probe::{self, Facts, Probe},
    reasons::{event, reason},
    target::{self, Target},
    write,
};
use crate::{
    api::{
        BackupRepository, BackupRepositorySpec, ClusterBackupRepository, ConditionStatus, RepositoryStatus,
        api_version, find_condition, kinds,
    },
    mover::config::MoverOutcome,
};
use jiff::Timestamp;
use k8s_openapi::{NamespaceResourceScope, api::core::v1::Pod};
use kube::{
    Api, Resource,
    api::{Patch, PostParams},
    runtime::{controller::Action, reflector::ObjectRef},
};
use serde::de::DeserializeOwned;
use serde_json::json;
use std::{fmt::Debug, sync::Arc, time::Duration};
use tracing::Instrument;

/// The kubelet ends a probe after so many seconds.
const PROBE_SECONDS: i64 = 600;

/// What both kinds of repositories have.
pub(super) trait Repository:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static
{
    /// Name of the kind.
    const KIND: &'static str;
    /// It is the cluster's.
    const OF_CLUSTER: bool;
    /// Its spec.
    fn spec(&self) -> &BackupRepositorySpec;
    /// Its status.
    fn status(&self) -> Option<&RepositoryStatus>;
    /// Where it is written.
    fn api(context: &Context, namespace: &str) -> Api<Self>;
}

impl Repository for BackupRepository {
    const KIND: &'static str = "BackupRepository";
    const OF_CLUSTER: bool = false;

    fn spec(&self) -> &BackupRepositorySpec {
        &self.spec
    }

    fn status(&self) -> Option<&RepositoryStatus> {
        self.status.as_ref()
    }

    fn api(context: &Context, namespace: &str) -> Api<Self>
    where
        Self: Resource<Scope = NamespaceResourceScope>,
    {
        Api::namespaced(context.client.clone(), namespace)
    }
}

impl Repository for ClusterBackupRepository {
    const KIND: &'static str = "ClusterBackupRepository";
    const OF_CLUSTER: bool = true;

    fn spec(&self) -> &BackupRepositorySpec {
        &self.spec.repository
    }

    fn status(&self) -> Option<&RepositoryStatus> {
        self.status.as_ref()
    }

    fn api(context: &Context, _: &str) -> Api<Self> {
        Api::all(context.client.clone())
    }
}

/// A repository that is looked at.
struct Look<'a, R> {
    context: &'a Context,
    repository: &'a R,
    /// Empty for the cluster's.
    namespace: String,
    name: String,
    uid: String,
    generation: i64,
}

/// Looks at a repository.
pub(super) async fn reconcile<R: Repository>(
    repository: Arc<R>,
    context: Arc<Context>,
) -> Result<Action, ControllerError> {
    let metadata = repository.meta();
    let (namespace, name) = key_of(metadata);
    if metadata.deletion_timestamp.is_some() {
        // Pods and claims of it go with it.
        return Ok(Action::await_change());
    }
    let look = Look {
        context: &context,
        repository: repository.as_ref(),
        uid: metadata.uid.clone().unwrap_or_default(),
        generation: metadata.generation.unwrap_or(0),
        namespace,
        name,
    };
    let full = format!("{} {}/{}", R::KIND, look.namespace, look.name);
    let span = tracing::info_span!("repository", repository = full);
    async {
        match look.step().await {
            Err(error) if error.is_not_found() => Ok(Action::await_change()),
            other => other,
        }
    }
    .instrument(span)
    .await
}

impl<R: Repository> Look<'_, R> {
    /// Where its secrets are, and so its pods.
    fn pod_namespace(&self) -> &str {
        if R::OF_CLUSTER { &self.context.settings.namespace } else { &self.namespace }
    }

    fn pod_name(&self) -> String {
        names::probe(R::KIND, &self.namespace, &self.name, &self.uid, self.generation)
    }

    fn annotation(&self) -> String {
        format!("{}/{}/{}", R::KIND, self.namespace, self.name)
    }

    fn pod(&self) -> Option<MoverFact> {
        let reference = ObjectRef::new(&self.pod_name()).within(self.pod_namespace());
        let pod = self.context.stores.pods.get(&reference)?;
        let annotations = pod.metadata.annotations.as_ref();
        let ours =
            annotations.and_then(|annotations| annotations.get(ANNOTATION_REPOSITORY)) == Some(&self.annotation());
        Some(mover_fact(&pod, !ours))
    }

    async fn step(&self) -> Result<Action, ControllerError> {
        let now = Timestamp::now();
        let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
        let nothing = RepositoryStatus::default();
        let status = self.repository.status().unwrap_or(&nothing);
        let pod = self.pod();
        let looks = pod
            .as_ref()
            .map_or(String::new(), |pod| format!("{} {}", pod.uid, matches!(pod.state, MoverState::Pending(_))));
        let facts = Facts {
            now,
            generation: self.generation,
            spec: self.repository.spec(),
            status,
            pod: pod.as_ref(),
            pod_for: self.context.sightings.since(&self.uid, "pod", looks),
            last_end: self.context.sightings.ago(&self.uid, "end"),
        };
        self.measure(status);
        match probe::decide(&facts) {
            Probe::Begin => self.begin(&facts).await,
            Probe::Wait(again) => Ok(Action::requeue(again)),
            Probe::Gone => Ok(Action::requeue(Duration::from_secs(30))),
            Probe::Pending(why) => {
                self.write(status, &probe::probing(&facts, &why)).await?;
                Ok(Action::requeue(Duration::from_secs(30)))
            }
            Probe::Finish(outcome) => self.finish(&facts, pod.as_ref(), &outcome).await,
        }
    }

    async fn begin(&self, facts: &Facts<'_>) -> Result<Action, ControllerError> {
        self.write(facts.status, &probe::probing(facts, "")).await?;
        let target = Target::Repository {
            key: String::new(),
            spec: Box::new(self.repository.spec().clone()),
            part: target::probed_part(R::OF_CLUSTER),
        };
        let pod = MoverPod {
            namespace: self.pod_namespace().to_owned(),
            name: self.pod_name(),
            owner: PodOwner {
                annotation: (ANNOTATION_REPOSITORY, self.annotation()),
                // An object of the cluster may own one of a namespace.
                reference: Some(mover_pod::owner_reference(R::KIND, &self.name, &self.uid)),
                backup: None,
                vm: None,
            },
            task: PodTask::Probe,
            target: &target,
            image: &self.context.image,
            active_seconds: PROBE_SECONDS,
        };
        let built = mover_pod::build(&pod).map_err(|source| ControllerError::Write {
            what: "build a probe",
            source: kube::Error::SerdeError(source),
        })?;
        let api = Api::<Pod>::namespaced(self.context.client.clone(), &pod.namespace);
        match self.context.writer.write("make a probe", api.create(&PostParams::default(), &built)).await {
            Ok(_) => {
                tracing::info!(pod = pod.name, "probing");
                Ok(Action::requeue(Duration::from_secs(60)))
            }
            // Ours from before, which the watch is about to tell.
            Err(error) if error.is_conflict() => Ok(Action::requeue(Duration::from_secs(5))),
            Err(error) => match error.refusal().map(ToOwned::to_owned) {
                Some(refusal) => {
                    let why = format!("the API server does not take the probe's pod: {refusal}");
                    self.finish(facts, None, &Err(why)).await
                }
                None => Err(error),
            },
        }
    }

    async fn finish(
        &self,
        facts: &Facts<'_>,
        pod: Option<&MoverFact>,
        outcome: &Result<MoverOutcome, String>,
    ) -> Result<Action, ControllerError> {
        let found = probe::found(facts, outcome);
        self.write(facts.status, &found).await?;
        self.context.sightings.note(&self.uid, "end");
        let ready = |status: &RepositoryStatus| {
            find_condition(&status.conditions, kinds::READY).filter(|ready| ready.reason != reason::PROBING).map(
                |ready| (ready.status == ConditionStatus::True.as_str(), ready.reason.clone(), ready.message.clone()),
            )
        };
        if let Some((is_ready, why, message)) = ready(&found)
            && ready(facts.status).is_none_or(|(was, before, _)| was != is_ready || before != why)
        {
            let about = self.repository.object_ref(&());
            tracing::info!(ready = is_ready, reason = why, message, "probed");
            if is_ready {
                self.context.events.normal(event::REPOSITORY_READY, "Probe", &message, &about).await;
            } else {
                let note = format!("{why}: {message}");
                self.context.events.warning(event::REPOSITORY_NOT_READY, "Probe", &note, &about).await;
            }
        }
        if let Some(pod) = pod {
            write::delete_pod(self.context, self.pod_namespace(), &self.pod_name(), &pod.uid).await?;
        }
        Ok(Action::requeue(Duration::from_secs(60)))
    }

    async fn write(&self, before: &RepositoryStatus, after: &RepositoryStatus) -> Result<(), ControllerError> {
        if before == after {
            return Ok(());
        }
        let mut metadata = json!({
            "name": self.name,
            "uid": self.uid,
            "resourceVersion": self.repository.meta().resource_version,
        });
        if !R::OF_CLUSTER {
            metadata["namespace"] = json!(self.namespace);
        }
        let patch = json!({"apiVersion": api_version(), "kind": R::KIND, "metadata": metadata, "status": after});
        let api = R::api(self.context, &self.namespace);
        let (how, patch) = (write::apply(), Patch::Apply(&patch));
        let request = api.patch_status(&self.name, &how, &patch);
        self.context.writer.write("write the status of a repository", request).await.map(drop)
    }

    fn measure(&self, status: &RepositoryStatus) {
        let labels = RepositoryLabels { kind: R::KIND, namespace: self.namespace.clone(), name: self.name.clone() };
        let ready = find_condition(&status.conditions, kinds::READY);
        let ready = ready.is_some_and(|ready| ready.status == ConditionStatus::True.as_str());
        self.context.metrics.repository_ready.get_or_create(&labels).set(i64::from(ready));
        if let Some(bytes) = status.stored_bytes {
            self.context.metrics.repository_bytes.get_or_create(&labels).set(bytes);
        }
    }
}
