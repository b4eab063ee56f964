//! Events of Kubernetes, with stable reasons (`super::reasons::event`).

use super::leader::Writer;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

/// Characters of a note; the API takes 1 kB.
const LONGEST: usize = 900;

/// Publishes Events. They are for people: one that cannot be published is logged, and nothing waits for it.
#[derive(Clone)]
pub(super) struct Events {
    recorder: Recorder,
    writer: Writer,
}

impl Events {
    pub(super) fn new(client: Client, identity: &str, writer: Writer) -> Self {
        let reporter = Reporter { controller: "virtfleece.io/controller".into(), instance: Some(identity.to_owned()) };
        Self { recorder: Recorder::new(client, reporter), writer }
    }

    async fn publish(&self, type_: EventType, reason: &str, action: &str, note: &str, about: &ObjectReference) {
        let note = Some(crate::reason::printable(note, LONGEST)).filter(|note| !note.is_empty());
        let event = Event { type_, reason: reason.into(), note, action: action.into(), secondary: None };
        if let Err(error) = self.writer.write("publish an Event", self.recorder.publish(&event, about)).await {
            tracing::warn!(%error, reason, "an Event is lost");
        }
    }

    /// Something happened as it should.
    pub(super) async fn normal(&self, reason: &str, action: &str, note: &str, about: &ObjectReference) {
        self.publish(EventType::Normal, reason, action, note, about).await;
    }

    /// Something happened that a person should know.
    pub(super) async fn warning(&self, reason: &str, action: &str, note: &str, about: &ObjectReference) {
        self.publish(EventType::Warning, reason, action, note, about).await;
    }
}
