//! A repository in S3 whose network or server fails in the middle: what passes is repeated, everything else ends the
//! backup cleanly and soon, and the next one is incremental and right.

use crate::{
    bed::{
        cli::{Cli, Outcome, Running},
        flavour::Flavour,
        s3::{ACCESS_KEY, SECRET_KEY},
        s3_proxy::{Effect, Fault, S3Proxy, Stage},
    },
    scene::{Scene, bitmap, id, is_incremental, noise, reason},
    store::{PASSPHRASE, Store},
};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// The chunk size of these tests.
const CHUNK: u64 = 256 << 10;
/// In the path of every manifest; the bucket's name is before it.
const MANIFESTS: &str = "/prefix/backups/";
/// Chunks that are under way at once.
const IN_FLIGHT: usize = 48;

/// A VM with one backup in S3, and 10 MiB that changed since.
struct Bed {
    store: Store,
    scene: Scene,
}

impl Bed {
    fn new() -> Self {
        let bed = Self { store: Store::s3(CHUNK), scene: Scene::new(Flavour::Next, false) };
        bed.change(1);
        let first: Value = bed.checked(bed.backup().run()).success().json();
        assert!(!is_incremental(&first));
        bed.change(2);
        bed
    }

    /// New content: the same places, other bytes for another seed.
    fn change(&self, seed: u64) {
        noise(&self.scene, "root", seed, 3, 6);
        noise(&self.scene, "data", seed + 1000, 5, 4);
    }

    /// A backup that says everything it ever says.
    fn backup(&self) -> Cli {
        self.store.backup(&self.scene).arg("-vvv")
    }

    /// One that lasts for some seconds.
    fn slow_backup(&self) -> Running {
        self.backup().arg("--bandwidth-limit").arg("3MiB/s").spawn()
    }

    fn proxy(&self) -> &S3Proxy {
        self.store.proxy()
    }

    /// Whatever is printed holds no secret.
    fn checked(&self, outcome: Outcome) -> Outcome {
        for secret in [SECRET_KEY, ACCESS_KEY, PASSPHRASE] {
            for text in [&outcome.stdout, &outcome.stderr] {
                assert!(!text.contains(secret), "{secret} is printed by a command on {}: {text}", self.store.url);
            }
        }
        outcome
    }

    /// A backup that must fail cleanly: nothing new is listed, and the guest runs.
    fn failed(&self, outcome: Outcome) -> Outcome {
        let outcome = self.checked(outcome).failure();
        assert_eq!(outcome.status.code(), Some(4), "{}", outcome.stderr);
        assert_eq!(self.scene.vm.control().status(), "running");
        outcome
    }

    /// Ids of all backups.
    fn listed(&self) -> Vec<String> {
        let listed: Value = self.store.cli(["list", "-o", "json"]).json();
        listed.as_array().expect("backups").iter().map(id).collect()
    }

    /// Everything is well again: the next backup is incremental and right, and so is the whole repository.
    fn goes_on(&self, backups: usize) {
        assert_eq!(self.listed().len(), backups, "complete backups before the next one");
        let report: Value = self.checked(self.backup().run()).success().json();
        assert!(is_incremental(&report), "{report}");
        assert_eq!(self.listed().len(), backups + 1);
        assert!(self.store.restored(&id(&report)) == self.scene.disks_now(), "{report}");
        self.scene.assert_clean(Some(&bitmap(&report)));
        self.store.cli(["verify", "--read-data", "100"]).run().success();
        // What the failed one left stands in nobody's way.
        let pruned: Value = self.store.cli(["repository", "prune", "-o", "json"]).json();
        assert_eq!(pruned["waits_for"], json!([]), "{pruned}");
        self.store.cli(["verify", "--read-data", "100"]).run().success();
    }

