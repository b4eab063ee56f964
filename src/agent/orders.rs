//! What an agent has to do about a backup that it sees; pure.

use crate::api::{Assignment, Run, VirtualMachineBackup};

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Nothing, or nothing yet.
    Nothing,
    /// Take the run, and carry it out.
    Claim(Assignment),
    /// Another process of this node had it, and is gone: clean up, and say so.
    TakeOver(Assignment),
    /// A run of this process is to end.
    Stop {
        /// Stable word.
        reason: String,
        /// For people.
        message: String,
    },
    /// It was called off before anybody took it.
    Decline(Assignment),
}

/// Decides about a backup. `mine`: the attempt that this process carries out right now.
pub fn decide(backup: &VirtualMachineBackup, node: &str, instance: &str, mine: Option<i64>) -> Order {
    let status = backup.status.as_ref();
    let assignment = status.and_then(|status| status.assignment.as_ref());
    let run = status.and_then(|status| status.run.as_ref());
    let Some(assignment) = assignment.filter(|assignment| assignment.node_name == node) else {
        return stop_mine(mine, "AssignmentWithdrawn", "the controller gave the backup to another node");
    };
    if let Some(mine) = mine {
        if assignment.attempt != mine {
            return stop_mine(Some(mine), "AssignmentWithdrawn", "the controller began another attempt");
        }
        return match &assignment.abort {
            Some(abort) => Order::Stop { reason: abort.reason.clone(), message: abort.message.clone() },
            None => Order::Nothing,
        };
    }
    match run.filter(|run| run.attempt >= assignment.attempt) {
        None if assignment.abort.is_some() => Order::Decline(assignment.clone()),
        None => Order::Claim(assignment.clone()),
        Some(run) if is_abandoned(run, instance) => Order::TakeOver(assignment.clone()),
        Some(_) => Order::Nothing,
    }
}

fn is_abandoned(run: &Run, instance: &str) -> bool {
    !run.state.is_terminal() && run.agent.instance != instance
}

fn stop_mine(mine: Option<i64>, reason: &str, message: &str) -> Order {
    match mine {
        Some(_) => Order::Stop { reason: reason.into(), message: message.into() },
        None => Order::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Abort, AgentClaim, PodReference, RunState};

    fn assignment(attempt: i64) -> Assignment {
        Assignment {
            attempt,
            node_name: "node-a".into(),
            virtual_machine_uid: "vm".into(),
            repository_vm: "prod/web".into(),
            launcher: None,
            mover: PodReference { namespace: "prod".into(), name: "m".into(), uid: "u".into() },
            assigned: None,
            deadline: None,
            abort: None,
        }
    }

    fn aborted(attempt: i64) -> Assignment {
        let abort = Abort { reason: "Cancelled".into(), message: "spec.cancel".into() };
        Assignment { abort: Some(abort), ..assignment(attempt) }
    }

    fn run(attempt: i64, instance: &str, state: RunState) -> Run {
        let agent = AgentClaim { instance: instance.into(), node_name: "node-a".into(), claimed: None };
        Run { attempt, agent, state, ..Run::default() }
    }

    fn decided(assignment: Option<Assignment>, run: Option<Run>, node: &str, mine: Option<i64>) -> Order {
        let spec = serde_json::json!({"source": {"name": "web"}, "repositoryRef": {"name": "r"}});
        let mut backup = VirtualMachineBackup::new("b", serde_json::from_value(spec).unwrap());
        backup.status = Some(crate::api::VirtualMachineBackupStatus { assignment, run, ..Default::default() });
        decide(&backup, node, "me", mine)
    }

    #[test]
    fn orders_follow_the_assignment() {
        use RunState::*;
        let stop = |order: &Order| matches!(order, Order::Stop { .. });
        // A fresh order is taken, by its own node only.
        assert_eq!(decided(Some(assignment(1)), None, "node-a", None), Order::Claim(assignment(1)));
        assert_eq!(decided(Some(assignment(1)), None, "node-b", None), Order::Nothing);
        assert_eq!(decided(None, None, "node-a", None), Order::Nothing);
        // The next attempt is another order, whatever became of the one before.
        let before = run(1, "me", Failed);
        assert_eq!(decided(Some(assignment(2)), Some(before), "node-a", None), Order::Claim(assignment(2)));
        // Terminal is terminal.
        for state in [Succeeded, Failed, Aborted] {
            assert_eq!(decided(Some(assignment(1)), Some(run(1, "old", state)), "node-a", None), Order::Nothing);
        }
        // What another process left is taken over, what this one just ended is not.
        let left = run(1, "old", Reading);
        assert_eq!(decided(Some(assignment(1)), Some(left), "node-a", None), Order::TakeOver(assignment(1)));
        assert_eq!(decided(Some(assignment(1)), Some(run(1, "me", Reading)), "node-a", None), Order::Nothing);
        // A run of ours goes on until it is called off, given away, or followed by another attempt.
        let going = || Some(run(1, "me", Reading));
        assert_eq!(decided(Some(assignment(1)), going(), "node-a", Some(1)), Order::Nothing);
        assert!(stop(&decided(Some(aborted(1)), going(), "node-a", Some(1))));
        assert!(stop(&decided(Some(assignment(2)), going(), "node-a", Some(1))));
        assert!(stop(&decided(None, going(), "node-a", Some(1))));
        // Called off before it was taken.
        assert_eq!(decided(Some(aborted(1)), None, "node-a", None), Order::Decline(aborted(1)));
    }
}
