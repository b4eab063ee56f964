//! Which process something belongs to, so that a later one can tell whether it still runs.

use serde::{Deserialize, Serialize};
use std::fs;

/// A process on some machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Name of the machine, for people.
    pub host: String,
    /// `/proc/sys/kernel/random/boot_id`: one boot of one machine.
    pub boot_id: String,
    /// The process id namespace: containers of one machine have the same boot id, but other processes.
    pub pid_namespace: String,
    /// Process id.
    pub pid: u32,
    /// Clock ticks since boot at which it started: a process id is used again.
    pub started_ticks: u64,
}

impl Process {
    /// This process.
    pub fn current() -> Self {
        let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
        let pid = std::process::id();
        Self {
            host: read("/proc/sys/kernel/hostname"),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            pid_namespace: namespace(),
            pid,
            started_ticks: started_ticks(pid).unwrap_or(0),
        }
    }

    /// Whether it has ended; `None` when that cannot be seen from here.
    pub fn has_ended(&self) -> Option<bool> {
        let here = Self::current();
        let comparable = !here.boot_id.is_empty()
            && !here.pid_namespace.is_empty()
            && (&self.boot_id, &self.pid_namespace) == (&here.boot_id, &here.pid_namespace);
        comparable.then(|| started_ticks(self.pid) != Some(self.started_ticks))
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} on {}", self.pid, self.host)
    }
}

fn namespace() -> String {
    fs::read_link("/proc/self/ns/pid").map(|link| link.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Field 22 of `/proc/PID/stat` (proc(5)); `None` for a process that does not exist, or is dead and not yet waited for.
fn started_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in field 2 may hold anything, parentheses and blanks included.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_one_that_ended() {
        let mut process = Process::current();
        assert!(process.started_ticks > 0);
        assert_eq!(process.has_ended(), Some(false));
        process.started_ticks += 1;
        assert_eq!(process.has_ended(), Some(true), "the same number, another process");
        process.boot_id = "another".into();
        assert_eq!(process.has_ended(), None);
    }
}
