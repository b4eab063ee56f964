//! The session's journal: what a later process has to know to finish the undo.
//!
//! Nodes, jobs, exports and bitmaps are found by looking at QEMU. The journal holds what cannot be seen there: that the
//! guest's file systems were frozen or its CPUs stopped by us, that the NBD server is ours, which device had which
//! node, and whose backup the bitmaps belong to. An entry reaches the disk *before* its step is done, so a step without
//! an entry never happened; a torn last line is a step that was never begun.

use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// One step of a session, written before it is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// The session begins.
    Begin(Begin),
    /// Descriptors, nodes and images of the fleece in this slot.
    PrepareFleece(u16),
    /// The target image of a push in this slot.
    PrepareTarget(u16),
    /// The NBD server, listening on a descriptor of ours.
    StartNbdServer,
    /// The scratch node of this slot, and its export for a moment.
    MarkEnd(u16),
    /// Freezing the guest's file systems.
    Freeze,
    /// The file systems were thawed.
    Thawed,
    /// Stopping the guest's CPUs.
    Stop,
    /// The CPUs run again.
    Continued,
    /// The point in time: fleece jobs and bitmaps, in one transaction.
    Cut,
    /// Putting the filter of this slot on a device.
    SwitchDrive {
        /// The disk's slot.
        slot: u16,
        /// QOM path or id of the device.
        qdev: String,
        /// Node that the device had.
        original: String,
    },
    /// The readable snapshot of this slot.
    OpenSnapshot(u16),
    /// The NBD export of this slot.
    Export(u16),
    /// The push job of this slot.
    Push(u16),
    /// The backup is about to be committed at its target.
    Committing,
    /// The undo begins.
    Teardown,
}

/// Whose session it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// Backup id.
    pub backup: String,
    /// Line of the chain's bitmaps.
    pub bitmap_line: String,
    /// The target: a directory (absolute), or the address of a repository.
    pub target: String,
    /// VM name at the target.
    pub vm: String,
    /// In a repository: the object whose presence says that the backup is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// The newest complete backup of the VM before this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Process that runs the session.
    pub pid: u32,
}

/// What an earlier session left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// Whose it was.
    pub begin: Begin,
    /// The steps that it began, oldest first.
    pub entries: Vec<Entry>,
}

impl Leftover {
    /// Whether the guest's file systems may still be frozen.
    pub fn is_frozen(&self) -> bool {
        self.unmatched(&Entry::Freeze, &Entry::Thawed)
    }

    /// Whether the guest's CPUs may still be stopped by us.
    pub fn is_stopped(&self) -> bool {
        self.unmatched(&Entry::Stop, &Entry::Continued)
    }

    /// Whether we started the NBD server.
    pub fn has_nbd_server(&self) -> bool {
        self.entries.contains(&Entry::StartNbdServer)
    }

    fn unmatched(&self, begun: &Entry, ended: &Entry) -> bool {
        self.entries.iter().rev().find(|entry| *entry == begun || *entry == ended) == Some(begun)
    }
}

/// The journal of one VM on this node.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: Option<File>,
}

impl Journal {
    /// The journal at this path, which need not exist.
    pub fn at(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What an earlier session left: `None` when it ended cleanly (no journal). A journal that does not even name its
    /// session was never begun and counts as none.
    pub fn leftover(&self) -> io::Result<Option<Leftover>> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut entries = Vec::new();
        for line in BufReader::new(file).lines() {
            let Ok(line) = line else { break };
            let Ok(entry) = serde_json::from_str(&line) else { break };
            entries.push(entry);
        }
        Ok(match entries.first() {
            Some(Entry::Begin(begin)) => Some(Leftover { begin: begin.clone(), entries }),
            _ => None,
        })
    }

    /// Writes an entry; it is on the disk when this returns.
    pub fn append(&mut self, entry: &Entry) -> io::Result<()> {
        kill_point();
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        if self.file.is_none() {
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?;
            // A first line that was torn names no session and is nobody's leftover: behind it, nothing of this one could
            // be read.
            file.set_len(0)?;
            self.file = Some(file);
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        file.write_all(&line)?;
        file.sync_data()?;
        kill_point();
        Ok(())
    }

    /// Ends the session: nothing is left to undo.
    pub fn close(&mut self) -> io::Result<()> {
        kill_point();
        self.file = None;
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// For the crash tests: the process kills itself with SIGKILL at the n-th point, n from `VIRT_FLEECE_TEST_KILL_AT`.
/// Points lie right before and right behind every journal entry, so also right behind every step.
fn kill_point() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(at) = std::env::var("VIRT_FLEECE_TEST_KILL_AT").ok().and_then(|at| at.parse::<u64>().ok()) else {
        return;
    };
    if COUNT.fetch_add(1, Ordering::SeqCst) == at {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin() -> Begin {
        Begin {
            backup: "b".into(),
            bitmap_line: "0123abcd".into(),
            target: "/t".into(),
            vm: "vm".into(),
            object: None,
            parent: None,
            pid: 1,
        }
    }

    #[test]
    fn a_journal_reads_back_and_a_torn_line_never_happened() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::at(directory.path().join("j"));
        assert_eq!(journal.leftover().unwrap(), None);
        for entry in [Entry::Begin(begin()), Entry::PrepareFleece(0), Entry::Freeze] {
            journal.append(&entry).unwrap();
        }
        std::fs::OpenOptions::new().append(true).open(journal.path()).unwrap().write_all(b"{\"export\":").unwrap();
        let leftover = journal.leftover().unwrap().unwrap();
        assert_eq!(leftover.entries.len(), 3);
        assert!(leftover.is_frozen());
        assert!(!leftover.is_stopped());
        journal.close().unwrap();
        assert_eq!(journal.leftover().unwrap(), None);
    }

    #[test]
    fn a_torn_first_line_hides_nothing_of_the_next_session() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("j");
        std::fs::write(&path, "{\"begin\":{\"back").unwrap();
        let mut journal = Journal::at(path);
        assert_eq!(journal.leftover().unwrap(), None);
        journal.append(&Entry::Begin(begin())).unwrap();
        journal.append(&Entry::Freeze).unwrap();
        assert!(journal.leftover().unwrap().is_some_and(|leftover| leftover.is_frozen()));
    }

    #[test]
    fn a_thaw_ends_a_freeze() {
        let leftover = Leftover { begin: begin(), entries: vec![Entry::Begin(begin()), Entry::Freeze, Entry::Thawed] };
        assert!(!leftover.is_frozen());
    }
}
