//! The faults must arrive as they are ordered, and nothing else.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::sync::mpsc::channel;

use super::super::process;
use super::*;

/// Long enough on a busy machine.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn passes_everything_through() {
    let target = FuseTarget::new();
    let at = |name: &str| target.path().join(name);
    fs::create_dir_all(at("chunks/ab")).unwrap();
    fs::write(at("chunks/ab/one"), b"one").unwrap();
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(at("big")).unwrap();
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    file.write_all_at(&data, 10).unwrap();
    file.sync_all().unwrap();
    file.set_len(3_000_000).unwrap();
    file.lock().unwrap();
    let other = fs::File::open(at("big")).unwrap();
    assert!(other.try_lock().is_err(), "flock works among the openers");
    assert_eq!(fs::metadata(at("big")).unwrap().len(), 3_000_000);
    assert!(fs::read(at("big")).unwrap()[10..] == data[..data.len() - 10]);
    assert_eq!(fs::read(target.backing().join("chunks/ab/one")).unwrap(), b"one");

    fs::rename(at("chunks/ab/one"), at("chunks/two")).unwrap();
    assert!(!at("chunks/ab/one").exists());
    fs::write(at("three"), b"three").unwrap();
    let refused = rustix::fs::renameat_with(
        rustix::fs::CWD,
        at("three"),
        rustix::fs::CWD,
        at("chunks/two"),
        rustix::fs::RenameFlags::NOREPLACE,
    );
    assert_eq!(refused, Err(Errno::EXIST));
    fs::remove_dir(at("chunks/ab")).unwrap();
    fs::remove_file(at("three")).unwrap();
    let mut names: Vec<_> = fs::read_dir(target.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["big", "chunks"]);
    assert!(rustix::fs::statvfs(target.path()).unwrap().f_bavail > 0);
    fs::File::open(target.path()).unwrap().sync_all().unwrap();
    assert_eq!(target.faults().syncs(), 2);
    assert_eq!(fs::metadata(at("missing")).unwrap_err().kind(), io::ErrorKind::NotFound);

    for n in 0..500 {
        fs::write(at("chunks").join(n.to_string()), b"x").unwrap();
    }
    assert_eq!(fs::read_dir(at("chunks")).unwrap().count(), 501);
}

#[test]
fn errors_arrive_as_they_are_ordered() {
    let target = FuseTarget::new();
    target.faults().fail_writes_after(100_000, Errno::NOSPC);
    let mut file = fs::File::create(target.path().join("data")).unwrap();
    file.write_all(&vec![1; 90_000]).unwrap();
    let error = file.write_all(&vec![1; 90_000]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    target.faults().heal();
    target.faults().fail_writes_to(".manifest", Errno::IO);
    target.faults().fail_syncs(Errno::DQUOT);
    file.write_all(&[1; 10]).unwrap();
    assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(Errno::DQUOT.raw_os_error()));
    let error = fs::write(target.path().join("a.manifest"), b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()));
}

#[test]
fn a_slow_target_is_slow() {
    let target = FuseTarget::new();
    target.faults().limit_bandwidth(4 << 20);
    let begun = Instant::now();
    fs::write(target.path().join("data"), vec![0; 2 << 20]).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(450), "{:?}", begun.elapsed());
}

#[test]
fn a_stalled_write_waits_for_the_release() {
    let target = FuseTarget::new();
    target.faults().stall();
    let path = target.path().join("data");
    let (done, finished) = channel();
    std::thread::spawn(move || done.send(fs::write(path, b"late")).unwrap());
    assert!(target.faults().wait_stalled(1, SOON));
    assert!(finished.try_recv().is_err());
    // What is no write goes on.
    assert_eq!(fs::metadata(target.path().join("data")).unwrap().len(), 0);
    target.faults().release();
    finished.recv_timeout(SOON).unwrap().unwrap();
    assert_eq!(fs::read(target.backing().join("data")).unwrap(), b"late");
}

#[test]
fn a_stalled_writer_can_be_killed() {
    let target = FuseTarget::new();
    target.faults().stall();
    let mut writer = Command::new("dd");
    writer.args(["if=/dev/zero", "bs=64k", "count=16"]).arg(format!("of={}/data", target.path().display()));
    let mut writer = writer.stderr(Stdio::null()).spawn().unwrap();
    assert!(target.faults().wait_stalled(1, SOON));
    writer.kill().unwrap();
    let status = process::wait(&mut writer, SOON).expect("SIGKILL ends it");
    assert_eq!(status.signal(), Some(9));
}

#[test]
fn a_full_tmpfs_says_so() {
    let target = TmpfsTarget::new(1 << 20);
    let path = target.path().to_owned();
    let error = fs::write(path.join("data"), vec![0; 2 << 20]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    drop(target);
    assert!(!path.exists());
}
