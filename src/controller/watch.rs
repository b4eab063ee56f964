//! Watches: what the API server has, kept in memory as small as possible.
//!
//! An object that cannot be read, since it is another version's or a broken one, stalls nothing: it is left out, or
//! stands there as unreadable.

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api, Resource,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt,
        reflector::{self, Lookup, Store},
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;
use std::{fmt::Debug, hash::Hash};
use tokio::task::JoinSet;

/// What a watch tells.
#[derive(Debug)]
pub(super) enum Seen<'a, K> {
    /// A list begins: all objects are told anew.
    Restarted,
    /// It is there, or changed.
    There(&'a K),
    /// It is gone.
    Gone(&'a K),
    /// The list is complete.
    Synced,
}

/// How a kind is watched.
pub(super) struct Watch<K> {
    /// For the log.
    pub(super) what: &'static str,
    /// Takes away what is not needed.
    pub(super) slim: fn(&mut K),
    /// What stands for an object that cannot be read.
    pub(super) unreadable: fn(ObjectMeta, String) -> Option<K>,
}

/// Takes away what nobody reads of any object.
pub(super) fn slim_metadata(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}

/// Starts a watch. `on` is told everything, after the store has it; what it returns is to be looked at, which happens
/// when the store is complete.
pub(super) fn follow<K, W>(
    tasks: &mut JoinSet<()>,
    api: Api<DeserializeGuard<K>>,
    config: watcher::Config,
    watch: Watch<K>,
    mut on: impl FnMut(Seen<'_, K>) -> Vec<W> + Send + 'static,
    mut wake: impl FnMut(W) + Send + 'static,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Lookup<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    <K as Resource>::DynamicType: Hash + Eq,
    W: Send + 'static,
{
    let (store, mut writer) = reflector::store();
    let mut stream = watcher::watcher(api, config).default_backoff().boxed();
    tasks.spawn(async move {
        let mut held = Vec::new();
        while let Some(event) = stream.next().await {
            let event = match event {
                Ok(event) => event,
                Err(error) => {
                    tracing::warn!(%error, what = watch.what, "the watch is interrupted, and begins again");
                    continue;
                }
            };
            let Some(event) = read(event, &watch) else { continue };
            writer.apply_watcher_event(&event);
            match &event {
                Event::Init => drop(on(Seen::Restarted)),
                // The store has these when the list is complete.
                Event::InitApply(object) => held.extend(on(Seen::There(object))),
                Event::InitDone => {
                    held.extend(on(Seen::Synced));
                    held.drain(..).for_each(&mut wake);
                    held.shrink_to_fit();
                }
                Event::Apply(object) => on(Seen::There(object)).into_iter().for_each(&mut wake),
                Event::Delete(object) => on(Seen::Gone(object)).into_iter().for_each(&mut wake),
            }
        }
    });
    store
}

fn read<K>(event: Event<DeserializeGuard<K>>, watch: &Watch<K>) -> Option<Event<K>> {
    let object = |guard: DeserializeGuard<K>| match guard.0 {
        Ok(mut object) => {
            (watch.slim)(&mut object);
            Some(object)
        }
        Err(invalid) => {
            let (namespace, name) = super::index::key_of(&invalid.metadata);
            tracing::warn!(what = watch.what, namespace, name, error = invalid.error, "an object cannot be read");
            (watch.unreadable)(invalid.metadata, invalid.error)
        }
    };
    Some(match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::Apply(guard) => Event::Apply(object(guard)?),
        Event::InitApply(guard) => Event::InitApply(object(guard)?),
        Event::Delete(guard) => Event::Delete(object(guard)?),
    })
}
