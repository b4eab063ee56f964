//! A real libvirt session daemon, as `KubeVirt`'s launcher runs it: an ordinary user, its own `XDG_*` directories, no
//! namespaces, no security driver. Reusable by every test that wants a machine behind libvirt.
#![allow(clippy::unwrap_used, reason = "tests")]

use crate::bed::flavour::tool;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::{
    env,
    fmt::Write as _,
    fs::{self, File, Permissions},
    os::unix::{
        fs::{PermissionsExt, chown},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// `nobody`: any user without privileges does.
const USER: u32 = 65534;

/// Starts the daemon as the user. `$1` is a directory that the user may not enter and that hides the bed (root's home
/// as a rule), or empty; `$2` is the bed. In a mount namespace of its own, the daemon sees the bed there and nothing
/// else. Everything is `exec`, so the daemon has the pid that was spawned.
const START_AS_USER: &str = r#"
hidden=$1 bed=$2; shift 2
if [ -n "$hidden" ]; then
    cd "$bed" && mount -t tmpfs -o mode=755 tmpfs "$hidden" && mkdir -p "$bed" && mount -c --bind . "$bed" || exit
    cd /
fi
exec setpriv --reuid=65534 --regid=65534 --clear-groups -- "$@"
"#;

/// The bed's directory, which the daemon must be able to see.
fn bed_dir() -> PathBuf {
    let home = || PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/virt-fleece-bed");
    env::var_os("VIRT_FLEECE_BED").map_or_else(home, PathBuf::from)
}

/// Which bus a disk hangs on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    /// virtio-blk with an iothread of its own.
    Virtio,
    /// A disk on the one virtio-scsi controller, which has an iothread.
    Scsi,
}

/// A disk; its alias is `ua-<volume>`, as `KubeVirt`'s are.
pub(crate) struct Disk {
    pub(crate) volume: String,
    pub(crate) file: PathBuf,
    /// `raw` or `qcow2`.
    pub(crate) format: &'static str,
    pub(crate) bus: Bus,
    /// What the guest's writer calls it.
    pub(crate) serial: String,
}

/// A kernel to boot.
pub(crate) struct Boot {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) cmdline: String,
}

impl Boot {
    /// The bed's guest.
    pub(crate) fn guest() -> Self {
        let cmdline = "console=ttyS0 quiet".into();
        Self { kernel: tool("GUEST_KERNEL"), initrd: tool("GUEST_INITRD"), cmdline }
    }
}

/// The daemon with its machines. All of them are killed, each by its pid, when this is dropped.
pub(crate) struct LibvirtDaemon {
    dir: TempDir,
    process: Child,
}

impl LibvirtDaemon {
    /// Starts a daemon and waits until it accepts connections.
    pub(crate) fn start() -> Self {
        Self::start_with(None)
    }

    /// The same, with its sockets in a directory elsewhere, as a launcher pod has them in a volume. There the socket has
    /// the name of `KubeVirt`'s daemon besides.
    pub(crate) fn start_in(runtime: &Path) -> Self {
        let daemon = Self::start_with(Some(runtime));
        fs::hard_link(daemon.socket(), runtime.join("virtqemud-sock")).unwrap();
        daemon
    }

    fn start_with(runtime: Option<&Path>) -> Self {
        // Short: the monitor's socket lies deep below, and a socket's path has at most 107 bytes.
        let dir = tempfile::Builder::new().prefix("vf").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        own(dir.path());
        for name in ["run", "config", "config/libvirt", "cache", "home"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            own(&dir.path().join(name));
        }
        if let Some(runtime) = runtime {
            fs::create_dir_all(runtime).unwrap();
            own(runtime);
            std::os::unix::fs::symlink(runtime, dir.path().join("run/libvirt")).unwrap();
        }
        // The guest's console goes straight to its file: no virtlogd to look after.
        let settings = "namespaces = []\nsecurity_driver = \"none\"\nstdio_handler = \"file\"\n";
        fs::write(dir.path().join("config/libvirt/qemu.conf"), settings).unwrap();
        let process = spawn(dir.path());
        let mut daemon = Self { dir, process };
        daemon.wait();
        daemon
    }

