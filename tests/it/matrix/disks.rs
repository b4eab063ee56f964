//! Kinds of disks: what is backed up and how, and what is left out and why.

use super::{INCREMENTAL, assert_is_now, complete_backups, engines, kinds, machine, scene, skipped, write_all};
use crate::{
    bed::{
        cli::Cli,
        disk::{Bus, DiskSpec, Format},
        flavour::{Flavour, tool},
        vm::VmBuilder,
    },
    scene::{Scene, bitmap, reason},
};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

const MIB: u64 = 1 << 20;

/// A full backup and two incremental ones by each engine, each of them right; the scene is clean afterwards.
fn full_and_incremental(flavour: Flavour, builder: &VmBuilder) {
    for engine in engines(flavour) {
        let scene = scene(builder.clone());
        let mut control = scene.vm.control();
        for (round, byte) in [0x11, 0x22, 0x33].into_iter().enumerate() {
            write_all(&scene, &mut control, byte, 40 * round as u64);
            let report: Value = scene.backup().arg("--engine").arg(engine).json();
            let expected = if round == 0 { "FirstBackup" } else { INCREMENTAL };
            for (volume, kind) in kinds(&report) {
                assert_eq!(kind, expected, "{flavour:?} {engine}: {volume}");
            }
            assert_eq!(kinds(&report).len(), super::volumes(&scene).len(), "{flavour:?} {engine}: {report}");
            assert_is_now(&scene, &mut control, &report);
            if round == 2 {
                drop(control);
                scene.assert_clean(Some(&bitmap(&report)));
                break;
            }
        }
    }
}

/// A file as a block device.
struct Loop(PathBuf);

impl Loop {
    fn attach(file: &Path) -> Self {
        let attach = Command::new("losetup").args(["--find", "--show"]).arg(file).output().expect("losetup");
        assert!(attach.status.success(), "losetup: {}", String::from_utf8_lossy(&attach.stderr));
        Self(PathBuf::from(String::from_utf8(attach.stdout).expect("a path").trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").arg("-d").arg(&self.0).status().ok();
    }
}

#[test]
fn every_bus_and_format_and_a_block_device() {
    for flavour in Flavour::all() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("device");
        std::fs::File::create(&file).and_then(|file| file.set_len(5 * MIB)).expect("a file");
        let device = Loop::attach(&file);
        let table = [
            ("blk", Bus::VirtioBlk { iothread: false }, Format::Raw, 4 * MIB),
            ("blk-thread", Bus::VirtioBlk { iothread: true }, Format::Qcow2, 4 * MIB + 512),
            ("scsi", Bus::ScsiHd { iothread: false }, Format::Qcow2, 3 * MIB),
            ("scsi-thread", Bus::ScsiHd { iothread: true }, Format::Raw, 4 * MIB + 3 * 512),
            ("sata", Bus::Ide, Format::Raw, 4 * MIB + 512),
            ("sata-qcow2", Bus::Ide, Format::Qcow2, 2 * MIB),
        ];
        let mut builder = machine(flavour);
        for (volume, bus, format, size) in table {
            builder = builder.disk(DiskSpec::new(volume, size).bus(bus).format(format));
        }
        let disk = DiskSpec::new("device", 5 * MIB).bus(Bus::VirtioBlk { iothread: true }).on_block_device(&device.0);
        full_and_incremental(flavour, &builder.disk(disk));
    }
}

#[test]
fn disks_under_filters() {
    for flavour in Flavour::all() {
        let disk = |volume| DiskSpec::new(volume, 4 * MIB + 512);
        let builder = machine(flavour)
            .disk(disk("throttled").throttled(1 << 30).bus(Bus::ScsiHd { iothread: true }))
            .disk(disk("throttled-qcow2").throttled(1 << 30).format(Format::Qcow2))
            .disk(disk("cor").copy_on_read().bus(Bus::VirtioBlk { iothread: true }))
            .disk(disk("both").copy_on_read().throttled(1 << 30).format(Format::Qcow2));
        full_and_incremental(flavour, &builder);
    }
}

/// qcow2 images of other kinds: version 2, which stores no bitmaps; with a raw file for its data; over a template.
#[test]
fn images_of_other_kinds() {
    for flavour in Flavour::all() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let create = |arguments: &[&str], name: &str, size: &str| {
            let mut create = Command::new(tool("QEMU_IMG"));
            create.args(["create", "-q", "-f", "qcow2"]).args(arguments).arg(at(name)).arg(size);
            assert!(create.status().expect("qemu-img").success(), "qemu-img create {arguments:?}");
        };
        std::fs::write(at("template.img"), vec![0x77; 3 << 20]).expect("a template");
        let data_file = format!("data_file={},data_file_raw=on", at("data.raw").display());
        let template = at("template.img").display().to_string();
        let disk = |volume: &str| DiskSpec::new(volume, 0).format(Format::Qcow2).in_directory(directory.path());
        create(&["-o", "compat=0.10"], "old.qcow2", "4194816");
        create(&["-o", &data_file], "split.qcow2", "4194304");
        create(&["-b", &template, "-F", "raw"], "cloned.qcow2", "4194304");
        let builder = machine(flavour).disk(disk("old")).disk(disk("split")).disk(disk("cloned"));
        full_and_incremental(flavour, &builder);
    }
}

