use super::*;
use crate::{
    api::find_condition,
    controller::machine::samples::{instance, vm},
    kubevirt::{VirtualMachine, VirtualMachineInstance},
};
use serde_json::{Value, json};

const CREATED: &str = "2026-01-01T00:00:00Z";

/// A case: everything as in the middle of a healthy life, with changes.
struct Case {
    backup: Value,
    vm: Option<VirtualMachine>,
    instance: Option<VirtualMachineInstance>,
    migration: Option<&'static str>,
    repository: RepositoryFact,
    mover: Option<MoverFact>,
    /// Seconds since the creation of the backup.
    now: i64,
    silence: u64,
    mover_for: u64,
}

#[allow(clippy::unnecessary_wraps, reason = "as the facts have it")]
fn mover(state: MoverState) -> Option<MoverFact> {
    Some(MoverFact { uid: "m-uid".into(), foreign: false, deleting: false, node: Some("node-a".into()), state })
}

fn committed() -> MoverState {
    MoverState::Ended(Some(MoverOutcome::Committed {
        backup_id: "id".into(),
        point_in_time: CREATED.into(),
        sequence: 1,
        incremental: true,
        stored_bytes: 1,
    }))
}

fn mover_failed(retryable: bool) -> MoverState {
    MoverState::Ended(Some(MoverOutcome::Failed { reason: "TargetFull".into(), message: "m".into(), retryable }))
}

fn assignment(abort: Option<&str>) -> Value {
    let mut value = json!({"attempt": 1, "nodeName": "node-a", "virtualMachineUID": "vm-uid", "repositoryVm": "n/web",
        "launcher": {"instanceUID": "vmi-uid", "podName": "virt-launcher", "podUID": "pod-uid"},
        "mover": {"namespace": "n", "name": "m", "uid": "m-uid"}});
    if let Some(reason) = abort {
        value["abort"] = json!({"reason": reason, "message": "a"});
    }
    value
}

fn run(state: &str, reason: Option<&str>, retryable: Option<bool>) -> Value {
    json!({"attempt": 1, "agent": {"instance": "i", "nodeName": "node-a"}, "state": state, "reason": reason,
        "retryable": retryable, "backupID": (state == "Succeeded").then_some("id")})
}

impl Case {
    fn new(status: Value) -> Self {
        let backup = json!({
            "apiVersion": "virtfleece.io/v1alpha1", "kind": "VirtualMachineBackup",
            "metadata": {"name": "b", "namespace": "n", "uid": "u", "creationTimestamp": CREATED},
            "spec": {"source": {"name": "web"}, "repositoryRef": {"name": "r"}},
            "status": status,
        });
        Self {
            backup,
            vm: Some(vm(json!({}))),
            instance: Some(instance(&json!({}))),
            migration: None,
            repository: RepositoryFact::Ready,
            mover: None,
            now: 60,
            silence: 0,
            mover_for: 0,
        }
    }

    /// Waits for its first or next attempt.
    fn waiting() -> Self {
        Self::new(json!({"phase": "Pending"}))
    }

    /// An attempt has begun.
    fn preparing(state: Option<MoverState>) -> Self {
        let mut case = Self::new(json!({"phase": "Preparing", "attempts": 1}));
        case.mover = state.and_then(mover);
        case
    }

