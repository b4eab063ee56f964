//! `forget`, through the binary, on a directory.

use serde_json::{Value, json};

use crate::made_up_repository::RepositoryScene;

/// Six days, the first with two backups.
const DAYS: [&str; 7] = [
    "2026-11-16T10:00:00Z",
    "2026-11-16T22:00:00Z",
    "2026-11-17T22:00:00Z",
    "2026-11-18T22:00:00Z",
    "2026-11-19T22:00:00Z",
    "2026-11-20T22:00:00Z",
    "2026-11-21T22:00:00Z",
];

fn scene(name: &str) -> RepositoryScene {
    let scene = RepositoryScene::new(name);
    scene.init();
    scene
}

/// Whether each backup in the answer is kept, and why.
fn reasons(plan: &Value) -> Vec<Vec<&str>> {
    let backups = plan["backups"].as_array().expect("backups");
    let words = |line: &'_ Value| line["reasons"].as_array().is_some_and(|reasons| !reasons.is_empty());
    assert!(backups.iter().all(|line| line["kept"] == words(line)), "{plan}");
    let texts = |line: &'_ Value| line["reasons"].as_array().cloned().unwrap_or_default().len();
    backups
        .iter()
        .map(|line| (0..texts(line)).map(|at| line["reasons"][at].as_str().expect("a text")).collect())
        .collect()
}

#[test]
fn a_dry_run_explains_and_changes_nothing_and_the_real_one_does_what_it_said() {
    let scene = scene("rule");
    let ids = scene.commit("web", &DAYS);
    let rule = ["forget", "--vm", "web", "--keep-last", "1", "--keep-daily", "2", "--keep-weekly", "4"];
    let dry: Value = scene.run(rule).arg("--keep-hourly").arg("0").arg("--dry-run").arg("-o").arg("json").json();
    assert_eq!((&dry["dry_run"], &dry["kept"], &dry["forgotten"]), (&json!(true), &json!(2), &json!(5)));
    let expected: [&[&str]; 7] =
        [&[], &[], &[], &[], &[], &["daily 2026-11-20"], &["newest", "last", "daily 2026-11-21", "weekly 2026-W47"]];
    assert_eq!(reasons(&dry), expected);
    assert_eq!(dry["backups"][0]["id"], json!(ids[0]));
    assert_eq!(dry["backups"][0]["point_in_time"], DAYS[0]);
    assert_eq!(dry["refused"], json!([]));
    let table = scene.run(rule).arg("--dry-run").run().success().stdout;
    let line = |id: usize| table.lines().find(|line| line.contains(ids[id].as_str())).expect("a line").to_owned();
    assert!(line(0).contains("forget") && line(0).contains("2026-11-16 10:00:00 UTC"), "{table}");
    assert!(line(5).contains("keep") && line(5).contains("daily 2026-11-20"), "{table}");
    assert!(table.contains("5 backups would be forgotten, 2 kept"), "{table}");
    assert_eq!(scene.ids("web").len(), 7, "a dry run changes nothing");

    let text = scene.run(rule).run().success().stdout;
    assert!(text.contains("5 backups forgotten, 2 kept; `virt-fleece repository prune`"), "{text}");
    assert_eq!(scene.ids("web"), [ids[5].to_string(), ids[6].to_string()]);
    // Once more there is nothing to do.
    let again: Value = scene.run(rule).arg("-o").arg("json").json();
    assert_eq!((&again["kept"], &again["forgotten"]), (&json!(2), &json!(0)));
}

#[test]
fn each_vm_has_its_own_newest_backups() {
    let scene = scene("vms");
    let web = scene.commit("web", &DAYS[..3]);
    // Not backed up for a year.
    let old = scene.commit("old", &["2025-11-01T00:00:00Z", "2025-11-20T00:00:00Z", "2025-11-21T00:00:00Z"]);
    let plan: Value = scene.run(["forget", "--keep-within", "1d", "-o", "json"]).json();
    assert_eq!(
        reasons(&plan),
        [&[][..], &["within 1d"], &["newest", "within 1d"], &[], &["within 1d"], &["newest", "within 1d"]]
    );
    assert_eq!(scene.ids("web"), [web[1].to_string(), web[2].to_string()]);
    assert_eq!(scene.ids("old"), [old[1].to_string(), old[2].to_string()]);
    // One VM only.
    scene.run(["forget", "--vm", "old", "--keep-last", "1"]).run().success();
    assert_eq!((scene.ids("web").len(), scene.ids("old")), (2, vec![old[2].to_string()]));
}

