//! The controller: decides what is to be done, and by whom. It touches no node and reads no secret.
//!
//! One process leads (`leader`). While it does, watches (`watch`, `context`) keep what counts in memory, and three
//! reconcilers (`backup`, `repository` for both kinds of repositories) look at each object that something happened to.
//! What follows from what is seen is decided by pure functions: `machine`, `target`, `decision`, `admission`, `probe`;
//! what is written is built by others: `status`, `mover_pod`, `definition`.

mod admission;
mod backup;
mod context;
mod decision;
mod definition;
mod duration;
mod error;
mod events;
mod finished;
mod index;
mod leader;
mod machine;
mod metrics;
mod mover_pod;
mod names;
mod probe;
mod quantity;
mod reasons;
mod repository;
mod sightings;
mod start;
mod status;
mod target;
mod watch;
mod write;

pub use error::ControllerError;

use crate::operator::{Health, Metrics};
use context::{Context, Queues, Wakes};
use futures::{FutureExt, Stream, StreamExt, future::Shared};
use kube::{
    Client, Resource,
    runtime::{
        controller::{self, Action},
        reflector::{Lookup, ObjectRef, Store},
    },
};
use leader::{Election, Leadership, Writer};
use metrics::ControllerMetrics;
use std::{convert::Infallible, fmt::Debug, future::Future, pin::Pin, sync::Arc, time::Duration};
use tokio::{sync::oneshot, task::JoinSet};

/// Objects that are looked at at the same time, of each kind.
const CONCURRENCY: u16 = 16;
/// Work that has begun may take so long when the process is to end.
const FINISH: Duration = Duration::from_secs(8);
/// How often pods are looked for whose backup is gone.
const SWEEP: Duration = Duration::from_secs(300);

/// How the controller is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The operator's own namespace: of the lease, and of the movers of the cluster's repositories.
    pub namespace: String,
    /// Name of this process, such as its pod's.
    pub identity: String,
    /// Image of the movers.
    pub image: String,
    /// Pull policy of it.
    pub image_pull_policy: Option<String>,
    /// Names of pull secrets, which have to be in the namespaces of the movers.
    pub image_pull_secrets: Vec<String>,
    /// Backups that may run on a node at the same time.
    pub max_backups_per_node: usize,
    /// Name of the lease.
    pub lease_name: String,
}

/// Runs the controller until `shutdown`.
pub async fn run(
    client: Client,
    settings: Settings,
    metrics: &Metrics,
    health: Arc<Health>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ControllerError> {
    let settings = Arc::new(settings);
    let metrics = ControllerMetrics::new(metrics);
    let leadership = Arc::new(Leadership::default());
    let lease = (settings.namespace.as_str(), settings.lease_name.as_str());
    let mut election = Election::new(client.clone(), lease, &settings.identity, Arc::clone(&leadership), health);
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = election.acquire() => {}
            () = &mut shutdown => return Ok(()),
        }
        metrics.leader.set(1);
        let (stop, stopped) = oneshot::channel::<()>();
        let writer = Writer(Arc::clone(&leadership));
        let lead = lead(client.clone(), writer, Arc::clone(&settings), metrics.clone(), stopped);
        let mut lead = std::pin::pin!(lead);
        let ends = tokio::select! {
            () = &mut lead => false,
            () = election.hold() => false,
            () = &mut shutdown => true,
        };
        metrics.leader.set(0);
        if !ends {
            // Whatever still runs cannot write any more: the writer sees to that.
            continue;
        }
        let _ = stop.send(());
        // What has begun is finished under the lease, which has to be kept meanwhile.
        tokio::select! {
            done = tokio::time::timeout(FINISH, &mut lead) => {
                if done.is_err() {
                    tracing::warn!("work that had begun is left to the next leader");
                }
            }
            () = election.hold() => {}
        }
        election.release().await;
        return Ok(());
    }
}

/// A signal that several wait for.
type Stop = Shared<Pin<Box<dyn Future<Output = ()> + Send>>>;

/// Reconciles until it is stopped.
async fn lead(
    client: Client,
    writer: Writer,
    settings: Arc<Settings>,
    metrics: ControllerMetrics,
    stopped: oneshot::Receiver<()>,
) {
    let stop: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(stopped.map(drop));
    let stop: Stop = stop.shared();
    let (wakes, queues) = Wakes::new();
    // Dropped, and with it the watches, when this future is.
    let mut tasks = JoinSet::new();
    let started = Context::start(client, writer, settings, metrics, wakes, &mut tasks);
    let context = tokio::select! {
        context = started => Arc::new(context),
        () = stop.clone() => return,
    };
    tracing::info!(backups = context.stores.backups.len(), unfinished = context.index.unfinished(), "reconciling");
    let sweep = {
        let context = Arc::clone(&context);
        async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                write::sweep(&context).await;
            }
        }
    };
    tasks.spawn(sweep);
    let Queues { backups, repositories, cluster_repositories } = queues;
    let (of_backups, of_repositories) = (context.stores.backups.clone(), context.stores.repositories.clone());
    let of_cluster = context.stores.cluster_repositories.clone();
    tokio::join!(
        reconcile("VirtualMachineBackup", backups, of_backups, &context, &stop, backup::reconcile),
        reconcile("BackupRepository", repositories, of_repositories, &context, &stop, repository::reconcile),
        reconcile("ClusterBackupRepository", cluster_repositories, of_cluster, &context, &stop, repository::reconcile),
    );
}

/// Looks at the objects of one kind, each by one at a time, until it is stopped.
async fn reconcile<K, F>(
    kind: &'static str,
    queue: impl Stream<Item = ObjectRef<K>> + Send,
    store: Store<K>,
    context: &Arc<Context>,
    stop: &Stop,
    look: impl Fn(Arc<K>, Arc<Context>) -> F,
) where
    K: Resource<DynamicType = ()> + Lookup<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
    F: Future<Output = Result<Action, ControllerError>> + Send,
{
    let queue = queue.map(Ok::<_, Infallible>).take_until(stop.clone());
    let measured = |object: Arc<K>, context: Arc<Context>| {
        let begun = std::time::Instant::now();
        let looked = look(object, Arc::clone(&context));
        async move {
            let result = looked.await;
            context.metrics.reconciles.get_or_create(&metrics::KindLabels { kind }).inc();
            context.metrics.reconcile_seconds.observe(begun.elapsed().as_secs_f64());
            result
        }
        .boxed()
    };
    let again = |object: Arc<K>, error: &ControllerError, context: Arc<Context>| {
        write::again(kind, object.meta(), error, &context)
    };
    let config = controller::Config::default().concurrency(CONCURRENCY);
    controller::applier(measured, again, Arc::clone(context), store, Box::pin(queue), config)
        // Errors were dealt with by `again`; an object that is gone needs no look.
        .for_each(|_| async {})
        .await;
}
