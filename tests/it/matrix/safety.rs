//! The guest comes before the backup: fleeces that fill up where that hits the guest, a journal that cannot be written,
//! signals between freeze and thaw.

use super::{INCREMENTAL, assert_is_now, assert_kinds, complete_backups, machine, scene, wait_for_exports, write_all};
use crate::{
    bed::{
        agent::FakeAgent,
        cli::Cli,
        control::Control,
        disk::{Bus, DiskSpec, Format},
        faults::TmpfsTarget,
        flavour::Flavour,
    },
    scene::{Scene, bitmap, reason},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

const MIB: u64 = 1 << 20;
/// Options of the guarded path: fleece jobs without `on-cbw-error`, for which a full fleece is a guest's write error.
const GUARDED: Flavour = Flavour::Qemu10;

/// Two disks, together larger than the space that their fleece gets, and filled with old data. `filters`: QEMU has the
/// filter drivers, so that the snapshot is read through one and not in the fleece itself.
fn filled_disks(filters: bool) -> (Scene, Control) {
    let disk = |volume| DiskSpec::new(volume, 48 * MIB).bus(Bus::VirtioBlk { iothread: true });
    let scene = scene(machine(GUARDED).disk(disk("root")).disk(disk("data").format(Format::Qcow2)));
    let scene = if filters { scene } else { scene.without_filters() };
    let mut control = scene.vm.control();
    for volume in ["root", "data"] {
        scene.vm.io(&mut control, volume, "write -P 1 0 48M");
    }
    (scene, control)
}

fn guarded_backup(scene: &Scene, fleece: &Path) -> Cli {
    let backup = scene.command_in("backup", &fleece.join("fleece")).arg("--vm").arg("web").arg("-o").arg("json");
    let backup = backup.arg("--qcow2-dir").arg(scene.target.path()).arg("--engine").arg("job");
    backup.arg("--bandwidth-limit").arg("1MiB/s")
}

/// Takes all space of a file system but so many bytes, until it is removed.
fn fill_but(directory: &Path, left: u64) -> PathBuf {
    let path = directory.join("filler");
    let stat = rustix::fs::statvfs(directory).expect("a file system");
    let free = stat.f_bavail * stat.f_frsize;
    let file = File::create(&path).expect("a file");
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, free - left).expect("space");
    path
}

/// Overwrites at some 20 MiB/s, as a guest might, while a backup that reads 1 MiB/s runs; every write succeeds.
fn overwrite_until_it_gives_up(scene: &Scene, control: &mut Control, running: crate::bed::cli::Running) -> String {
    let mut running = running;
    for at in 0..48 {
        scene.vm.io(control, "root", &format!("write -P 2 {at}M 1M"));
        if running.ends_within(Duration::from_millis(50)).is_some() {
            break;
        }
    }
    let failed = running.finish().failure();
    assert_eq!(control.status(), "running", "the guest met an error: {}", failed.stderr);
    assert_eq!(complete_backups(scene.target.path()), 0);
    reason(&failed)
}

/// Nothing is left, and a backup that has space is whole.
fn works_afterwards(scene: &Scene, mut control: Control) {
    let report: Value = scene.backup().arg("--engine").arg("job").json();
    assert_is_now(scene, &mut control, &report);
    drop(control);
    scene.assert_clean(Some(&bitmap(&report)));
}

#[test]
fn an_unguarded_fleece_is_given_up_well_before_its_limit() {
    for filters in [true, false] {
        let (scene, mut control) = filled_disks(filters);
        let fleece = TmpfsTarget::new(512 * MIB);
        let running = guarded_backup(&scene, fleece.path()).arg("--fleece-limit").arg("40M").spawn();
        wait_for_exports(&mut control, 2);
        assert_eq!(overwrite_until_it_gives_up(&scene, &mut control, running), "FleeceFull");
        works_afterwards(&scene, control);
    }
}

/// Space that was free when the backup began is taken by somebody else.
#[test]
fn an_unguarded_fleece_is_given_up_when_others_take_its_space() {
    for filters in [true, false] {
        let (scene, mut control) = filled_disks(filters);
        let fleece = TmpfsTarget::new(340 * MIB);
        let running = guarded_backup(&scene, fleece.path()).spawn();
        wait_for_exports(&mut control, 2);
        fill_but(fleece.path(), 30 * MIB);
        assert_eq!(overwrite_until_it_gives_up(&scene, &mut control, running), "FleeceFull");
        works_afterwards(&scene, control);
    }
}

/// A VM with an agent in the test's hands, and a small fleece's file system.
struct Frozen {
    scene: Scene,
    agent: FakeAgent,
    fleece: TmpfsTarget,
}

impl Frozen {
    fn new() -> Self {
        let scene = scene(
            machine(Flavour::Next)
                .disk(DiskSpec::new("root", 2 * MIB).bus(Bus::VirtioBlk { iothread: true }))
                .disk(DiskSpec::new("data", 2 * MIB).format(Format::Qcow2)),
        );
        Self { scene, agent: FakeAgent::start(), fleece: TmpfsTarget::new(512 * MIB) }
    }

