//! Everybody at once on one repository, as processes that are killed at random: backups of two VMs, `forget`, and two
//! that prune. In the end every backup that is listed is what the disks were, and nothing is left that nobody needs.
//!
//! `VIRT_FLEECE_STRESS_SECONDS` says for how long; `VIRT_FLEECE_STRESS_SEED` repeats the dice, not the order of events.

use crate::{
    bed::{
        cli::{Cli, Outcome},
        flavour::Flavour,
    },
    scene::{Scene, id, noise, reason},
    store::{Store, files},
};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    sync::Mutex,
    time::{Duration, Instant},
};

/// The chunk size of these tests.
const CHUNK: u64 = 256 << 10;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

/// splitmix64
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// What the disks of a backup were: a digest of each.
type Digests = Vec<blake3::Hash>;

/// How often what happened.
#[derive(Debug, Default)]
struct Count {
    backups: u64,
    killed_backups: u64,
    lost_backups: u64,
    forgets: u64,
    prunes: u64,
    killed_prunes: u64,
    busy_prunes: u64,
    waiting_prunes: u64,
    deleted: u64,
    rescued: u64,
}

struct Stress<'a> {
    store: &'a Store,
    until: Instant,
    points: Mutex<HashMap<String, Digests>>,
    count: Mutex<Count>,
}

/// Runs a command, or kills it somewhere in its first seconds: one time in `one_in`.
fn run_or_kill(command: Cli, dice: &mut Dice, one_in: u64, within: u64) -> Option<Outcome> {
    let running = command.spawn();
    if dice.roll(one_in) > 0 {
        return Some(running.finish());
    }
    let mut running = running;
    let after = Duration::from_millis(dice.roll(within));
    if running.ends_within(after).is_some() {
        return Some(running.finish());
    }
    running.kill9();
    None
}

impl Stress<'_> {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until
    }

    fn count(&self, change: impl FnOnce(&mut Count)) {
        change(&mut self.count.lock().expect("no panic elsewhere"));
    }

    /// One backup of a VM, of disks that nobody writes meanwhile.
    fn back_up(&self, scene: &Scene, vm: &str, dice: &mut Dice, may_die: bool) {
        // Contents that all VMs have, so that chunks come, go and come back.
        for volume in ["root", "data"] {
            for _ in 0..=dice.roll(2) {
                noise(scene, volume, dice.roll(6), dice.roll(20), 1 + dice.roll(2));
            }
        }
        let disks: Digests = scene.disks_now().iter().map(|disk| blake3::hash(disk)).collect();
        let command = self.store.backup_as(scene, vm);
        match run_or_kill(command, dice, if may_die { 3 } else { u64::MAX }, 900) {
            None => self.count(|count| count.killed_backups += 1),
            Some(outcome) if outcome.status.success() => {
                let report: Value = outcome.json();
                self.points.lock().expect("no panic elsewhere").insert(id(&report), disks);
                self.count(|count| count.backups += 1);
            }
            Some(outcome) => {
                let reason = reason(&outcome);
                assert!(may_die && ["SessionLost", "Busy"].contains(&reason.as_str()), "{}", outcome.stderr);
                self.count(|count| count.lost_backups += 1);
            }
        }
    }

    fn forget(&self, dice: &mut Dice) {
        let keep = (1 + dice.roll(3)).to_string();
        let listed: Value = self.store.cli(["list", "-o", "json"]).json();
        let ids: Vec<_> = listed.as_array().expect("backups").iter().map(id).collect();
        let command = if ids.len() > 2 && dice.roll(2) == 0 {
            // Also the newest of a VM, on which a backup may stand just now.
            self.store.cli(["forget", "--backup", &ids[dice.roll(ids.len() as u64) as usize]])
        } else {
            self.store.cli(["forget", "--keep-last", &keep])
        };
        if let Some(outcome) = run_or_kill(command, dice, 4, 300) {
            outcome.success();
        }
        self.count(|count| count.forgets += 1);
    }

    fn prune(&self, dice: &mut Dice) {
        let wait = dice.roll(3).to_string();
        let command = self.store.cli(["repository", "prune", "-o", "json", "--wait", &wait]);
        let Some(outcome) = run_or_kill(command, dice, 3, 600) else {
            return self.count(|count| count.killed_prunes += 1);
        };
        if outcome.status.success() {
            let summary: Value = outcome.json();
            let number = |field: &str| summary[field].as_u64().expect("a number");
            self.count(|count| {
                count.prunes += 1;
                count.waiting_prunes += u64::from(summary["waits_for"] != json!([]));
                count.deleted += number("deleted_chunks");
                count.rescued += number("rescued_chunks");
            });
            return;
        }
        let reason = reason(&outcome);
        assert!(["Busy", "SessionLost"].contains(&reason.as_str()), "{}", outcome.stderr);
        self.count(|count| count.busy_prunes += 1);
    }

    /// Nobody runs any more.
    fn assert_in_order(&self) {
        let store = self.store;
        // The first may finish what a dead one began.
        for _ in 0..2 {
            let pruned: Value = store.cli(["repository", "prune", "-o", "json"]).json();
            assert_eq!(pruned["waits_for"], json!([]), "{pruned}");
        }
        let left: Value = store.cli(["repository", "prune", "--dry-run", "-o", "json"]).json();
        assert_eq!(left["condemned_chunks"], json!(0), "chunks that nobody needs are left: {left}");
        assert_no_objects(store, "sessions");
        assert_no_objects(store, "prune");
        store.cli(["verify", "--read-data", "100"]).limit(Duration::from_secs(300)).run().success();
        let listed: Value = store.cli(["list", "-o", "json"]).json();
        let points = self.points.lock().expect("no panic elsewhere");
        let mut restored = 0;
        for backup in listed.as_array().expect("backups") {
            // One whose process was killed after its commit is not known here; it was verified.
            let Some(point) = points.get(&id(backup)) else { continue };
            let disks: Digests = store.restored(&id(backup)).iter().map(|disk| blake3::hash(disk)).collect();
            assert!(disks == *point, "{} is not what the disks were", id(backup));
            restored += 1;
        }
        assert!(restored >= 2, "{restored} of {} backups were restored", points.len());
        println!("{restored} of {} listed backups restored; {:?}", listed.as_array().map_or(0, Vec::len), self.count);
    }
}

