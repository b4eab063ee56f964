//! Which backup may begin: one at a time of a VM, so many on a node and in a repository, in a fair order. Pure.
//!
//! The leader keeps one [`Admission`] in memory, filled from what is at work when it begins to lead. Whoever has a
//! place keeps it until its mover is gone.

use super::reasons::reason;
use jiff::Timestamp;
use std::collections::{BTreeMap, HashMap, HashSet};

/// A place that a backup asks for, or has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// UID of the backup.
    pub(super) uid: String,
    /// Its namespace.
    pub(super) namespace: String,
    /// Its name.
    pub(super) name: String,
    /// When it was created.
    pub(super) created: Timestamp,
    /// The VM, in the namespace.
    pub(super) vm: String,
    /// The node; none when the scheduler chooses it.
    pub(super) node: Option<String>,
    /// What identifies the repository, and how many it takes; none for a target that is not shared.
    pub(super) repository: Option<(String, usize)>,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// It has a place.
    Granted,
    /// It has to wait.
    Denied {
        /// Stable word.
        reason: &'static str,
        /// For people.
        message: String,
    },
}

/// Who is at work and who waits.
#[derive(Debug, Default)]
pub(super) struct Admission {
    per_node: usize,
    running: HashMap<String, Request>,
    waiting: HashMap<String, Request>,
}

/// What is taken.
#[derive(Debug, Default)]
struct Load<'a> {
    vms: HashMap<(&'a str, &'a str), &'a str>,
    nodes: HashMap<&'a str, usize>,
    repositories: HashMap<&'a str, usize>,
    namespaces: HashMap<&'a str, usize>,
}

impl<'a> Load<'a> {
    fn add(&mut self, request: &'a Request) {
        self.vms.insert((&request.namespace, &request.vm), &request.name);
        *self.namespaces.entry(&request.namespace).or_default() += 1;
        if let Some(node) = &request.node {
            *self.nodes.entry(node).or_default() += 1;
        }
        if let Some((repository, _)) = &request.repository {
            *self.repositories.entry(repository).or_default() += 1;
        }
    }

    /// What is in the way of a request.
    fn obstacle(&self, request: &Request, per_node: usize) -> Option<(&'static str, String)> {
        if let Some(other) = self.vms.get(&(request.namespace.as_str(), request.vm.as_str())) {
            let message = format!("backup {other} of the VirtualMachine {} is at work", request.vm);
            return Some((reason::ANOTHER_BACKUP, message));
        }
        if let Some(node) = &request.node
            && self.nodes.get(node.as_str()).is_some_and(|taken| *taken >= per_node)
        {
            let message = format!("node {node} takes {per_node} backups at a time (--max-backups-per-node)");
            return Some((reason::NODE_BUSY, message));
        }
        if let Some((repository, limit)) = &request.repository
            && self.repositories.get(repository.as_str()).is_some_and(|taken| taken >= limit)
        {
            let message = format!("{repository} takes {limit} backups at a time (spec.maxConcurrentBackups)");
            return Some((reason::REPOSITORY_BUSY, message));
        }
        None
    }
}

impl Admission {
    /// Nobody is at work.
    pub(super) fn new(per_node: usize) -> Self {
        Self { per_node, ..Self::default() }
    }

    /// Enters one that is at work, whatever the limits say.
    pub(super) fn enter(&mut self, request: Request) {
        self.waiting.remove(&request.uid);
        self.running.insert(request.uid.clone(), request);
    }

    /// Asks for a place. The answer is no as well when another one that waits is to have it.
    pub(super) fn ask(&mut self, request: Request) -> Answer {
        if self.running.contains_key(&request.uid) {
            return Answer::Granted;
        }
        let (uid, asked) = (request.uid.clone(), request.clone());
        self.waiting.insert(uid.clone(), request);
        if self.next().contains(&uid) {
            self.enter(asked);
            return Answer::Granted;
        }
        let mut load = Load::default();
        self.running.values().for_each(|running| load.add(running));
        let (reason, message) = load.obstacle(&asked, self.per_node).unwrap_or_else(|| {
            let message = "backups that wait longer, or of namespaces with fewer backups at work, are first";
            (reason::QUEUED, message.into())
        });
        Answer::Denied { reason, message }
    }

    /// It does not want a place any more. Whether it waited for one.
    pub(super) fn withdraw(&mut self, uid: &str) -> bool {
        self.waiting.remove(uid).is_some()
    }

    /// It gives its place back. Whether it had one.
    pub(super) fn release(&mut self, uid: &str) -> bool {
        self.running.remove(uid).is_some()
    }

    /// Those who wait and may begin now, as (namespace, name): they should ask again.
    pub(super) fn admissible(&self) -> Vec<(String, String)> {
        let next = self.next();
        let waiting = self.waiting.values().filter(|request| next.contains(&request.uid));
        waiting.map(|request| (request.namespace.clone(), request.name.clone())).collect()
    }

