//! `examples/argocd/health.lua`, run by the Lua that Argo CD has (5.1), over objects as they are in each phase.

use super::checkout;
use crate::bed::flavour::tool;
use serde_json::{Value, json};
use std::{fmt::Write as _, fs, io::Write as _, process::Command, process::Stdio};

/// A value as Lua writes it.
fn lua(value: &Value) -> String {
    match value {
        Value::Null => "nil".into(),
        Value::Object(fields) => {
            let mut text = "{".to_owned();
            for (name, value) in fields {
                let _ = write!(text, "[{name:?}]={},", lua(value));
            }
            text + "}"
        }
        Value::Array(items) => format!("{{{}}}", items.iter().map(lua).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}

/// What the script says of an object. It gets what Argo CD gives it: no `os`, no `io`, nothing to load with.
fn health(object: &Value) -> (String, String) {
    let script = checkout("examples/argocd/health.lua").display().to_string();
    let program = format!(
        "local chunk = assert(loadfile({script:?}))\n\
         setfenv(chunk, {{ obj = {}, ipairs = ipairs, pairs = pairs, string = string, table = table }})\n\
         local health = chunk()\nprint(health.status)\nprint(health.message)\n",
        lua(object)
    );
    let mut child = Command::new(tool("LUA"))
        .arg("-")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("running Lua");
    child.stdin.take().expect("a pipe").write_all(program.as_bytes()).expect("a program");
    let output = child.wait_with_output().expect("Lua's output");
    assert!(output.status.success(), "{object}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    let (status, message) = text.trim_end().split_once('\n').expect("two lines");
    (status.into(), message.into())
}

fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({ "type": kind, "status": status, "reason": reason, "message": message })
}

/// An object with this status, of generation 1.
fn object(status: &Value) -> Value {
    json!({ "metadata": { "name": "x", "generation": 1 }, "status": status })
}

#[test]
fn every_phase_has_its_health() {
    let waiting = condition("Ready", "False", "Migrating", "the VM migrates");
    let running = condition("Ready", "False", "InProgress", "");
    let reconciling = condition("Reconciling", "True", "InProgress", "");
    let cases = [
        (json!({ "metadata": { "name": "x" } }), "Progressing", "virt-fleece has not seen it yet"),
        (object(&json!({ "phase": "Pending" })), "Progressing", "virt-fleece has not seen it yet"),
        (
            object(&json!({ "observedGeneration": 1, "phase": "Pending", "conditions": [waiting, reconciling] })),
            "Progressing",
            "Pending, Migrating: the VM migrates",
        ),
        (
            object(&json!({ "observedGeneration": 1, "phase": "Running", "progress": "42%", "conditions": [running] })),
            "Progressing",
            "Running, InProgress (42%)",
        ),
        (
            object(&json!({ "observedGeneration": 1, "phase": "Completed", "conditions": [
                condition("Ready", "True", "Completed", "stored 1 MiB"), condition("Complete", "True", "Completed", ""),
                condition("Quiesced", "False", "NoAgent", "")] })),
            "Healthy",
            "Completed: stored 1 MiB",
        ),
        (
            object(&json!({ "observedGeneration": 1, "phase": "Failed", "conditions": [
                condition("Ready", "False", "DeadlineExceeded", ""), condition("Failed", "True", "DeadlineExceeded", "too late"),
                condition("Stalled", "True", "DeadlineExceeded", "")] })),
            "Degraded",
            "DeadlineExceeded: too late",
        ),
        (
            json!({ "metadata": { "generation": 2 }, "status": { "observedGeneration": 1,
                "conditions": [condition("Ready", "True", "Completed", "")] } }),
            "Progressing",
            "the spec has changed",
        ),
        (
            json!({ "metadata": { "deletionTimestamp": "2026-01-01T00:00:00Z", "generation": 1 },
                "status": { "conditions": [condition("Ready", "True", "Completed", "")] } }),
            "Progressing",
            "being deleted",
        ),
        // Repositories.
        (
            object(&json!({ "observedGeneration": 1, "conditions": [
                condition("Ready", "True", "Probed", ""), condition("Reachable", "True", "Probed", "")] })),
            "Healthy",
            "Probed",
        ),
        (
            object(&json!({ "observedGeneration": 1, "conditions": [
                condition("Ready", "False", "Unreachable", ""), condition("Reachable", "False", "Unreachable", "refused")] })),
            "Degraded",
            "Unreachable: refused",
        ),
        (
            object(&json!({ "observedGeneration": 1, "conditions": [
                condition("Ready", "False", "WrongPassphrase", ""), condition("Stalled", "True", "WrongPassphrase", "x")] })),
            "Degraded",
            "WrongPassphrase: x",
        ),
        (
            object(&json!({ "observedGeneration": 1, "conditions": [condition("Ready", "Unknown", "Probing", "")] })),
            "Progressing",
            "Probing",
        ),
    ];
    for (object, status, message) in cases {
        assert_eq!(health(&object), (status.to_owned(), message.to_owned()), "{object}");
    }
}

#[test]
fn the_config_map_has_the_same_script() {
    let script = fs::read_to_string(checkout("examples/argocd/health.lua")).expect("health.lua");
    let map = fs::read_to_string(checkout("examples/argocd/argocd-cm.yaml")).expect("argocd-cm.yaml");
    let (_, copy) = map.split_once("      health.lua: |\n").expect("a script in the map");
    let copy: String =
        copy.lines().map(|line| line.strip_prefix("        ").unwrap_or(line).to_owned() + "\n").collect();
    assert_eq!(copy, script);
}