    /// The daemon's directory: everything in it that [`Self::own`] was called on, the machines may open.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The RPC socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir().join("run/libvirt/libvirt-sock")
    }

    /// What libvirtd printed.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir().join("libvirtd.log")).unwrap_or_default()
    }

    /// What a machine's guest printed on its console.
    pub(crate) fn console(&self, machine: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.dir().join(format!("{machine}.console"))).unwrap_or_default()).into()
    }

    /// The host's end of a machine's virtio-serial port.
    pub(crate) fn channel(&self, machine: &str, port: &str) -> PathBuf {
        self.dir().join(format!("{machine}-{port}"))
    }

    /// An empty raw file that the machines may open.
    pub(crate) fn raw_file(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.dir().join(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        own(&path);
        path
    }

    /// Lets the machines open a file.
    #[allow(clippy::unused_self, dead_code, reason = "of the daemon's machines; for tests with files of their own")]
    pub(crate) fn own(&self, path: &Path) {
        own(path);
    }

    /// A machine's XML. With `ports`, it has virtio-serial ports of these names, as Unix sockets at
    /// [`Self::channel`]; libvirt itself takes the one named `org.qemu.guest_agent.0`.
    pub(crate) fn domain_xml(
        &self,
        name: &str,
        emulator: &Path,
        disks: &[Disk],
        boot: Option<&Boot>,
        ports: &[&str],
    ) -> String {
        let mut devices = String::new();
        let mut iothreads = 0;
        let count = |bus| disks.iter().filter(|disk| disk.bus == bus).count();
        if count(Bus::Scsi) > 0 {
            iothreads += 1;
            devices += "<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='1'/></controller>";
        }
        for (index, disk) in disks.iter().enumerate() {
            let letter = char::from(b'a' + u8::try_from(index).unwrap());
            let (bus, prefix, iothread) = match disk.bus {
                Bus::Virtio => {
                    iothreads += 1;
                    ("virtio", "vd", format!("iothread='{iothreads}'"))
                }
                Bus::Scsi => ("scsi", "sd", String::new()),
            };
            let Disk { volume, file, format, serial, .. } = disk;
            let file = file.display();
            write!(
                devices,
                "<disk type='file' device='disk'><driver name='qemu' type='{format}' discard='unmap' {iothread}/>\
                 <source file='{file}'/><target dev='{prefix}{letter}' bus='{bus}'/><serial>{serial}</serial>\
                 <alias name='ua-{volume}'/></disk>"
            )
            .unwrap();
        }
        for port in ports {
            let path = self.channel(name, port);
            write!(
                devices,
                "<channel type='unix'><source mode='bind' path='{}'/><target type='virtio' name='{port}'/></channel>",
                path.display()
            )
            .unwrap();
        }
        let boot = boot.map_or_else(String::new, |Boot { kernel, initrd, cmdline }| {
            let (kernel, initrd) = (kernel.display(), initrd.display());
            format!("<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline>")
        });
        let console = self.dir().join(format!("{name}.console"));
        // Type qemu is TCG. No CPU model: QEMU's default one runs everywhere, libvirt computes none.
        format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>\
             <iothreads>{iothreads}</iothreads>\
             <os><type arch='x86_64' machine='q35'>hvm</type>{boot}</os><features><acpi/></features>\
             <devices><emulator>{}</emulator><controller type='usb' model='none'/><memballoon model='none'/>\
             <serial type='file'><source path='{}'/></serial>{devices}</devices></domain>",
            emulator.display(),
            console.display()
        )
    }

    /// Defines a machine and starts it.
    pub(crate) fn define_and_start(&self, xml: &str) {
        let (_, rest) = xml.split_once("<name>").unwrap();
        let (name, _) = rest.split_once("</name>").unwrap();
        self.define(xml);
        self.virsh(&["start", name]);
    }

    /// Defines a machine.
    pub(crate) fn define(&self, xml: &str) {
        let path = self.dir().join("define.xml");
        fs::write(&path, xml).unwrap();
        self.virsh(&["define", path.to_str().unwrap()]);
    }

    /// Runs virsh on this daemon and returns what it prints.
    pub(crate) fn virsh(&self, arguments: &[&str]) -> String {
        let uri = format!("qemu+unix:///session?socket={}", self.socket().display());
        let output = Command::new("virsh").args(["-q", "-c", &uri]).args(arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "virsh {arguments:?}: {error}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// A machine's QEMU process.
    pub(crate) fn qemu_pid(&self, machine: &str) -> Option<Pid> {
        read_pid(&self.dir().join(format!("run/libvirt/qemu/run/{machine}.pid")))
    }

    /// The daemon's process.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Kills the daemon, not its machines.
    pub(crate) fn kill(&mut self) {
        // It may be dead already.
        let _ = self.process.kill();
        self.process.wait().unwrap();
    }

    /// Starts a killed daemon again. It takes its running machines over.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.process = spawn(self.dir.path());
        self.wait();
    }

    fn wait(&mut self) {
        let end = Instant::now() + Duration::from_secs(60);
        while UnixStream::connect(self.socket()).is_err() {
            let exited = self.process.try_wait().unwrap();
            assert!(exited.is_none() && Instant::now() < end, "libvirtd does not come up ({exited:?}): {}", self.log());
            sleep(Duration::from_millis(20));
        }
    }

    /// Everything that QEMU processes left their pid in: machines, and the ones that libvirt asks for capabilities.
    fn qemu_pids(&self) -> Vec<Pid> {
        let list = |path: &str| fs::read_dir(self.dir().join(path)).into_iter().flatten().flatten();
        let machines = list("run/libvirt/qemu/run").map(|entry| entry.path());
        let probes = list("config/libvirt/qemu/lib").map(|entry| entry.path().join("qmp.pid"));
        let files = machines.chain(probes).filter(|path| path.extension().is_some_and(|ext| ext == "pid"));
        files.filter_map(|path| read_pid(&path)).filter(|pid| self.is_ours(*pid)).collect()
    }

    /// Whether the process still is the one of the pid file: our directory is in its command line.
    fn is_ours(&self, pid: Pid) -> bool {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains(self.dir().to_str().unwrap())
    }
}

