//! How long something has been seen unchanged, by our own clock: clocks of other machines are not relied on.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// What was seen, by UID of the object that it is about and a word for what.
#[derive(Debug, Default)]
pub(super) struct Sightings(Mutex<HashMap<String, Seen>>);

/// What was seen of one object.
type Seen = HashMap<&'static str, (String, Instant)>;

impl Sightings {
    /// Since when this has looked so; now, when it looked otherwise before.
    pub(super) fn since(&self, uid: &str, what: &'static str, looks: String) -> Duration {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_object = seen.entry(uid.to_owned()).or_default();
        match of_object.get(what) {
            Some((before, since)) if *before == looks => since.elapsed(),
            _ => {
                of_object.insert(what, (looks, Instant::now()));
                Duration::ZERO
            }
        }
    }

    /// How long ago this was noted last. `None`: never.
    pub(super) fn ago(&self, uid: &str, what: &'static str) -> Option<Duration> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Some(seen.get(uid)?.get(what)?.1.elapsed())
    }

    /// Notes it as of now.
    pub(super) fn note(&self, uid: &str, what: &'static str) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.entry(uid.to_owned()).or_default().insert(what, (String::new(), Instant::now()));
    }

    /// The object is finished with.
    pub(super) fn forget(&self, uid: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_begins_anew_with_each_change() {
        let sightings = Sightings::default();
        assert_eq!(sightings.since("a", "run", "1".into()), Duration::ZERO);
        std::thread::sleep(Duration::from_millis(5));
        assert!(sightings.since("a", "run", "1".into()) >= Duration::from_millis(5));
        assert_eq!(sightings.since("a", "mover", "1".into()), Duration::ZERO);
        assert_eq!(sightings.since("a", "run", "2".into()), Duration::ZERO);
        assert_eq!(sightings.ago("a", "write"), None);
        sightings.note("a", "write");
        assert!(sightings.ago("a", "write").is_some());
        sightings.forget("a");
        assert_eq!(sightings.ago("a", "write"), None);
    }
}