    /// An agent has its order.
    fn assigned(run: Value, abort: Option<&str>) -> Self {
        let mut case =
            Self::new(json!({"phase": "Running", "attempts": 1, "assignment": assignment(abort), "run": run}));
        case.mover = mover(MoverState::Running);
        case
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn decide(&self) -> Decision {
        let backup: VirtualMachineBackup = serde_json::from_value(self.backup.clone()).unwrap();
        let created: Timestamp = CREATED.parse().unwrap();
        decide(&Facts {
            now: created.checked_add(SignedDuration::from_secs(self.now)).unwrap(),
            backup: &backup,
            machine: Machine { vm: self.vm.as_ref(), instance: self.instance.as_ref(), migration: self.migration },
            repository: self.repository.clone(),
            mover: self.mover.as_ref(),
            silence: Duration::from_secs(self.silence),
            mover_for: Duration::from_secs(self.mover_for),
        })
    }

    /// The decision in short.
    fn short(&self) -> String {
        match self.decide() {
            Decision::Wait { phase, reason, .. } => format!("wait {phase:?} {reason}"),
            Decision::Start(place) => format!("start {}", place.node().unwrap_or("anywhere")),
            Decision::CreateMover(_) => "create".into(),
            Decision::Assign { node, .. } => format!("assign {node}"),
            Decision::Abort { reason, .. } => format!("abort {reason}"),
            Decision::EndAttempt { reason, failure, pause, .. } => {
                format!("{} {reason} {}", if failure { "failed" } else { "cut" }, pause.as_secs())
            }
            Decision::DeleteMover => "delete".into(),
            Decision::Complete => "complete".into(),
            Decision::Fail { reason, .. } => format!("fail {reason}"),
        }
    }
}

fn check(cases: Vec<(&str, Case, &str)>) {
    for (what, case, expected) in cases {
        assert_eq!(case.short(), expected, "{what}");
    }
}

fn deleted(case: &mut Case) {
    case.backup["metadata"]["deletionTimestamp"] = json!(CREATED);
}

fn stopped(case: &mut Case) {
    case.vm = Some(vm(json!({"printableStatus": "Stopped"})));
    case.instance = None;
}

fn offline(run: Value) -> Case {
    let mut case = Case::assigned(run, None).with(stopped);
    case.backup["status"]["assignment"]["launcher"] = json!(null);
    case
}

#[test]
fn before_an_attempt() {
    let lasting = || RepositoryFact::Obstacle(Obstacle::lasting(reason::REPOSITORY_NOT_FOUND, "m"));
    let passing = || RepositoryFact::Obstacle(Obstacle::passing(reason::REPOSITORY_NOT_READY, "m"));
    check(vec![
        ("nothing in the way", Case::waiting(), "start node-a"),
        ("the VM is stopped", Case::waiting().with(stopped), "start anywhere"),
        ("no VM yet", Case::waiting().with(|c| c.vm = None), "wait Pending VirtualMachineNotFound"),
        (
            "no VM after ten minutes",
            Case::waiting().with(|c| (c.vm, c.now) = (None, 600)),
            "fail VirtualMachineNotFound",
        ),
        ("it migrates", Case::waiting().with(|c| c.migration = Some("m")), "wait Pending Migrating"),
        ("for hours", Case::waiting().with(|c| (c.migration, c.now) = (Some("m"), 9999)), "wait Pending Migrating"),
        ("no repository yet", Case::waiting().with(|c| c.repository = lasting()), "wait Pending RepositoryNotFound"),
        (
            "no repository after ten minutes",
            Case::waiting().with(|c| (c.repository, c.now) = (lasting(), 601)),
            "fail RepositoryNotFound",
        ),
        (
            "the repository is not ready, however long",
            Case::waiting().with(|c| (c.repository, c.now) = (passing(), 9999)),
            "wait Pending RepositoryNotReady",
        ),
        ("cancelled", Case::waiting().with(|c| c.backup["spec"]["cancel"] = json!(true)), "fail Cancelled"),
        ("deleted", Case::waiting().with(deleted), "fail Deleted"),
        ("the default deadline", Case::waiting().with(|c| c.now = 24 * 3600), "fail DeadlineExceeded"),
        (
            "its own deadline",
            Case::waiting().with(|c| (c.backup["spec"]["deadline"], c.now) = (json!("1m"), 60)),
            "fail DeadlineExceeded",
        ),
        (
            "just before its own deadline",
            Case::waiting().with(|c| (c.backup["spec"]["deadline"], c.now) = (json!("1m1s"), 60)),
            "start node-a",
        ),
    ]);
}

#[test]
fn between_attempts() {
    let over = |mover: Option<MoverFact>, now| {
        let mut case = Case::new(json!({"phase": "Pending", "attempts": 1, "reason": "Migrating", "message": "m",
            "retryAfter": "2026-01-01T00:01:00Z"}));
        (case.mover, case.now) = (mover, now);
        case
    };
    let deleting = |state| mover(state).map(|mover| MoverFact { deleting: true, ..mover });
    check(vec![
        ("the old mover has to go", over(mover(MoverState::Running), 59), "delete"),
        ("even one that ended", over(mover(MoverState::Ended(None)), 99), "delete"),
        ("it goes", over(deleting(MoverState::Running), 59), "wait Pending Migrating"),
        ("it does not go", over(deleting(MoverState::Running), 99), "wait Pending OldMoverTerminating"),
        ("it had committed", over(deleting(committed()), 99), "complete"),
        ("the pause", over(None, 59), "wait Pending Migrating"),
        ("after the pause", over(None, 60), "start node-a"),
        ("cancelled in the pause", over(None, 5).with(|c| c.backup["spec"]["cancel"] = json!(true)), "fail Cancelled"),
        (
            "a pod that is not ours does not matter",
            over(mover(MoverState::Running).map(|mover| MoverFact { foreign: true, ..mover }), 60),
            "start node-a",
        ),
        ("the VM is gone, and the backup is old", over(None, 700).with(|c| c.vm = None), "fail VirtualMachineNotFound"),
    ]);
}

#[test]
fn while_the_mover_starts() {
    let pending = || Some(MoverState::Pending(Some("ImagePullBackOff".into())));
    let changed = |change: fn(&mut MoverFact)| {
        Case::preparing(Some(MoverState::Running)).with(|case| case.mover.iter_mut().for_each(change))
    };
    check(vec![
        ("no pod yet", Case::preparing(None), "create"),
        ("no pod, and it migrates", Case::preparing(None).with(|c| c.migration = Some("m")), "cut Migrating 10"),
        ("pending", Case::preparing(pending()), "wait Preparing MoverStarting"),
        ("too long", Case::preparing(pending()).with(|c| c.mover_for = 600), "failed MoverNotStarted 10"),
        ("running", Case::preparing(Some(MoverState::Running)), "assign node-a"),
        ("running elsewhere", changed(|mover| mover.node = Some("node-b".into())), "cut VirtualMachineChanged 10"),
        ("node not known", changed(|mover| mover.node = None), "wait Preparing MoverStarting"),
        ("a foreign pod", changed(|mover| mover.foreign = true), "wait Preparing MoverRefused"),
        ("deleted by somebody", changed(|mover| mover.deleting = true), "failed MoverLost 10"),
        ("it failed", Case::preparing(Some(mover_failed(true))), "failed TargetFull 10"),
        ("for good", Case::preparing(Some(mover_failed(false))), "fail TargetFull"),
        ("killed", Case::preparing(Some(MoverState::Ended(None))), "failed MoverLost 10"),
        (
            "nobody came",
            Case::preparing(Some(MoverState::Ended(Some(MoverOutcome::Abandoned { message: "m".into() })))),
            "failed MoverLost 10",
        ),
        (
            "it migrates meanwhile",
            Case::preparing(Some(MoverState::Running)).with(|c| c.migration = Some("m")),
            "cut Migrating 10",
        ),
        (
            "cancelled: no agent knows of it",
            Case::preparing(Some(MoverState::Running)).with(|c| c.backup["spec"]["cancel"] = json!(true)),
            "fail Cancelled",
        ),
        ("deleted", Case::preparing(Some(MoverState::Running)).with(deleted), "fail Deleted"),
        (
            "a stopped VM's mover is where the scheduler put it",
            changed(|mover| mover.node = Some("node-z".into())).with(stopped),
            "assign node-z",
        ),
    ]);
}

#[test]
fn while_the_agent_works() {
    let reading = || run("Reading", None, None);
    check(vec![
        ("not claimed yet", Case::assigned(json!(null), None), "wait Preparing AwaitingAgent"),
        ("never claimed", Case::assigned(json!(null), None).with(|c| c.silence = 60), "abort AgentNotResponding"),
        ("at work", Case::assigned(reading(), None), "wait Running InProgress"),
        ("silent for a while", Case::assigned(reading(), None).with(|c| c.silence = 299), "wait Running InProgress"),
        ("silent for long", Case::assigned(reading(), None).with(|c| c.silence = 300), "abort AgentLost"),
        (
            "cancelled",
            Case::assigned(reading(), None).with(|c| c.backup["spec"]["cancel"] = json!(true)),
            "abort Cancelled",
        ),
        ("deleted", Case::assigned(reading(), None).with(deleted), "abort Deleted"),
        ("too late", Case::assigned(reading(), None).with(|c| c.now = 24 * 3600), "abort DeadlineExceeded"),
        ("a migration begins", Case::assigned(reading(), None).with(|c| c.migration = Some("m")), "abort Migrating"),
        (
            "a drain begins",
            Case::assigned(reading(), None)
                .with(|c| c.instance = Some(instance(&json!({"evacuationNodeName": "node-a"})))),
            "abort Evacuating",
        ),
        ("the VM stops", Case::assigned(reading(), None).with(stopped), "abort VirtualMachineChanged"),
        (
            "another launcher",
            Case::assigned(reading(), None)
                .with(|c| c.instance = Some(instance(&json!({"activePods": {"other": "node-a"}})))),
            "abort VirtualMachineChanged",
        ),
        (
            "another VM of the same name",
            Case::assigned(reading(), None)
                .with(|c| c.vm.iter_mut().for_each(|vm| vm.metadata.uid = Some("new".into()))),
            "abort VirtualMachineStarting",
        ),
        ("the mover is gone", Case::assigned(reading(), None).with(|c| c.mover = None), "abort MoverLost"),
        (
            "the mover ended, and the agent is about to say so",
            Case::assigned(reading(), None).with(|c| (c.mover, c.mover_for) = (mover(MoverState::Ended(None)), 14)),
            "wait Running InProgress",
        ),
        (
            "the mover ended, and nobody says so",
            Case::assigned(reading(), None).with(|c| (c.mover, c.mover_for) = (mover(MoverState::Ended(None)), 15)),
            "abort MoverLost",
        ),
        (
            "a run of an earlier attempt is none",
            Case::assigned(run("Succeeded", None, None), None).with(|c| {
                c.backup["status"]["attempts"] = json!(2);
                c.backup["status"]["assignment"]["attempt"] = json!(2);
            }),
            "wait Preparing AwaitingAgent",
        ),
        ("of a stopped VM", offline(reading()), "wait Running InProgress"),
        (
            "the stopped VM is started",
            offline(reading()).with(|c| c.instance = Some(instance(&json!({"phase": "Scheduling"})))),
            "abort VirtualMachineStarted",
        ),
        (
            "the stopped VM is about to be started",
            offline(reading()).with(|c| c.vm = Some(vm(json!({"printableStatus": "Starting"})))),
            "abort VirtualMachineStarted",
        ),
        ("the stopped VM is deleted", offline(reading()).with(|c| c.vm = None), "abort VirtualMachineNotFound"),
    ]);
}

#[test]
fn committed_wins() {
    let everything_wrong = |case: &mut Case| {
        case.mover = mover(committed());
        case.migration = Some("m");
        case.now = 99 * 3600;
        case.backup["spec"]["cancel"] = json!(true);
        deleted(case);
    };
    check(vec![
        ("by the agent", Case::assigned(run("Succeeded", None, None), None), "complete"),
        ("though cancelled meanwhile", Case::assigned(run("Succeeded", None, None), Some("Cancelled")), "complete"),
        ("by the mover", Case::assigned(run("Committing", None, None), None).with(everything_wrong), "complete"),
        (
            "though the agent restarted",
            Case::assigned(run("Failed", Some("AgentRestarted"), Some(true)), None).with(everything_wrong),
            "complete",
        ),
        ("though given up", Case::assigned(json!(null), Some("AgentLost")).with(everything_wrong), "complete"),
        (
            "not by a foreign pod",
            Case::preparing(Some(committed())).with(|c| c.mover.iter_mut().for_each(|mover| mover.foreign = true)),
            "wait Preparing MoverRefused",
        ),
        (
            "success without an id is none",
            Case::assigned(run("Succeeded", None, None), None)
                .with(|c| c.backup["status"]["run"]["backupID"] = json!(null)),
            "fail Unknown",
        ),
    ]);
}

#[test]
fn when_the_agent_is_done() {
    let aborted = |reason| Case::assigned(run("Aborted", Some(reason), None), None);
    let failed = |reason, retryable| Case::assigned(run("Failed", Some(reason), Some(retryable)), None);
    check(vec![
        ("failed for good", failed("GuestAgentUnreachable", false), "fail GuestAgentUnreachable"),
        ("failed for now", failed("TargetStalled", true), "failed TargetStalled 10"),
        (
            "failed again",
            failed("TargetStalled", true).with(|c| c.backup["status"]["failures"] = json!(3)),
            "failed TargetStalled 80",
        ),
        (
            "failed for the fifth time",
            failed("TargetStalled", true).with(|c| c.backup["status"]["failures"] = json!(4)),
            "fail TargetStalled",
        ),
        (
            "cut short as often as it has to be",
            aborted("Migrating").with(|c| c.backup["status"]["failures"] = json!(4)),
            "cut Migrating 10",
        ),
        ("drained", aborted("Evacuating"), "cut Evacuating 10"),
        ("the VM stopped", aborted("LauncherTerminating"), "cut LauncherTerminating 10"),
        ("the agent's own clock", aborted("DeadlineExceeded"), "fail DeadlineExceeded"),
        ("the agent was told to end", aborted("AgentRestarted"), "cut AgentRestarted 10"),
        ("some other reason", aborted("FleeceFull"), "failed FleeceFull 10"),
        (
            "the agent restarted, and the mover may yet commit",
            failed("AgentRestarted", true).with(|c| c.silence = 59),
            "wait Running MoverSettling",
        ),
        ("it does not", failed("AgentRestarted", true).with(|c| c.silence = 60), "failed AgentRestarted 10"),
        (
            "the agent restarted, and the mover has ended",
            failed("AgentRestarted", true).with(|c| c.mover = mover(MoverState::Ended(None))),
            "failed AgentRestarted 10",
        ),
        ("no word", Case::assigned(run("Failed", None, None), None), "fail Unknown"),
    ]);
}

#[test]
fn after_an_abort() {
    let reading = || run("Reading", None, None);
    let undone = || run("Aborted", Some("Migrating"), None);
    check(vec![
        ("it is undone", Case::assigned(reading(), Some("Cancelled")), "wait Running Aborting"),
        ("cancelled and undone", Case::assigned(undone(), Some("Cancelled")), "fail Cancelled"),
        ("no answer", Case::assigned(reading(), Some("Cancelled")).with(|c| c.silence = 30), "fail Cancelled"),
        ("deleted and undone", Case::assigned(undone(), Some("Deleted")).with(deleted), "fail Deleted"),
        ("too late", Case::assigned(undone(), Some("DeadlineExceeded")), "fail DeadlineExceeded"),
        ("migration", Case::assigned(undone(), Some("Migrating")), "cut Migrating 10"),
        ("another VM", Case::assigned(undone(), Some("VirtualMachineChanged")), "cut VirtualMachineChanged 10"),
        (
            "never claimed",
            Case::assigned(json!(null), Some("AgentNotResponding")).with(|c| c.silence = 30),
            "failed AgentNotResponding 10",
        ),
        ("lost", Case::assigned(reading(), Some("AgentLost")).with(|c| c.silence = 30), "failed AgentLost 10"),
        (
            "the mover was lost",
            Case::assigned(undone(), Some("MoverLost")).with(|c| c.mover = None),
            "failed MoverLost 10",
        ),
        (
            "the mover had said why",
            Case::assigned(undone(), Some("MoverLost")).with(|c| c.mover = mover(mover_failed(false))),
            "fail TargetFull",
        ),
    ]);
}

#[test]
fn pauses_double_and_end() {
    let pauses: Vec<_> = (1..9).map(|failures| pause(failures).as_secs()).collect();
    assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 600, 600]);
    assert_eq!((pause(0), pause(i64::MIN)), (BACKOFF, BACKOFF));
}

#[test]
fn whatever_waits_looks_again_by_its_deadline() {
    let mut case = Case::waiting().with(|c| c.migration = Some("m"));
    case.backup["spec"]["deadline"] = json!("70s");
    let Decision::Wait { again, .. } = case.decide() else { panic!() };
    assert!(again >= Duration::from_secs(10) && again < Duration::from_secs(11), "{again:?}");
}

#[test]
fn the_deadline_s_message_says_what_was_waited_for() {
    let case = Case::new(json!({"phase": "Pending", "message": "node n1 takes 2 backups"})).with(|c| c.now = 99_999);
    let Decision::Fail { message, .. } = case.decide() else { panic!() };
    assert!(message.contains("node n1 takes 2 backups") && message.contains("24 h"), "{message}");
    assert!(find_condition(&[], "Ready").is_none());
}