#[test]
fn named_backups_go_all_or_none() {
    let scene = scene("ids");
    let web = scene.commit("web", &DAYS[..4]);
    let db = scene.commit("db", &DAYS[4..]);
    let missing = scene.run(["forget", "--backup", web[0].as_str(), "20260101T000000Z-00000000"]).run().failure();
    assert_eq!(missing.status.code(), Some(6));
    assert!(missing.stderr.contains("20260101T000000Z-00000000"), "{}", missing.stderr);
    let other_vm = scene.run(["forget", "--vm", "db", "--backup", web[0].as_str()]).run().failure();
    assert_eq!(other_vm.status.code(), Some(6));
    assert_eq!((scene.ids("web").len(), scene.ids("db").len()), (4, 3), "nothing was forgotten");

    let named = ["forget", "--backup", web[0].as_str(), web[1].as_str(), "--backup", db[2].as_str(), "-o", "json"];
    let dry: Value = scene.run(named).arg("--dry-run").json();
    assert_eq!((&dry["forgotten"], scene.ids("web").len()), (&json!(3), 4));
    let done = scene.run(named).run().success();
    assert!(done.stderr.contains("newest backup"), "says that the next one is not incremental: {}", done.stderr);
    let lines = &done.json::<Value>()["backups"];
    assert_eq!((&lines[0]["vm"], &lines[2]["vm"], &lines[2]["kept"]), (&json!("web"), &json!("db"), &json!(false)));
    assert_eq!((scene.ids("web").len(), scene.ids("db").len()), (2, 2));
}

#[test]
fn ids_that_two_vms_have_need_the_vm() {
    let scene = scene("same-id");
    let ids = scene.commit("web", &DAYS[..1]);
    assert_eq!(scene.commit("db", &DAYS[..1]), ids);
    let refused = scene.run(["forget", "--backup", ids[0].as_str()]).run().failure();
    assert_eq!(refused.status.code(), Some(2));
    assert!(refused.stderr.contains("--vm"), "{}", refused.stderr);
    scene.run(["forget", "--vm", "db", "--backup", ids[0].as_str()]).run().success();
    assert_eq!((scene.ids("web").len(), scene.ids("db").len()), (1, 0));
}

#[test]
fn a_vm_with_a_damaged_backup_is_left_alone_until_that_is_named() {
    let scene = scene("damaged");
    scene.commit("web", &DAYS[..3]);
    scene.commit("db", &DAYS[..3]);
    let damaged = scene.damage("web", 2).to_string();
    let rule = ["forget", "--keep-last", "1"];
    for run in [scene.run(rule).arg("--dry-run"), scene.run(rule)] {
        let refused = run.run().failure();
        assert_eq!(refused.status.code(), Some(5));
        let way_out = format!("virt-fleece forget --vm web --backup {damaged}");
        assert!(refused.stderr.contains("VM `web`") && refused.stderr.contains(&way_out), "{}", refused.stderr);
    }
    assert_eq!((scene.ids("web").len(), scene.ids("db").len()), (3, 1), "the other VM is not concerned");
    let only = scene.run(rule).arg("--vm").arg("web").arg("-o").arg("json").run().failure();
    assert_eq!(only.status.code(), Some(5));
    let plan: Value = only.json();
    assert_eq!((&plan["refused"][0]["vm"], &plan["backups"]), (&json!("web"), &json!([])));
    assert_eq!(plan["refused"][0]["unreadable"][0]["id"], json!(damaged));
    scene.run(rule).arg("--vm").arg("db").run().success();

    let named = scene.run(["forget", "--vm", "web", "--backup", &damaged, "-o", "json"]).run().success();
    let line = &named.json::<Value>()["backups"][0];
    assert_eq!((&line["vm"], &line["point_in_time"]), (&json!("web"), &Value::Null));
    scene.run(rule).run().success();
    assert_eq!(scene.ids("web").len(), 1);
}

#[test]
fn a_vm_of_which_nothing_can_be_read_is_told_about() {
    let scene = scene("nameless");
    scene.commit("web", &DAYS[..1]);
    scene.commit("db", &DAYS[..2]);
    let damaged = scene.damage("web", 1).to_string();
    let refused = scene.run(["forget", "--keep-last", "1", "-o", "json"]).run().failure();
    assert_eq!(refused.status.code(), Some(5));
    let plan: Value = refused.json();
    assert_eq!((&plan["refused"][0]["vm"], &plan["forgotten"]), (&Value::Null, &json!(1)));
    assert_eq!((scene.ids("web").len(), scene.ids("db").len()), (1, 1));
    scene.run(["forget", "--backup", &damaged]).run().success();
    assert_eq!(scene.ids("web").len(), 0);
}

#[test]
fn rules_that_make_no_sense_are_wrong_usage() {
    let scene = scene("usage");
    let ids = scene.commit("web", &DAYS[..2]);
    let id = ids[0].as_str();
    let cases: [&[&str]; 9] = [
        &[],
        &["--vm", "web"],
        &["--dry-run", "--time-zone", "UTC"],
        &["--keep-last", "0", "--keep-daily", "0"],
        &["--keep-within", "0d"],
        &["--keep-within", "14 fortnights"],
        &["--keep-last", "1", "--time-zone", "Mars/Olympus"],
        &["--keep-last", "1", "--backup", id],
        &["--backup", "latest"],
    ];
    for case in cases {
        let refused = scene.run(["forget"].iter().chain(case).copied()).run().failure();
        assert_eq!(refused.status.code(), Some(2), "{case:?}: {}", refused.stderr);
    }
    let unknown = scene.run(["forget", "--vm", "wbe", "--keep-last", "1"]).run().failure();
    assert_eq!(unknown.status.code(), Some(6));
    assert!(unknown.stderr.contains("there is: web"), "{}", unknown.stderr);
    assert_eq!(scene.ids("web").len(), 2);
    let help = scene.run(["forget", "--help"]).run().success().stdout;
    assert!(help.contains("Examples:") && help.contains("--keep-weekly 5"), "{help}");
}