/// KubeVirt names every image `disk.img`; node names have 31 bytes at most, aliases have no limit.
#[test]
fn names_of_any_length_and_files_of_one_name() {
    let directories = [(); 3].map(|()| tempfile::tempdir().expect("a directory"));
    let long = format!("a-volume-of-{}", "long-name-".repeat(8));
    for flavour in [Flavour::Qemu10, Flavour::Next] {
        let disk = |volume: &str, at: usize| {
            DiskSpec::new(volume, 2 * MIB).in_directory(directories[at].path()).file_named("disk.img")
        };
        let builder = machine(flavour)
            .disk(disk("one", 0))
            .disk(disk("two", 1).bus(Bus::ScsiHd { iothread: true }))
            .disk(disk(&long, 2).node_named("a-node-name-of-just-31-bytes-ab").qdev(Some(&format!("ua-{long}"))));
        full_and_incremental(flavour, &builder);
    }
}

/// `-drive` names no node: QEMU makes `#block123` up, which it takes nowhere where a new name is given.
#[test]
fn nodes_without_names_of_their_own() {
    for flavour in Flavour::all() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("old.raw");
        std::fs::File::create(&file).and_then(|file| file.set_len(2 * MIB)).expect("a file");
        let drive = format!("if=none,id=old,format=raw,file={}", file.display());
        let flash = |unit: u8, options: &str| {
            let path = directory.path().join(format!("flash{unit}"));
            std::fs::File::create(&path).and_then(|file| file.set_len(540_672)).expect("a file");
            format!("if=pflash,unit={unit},format=raw,file={}{options}", path.display())
        };
        let (code, variables) = (flash(0, ",readonly=on"), flash(1, ""));
        for engine in engines(flavour) {
            let builder = machine(flavour).arguments(&["-drive", &drive, "-device", "virtio-blk-pci,drive=old,id=old"]);
            let scene = scene(builder.arguments(&["-drive", &code, "-drive", &variables]));
            let mut control = scene.vm.control();
            for (byte, kind) in [(1_u8, "FirstBackup"), (2, INCREMENTAL)] {
                for device in ["/machine/peripheral/old/virtio-backend", "/machine/system.flash1"] {
                    let printed = control.human(&format!("qemu-io -d {device} \"write -P {byte} {byte}00k 70k\""));
                    assert!(printed.trim().is_empty(), "{printed}");
                }
                let report: Value = scene.backup().arg("--engine").arg(engine).json();
                let mut found = kinds(&report);
                found.sort();
                assert_eq!(found, ["old", "pflash1"].map(|volume| (volume.to_owned(), kind.to_owned())), "{flavour:?}");
                assert_eq!(skipped(&report, "pflash0"), "read-only");
                let to = tempfile::tempdir().expect("a directory");
                let restore = Cli::new(["restore", "--qcow2-dir"]).arg(scene.target.path());
                restore.arg("--output").arg(to.path()).run().success();
                for (volume, file) in [("old", "old.raw"), ("pflash1", "flash1")] {
                    let restored = std::fs::read(to.path().join(format!("{volume}.raw"))).expect("a disk");
                    let disk = std::fs::read(directory.path().join(file)).expect("the disk");
                    assert_eq!(disk[usize::from(byte) * 102_400], byte, "{volume} was not written");
                    assert!(restored == disk, "{flavour:?} {engine}: {volume} differs");
                }
            }
        }
    }
}

