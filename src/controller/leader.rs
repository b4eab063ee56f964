//! One controller acts: leader election on a Lease.
//!
//! The rule of client-go: a candidate takes the lease over when it has *seen* it unchanged for as long as the lease
//! says, by its own clock; the clocks of two machines are never compared. Every change carries the resource version
//! that was seen, so that of two candidates one gets a conflict.
//!
//! A leader that cannot renew stops before anybody else may begin: [`Leadership::remaining`] ends [`MARGIN`] before the
//! lease does, counted from before the renewal was sent. [`Writer`] asks it before each write and gives the write no
//! more time than that. How far this holds: a request that left in time may be carried out later, if the API server
//! itself sits on it for longer than the margin. Status writes carry the resource version they were decided on, so that
//! such a late one is a conflict once the new leader has written.

use super::ControllerError;
use crate::operator::Health;
use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, api::PostParams};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::time::{sleep, timeout};

/// How long a lease holds. A new leader begins at most this and [`RETRY`] after the old one died.
const LEASE: Duration = Duration::from_secs(10);
/// So much earlier the leader regards it as over.
const MARGIN: Duration = Duration::from_secs(3);
/// Between renewals.
const RENEW: Duration = Duration::from_millis(2500);
/// Between looks of a candidate, and after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// No request of the election takes longer.
const REQUEST: Duration = Duration::from_secs(3);
/// No write takes longer.
const WRITE: Duration = Duration::from_secs(30);

/// Until when this process leads.
#[derive(Debug, Default)]
pub(super) struct Leadership(Mutex<Option<Instant>>);

impl Leadership {
    fn set(&self, until: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    /// How long this process surely leads. `None`: it does not.
    pub(super) fn remaining(&self) -> Option<Duration> {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

/// The way of all writes: only while this process leads.
#[derive(Debug, Clone)]
pub(super) struct Writer(pub(super) Arc<Leadership>);

impl Writer {
    /// Carries out a write.
    pub(super) async fn write<T>(
        &self,
        what: &'static str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, ControllerError> {
        let left = self.0.remaining().ok_or(ControllerError::NotLeader)?;
        match timeout(left.min(WRITE), request).await {
            Ok(result) => result.map_err(|source| ControllerError::Write { what, source }),
            Err(_) => Err(ControllerError::NoAnswer { what }),
        }
    }
}

/// A candidate.
pub(super) struct Election {
    leases: Api<Lease>,
    name: String,
    identity: String,
    /// The state of the lease that was seen last, and since when.
    seen: Option<(Option<String>, Instant)>,
    leadership: Arc<Leadership>,
    health: Arc<Health>,
}

impl Election {
    /// A candidate for the lease of this name. To the identity a random part is added: a restarted process is another
    /// one.
    pub(super) fn new(
        client: Client,
        (namespace, name): (&str, &str),
        identity: &str,
        leadership: Arc<Leadership>,
        health: Arc<Health>,
    ) -> Self {
        let identity =
            format!("{identity}_{:016x}", getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id())));
        let leases = Api::namespaced(client, namespace);
        Self { leases, name: name.into(), identity, seen: None, leadership, health }
    }

    /// Waits until this process leads.
    pub(super) async fn acquire(&mut self) {
        loop {
            if self.step().await == Some(true) {
                tracing::info!(identity = self.identity, "leading");
                return;
            }
            sleep(RETRY).await;
        }
    }

    /// Renews until the lease is lost.
    pub(super) async fn hold(&mut self) {
        let mut pause = RENEW;
        loop {
            sleep(pause).await;
            match self.step().await {
                Some(true) => pause = RENEW,
                Some(false) => break,
                None if self.leadership.remaining().is_none() => break,
                None => pause = RETRY,
            }
        }
        self.leadership.set(None);
        tracing::warn!(identity = self.identity, "the lease is lost");
    }

    /// Gives the lease up, so that another one may take it at once. Nothing may be written after that.
    pub(super) async fn release(&mut self) {
        if self.leadership.remaining().is_none() {
            return;
        }
        self.leadership.set(None);
        let release = async {
            let mut lease = self.leases.get(&self.name).await?;
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(&self.identity) {
                spec.holder_identity = None;
                spec.lease_duration_seconds = Some(1);
                self.leases.replace(&self.name, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match timeout(REQUEST, release).await {
            Ok(Ok(())) => tracing::info!("the lease is released"),
            Ok(Err(error)) => tracing::warn!(%error, "the lease could not be released; it runs out by itself"),
            Err(_) => tracing::warn!("the lease could not be released in time; it runs out by itself"),
        }
    }

    /// Looks at the lease, and takes or renews it where that is allowed. `None`: it is not known.
    async fn step(&mut self) -> Option<bool> {
        let sent = Instant::now();
        let result = timeout(REQUEST, self.attempt()).await;
        self.health.beat();
        let (unready, led) = match result {
            Ok(Ok(true)) => {
                self.leadership.set(Some(sent + LEASE.saturating_sub(MARGIN)));
                (None, Some(true))
            }
            Ok(Ok(false)) => (None, Some(false)),
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => (None, None),
            Ok(Err(error)) => (Some(format!("the lease cannot be reached: {error}")), None),
            Err(_) => (Some("the API server does not answer".into()), None),
        };
        if let Some(why) = &unready {
            tracing::warn!("{why}");
        }
        self.health.set_unready(unready);
        led
    }

    async fn attempt(&mut self) -> kube::Result<bool> {
        let now = MicroTime(Timestamp::now());
        let Some(mut lease) = self.leases.get_opt(&self.name).await? else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.held(&LeaseSpec::default(), now)) };
            self.leases.create(&PostParams::default(), &lease).await?;
            return Ok(true);
        };
        let version = lease.metadata.resource_version.clone();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => Instant::now(),
        };
        self.seen = Some((version, since));
        let spec = lease.spec.take().unwrap_or_default();
        if !may_take(&spec, &self.identity, since.elapsed()) {
            return Ok(false);
        }
        lease.spec = Some(self.held(&spec, now));
        self.leases.replace(&self.name, &PostParams::default(), &lease).await?;
        Ok(true)
    }

