//! The commands that manage a repository, through the binary, on a directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use object_store::ObjectStoreExt as _;
use serde_json::{Value, json};

use crate::bed::cli::{Cli, Outcome};
use crate::bed::s3::{self, S3Server};
use crate::made_up_repository::{PASSPHRASE, RepositoryScene};

/// All files of a directory with their content.
fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(self::files(&path));
        } else {
            let content = fs::read(&path).expect("a file");
            files.insert(path, content);
        }
    }
    files
}

fn code(outcome: &Outcome) -> Option<i32> {
    outcome.status.code()
}

fn reason(outcome: &Outcome) -> String {
    outcome.json::<Value>()["error"]["reason"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn init_makes_the_directory_and_info_says_what_is_in_it() {
    let scene = RepositoryScene::new("info");
    let made: Value = scene.repository(["init", "--chunk-size", "256K", "-o", "json"]).json();
    assert_eq!(made["chunk_size"], 256 << 10);
    let info: Value = scene.repository(["info", "-o", "json"]).json();
    for same in ["url", "id", "format_version", "chunk_size", "created"] {
        assert_eq!(info[same], made[same], "{same}");
    }
    assert_eq!(info["url"], json!(scene.path()));
    assert_eq!(info["format_version"], 1);
    let counts = |info: &Value| {
        ["key_slots", "vms", "backups", "unreadable_backups", "chunk_objects", "chunk_bytes", "logical_bytes"]
            .map(|name| info[name].as_u64().unwrap_or_else(|| panic!("{name} in {info}")))
    };
    assert_eq!(counts(&info), [1, 0, 0, 0, 0, 0, 0]);
    assert_eq!(info["deduplication_ratio"], Value::Null);

    scene.commit("web", &["2026-11-20T10:00:00Z", "2026-11-21T10:00:00Z"]);
    scene.commit("db", &["2026-11-20T10:00:00Z"]);
    let chunks = scene.path().join("chunks/ab");
    fs::create_dir_all(&chunks).expect("a directory");
    fs::write(chunks.join(format!("ab{}", "0".repeat(62))), [0; 1024]).expect("a chunk");
    fs::write(chunks.join("notes.txt"), "no chunk").expect("a file");
    let info: Value = scene.repository(["info", "-o", "json"]).json();
    let logical = 3 * RepositoryScene::VOLUME_SIZE;
    assert_eq!(counts(&info), [1, 2, 3, 0, 1, 1024, logical]);
    assert_eq!(info["deduplication_ratio"].as_f64(), Some(logical as f64 / 1024.0));

    scene.damage("db", 1);
    let info: Value = scene.repository(["info", "-o", "json"]).json();
    assert_eq!(counts(&info), [1, 2, 2, 1, 1, 1024, 2 * RepositoryScene::VOLUME_SIZE]);
    let text = scene.repository(["info"]).run().success();
    assert!(text.stdout.contains("CANNOT BE READ"), "{}", text.stdout);
}

#[test]
fn init_refuses_a_place_where_something_is() {
    let scene = RepositoryScene::new("twice");
    scene.repository(["init"]).run().success();
    let before = files(scene.path());
    let again = scene.repository(["init", "-o", "json"]).run().failure();
    assert_eq!((code(&again), &*reason(&again)), (Some(6), "TargetExists"));
    assert_eq!(files(scene.path()), before);

    let other = RepositoryScene::new("not-empty");
    fs::create_dir(other.path()).expect("a directory");
    fs::write(other.path().join("letter.txt"), "dear").expect("a file");
    let refused = other.repository(["init"]).run().failure();
    assert_eq!(code(&refused), Some(6));
    assert!(refused.stderr.contains("letter.txt"), "{}", refused.stderr);
    assert_eq!(files(other.path()).len(), 1);
}

#[test]
fn init_refuses_chunk_sizes_that_are_not_possible() {
    let scene = RepositoryScene::new("chunk-size");
    for size in ["1000", "32K", "16M", "3M"] {
        let refused = scene.repository(["init", "--chunk-size", size]).run().failure();
        assert_eq!(code(&refused), Some(2), "{size}: {}", refused.stderr);
        assert!(refused.stderr.contains("power of two"), "{}", refused.stderr);
    }
}

#[test]
fn a_wrong_or_missing_passphrase_is_wrong_usage() {
    let scene = RepositoryScene::new("passphrase");
    let none = scene.with_passphrase(["repository", "init"], None).run().failure();
    assert_eq!(code(&none), Some(2));
    assert!(none.stderr.contains("--passphrase-file"), "{}", none.stderr);
    assert!(!scene.path().exists(), "a directory was made for nothing");
    let empty = scene.with_passphrase(["repository", "init"], Some("")).run().failure();
    assert_eq!(code(&empty), Some(2));

    scene.repository(["init"]).run().success();
    let wrong = scene.with_passphrase(["repository", "info", "-o", "json"], Some("battery staple")).run().failure();
    assert_eq!((code(&wrong), &*reason(&wrong)), (Some(2), "WrongPassphrase"));
    assert!(wrong.stderr.contains("opens with this passphrase"), "{}", wrong.stderr);
    assert!(!format!("{wrong:?}").contains("battery"));
}

#[test]
fn a_missing_repository_says_how_to_make_one() {
    let scene = RepositoryScene::new("missing");
    for command in [&["repository", "info"][..], &["repository", "key", "list"], &["forget", "--keep-last", "1"]] {
        let missing = scene.run(command.iter().copied()).arg("-o").arg("json").run().failure();
        assert_eq!((code(&missing), &*reason(&missing)), (Some(6), "RepositoryMissing"), "{command:?}");
        assert!(missing.stderr.contains("virt-fleece repository init --repository"), "{}", missing.stderr);
        assert!(!scene.path().exists());
    }
    // A directory that holds something else.
    fs::create_dir(scene.path()).expect("a directory");
    let missing = scene.repository(["info"]).run().failure();
    assert_eq!(code(&missing), Some(6), "{}", missing.stderr);
}

#[test]
fn passphrases_come_and_go_but_the_last_one_stays() {
    let scene = RepositoryScene::new("keys");
    scene.repository(["init"]).run().success();
    let file = scene.path().with_extension("new");
    fs::write(&file, "second secret\n").expect("a file");
    let added: Value = scene
        .repository(["key", "add", "--label", "safe\u{1b}[31m", "-o", "json"])
        .arg("--new-passphrase-file")
        .arg(&file)
        .json();
    let third = scene.repository(["key", "add"]).env("VIRT_FLEECE_NEW_PASSPHRASE", "third secret").run().success();
    assert!(third.stdout.starts_with("key slot "), "{}", third.stdout);

    let second = |arguments: &[&str]| {
        let arguments = ["repository", "key"].iter().chain(arguments).copied();
        scene.with_passphrase(arguments, Some("second secret"))
    };
    let slots: Vec<Value> = second(&["list", "-o", "json"]).json();
    assert_eq!(slots.len(), 3);
    assert_eq!(slots[1], added);
    let exposed = slots.iter().flat_map(|slot| slot.as_object().expect("an object").keys());
    assert!(exposed.into_iter().all(|key| ["id", "label", "created", "kdf"].contains(&key.as_str())), "{slots:?}");
    let table = second(&["list"]).run().success();
    assert!(!table.stdout.contains('\u{1b}'), "a label moves the cursor: {:?}", table.stdout);

    let id = |slot: &Value| slot["id"].as_str().expect("an id").to_owned();
    let unknown = second(&["remove", "0123456789abcdef"]).run().failure();
    assert_eq!(code(&unknown), Some(6));
    assert!(unknown.stderr.contains(&id(&added)), "{}", unknown.stderr);
    let removed: Value = second(&["remove", &id(&slots[0]), "-o", "json"]).json();
    assert_eq!(removed, json!({ "removed": id(&slots[0]) }));
    let old = scene.repository(["info"]).run().failure();
    assert_eq!(code(&old), Some(2), "{}", old.stderr);
    second(&["remove", &id(&slots[2])]).run().success();
    let last = second(&["remove", &id(&added), "-o", "json"]).run().failure();
    assert_eq!((code(&last), &*reason(&last)), (Some(6), "LastKey"));
    assert_eq!(second(&["list", "-o", "json"]).json::<Vec<Value>>().len(), 1);
}

#[test]
fn secrets_are_in_no_output_no_log_no_option_and_no_object() {
    let scene = RepositoryScene::new("secrets");
    let loud = |cli: Cli| {
        let cli = cli.arg("-vvv").env("VIRT_FLEECE_LOG", "trace").env("RUST_BACKTRACE", "1");
        let outcome = cli.env("VIRT_FLEECE_NEW_PASSPHRASE", "another-one").run();
        let shown = format!("{}{}", outcome.stdout, outcome.stderr);
        assert!(!shown.contains(PASSPHRASE) && !shown.contains("another-one"), "{shown}");
        outcome
    };
    loud(scene.repository(["init"])).success();
    scene.commit("payroll-server", &["2026-11-20T10:00:00Z", "2026-11-21T10:00:00Z"]);
    loud(scene.repository(["key", "add"])).success();
    loud(scene.repository(["key", "list", "-o", "json"])).success();
    loud(scene.repository(["info"])).success();
    loud(scene.run(["forget", "--keep-last", "1"])).success();
    loud(scene.with_passphrase(["repository", "info"], Some("not-the-right-one"))).failure();
    for (path, content) in files(scene.path()) {
        for secret in [PASSPHRASE, "another-one", "payroll-server"] {
            let found = content.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found && !path.to_string_lossy().contains(secret), "{secret} is in {}", path.display());
        }
    }
    // What is on the command line is seen by every user of the machine.
    for command in [&["init"][..], &["info"], &["key", "add"], &["key", "list"], &["key", "remove"]] {
        let help = Cli::new(["repository"].iter().chain(command)).arg("--help").run().success();
        let takes = |line: &str| line.trim_start().starts_with("--") && line.contains("passphrase");
        let options = help.stdout.split("Example").next().unwrap_or_default();
        for line in options.lines().filter(|line| takes(line)) {
            assert!(line.contains("<FILE>"), "{command:?}: {line}");
        }
        assert!(help.stdout.contains("Example"), "{command:?} shows no example");
    }
}

#[test]
fn a_bucket_is_like_a_directory() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = S3Server::start(directory.path());
    server.create_bucket("backups");
    let run = |arguments: &[&str]| {
        let cli = Cli::new(["repository"].iter().chain(arguments)).arg("--repository").arg("s3://backups/prod");
        let cli = cli.arg("-o").arg("json").env("VIRT_FLEECE_PASSPHRASE", PASSPHRASE);
        s3::environment(&server.endpoint()).into_iter().fold(cli, |cli, (name, value)| cli.env(name, value))
    };
    run(&["init"]).run().success();
    let again = run(&["init"]).run().failure();
    assert_eq!((code(&again), &*reason(&again)), (Some(6), "TargetExists"));
    let chunk = |id: &str| format!("prod/chunks/{}/{id}", &id[..2]);
    let client = s3::client(&server.endpoint(), "backups").build().expect("a client");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    for name in [chunk(&"0a".repeat(32)), chunk(&"ff".repeat(32)), "other/chunks/00/x".into()] {
        let path = object_store::path::Path::from(name);
        runtime.block_on(client.put(&path, vec![1; 500].into())).expect("a put");
    }
    let info: Value = run(&["info"]).json();
    assert_eq!((&info["url"], &info["chunk_objects"]), (&json!("s3://backups/prod"), &json!(2)));
    assert_eq!(info["chunk_bytes"], 1000);
    let shown = format!("{:?}", run(&["info", "-vvv"]).env("VIRT_FLEECE_LOG", "trace").run().success());
    assert!(!shown.contains(s3::SECRET_KEY) && !shown.contains(PASSPHRASE), "{shown}");
    assert_eq!(run(&["key", "list"]).json::<Vec<Value>>().len(), 1);
}
