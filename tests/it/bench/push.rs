//! Peers inside QEMU: a fleecing push into qcow2, as qmpbackup makes it; and an export of a disk.

use crate::{
    bed::{control::Control, flavour::tool},
    scene::Scene,
};
use serde_json::json;
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// An empty qcow2 image.
fn empty(path: &Path, size: u64) {
    std::fs::remove_file(path).ok();
    let mut create = Command::new(tool("QEMU_IMG"));
    create.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size.to_string());
    assert!(create.status().unwrap().success());
}

fn open(control: &mut Control, node: &str, path: &Path) {
    let file = json!({"driver": "file", "filename": path});
    control.run("blockdev-add", &json!({"driver": "qcow2", "node-name": node, "file": file, "discard": "unmap"}));
}

/// Backs a disk up into a qcow2 file: copy-before-write filter, `snapshot-access`, `blockdev-backup`. The seconds that
/// it takes from the first filter to the last.
pub(super) fn push(scene: &Scene, volume: &str, directory: &Path, compress: bool) -> f64 {
    let mut control = scene.vm.control();
    let disk = scene.vm.disk(volume);
    let (fleece, target) = (directory.join("push-fleece.qcow2"), directory.join("push.qcow2"));
    empty(&fleece, disk.spec.size);
    empty(&target, disk.spec.size);
    let device = format!("/machine/peripheral/{}", disk.spec.qdev.as_deref().unwrap());
    let begun = Instant::now();
    open(&mut control, "push-fleece", &fleece);
    open(&mut control, "push-target", &target);
    let filter = json!({"driver": "copy-before-write", "node-name": "push-filter", "file": disk.top_node(),
        "target": "push-fleece"});
    control.run("blockdev-add", &filter);
    let insert = |control: &mut Control, node: &str| {
        control.run("qom-set", &json!({"path": device, "property": "drive", "value": node}));
    };
    insert(&mut control, "push-filter");
    control.run(
        "blockdev-add",
        &json!({"driver": "snapshot-access", "node-name": "push-snapshot", "file": "push-filter"}),
    );
    control.clear_events();
    let job = json!({"job-id": "push", "device": "push-snapshot", "target": "push-target", "sync": "full",
        "compress": compress});
    control.run("blockdev-backup", &job);
    let completed = control.wait_event("BLOCK_JOB_COMPLETED", Duration::from_secs(180)).expect("the job ends");
    assert!(completed["data"].get("error").is_none(), "{completed}");
    control.run("blockdev-del", &json!({"node-name": "push-snapshot"}));
    insert(&mut control, &disk.top_node());
    for node in ["push-filter", "push-fleece", "push-target"] {
        control.run("blockdev-del", &json!({"node-name": node}));
    }
    let seconds = begun.elapsed().as_secs_f64();
    std::fs::remove_file(fleece).unwrap();
    std::fs::remove_file(target).unwrap();
    seconds
}

/// A disk of a VM, exported to read; ends when dropped.
pub(super) struct Export {
    control: Control,
    socket: PathBuf,
}

impl Export {
    /// Of the disk as it is.
    pub(super) fn new(scene: &Scene, volume: &str) -> Self {
        // The product's monitor, so that the test may hold its own.
        let mut control = Control::connect(&scene.vm.qmp_socket());
        let socket = scene.vm.directory().join("bench-nbd");
        let address = json!({"type": "unix", "data": {"path": socket}});
        control.run("nbd-server-start", &json!({"addr": address, "max-connections": 8}));
        let node = scene.vm.disk(volume).format_node();
        control.run("block-export-add", &json!({"type": "nbd", "id": "bench", "node-name": node, "name": "disk"}));
        Self { control, socket }
    }

    /// `nbdcopy` from it, with these options.
    pub(super) fn nbdcopy(&self, options: &[&str], to: &Path) -> Command {
        let mut command = Command::new("nbdcopy");
        command.args(options);
        command.arg(format!("nbd+unix:///disk?socket={}", self.socket.display())).arg(to);
        command
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.control.execute("nbd-server-stop", &json!({})).ok();
        std::fs::remove_file(&self.socket).ok();
    }
}
