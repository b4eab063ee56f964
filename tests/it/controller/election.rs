//! Two controllers: one acts.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::scene::{OPERATOR, Scene, eventually, text};
use crate::bed::process;

/// Who leads.
fn holder(scene: &Scene) -> Option<String> {
    let lease = scene.admin.run(["-n", OPERATOR, "get", "lease", "--ignore-not-found", "-o", "json"]);
    let leases: serde_json::Value = serde_json::from_str(&lease).ok()?;
    let holder = leases["items"][0]["spec"]["holderIdentity"].as_str()?;
    Some(holder.split('_').next()?.to_owned())
}

#[test]
fn another_controller_takes_over_within_seconds() {
    let scene = Scene::start();
    scene.running_vm("team", "web", "node-a");
    let mut one = scene.controller("one", &[]);
    eventually("one leads", || (holder(&scene)? == "one").then_some(()));
    let two = scene.controller("two", &[]);
    scene.backup("team", "b", "web", &json!({}));
    scene.until_assigned("team", "b", 1);
    assert_eq!(holder(&scene).as_deref(), Some("one"));
    process::kill9(&mut one.0);
    let killed = Instant::now();
    // What happens meanwhile is seen by the next one.
    scene.report("team", "b", 1, "Succeeded", &json!({"backupID": "20261125T010203Z-00ff00ff"}));
    eventually("two leads", || (holder(&scene)? == "two").then_some(()));
    let took = killed.elapsed();
    scene.until_phase("team", "b", "Completed");
    println!("taken over {took:?} after SIGKILL, acted upon after {:?}", killed.elapsed());
    assert!(took < Duration::from_secs(25), "{took:?}");
    let started = scene.events("team", "b").iter().filter(|event| *event == "BackupStarted").count();
    assert_eq!(started, 1, "one attempt");

    // Told to end, it gives the lease back.
    let three = scene.controller("three", &[]);
    std::thread::sleep(Duration::from_secs(3));
    let mut two = two;
    let pid = Pid::from_raw(two.0.id().cast_signed()).expect("a pid");
    kill_process(pid, Signal::TERM).expect("SIGTERM");
    let told = Instant::now();
    let status = process::wait(&mut two.0, Duration::from_secs(30)).expect("it ends");
    assert!(status.success(), "{status}");
    eventually("three leads", || (holder(&scene)? == "three").then_some(()));
    println!("handed over {:?} after SIGTERM", told.elapsed());
    assert!(told.elapsed() < Duration::from_secs(15));
    drop(three);
    let lease = scene.admin.get(&["-n", OPERATOR, "lease", "virt-fleece-controller"]);
    assert_eq!(lease["spec"]["leaseTransitions"], 3, "{}", text(&lease["metadata"]["name"]));
}

#[test]
fn a_controller_that_was_stopped_does_nothing_when_it_goes_on() {
    let scene = Scene::start();
    scene.running_vm("team", "web", "node-a");
    let one = scene.controller("one", &[]);
    eventually("one leads", || (holder(&scene)? == "one").then_some(()));
    let pid = Pid::from_raw(one.0.id().cast_signed()).expect("a pid");
    kill_process(pid, Signal::STOP).expect("SIGSTOP");
    let _two = scene.controller("two", &[]);
    eventually("two leads", || (holder(&scene)? == "two").then_some(()));
    kill_process(pid, Signal::CONT).expect("SIGCONT");
    scene.backup("team", "b", "web", &json!({}));
    scene.until_assigned("team", "b", 1);
    assert_eq!(holder(&scene).as_deref(), Some("two"));
    let started = scene.events("team", "b").iter().filter(|event| *event == "BackupStarted").count();
    assert_eq!(started, 1, "one attempt");
}