#[test]
fn two_disks_of_one_name_are_refused_by_both_devices() {
    let disk = |volume: &str, id: &str| DiskSpec::new(volume, MIB).qdev(Some(id));
    let scene = scene(machine(Flavour::Next).disk(disk("a", "ua-disk")).disk(disk("b", "disk")));
    let refused = scene.backup().run().failure();
    assert_eq!(reason(&refused), "VolumeNameClash");
    for device in ["/machine/peripheral/ua-disk/", "/machine/peripheral/disk/"] {
        assert!(refused.stderr.contains(device), "{}", refused.stderr);
    }
    assert_eq!(complete_backups(scene.target.path()), 0);
    scene.assert_clean(None);
}

/// The firmware's variables are a volume; everything that cannot change, or cannot be told apart, is named and left out.
#[test]
fn firmware_variables_are_a_volume_and_what_is_no_disk_is_skipped() {
    let directory = tempfile::tempdir().expect("a directory");
    let medium = directory.path().join("cd.iso");
    std::fs::File::create(&medium).and_then(|file| file.set_len(MIB)).expect("a file");
    let medium = json!({"driver": "file", "filename": medium, "node-name": "medium", "read-only": true}).to_string();
    for (flavour, engine) in [(Flavour::Qemu10, "filter"), (Flavour::Qemu10, "job"), (Flavour::Allowlist, "job")] {
        let scene = scene(
            machine(flavour)
                // The sizes that OVMF's code and variables have.
                .disk(DiskSpec::new("pflash0", 3_653_632).bus(Bus::Pflash { unit: 0 }).read_only())
                .disk(DiskSpec::new("pflash1", 540_672).bus(Bus::Pflash { unit: 1 }))
                .disk(DiskSpec::new("root", MIB))
                .disk(DiskSpec::new("fixed", MIB).read_only())
                .disk(DiskSpec::new("anonymous", MIB).qdev(None))
                .arguments(&["-blockdev", &medium])
                .arguments(&["-device", "ide-cd,bus=ide.0,id=cd,drive=medium"])
                .arguments(&["-device", "ide-cd,bus=ide.1,id=empty"]),
        );
        let mut control = scene.vm.control();
        for (byte, kind) in [(7, "FirstBackup"), (8, INCREMENTAL)] {
            write_all(&scene, &mut control, byte, 40 * u64::from(byte));
            let report: Value = scene.backup().arg("--engine").arg(engine).json();
            let mut found = kinds(&report);
            found.sort();
            let kind = kind.to_owned();
            assert_eq!(found, [("pflash1".to_owned(), kind.clone()), ("root".to_owned(), kind)], "{flavour:?}");
            assert_is_now(&scene, &mut control, &report);
            for (name, reason) in [
                ("pflash0", "read-only"),
                ("fixed", "read-only"),
                ("cd", "removable medium (CD-ROM or floppy)"),
                ("empty", "no medium"),
            ] {
                assert_eq!(skipped(&report, name), reason, "{flavour:?}: {report}");
            }
            let anonymous = report["skipped"].as_array().into_iter().flatten().any(|device| {
                device["name"].as_str().is_some_and(|name| name.contains("peripheral-anon"))
                    && device["reason"].as_str().is_some_and(|reason| reason.contains("no id"))
            });
            assert!(anonymous, "{flavour:?}: {report}");
        }
        drop(control);
        assert_clean_but_ours(&scene);
    }
}

/// Nothing is left but one bitmap of the chain per volume.
fn assert_clean_but_ours(scene: &Scene) {
    let manifest: Value = Cli::new(["list", "-o", "json", "--qcow2-dir"]).arg(scene.target.path()).json();
    let last = manifest.as_array().and_then(|backups| backups.last()).expect("a backup");
    scene.assert_clean(Some(&bitmap(last)));
}