    fn held(&self, before: &LeaseSpec, now: MicroTime) -> LeaseSpec {
        let ours = before.holder_identity.as_deref() == Some(&self.identity);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(LEASE.as_secs()).ok(),
            acquire_time: if ours { before.acquire_time.clone() } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(before.lease_transitions.unwrap_or(0).saturating_add(i32::from(!ours))),
            ..LeaseSpec::default()
        }
    }
}

/// Whether a lease that has been seen unchanged for so long may be taken.
fn may_take(lease: &LeaseSpec, identity: &str, unchanged: Duration) -> bool {
    match lease.holder_identity.as_deref() {
        None | Some("") => true,
        Some(holder) if holder == identity => true,
        Some(_) => {
            let seconds = lease.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
            unchanged >= seconds.map_or(LEASE, Duration::from_secs)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_taken_when_it_is_free_or_was_not_renewed() {
        let lease = |holder: Option<&str>, seconds| LeaseSpec {
            holder_identity: holder.map(Into::into),
            lease_duration_seconds: seconds,
            ..LeaseSpec::default()
        };
        let second = Duration::from_secs;
        let cases = [
            (lease(None, Some(10)), second(0), true),
            (lease(Some(""), Some(10)), second(0), true),
            (lease(Some("me"), Some(10)), second(0), true),
            (lease(Some("other"), Some(10)), second(9), false),
            (lease(Some("other"), Some(10)), second(10), true),
            (lease(Some("other"), Some(1)), second(1), true),
            (lease(Some("other"), None), second(9), false),
            (lease(Some("other"), Some(-5)), second(9), false),
        ];
        for (lease, unchanged, expected) in cases {
            assert_eq!(may_take(&lease, "me", unchanged), expected, "{lease:?} {unchanged:?}");
        }
    }

    #[tokio::test]
    async fn nothing_is_written_without_the_lease() {
        let leadership = Arc::new(Leadership::default());
        let writer = Writer(Arc::clone(&leadership));
        let error = writer.write("test", async { Ok(()) }).await.unwrap_err();
        assert!(matches!(error, ControllerError::NotLeader));
        leadership.set(Some(Instant::now() + Duration::from_millis(100)));
        writer.write("test", async { Ok(()) }).await.unwrap();
        // A request that hangs is dropped when the lease runs out.
        let error = writer.write("test", std::future::pending::<kube::Result<()>>()).await.unwrap_err();
        assert!(matches!(error, ControllerError::NoAnswer { .. }));
        assert!(matches!(writer.write("test", async { Ok(()) }).await, Err(ControllerError::NotLeader)));
    }
}