/// Of writers that died, files may be left that are not old enough to be removed; they are no objects.
fn assert_no_objects(store: &Store, directory: &str) {
    let is_object = |path: &std::path::PathBuf| !path.to_string_lossy().contains('#');
    let left: Vec<_> = files(&store.path().join(directory)).into_iter().filter(is_object).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn stress(store: &Store, seconds: u64) {
    let seed = from_environment("VIRT_FLEECE_STRESS_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("VIRT_FLEECE_STRESS_SEED={seed}");
    let seconds = from_environment("VIRT_FLEECE_STRESS_SECONDS").unwrap_or(seconds);
    let until = Instant::now() + Duration::from_secs(seconds);
    let stress = Stress { store, until, points: Mutex::default(), count: Mutex::default() };
    let scenes = [("web", Scene::new(Flavour::Next, false)), ("db", Scene::new(Flavour::Qemu10, false))];
    std::thread::scope(|scope| {
        for (number, (vm, scene)) in (0..).zip(&scenes) {
            let stress = &stress;
            scope.spawn(move || {
                let mut dice = Dice(seed * 100 + number);
                while stress.goes_on() {
                    stress.back_up(scene, vm, &mut dice, true);
                }
            });
        }
        for number in 0..2 {
            let stress = &stress;
            scope.spawn(move || {
                let mut dice = Dice(seed * 100 + 10 + number);
                while stress.goes_on() {
                    stress.prune(&mut dice);
                    std::thread::sleep(Duration::from_millis(dice.roll(800)));
                }
            });
        }
        let stress = &stress;
        scope.spawn(move || {
            let mut dice = Dice(seed * 100 + 20);
            while stress.goes_on() {
                stress.forget(&mut dice);
                std::thread::sleep(Duration::from_millis(dice.roll(1500)));
            }
        });
    });
    let mut dice = Dice(seed);
    for (vm, scene) in &scenes {
        stress.back_up(scene, vm, &mut dice, false);
    }
    stress.assert_in_order();
}

#[test]
fn everybody_at_once_on_a_directory() {
    stress(&Store::directory(CHUNK), 35);
}

#[test]
fn everybody_at_once_on_s3() {
    stress(&Store::s3(CHUNK), 20);
}

/// A VM with two backups, of which the first is forgotten: there is something to prune.
fn something_to_prune(store: &Store) -> Scene {
    let scene = Scene::new(Flavour::Next, false);
    noise(&scene, "root", 1, 0, 12);
    let first: Value = store.backup(&scene).json();
    noise(&scene, "root", 2, 0, 8);
    store.backup(&scene).run().success();
    store.cli(["forget", "--backup", &id(&first)]).run().success();
    scene
}

/// Restores the newest backup, whose disks have not changed since; nothing is left that nobody needs.
fn assert_pruned(store: &Store, scene: &Scene) {
    let listed: Value = store.cli(["list", "-o", "json"]).json();
    let newest = listed.as_array().expect("backups").last().expect("a backup");
    assert!(store.restored(&id(newest)) == scene.disks_now());
    let left: Value = store.cli(["repository", "prune", "--dry-run", "-o", "json"]).json();
    assert_eq!(left["condemned_chunks"], json!(0), "{left}");
    assert_no_objects(store, "prune");
}

#[test]
fn of_two_prunes_one_works_and_a_killed_one_is_taken_up() {
    for store in [Store::directory(CHUNK), Store::s3(CHUNK)] {
        let scene = something_to_prune(&store);
        let prune = || store.cli(["repository", "prune", "-o", "json"]);
        let both = [prune().spawn(), prune().spawn()].map(crate::bed::cli::Running::finish);
        let mut deleted = 0;
        for outcome in both {
            if outcome.status.success() {
                deleted += outcome.json::<Value>()["deleted_chunks"].as_u64().expect("a number");
            } else {
                assert_eq!((outcome.status.code(), reason(&outcome).as_str()), (Some(6), "Busy"), "{}", outcome.stderr);
                assert!(outcome.stderr.contains("wait"), "the way out: {}", outcome.stderr);
            }
        }
        assert!(deleted >= 32, "{deleted} chunks");
        assert_pruned(&store, &scene);
        // Killed ever later, until one comes to its end.
        let mut resumed = 0;
        for round in 0.. {
            noise(&scene, "root", 100 + round, 0, 8);
            store.backup(&scene).run().success();
            store.cli(["forget", "--keep-last", "1"]).run().success();
            let mut running = prune().spawn();
            let ended = running.ends_within(Duration::from_millis(150 + 25 * round));
            let outcome = running.kill9();
            let next: Value = prune().json();
            resumed += u64::from(next["resumed"] == json!(true));
            assert_pruned(&store, &scene);
            if ended.is_some() {
                outcome.success();
                break;
            }
        }
        println!("{}: {resumed} were taken up", store.url);
        store.cli(["verify", "--read-data", "100"]).run().success();
    }
}

#[test]
fn a_prune_names_the_backup_that_it_waits_for() {
    let store = Store::directory(CHUNK);
    let scene = something_to_prune(&store);
    noise(&scene, "root", 3, 0, 10);
    let backup = store.backup(&scene).arg("--bandwidth-limit").arg("1MiB/s").spawn();
    let begun = Instant::now();
    while files(&store.path().join("sessions")).is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(30), "no session appears");
        std::thread::sleep(Duration::from_millis(5));
    }
    let outcome = store.cli(["repository", "prune", "-o", "json", "--wait", "1"]).run();
    assert_eq!(outcome.status.code(), Some(0), "{}", outcome.stderr);
    let summary: Value = outcome.json();
    let waits = summary["waits_for"][0].as_str().expect("a session").to_owned();
    assert!(waits.contains(&format!("process {} on ", backup.pid())), "{summary}");
    assert_eq!(summary["deleted_chunks"], json!(0));
    let text = store.cli(["repository", "prune", "--wait", "0"]).run().success();
    assert!(text.stdout.contains(&waits) && text.stdout.contains("run it again"), "{}", text.stdout);
    let report: Value = backup.finish().success().json();
    let done: Value = store.cli(["repository", "prune", "-o", "json"]).json();
    assert!(done["resumed"] == json!(true) && done["deleted_chunks"].as_u64() > Some(0), "{done}");
    assert!(store.restored(&id(&report)) == scene.disks_now());
    store.cli(["verify", "--read-data", "100"]).run().success();
}