    fn wait_for_puts(&self, puts: usize) {
        let before = chunk_puts(self.proxy());
        let begun = Instant::now();
        while chunk_puts(self.proxy()) < before + puts {
            assert!(begun.elapsed() < Duration::from_secs(30), "no chunks are sent");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn chunk_puts(proxy: &S3Proxy) -> usize {
    proxy.requests().iter().filter(|seen| seen.method == "PUT" && seen.target.contains("/chunks/")).count()
}

/// Puts of chunks.
fn chunks(effect: Effect) -> Fault {
    Fault::new(effect).method("PUT").target("/chunks/")
}

/// The put of a manifest, which commits.
fn manifest(effect: Effect) -> Fault {
    Fault::new(effect).method("PUT").target(MANIFESTS)
}

#[test]
fn what_fails_now_and_then_is_repeated_and_costs_few_requests() {
    let bed = Bed::new();
    let before = bed.proxy().requests().len();
    let second: Value = bed.checked(bed.backup().run()).success().json();
    let undisturbed = bed.proxy().requests().len() - before;
    bed.change(3);
    let effects = [
        Effect::Drop(Stage::Before),
        Effect::Drop(Stage::After),
        Effect::Answer(Stage::Before, 500),
        Effect::Answer(Stage::After, 503),
        Effect::Answer(Stage::Before, 429),
        Effect::CutRequest(1000),
    ];
    for (effect, seed) in effects.into_iter().zip(1..) {
        bed.proxy().inject(Fault::new(effect).chance(0.04, seed));
    }
    let before = bed.proxy().requests().len();
    // Whatever is logged by whomever.
    let third: Value = bed.checked(bed.backup().env("VIRT_FLEECE_LOG", "trace").run()).success().json();
    let requests = bed.proxy().requests().split_off(before);
    let hit = requests.iter().filter(|seen| seen.effect.is_some()).count();
    bed.proxy().clear();
    println!("{undisturbed} requests undisturbed; {} of which {hit} failed", requests.len());
    assert!(is_incremental(&second) && is_incremental(&third));
    assert!(hit > 3, "only {hit} of {} requests failed", requests.len());
    assert!(requests.len() <= undisturbed + 3 * hit + 10, "{} instead of {undisturbed}", requests.len());
    bed.goes_on(3);
}

#[test]
fn a_server_that_dies_ends_the_backup_soon_and_nothing_else() {
    let mut bed = Bed::new();
    let running = bed.slow_backup();
    bed.wait_for_puts(8);
    let begun = Instant::now();
    bed.store.s3.as_mut().expect("a server").0.kill();
    let failed = bed.failed(running.finish());
    println!("ended after {:?}: {}", begun.elapsed(), failed.stderr.lines().last().unwrap_or_default());
    assert!(begun.elapsed() < Duration::from_secs(110));
    assert_eq!(reason(&failed), "TargetIo");
    assert!(failed.stderr.contains("chunks/"), "the object is named: {}", failed.stderr);
    bed.store.s3.as_mut().expect("a server").0.restart();
    bed.goes_on(1);
}

#[test]
fn refused_connections_end_the_backup_soon() {
    let mut bed = Bed::new();
    let running = bed.slow_backup();
    bed.wait_for_puts(8);
    let begun = Instant::now();
    bed.store.refuse_connections();
    let failed = bed.failed(running.finish());
    println!("ended after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(110));
    assert_eq!(reason(&failed), "TargetIo");
    // A new one does not even begin, and says where it wanted to go.
    let begun = Instant::now();
    let unreachable = bed.checked(bed.backup().run()).failure();
    println!("a new one gives up after {:?}", begun.elapsed());
    assert!(unreachable.stderr.contains("repository.json"), "{}", unreachable.stderr);
    bed.store.accept_connections();
    bed.goes_on(1);
}

#[test]
fn a_stall_for_ever_ends_after_the_stall_timeout_and_never_reaches_the_guest() {
    let bed = Bed::new();
    bed.proxy().inject(chunks(Effect::Stall(Stage::Before)).skip(5));
    let running = bed.backup().arg("--stall-timeout").arg("6").spawn();
    bed.wait_for_puts(6);
    let begun = Instant::now();
    let mut control = bed.scene.vm.control();
    for round in 0..5 {
        let asked = Instant::now();
        control.run("stop", &json!({}));
        let stopped = asked.elapsed();
        control.run("cont", &json!({}));
        assert!(stopped < Duration::from_secs(1), "`stop` took {stopped:?}");
        let asked = Instant::now();
        bed.scene.vm.io(&mut control, "root", &format!("write -P 7 {}k 64k", 4096 + 64 * round));
        assert!(asked.elapsed() < Duration::from_secs(1), "a write took {:?}", asked.elapsed());
        std::thread::sleep(Duration::from_millis(300));
    }
    bed.scene.vm.io(&mut control, "root", "flush");
    drop(control);
    let failed = bed.failed(running.finish());
    println!("ended after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(40));
    assert_eq!(reason(&failed), "TargetStalled");
    assert!(failed.stderr.contains("--stall-timeout"), "{}", failed.stderr);
    bed.proxy().clear();
    bed.goes_on(1);
}

#[test]
fn a_slow_line_is_only_slow() {
    let bed = Bed::new();
    bed.proxy().inject(Fault::new(Effect::Throttle(100 << 10)));
    let report: Value = bed.checked(bed.backup().arg("--stall-timeout").arg("30").run()).success().json();
    assert!(is_incremental(&report));
    bed.proxy().clear();
    bed.goes_on(2);
}

#[test]
fn what_is_forbidden_is_not_repeated() {
    let bed = Bed::new();
    bed.proxy().inject(chunks(Effect::Answer(Stage::Before, 403)).skip(10));
    let begun = Instant::now();
    let before = bed.proxy().requests().len();
    let failed = bed.failed(bed.backup().run());
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    let refused = bed.proxy().requests().split_off(before);
    let mut refused: Vec<_> =
        refused.into_iter().filter(|seen| seen.effect.is_some()).map(|seen| seen.target).collect();
    let requests = refused.len();
    refused.sort();
    refused.dedup();
    assert_eq!(refused.len(), requests, "some were repeated");
    assert!((1..=IN_FLIGHT).contains(&requests), "{requests} requests were refused");
    assert_eq!(reason(&failed), "PermissionDenied");
    assert!(failed.stderr.contains("these credentials"), "the way out: {}", failed.stderr);
    assert!(failed.stderr.contains("chunks/"), "the object is named: {}", failed.stderr);
    bed.proxy().clear();
    bed.goes_on(1);
}

#[test]
fn a_commit_whose_answer_is_lost_is_one_backup() {
    let bed = Bed::new();
    let look = |effect| Fault::new(effect).method("GET").target(MANIFESTS).times(1);
    // What happens to the put, and what to the look at it afterwards, after the four backups that are read before. The
    // last case leaves the answer to a second look.
    let cases = [
        (manifest(Effect::Drop(Stage::After)).times(1), None),
        (manifest(Effect::Answer(Stage::After, 500)).times(1), None),
        (manifest(Effect::Drop(Stage::Before)).times(2), None),
        (manifest(Effect::Drop(Stage::After)).times(1), Some(look(Effect::Answer(Stage::Before, 403)).skip(4))),
    ];
    for (round, (fault, look)) in cases.into_iter().enumerate() {
        bed.proxy().inject(fault);
        let hit_by_look = look.is_some();
        bed.proxy().inject(look.unwrap_or_else(|| Fault::new(Effect::Drop(Stage::Before)).times(0)));
        let before = bed.proxy().requests().len();
        let outcome = bed.checked(bed.backup().run());
        bed.proxy().clear();
        let seen = bed.proxy().requests().split_off(before);
        let trace: Vec<_> = seen.iter().filter(|seen| seen.target.contains(MANIFESTS)).collect();
        assert!(outcome.status.success(), "round {round}: {}\n{trace:#?}", outcome.stderr);
        let is_second_look = outcome.stderr.contains("though its commit seemed to fail");
        assert_eq!(is_second_look, hit_by_look, "round {round}: {}\n{trace:#?}", outcome.stderr);
        let report: Value = outcome.json();
        assert!(is_incremental(&report), "round {round}: {report}");
        assert!(seen.iter().filter(|seen| seen.effect.is_some()).count() > usize::from(hit_by_look), "{trace:#?}");
        assert_eq!(bed.listed().len(), round + 2, "round {round}: {trace:#?}");
        assert!(bed.store.restored(&id(&report)) == bed.scene.disks_now(), "round {round}");
        bed.change(10 + round as u64);
    }
    bed.goes_on(5);
}

#[test]
fn a_commit_that_is_refused_is_no_backup() {
    let bed = Bed::new();
    bed.proxy().inject(manifest(Effect::Answer(Stage::Before, 403)));
    let refused = bed.checked(bed.backup().run()).failure();
    assert_eq!(reason(&refused), "PermissionDenied");
    assert!(refused.stderr.contains("backups/"), "the object is named: {}", refused.stderr);
    assert_eq!(bed.scene.vm.control().status(), "running");
    bed.proxy().clear();
    bed.goes_on(1);
}

#[test]
fn truncated_answers_are_never_taken_for_the_disk() {
    let bed = Bed::new();
    let listed = bed.listed();
    bed.backup().run().success();
    let get = |bytes| Fault::new(Effect::CutReply(bytes)).method("GET").target("/chunks/");
    let restore = |to: &std::path::Path| {
        bed.store.cli(["restore", "--vm", "web", "--backup", "latest", "-vvv"]).arg("--output").arg(to)
    };
    // For good. A cut that lets more of each object through is no failure: reading goes on where it ended.
    for bytes in [0, 1000] {
        let to = tempfile::tempdir().expect("a directory");
        bed.proxy().inject(get(bytes).skip(12));
        let begun = Instant::now();
        let failed = bed.checked(restore(to.path()).run()).failure();
        println!("cut after {bytes}: ended after {:?}: {}", begun.elapsed(), failed.stderr);
        assert!(failed.stderr.contains("chunks/"), "the object is named: {}", failed.stderr);
        let left: Vec<_> = std::fs::read_dir(to.path()).expect("a directory").flatten().map(|e| e.path()).collect();
        assert!(!left.iter().any(|path| path.ends_with("root.raw")), "{left:?}");
        bed.proxy().clear();
    }
    for fault in [get(200 << 10), get(1000).chance(0.1, 5), get(0).times(0)] {
        let to = tempfile::tempdir().expect("a directory");
        let before = bed.proxy().requests().len();
        bed.proxy().inject(fault.clone());
        bed.checked(restore(to.path()).run()).success();
        bed.proxy().clear();
        let hit = bed.proxy().requests().iter().skip(before).filter(|seen| seen.effect.is_some()).count();
        println!("{hit} answers were cut");
        assert!(std::fs::read(to.path().join("root.raw")).expect("restored") == bed.scene.disks_now()[0], "{fault:?}");
    }
    assert_eq!(bed.listed().len(), listed.len() + 1);
}