    /// How many are at work, and how many wait.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// UIDs of those who wait and may begin: one after the other, always the oldest of the namespace that has the
    /// fewest at work. One whose node or repository is busy does not hold up those behind it.
    fn next(&self) -> HashSet<String> {
        let mut load = Load::default();
        self.running.values().for_each(|running| load.add(running));
        let mut queues: BTreeMap<&str, Vec<&Request>> = BTreeMap::new();
        for request in self.waiting.values() {
            queues.entry(&request.namespace).or_default().push(request);
        }
        for queue in queues.values_mut() {
            // The oldest is taken from the end.
            queue.sort_by(|a, b| (b.created, &b.name).cmp(&(a.created, &a.name)));
        }
        let mut next = HashSet::new();
        loop {
            let taken = |namespace: &str| load.namespaces.get(namespace).copied().unwrap_or(0);
            let heads = queues.iter().filter_map(|(namespace, queue)| Some((*namespace, *queue.last()?)));
            let first = heads.min_by_key(|(namespace, head)| (taken(namespace), head.created, head.name.as_str()));
            let Some((namespace, head)) = first else { break };
            if let Some(queue) = queues.get_mut(namespace) {
                queue.pop();
            }
            if load.obstacle(head, self.per_node).is_none() {
                load.add(head);
                next.insert(head.uid.clone());
            }
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(namespace: &str, name: &str, age: i64, node: &str) -> Request {
        Request {
            uid: format!("{namespace}/{name}"),
            namespace: namespace.into(),
            name: name.into(),
            created: Timestamp::from_second(1_000_000 - age).unwrap(),
            vm: format!("vm-of-{name}"),
            node: (!node.is_empty()).then(|| node.into()),
            repository: Some(("BackupRepository repo".into(), 3)),
        }
    }

    fn denied(answer: &Answer) -> &'static str {
        match answer {
            Answer::Granted => "",
            Answer::Denied { reason, .. } => reason,
        }
    }

    #[test]
    fn limits_hold_and_free_places_are_given_on() {
        let mut admission = Admission::new(2);
        assert_eq!(admission.ask(request("a", "1", 9, "n1")), Answer::Granted);
        assert_eq!(admission.ask(request("a", "2", 8, "n1")), Answer::Granted);
        assert_eq!(admission.ask(request("a", "1", 9, "n1")), Answer::Granted, "it has a place");
        assert_eq!(denied(&admission.ask(request("a", "3", 7, "n1"))), "NodeBusy");
        // Another node is free.
        assert_eq!(admission.ask(request("a", "4", 6, "n2")), Answer::Granted);
        // The repository takes three.
        assert_eq!(denied(&admission.ask(request("a", "5", 5, "n3"))), "RepositoryBusy");
        assert!(admission.admissible().is_empty());
        assert!(admission.release("a/2") && !admission.release("a/2"));
        assert_eq!(admission.admissible(), [("a".into(), "3".into())]);
        // The younger one would have a node, but not the repository's last place.
        assert_eq!(denied(&admission.ask(request("a", "5", 5, "n3"))), "Queued");
        assert_eq!(admission.ask(request("a", "3", 7, "n1")), Answer::Granted);
        assert_eq!(admission.counts(), (3, 1));
        assert!(admission.withdraw("a/5") && !admission.withdraw("a/5"));
    }

    #[test]
    fn a_vm_is_backed_up_once_at_a_time() {
        let mut admission = Admission::new(9);
        let mut second = request("a", "second", 1, "n1");
        second.vm = "vm-of-first".into();
        assert_eq!(admission.ask(request("a", "first", 2, "n1")), Answer::Granted);
        assert_eq!(denied(&admission.ask(second.clone())), "AnotherBackupRunning");
        // A VM of the same name elsewhere is another one.
        let mut elsewhere = second.clone();
        (elsewhere.namespace, elsewhere.uid) = ("b".into(), "b/second".into());
        assert_eq!(admission.ask(elsewhere), Answer::Granted);
        admission.release("a/first");
        assert_eq!(admission.ask(second), Answer::Granted);
    }

    #[test]
    fn namespaces_take_turns() {
        let mut admission = Admission::new(2);
        admission.enter(request("busy", "running", 0, "n1"));
        admission.enter(request("other", "running", 0, "n1"));
        for age in 1..=5 {
            admission.ask(request("busy", &format!("old-{age}"), 100 + age, "n1"));
        }
        admission.ask(request("calm", "young", 1, "n1"));
        admission.release("other/running");
        // The young one of the namespace without a backup at work is before the old ones of the busy namespace.
        assert_eq!(admission.admissible(), [("calm".into(), "young".into())]);
        admission.release("busy/running");
        let mut next = admission.admissible();
        next.sort();
        assert_eq!(next, [("busy".into(), "old-5".into()), ("calm".into(), "young".into())], "the oldest, then");
    }

    #[test]
    fn who_is_at_work_counts_whatever_the_limit() {
        let mut admission = Admission::new(1);
        admission.enter(request("a", "1", 1, "n1"));
        admission.enter(request("a", "2", 1, "n1"));
        assert_eq!(denied(&admission.ask(request("a", "3", 1, "n1"))), "NodeBusy");
        admission.release("a/1");
        assert_eq!(denied(&admission.ask(request("a", "3", 1, "n1"))), "NodeBusy");
        // A stopped VM's mover has no node beforehand.
        assert_eq!(admission.ask(request("a", "4", 1, "")), Answer::Granted);
    }

    #[test]
    fn thousands_may_wait() {
        let mut admission = Admission::new(2);
        let begun = std::time::Instant::now();
        for i in 0..500 {
            admission.ask(request(&format!("ns-{}", i % 20), &format!("b-{i}"), i, "n1"));
        }
        assert_eq!(admission.counts(), (2, 498));
        assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    }
}
