//! The agent's privileges: what it does works with them, and fails without any one of them.

use std::process::Command;

/// A pod's directory of another user with a socket in it, a fleece directory, and the mounts of the agent's pod.
/// Arguments: the capabilities that are left, what is done with them, and how later mounts come through.
const SCENE: &str = r#"
set -euo pipefail
work=$1 capabilities=$2 action=$3 propagation=$4
mkdir -p "$work"/host
mount --bind "$work"/host "$work"/host
mount --make-shared "$work"/host
mkdir -p "$work"/host/pods/uid "$work"/agent/pods "$work"/fleece
chmod 750 "$work"/host/pods "$work"/host/pods/uid
mount --bind "$work"/host/pods "$work"/agent/pods
mount --make-"$propagation" "$work"/agent/pods
mount -o remount,bind,ro "$work"/agent/pods
# Made after the agent's mount: a mover's directory in memory, of its user, whom alone it lets in.
mkdir "$work"/host/pods/uid/mover
mount -t tmpfs -o uid=107,gid=107,mode=700 none "$work"/host/pods/uid/mover
cd "$work"/host/pods/uid/mover
setpriv --reuid=107 --regid=107 --clear-groups /usr/bin/python3 - <<'PYTHON' &
import os, socket
server = socket.socket(socket.AF_UNIX)
server.bind("s")
os.chmod("s", 0o700)
server.listen()
peer, _ = server.accept()
peer.sendall(b"hello")
PYTHON
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
cd /
for _ in {1..100}; do [ -S "$work"/host/pods/uid/mover/s ] && break; sleep 0.1; done
setpriv --bounding-set="$capabilities" --inh-caps="$capabilities" --no-new-privs -- /usr/bin/python3 - "$work" "$action" <<'PYTHON'
import os, socket, struct, sys
work, action = sys.argv[1:]
if action == "connect":
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(work + "/agent/pods/uid/mover/s")
    pid, uid, gid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    print(peer.recv(5).decode(), "pid" if pid else "no pid", uid)
elif action == "fleece":
    fd = os.open(work + "/fleece/f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.fchown(fd, 107, 107)
    os.posix_fallocate(fd, 0, 65536)
    again = os.open(work + "/fleece/f", os.O_RDONLY)
    os.unlink(work + "/fleece/f")
    print("fleece of", os.fstat(again).st_uid)
elif action == "write":
    open(work + "/agent/pods/uid/planted", "w")
PYTHON
"#;

/// The capabilities of the agent's container in the chart.
const CAPABILITIES: &str = "-all,+dac_override,+chown";

/// Runs an action in mounts of its own.
fn attempt(script: &str, capabilities: &str, action: &str, propagation: &str) -> Result<String, String> {
    let directory = tempfile::tempdir().expect("a directory");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "bash", "-c", script, "scene"]);
    command.arg(directory.path()).args([capabilities, action, propagation]);
    let output = command.output().expect("running unshare");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn two_capabilities_suffice_and_none_is_too_many() {
    let with = |capabilities: &str, action: &str| attempt(SCENE, capabilities, action, "slave");
    assert_eq!(with(CAPABILITIES, "connect").as_deref(), Ok("hello pid 107"));
    assert_eq!(with(CAPABILITIES, "fleece").as_deref(), Ok("fleece of 107"));
    let denied = |capabilities: &str, action: &str, why: &str| {
        let error = with(capabilities, action).expect_err(action);
        assert!(error.contains(why), "{capabilities} {action}: {error}");
    };
    denied("-all,+chown", "connect", "PermissionError");
    // Going through directories is not enough: connecting is a write.
    denied("-all,+chown,+dac_read_search", "connect", "PermissionError");
    denied("-all,+dac_override", "fleece", "PermissionError");
    denied(CAPABILITIES, "write", "Read-only file system");
}

#[test]
fn a_mount_that_comes_later_has_to_come_through() {
    let error = attempt(SCENE, CAPABILITIES, "connect", "private").expect_err("an empty directory");
    assert!(error.contains("FileNotFoundError"), "{error}");
}

#[test]
fn without_the_hosts_pids_nobody_knows_who_is_at_the_other_end() {
    // The agent's side alone is in another namespace.
    let scene = SCENE.replace("\nsetpriv --bounding-set", "\nunshare --pid --fork setpriv --bounding-set");
    assert_eq!(attempt(&scene, CAPABILITIES, "connect", "slave").as_deref(), Ok("hello no pid 107"));
}