    fn backup(&self, engine: &str) -> Cli {
        let backup = self.scene.command_in("backup", &self.fleece.path().join("fleece")).arg("--vm").arg("web");
        backup.arg("-o").arg("json").arg("--qcow2-dir").arg(self.scene.target.path()).arg("--engine").arg(engine)
    }

    fn freezing_backup(&self, engine: &str) -> Cli {
        self.backup(engine).arg("--quiesce").arg("require").arg("--guest-agent").arg(self.agent.socket())
    }

    /// The guest runs and is thawed, nothing is in QEMU or in the fleece's directory, and the next backup is right.
    fn assert_released(&self, control: &mut Control, engine: &str, kind: &str) {
        assert!(self.agent.is_thawed(), "the guest is frozen");
        let left = fs::read_dir(self.fleece.path().join("fleece")).expect("the directory").flatten();
        let left: Vec<_> =
            left.map(|entry| entry.file_name()).filter(|name| !name.as_encoded_bytes().ends_with(b".lock")).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        let report: Value = self.backup(engine).arg("--quiesce").arg("never").json();
        assert!(report.get("recovered").is_none(), "something was left: {report}");
        assert_kinds(&report, &[("root", kind), ("data", kind)]);
        assert_is_now(&self.scene, control, &report);
        self.scene.vm.assert_clean(control, &[&bitmap(&report)]);
    }
}

#[test]
fn a_signal_between_freeze_and_thaw_waits_for_the_thaw() {
    let test = Frozen::new();
    let mut control = test.scene.vm.control();
    write_all(&test.scene, &mut control, 1, 0);
    test.backup("job").run().success();
    for (engine, signal, code) in [("job", Signal::TERM, 143), ("filter", Signal::INT, 130)] {
        write_all(&test.scene, &mut control, u8::try_from(code).expect("a byte"), 300);
        let running = test.freezing_backup(engine).spawn();
        test.agent.wait_freeze();
        let pid = Pid::from_raw(i32::try_from(running.pid()).expect("a pid")).expect("a pid");
        kill_process(pid, signal).expect("a signal");
        test.agent.answer();
        let ended = running.finish();
        assert_eq!(ended.status.code(), Some(code), "{engine}: {}", ended.stderr);
        test.assert_released(&mut control, engine, INCREMENTAL);
    }
}

/// The journal's file system is full from a moment between freeze and thaw on: at the cut, at the stop of the CPUs, while
/// they are stopped, or behind it.
#[test]
fn a_journal_that_cannot_be_written_releases_the_guest() {
    let test = Frozen::new();
    let mut control = test.scene.vm.control();
    write_all(&test.scene, &mut control, 1, 0);
    test.backup("job").run().success();
    // Bytes that the entries behind the freeze take: `"cut"`, `"stop"`, one `switch_drive` for each disk.
    for (engine, room) in [("job", 0), ("job", 6), ("filter", 0), ("filter", 6), ("filter", 13), ("filter", 140)] {
        write_all(&test.scene, &mut control, 7, 300);
        let running = test.freezing_backup(engine).spawn();
        test.agent.wait_freeze();
        let directory = test.fleece.path().join("fleece");
        let mut journals = fs::read_dir(&directory).expect("the directory").flatten().map(|entry| entry.path());
        let journal = journals.find(|path| path.extension().is_some_and(|kind| kind == "journal")).expect("a journal");
        // Blanks between two entries mean nothing; the file system gives space by the page.
        let length = fs::metadata(&journal).expect("the journal").len();
        let blanks = (length + room).next_multiple_of(4096) - length - room;
        let mut file = File::options().append(true).open(&journal).expect("the journal");
        file.write_all(&vec![b' '; usize::try_from(blanks).expect("a size")]).expect("blanks");
        let filler = fill_but(test.fleece.path(), 0);
        test.agent.answer();
        let failed = running.finish().failure();
        assert_eq!(failed.status.code(), Some(4), "{engine} {room}: {}", failed.stderr);
        assert!(failed.stderr.contains("journal"), "{engine} {room}: {}", failed.stderr);
        assert_eq!(control.status(), "running", "{engine} {room}");
        fs::remove_file(filler).expect("the filler");
        test.assert_released(&mut control, engine, INCREMENTAL);
    }
}

#[test]
fn a_journal_that_cannot_even_be_begun_ends_the_backup_before_the_guest_notices() {
    let test = Frozen::new();
    let mut control = test.scene.vm.control();
    write_all(&test.scene, &mut control, 1, 0);
    // The lock is there; a directory in the journal's place is what cannot be written by root either.
    test.backup("job").run().success();
    let directory = test.fleece.path().join("fleece");
    let lock = fs::read_dir(&directory).expect("the directory").flatten().map(|entry| entry.path()).next();
    let journal = lock.expect("a lock").with_extension("journal");
    fs::create_dir(&journal).expect("a directory");
    let failed = test.freezing_backup("job").run().failure();
    assert_eq!(failed.status.code(), Some(4), "{}", failed.stderr);
    assert!(failed.stderr.contains("journal"), "{}", failed.stderr);
    fs::remove_dir(&journal).expect("the directory");
    let report: Value = test.backup("job").json();
    assert_kinds(&report, &[("root", INCREMENTAL), ("data", INCREMENTAL)]);
    test.scene.vm.assert_clean(&mut control, &[&bitmap(&report)]);
}
