//! A VM with a target directory, and the commands of the product against them.

use crate::bed::{
    cli::{Cli, Outcome},
    disk::{Bus, DiskSpec, Format},
    flavour::Flavour,
    oracle::Stream,
    proxy::QmpProxy,
    vm::Vm,
};
use serde_json::Value;
use std::path::Path;
use tempfile::TempDir;

/// Size of the disks that the guest writes: not a multiple of the cluster, and two different ones.
pub(crate) const SIZES: [u64; 2] = [64 << 20, (48 << 20) + 5 * 512];
/// Names of these disks.
pub(crate) const VOLUMES: [&str; 2] = ["root", "data"];

/// A VM and a target.
pub(crate) struct Scene {
    pub(crate) vm: Vm,
    pub(crate) target: TempDir,
    /// What the product speaks to instead of QEMU, if anything.
    pub(crate) proxy: Option<QmpProxy>,
}

impl Scene {
    /// Two disks on two controllers, each with an iothread; raw and qcow2.
    pub(crate) fn new(flavour: Flavour, guest: bool) -> Self {
        let vm = Vm::builder(flavour)
            .disk(DiskSpec::new(VOLUMES[0], SIZES[0]).bus(Bus::VirtioBlk { iothread: true }))
            .disk(DiskSpec::new(VOLUMES[1], SIZES[1]).bus(Bus::ScsiHd { iothread: true }).format(Format::Qcow2))
            .guest(guest)
            .start();
        Self::of(vm)
    }

    /// Any VM.
    pub(crate) fn of(vm: Vm) -> Self {
        Self { vm, target: tempfile::tempdir().expect("a directory"), proxy: None }
    }

    /// Without QEMU's filter drivers: what KubeVirt up to 1.7 runs, when the flavour is QEMU 10.
    pub(crate) fn without_filters(mut self) -> Self {
        self.proxy = Some(QmpProxy::start(&self.vm.qmp_socket()));
        self
    }

    /// `virt-fleece backup` into the scene's own target.
    pub(crate) fn backup(&self) -> Cli {
        self.backup_to(self.target.path())
    }

    /// `virt-fleece backup` into another directory.
    pub(crate) fn backup_to(&self, target: &Path) -> Cli {
        self.vm_command("backup").arg("--vm").arg("web").arg("--qcow2-dir").arg(target).arg("-o").arg("json")
    }

    /// `virt-fleece recover`.
    pub(crate) fn recover(&self) -> Cli {
        self.vm_command("recover").arg("-o").arg("json")
    }

    /// A command with the options that name the VM.
    pub(crate) fn vm_command(&self, command: &str) -> Cli {
        self.command_in(command, &self.vm.fleece_directory())
    }

    /// The same with another fleece directory.
    pub(crate) fn command_in(&self, command: &str, fleece: &Path) -> Cli {
        let monitor = self.proxy.as_ref().map_or_else(|| self.vm.qmp_socket(), QmpProxy::socket);
        Cli::new([command, "--qmp"]).arg(monitor).arg("--fleece-dir").arg(fleece)
    }

    /// Restores a backup; the bytes of its disks in the order of [`VOLUMES`].
    pub(crate) fn restored(&self, id: &str) -> Vec<Vec<u8>> {
        let to = tempfile::tempdir().expect("a directory");
        let restore = Cli::new(["restore", "--vm", "web", "--backup", id, "--qcow2-dir"]).arg(self.target.path());
        restore.arg("--output").arg(to.path()).run().success();
        VOLUMES.iter().map(|volume| std::fs::read(to.path().join(format!("{volume}.raw"))).expect("restored")).collect()
    }

    /// The bytes of the disks as they are, when nothing writes.
    pub(crate) fn disks_now(&self) -> Vec<Vec<u8>> {
        VOLUMES.iter().map(|volume| crate::bed::disk::read_image(&self.vm.disk(volume).path)).collect()
    }

    /// Nothing of ours is in QEMU but the bitmap of this backup, and no file in the fleece directory but the lock.
    pub(crate) fn assert_clean(&self, bitmap: Option<&str>) {
        for file in std::fs::read_dir(self.vm.fleece_directory()).into_iter().flatten().flatten() {
            let name = file.file_name().into_string().expect("a name");
            assert!(
                Path::new(&name).extension().is_some_and(|kind| kind == "lock"),
                "{name} is left in the fleece directory"
            );
            std::fs::remove_file(file.path()).expect("removing the lock");
        }
        let bitmaps: Vec<&str> = bitmap.into_iter().collect();
        self.vm.assert_clean(&mut self.vm.control(), &bitmaps);
    }
}

/// The stream that the guest writes in these tests.
pub(crate) fn stream(seed: u64) -> Stream {
    Stream { seed, threads: 4, zero: 15, disks: SIZES.to_vec() }
}

/// The id in a report.
pub(crate) fn id(report: &Value) -> String {
    report["id"].as_str().expect("an id").to_owned()
}

/// The bitmap in a report.
pub(crate) fn bitmap(report: &Value) -> String {
    report["volumes"][0]["bitmap"].as_str().expect("a bitmap").to_owned()
}

/// Whether all volumes of a report are incremental.
pub(crate) fn is_incremental(report: &Value) -> bool {
    report["volumes"].as_array().expect("volumes").iter().all(|volume| volume.get("parent").is_some())
}

/// The reason of a failed command that prints JSON.
pub(crate) fn reason(outcome: &Outcome) -> String {
    outcome.json::<Value>()["error"]["reason"].as_str().expect("a reason").to_owned()
}

/// Content that nothing compresses or deduplicates away, into a disk of a VM that has no guest.
pub(crate) fn noise(scene: &Scene, volume: &str, seed: u64, at_mib: u64, mib: u64) {
    let mut bytes = vec![0; (mib << 20) as usize];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    let file = scene.vm.directory().join("noise");
    std::fs::write(&file, bytes).expect("a file");
    let mut control = scene.vm.control();
    scene.vm.io(&mut control, volume, &format!("write -s {} {at_mib}M {mib}M", file.display()));
    scene.vm.io(&mut control, volume, "flush");
}