impl Drop for LibvirtDaemon {
    fn drop(&mut self) {
        // A stopped process dies of SIGKILL as well.
        let _ = self.process.kill();
        let _ = self.process.wait();
        for pid in self.qemu_pids() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn spawn(dir: &Path) -> Child {
    let libvirtd = tool("LIBVIRTD");
    let mut command = if geteuid().is_root() {
        let bed = bed_dir();
        let hidden = bed.ancestors().filter(|dir| !may_enter(dir)).last().filter(|_| bed.exists());
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "--", "sh", "-c", START_AS_USER, "sh"]);
        command.arg(hidden.unwrap_or(Path::new(""))).arg(&bed).arg(libvirtd);
        command
    } else {
        Command::new(libvirtd)
    };
    command
        .env("HOME", dir.join("home"))
        .env("XDG_RUNTIME_DIR", dir.join("run"))
        .env("XDG_CONFIG_HOME", dir.join("config"))
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(dir.join("libvirtd.log")).unwrap())
        .spawn()
        .unwrap()
}

fn may_enter(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|found| found.permissions().mode() & 1 == 1)
}

fn own(path: &Path) {
    if geteuid().is_root() {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
}

fn read_pid(path: &Path) -> Option<Pid> {
    Pid::from_raw(fs::read_to_string(path).ok()?.trim().parse().ok()?)
}
