//! What this QEMU can do, found by asking and trying, never by its version.

use super::{
    Qmp, QmpError,
    command::{BlockdevAdd, BlockdevDel, NodeOptions, QueryNamedBlockNodes, QueryQmpSchema, QueryVersion, VersionInfo},
};
use serde_json::Value;
use std::collections::HashMap;

/// Scratch nodes of the trial, top first. None of them touches a node of the guest.
const SCRATCH: [&str; 4] = ["vf-probe-snapshot", "vf-probe-filter", "vf-probe-target", "vf-probe-disk"];

/// What matters for fleecing.
#[derive(Debug, Clone)]
pub struct Capabilities {
    /// Version, for display and for the one bug that only the version tells (`cbw-timeout` before 9.1).
    pub version: VersionInfo,
    /// `blockdev-backup` has `on-cbw-error` (10.1): a full fleece does not hurt the guest.
    pub backup_on_cbw_error: bool,
    /// Ranges of a snapshot can be discarded (9.1). `discard-source` of `blockdev-backup` came with the very changes that
    /// made such discards safe; before them an unaligned one, or one without a writer's permission, aborts QEMU.
    pub snapshot_discard: bool,
    /// Why the driver `copy-before-write` cannot be used, `None` when it can.
    pub copy_before_write: Option<String>,
    /// Why the driver `snapshot-access` cannot be used, `None` when it can.
    pub snapshot_access: Option<String>,
}

impl Capabilities {
    /// Asks and tries. The drivers are tried on scratch nodes, since CentOS's allow-list does not show in the schema.
    pub async fn probe(qmp: &Qmp) -> Result<Self, QmpError> {
        let version = qmp.execute(&QueryVersion {}).await?;
        let schema = Schema::new(qmp.execute(&QueryQmpSchema {}).await?);
        let backup_on_cbw_error = schema.command_has("blockdev-backup", "on-cbw-error");
        let snapshot_discard = schema.command_has("blockdev-backup", "discard-source");
        remove_scratch(qmp).await?;
        let tried = try_drivers(qmp).await;
        remove_scratch(qmp).await?;
        let (copy_before_write, snapshot_access) = tried?;
        Ok(Self { version, backup_on_cbw_error, snapshot_discard, copy_before_write, snapshot_access })
    }
}

/// Why `copy-before-write` and `snapshot-access` cannot be used.
async fn try_drivers(qmp: &Qmp) -> Result<(Option<String>, Option<String>), QmpError> {
    let [snapshot, filter, target, disk] = SCRATCH;
    for name in [disk, target] {
        add(qmp, name, NodeOptions::NullCo { size: 1 << 20 }).await?;
    }
    let options = NodeOptions::CopyBeforeWrite {
        file: disk.into(),
        target: target.into(),
        bitmap: None,
        on_cbw_error: "break-snapshot",
        cbw_timeout: None,
    };
    if let Some(why) = refusal(add(qmp, filter, options).await)? {
        // The snapshot driver can still be tried: the allow-list is checked before its child is.
        let why_not = refusal(add(qmp, snapshot, snapshot_of(disk)).await)?;
        return Ok((Some(why), why_not));
    }
    Ok((None, refusal(add(qmp, snapshot, snapshot_of(filter)).await)?))
}

fn snapshot_of(node: &str) -> NodeOptions {
    NodeOptions::SnapshotAccess { file: node.into(), discard: None }
}

async fn add(qmp: &Qmp, name: &str, options: NodeOptions) -> Result<(), QmpError> {
    qmp.execute(&BlockdevAdd { node_name: name.to_owned(), options }).await.map(drop)
}

/// A refusal is an answer, anything else an error.
fn refusal(result: Result<(), QmpError>) -> Result<Option<String>, QmpError> {
    match result {
        Ok(()) => Ok(None),
        Err(QmpError::Refused { description, .. }) => Ok(Some(description)),
        Err(error) => Err(error),
    }
}

/// Also those that a killed process left.
async fn remove_scratch(qmp: &Qmp) -> Result<(), QmpError> {
    let nodes = qmp.execute(&QueryNamedBlockNodes { flat: Some(true) }).await?;
    for name in SCRATCH {
        if nodes.iter().any(|node| node.node_name == name) {
            qmp.execute(&BlockdevDel { node_name: name.into() }).await?;
        }
    }
    Ok(())
}

/// QEMU's description of its own protocol.
struct Schema {
    entities: HashMap<String, Value>,
}

impl Schema {
    fn new(entities: Vec<Value>) -> Self {
        let named = entities.into_iter().filter_map(|entity| Some((entity["name"].as_str()?.to_owned(), entity)));
        Self { entities: named.collect() }
    }

    /// Whether the arguments of this very command have this member.
    fn command_has(&self, command: &str, member: &str) -> bool {
        let Some(arguments) = self.entities.get(command).and_then(|entity| entity["arg-type"].as_str()) else {
            return false;
        };
        let Some(members) = self.entities.get(arguments).and_then(|entity| entity["members"].as_array()) else {
            return false;
        };
        members.iter().any(|entry| entry["name"] == member)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_the_argument_of_the_very_command_counts() {
        let schema = Schema::new(vec![
            json!({"name": "blockdev-backup", "meta-type": "command", "arg-type": "1"}),
            json!({"name": "blockdev-add", "meta-type": "command", "arg-type": "2"}),
            json!({"name": "1", "meta-type": "object", "members": [{"name": "job-id"}]}),
            json!({"name": "2", "meta-type": "object", "members": [{"name": "on-cbw-error"}]}),
        ]);
        assert!(!schema.command_has("blockdev-backup", "on-cbw-error"));
        assert!(schema.command_has("blockdev-add", "on-cbw-error"));
        assert!(!schema.command_has("nothing", "x"));
    }
}
