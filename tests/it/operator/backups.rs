//! Backups that come to a good end.

use super::{DISKS, Operator, condition, id, stream};
use crate::{
    bed::{flavour::Flavour, oracle::Replay, point_in_time::PointInTime},
    node::Launcher,
};
use serde_json::json;

#[test]
fn kubectl_apply_makes_exact_instants_of_a_running_vm() {
    let operator = Operator::start(&["node-a", "node-b"]);
    operator.tenant("prod");
    let launcher = Launcher::start(&operator.cluster, &operator.nodes[1], Flavour::Allowlist, ("prod", "web"), &DISKS);
    let stream = stream(21);
    let mut writer = launcher.writer();
    let names: Vec<&str> = DISKS.iter().map(|disk| disk.name).collect();
    writer.start(&stream, 0, &names);
    let mut replay = Replay::new(&stream);
    let mut points = Vec::new();
    for round in 0..3 {
        let name = format!("web-{round}");
        let before = writer.status();
        operator.back_up("prod", &name, "web", &json!({}));
        let backup = operator.complete("prod", &name);
        let after = writer.status();
        let kind = if round == 0 { "Full" } else { "Incremental" };
        assert_eq!(backup["status"]["type"], kind, "{backup:#}\n{}", operator.logs());
        assert_eq!(backup["status"]["assignment"]["nodeName"], "node-b", "{backup:#}");
        assert_eq!(backup["status"]["run"]["chain"]["sequence"], round + 1, "{backup:#}");
        assert_eq!(condition(&backup, "Ready"), Some(("True", "Completed")), "{backup:#}");
        operator.until("prod", &name, super::BACKUP_LIMIT, "without a finalizer: nothing is left to undo", |backup| {
            backup["metadata"]["finalizers"].is_null()
        });
        assert_eq!(launcher.leftovers(), Vec::<String>::new());
        points.push((id(&backup), before.writes, after.writes));
    }
    let done = writer.stop();
    assert_eq!(done.errors, 0, "the guest saw an error: {done:?}");
    for (id, before, after) in &points {
        let images = operator.restored("prod", "web", id);
        let found = PointInTime::find_after(&images, &replay).unwrap_or_else(|error| panic!("{id}: {error}"));
        found.assert_between(before, after);
        replay.advance_all(&found.numbers());
    }
    let columns = operator.admin().run(["-n", "prod", "get", "vfb", "web-2", "-o", "wide"]);
    for shown in ["web", "Incremental", "Completed", "100%", "node-b", "job", "3"] {
        assert!(columns.contains(shown), "{shown}: {columns}");
    }
    // The repository alone tells what the VM was.
    let list = operator.cli("prod", "main", &["list", "-o", "json"]).run().success();
    assert!(list.stdout.contains("\"runStrategy\"") || list.stdout.contains("prod/web"), "{}", list.stdout);
}
