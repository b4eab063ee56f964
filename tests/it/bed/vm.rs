//! A VM: one QEMU process under TCG, started and killed by the test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;

use super::control::{Control, dial, leftovers};
use super::disk::{Bus, Disk, DiskSpec, scsi_controller};
use super::flavour::{Flavour, tool};
use super::process;
use super::writer::Writer;

/// More guests at once than this starve each other on small machines until they miss every time limit.
const GUESTS: usize = 2;
/// Guests running now, in this process: cargo runs one test binary at a time.
static RUNNING: Mutex<usize> = Mutex::new(0);
/// Signals that one ended.
static ENDED: Condvar = Condvar::new();

/// One of the places for guests. A test must not hold one while it starts a second guest.
#[derive(Debug)]
struct Place;

impl Place {
    /// Waits for a free place.
    fn take() -> Self {
        // A panic of another test leaves a number that is right nevertheless.
        let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut running =
            ENDED.wait_while(running, |running| *running >= GUESTS).unwrap_or_else(PoisonError::into_inner);
        *running += 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        ENDED.notify_one();
    }
}

/// What a VM shall be.
#[derive(Debug, Clone)]
pub(crate) struct VmBuilder {
    /// The QEMU to run.
    flavour: Flavour,
    /// Disks, in order.
    disks: Vec<DiskSpec>,
    /// Whether the guest runs; else only firmware that finds nothing to boot.
    guest: bool,
    /// Whether there is a port for the guest agent.
    agent: bool,
    /// Machine type.
    machine: String,
    /// More arguments.
    arguments: Vec<String>,
}

impl VmBuilder {
    /// Adds a disk.
    pub(crate) fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// Whether the guest runs (as it does unless told otherwise); without it, writes come from [`Vm::write`].
    pub(crate) fn guest(mut self, guest: bool) -> Self {
        self.guest = guest;
        self
    }

    /// Whether there is a port for the guest agent; there is none unless told otherwise.
    pub(crate) fn agent(mut self, agent: bool) -> Self {
        self.agent = agent;
        self
    }

    /// Machine type: `q35` unless changed.
    pub(crate) fn machine(mut self, machine: &str) -> Self {
        machine.clone_into(&mut self.machine);
        self
    }

    /// Adds arguments to QEMU's.
    pub(crate) fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// Starts QEMU. The guest boots while the test goes on; [`Vm::writer`] waits for it.
    pub(crate) fn start(self) -> Vm {
        let place = self.guest.then(Place::take);
        // Socket paths are limited to 108 bytes, so this must not follow a long TMPDIR.
        let directory = tempfile::Builder::new().prefix("vf-").tempdir_in("/tmp").expect("a directory");
        fs::create_dir(directory.path().join("fleece")).expect("a directory");
        let disks: Vec<_> = self.disks.iter().zip(1..).collect();
        let disks: Vec<_> = disks.into_iter().map(|(spec, n)| Disk::create(spec, n, directory.path())).collect();
        let log = File::create(directory.path().join("qemu.log")).expect("a log");
        let child = Command::new(self.flavour.binary())
            .args(self.command_line(directory.path(), &disks))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second descriptor"))
            .stderr(log)
            .spawn()
            .expect("starting QEMU");
        let mut vm = Vm { child, disks, directory, agent: self.agent, place };
        vm.wait_for_monitor();
        vm
    }

    /// QEMU's arguments.
    fn command_line(&self, directory: &Path, disks: &[Disk]) -> Vec<String> {
        let at = |name: &str| directory.join(name).display().to_string();
        let mut line = Vec::new();
        let mut add = |option: &str, value: String| line.extend([option.to_owned(), value]);
        add("-name", "vf-test".to_owned());
        let flash = disks.iter().filter_map(|disk| match disk.spec.bus {
            Bus::Pflash { unit } => Some(format!(",pflash{unit}={}", disk.top_node())),
            _ => None,
        });
        add("-machine", self.machine.clone() + &flash.collect::<String>());
        add("-accel", "tcg".to_owned());
        add("-m", "256".to_owned());
        add("-display", "none".to_owned());
        add("-serial", format!("file:{}", at("console.log")));
        for socket in ["qmp", "control", "quit"] {
            add("-qmp", format!("unix:{},server=on,wait=off", at(socket)));
        }
        for iothread in ["iothread1", "iothread2"] {
            add("-object", format!("iothread,id={iothread}"));
        }
        add("-device", "virtio-serial-pci,id=serial0".to_owned());
        let mut ports = vec![("writer", "virtfleece.writer")];
        if self.agent {
            ports.push(("agent", "org.qemu.guest_agent.0"));
        }
        for (id, name) in ports {
            add("-chardev", format!("socket,id={id},path={},server=on,wait=off", at(id)));
            add("-device", format!("virtserialport,bus=serial0.0,chardev={id},name={name}"));
        }
        for iothread in [false, true] {
            if self.disks.iter().any(|disk| disk.bus == Bus::ScsiHd { iothread }) {
                let mut controller = json!({"driver": "virtio-scsi-pci", "id": scsi_controller(iothread)});
                if iothread {
                    controller["iothread"] = json!("iothread2");
                }
                add("-device", controller.to_string());
            }
        }
        if self.guest {
            add("-kernel", tool("GUEST_KERNEL").display().to_string());
            add("-initrd", tool("GUEST_INITRD").display().to_string());
            add("-append", "console=ttyS0 quiet".to_owned());
        }
        line.extend(["-nodefaults".to_owned(), "-no-user-config".to_owned()]);
        line.extend(disks.iter().flat_map(Disk::arguments));
        line.extend(self.arguments.iter().cloned());
        line
    }
}

/// A running VM; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Vm {
    /// QEMU.
    child: Child,
    /// The disks.
    disks: Vec<Disk>,
    /// Sockets, logs, fleeces and the images that have no directory of their own.
    directory: TempDir,
    /// Whether there is an agent port.
    agent: bool,
    /// Held as long as QEMU may run; after `child` in drop order because `Drop` kills first.
    place: Option<Place>,
}

impl Vm {
    /// A VM with the guest and without disks, to be added to.
    pub(crate) fn builder(flavour: Flavour) -> VmBuilder {
        let machine = "q35".to_owned();
        VmBuilder { flavour, disks: Vec::new(), guest: true, agent: false, machine, arguments: Vec::new() }
    }

    /// The monitor that is the product's.
    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.directory.path().join("qmp")
    }

    /// A new connection to the monitor that is the test's; one at a time.
    pub(crate) fn control(&self) -> Control {
        Control::connect(&self.directory.path().join("control"))
    }

    /// Waits for the guest to boot and returns the connection to its writer; one at a time.
    pub(crate) fn writer(&self) -> Writer {
        Writer::connect(&self.directory.path().join("writer"))
    }

    /// The guest agent's socket.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        assert!(self.agent, "built without agent(true)");
        self.directory.path().join("agent")
    }

    /// A directory for fleeces, empty at the start; [`Vm::assert_clean`] wants it empty at the end.
    pub(crate) fn fleece_directory(&self) -> PathBuf {
        self.directory.path().join("fleece")
    }

    /// The VM's own directory, removed with it.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// All disks.
    pub(crate) fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The disk of a volume.
    pub(crate) fn disk(&self, volume: &str) -> &Disk {
        let mut disks = self.disks.iter();
        disks.find(|disk| disk.spec.volume == volume).unwrap_or_else(|| panic!("no disk {volume}"))
    }

    /// Runs a `qemu-io` command, say `write -P 0x5a 0 64k`, as if the device of this disk did it; it must succeed.
    pub(crate) fn io(&self, control: &mut Control, volume: &str, command: &str) {
        let device = self.disk(volume).device().expect("a device with an id");
        let log = || fs::read(self.directory.path().join("qemu.log")).expect("the log");
        let before = log().len();
        let printed = control.human(&format!("qemu-io -d {device} \"{command}\""));
        assert!(printed.trim().is_empty(), "{command} on {volume}: {printed}");
        // Errors of the command itself are printed on standard output, a line at once, and never reach the monitor.
        let log = log();
        let printed = String::from_utf8_lossy(&log[before..]);
        assert!(!printed.contains("failed"), "{command} on {volume}: {printed}");
        assert!(!command.starts_with("write") || printed.contains("wrote"), "{command} on {volume} says nothing");
    }

    /// Plugs a disk in while the VM runs.
    pub(crate) fn plug(&mut self, control: &mut Control, spec: &DiskSpec) {
        let disk = Disk::create(spec, self.disks.len() + 1, self.directory.path());
        for argument in disk.arguments().chunks(2) {
            let command = match argument[0].as_str() {
                "-blockdev" => "blockdev-add",
                "-object" => "object-add",
                _ => "device_add",
            };
            control.run(command, &serde_json::from_str(&argument[1]).expect("the arguments are JSON"));
        }
        self.disks.push(disk);
    }

    /// Takes the device of a disk away; its nodes stay.
    pub(crate) fn unplug(&self, control: &mut Control, volume: &str) {
        let id = self.disk(volume).spec.qdev.clone().expect("a device with an id");
        control.run("device_del", &json!({"id": id}));
        let deleted = control.wait_event("DEVICE_DELETED", Duration::from_secs(30));
        assert!(deleted.is_some(), "{volume} stays plugged in");
    }

    /// Removes the nodes of a disk whose device is gone.
    pub(crate) fn forget(&mut self, control: &mut Control, volume: &str) {
        for node in self.disk(volume).nodes() {
            control.run("blockdev-del", &json!({"node-name": node}));
        }
        // The place stays taken: the places of the others are in their names.
        let disk = self.disks.iter_mut().find(|disk| disk.spec.volume == volume).expect("a disk");
        disk.spec.volume = format!("{volume} (gone)");
    }

    /// QEMU's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What QEMU and the guest's console have printed, for messages.
    pub(crate) fn logs(&self) -> String {
        let read = |name| fs::read_to_string(self.directory.path().join(name)).unwrap_or_default();
        format!("QEMU: {}\nconsole: {}", read("qemu.log"), read("console.log"))
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        process::kill9(&mut self.child);
        self.place = None;
    }

    /// Waits for QEMU to end by itself, and panics when it has not within the limit.
    pub(crate) fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let Some(status) = process::wait(&mut self.child, limit) else {
            panic!("QEMU has not ended within {limit:?}: {}", self.logs());
        };
        self.place = None;
        status
    }

    /// Ends QEMU in order, so that the images are complete and persistent bitmaps stored.
    pub(crate) fn quit(&mut self) {
        // A monitor of its own, because the test may still hold the other one.
        Control::connect(&self.directory.path().join("quit")).quit();
        let status = self.wait_exit(Duration::from_secs(60));
        assert!(status.success(), "QEMU ends with {status}: {}", self.logs());
    }

    /// Whether QEMU still runs.
    pub(crate) fn alive(&mut self) -> bool {
        self.child.try_wait().expect("asking for a child's status").is_none()
    }

    /// Asserts that nothing is left of a session but the bitmaps of these names.
    pub(crate) fn assert_clean(&self, control: &mut Control, bitmaps: &[&str]) {
        let mut left = leftovers(control, bitmaps);
        let files = fs::read_dir(self.fleece_directory()).expect("the fleece directory");
        left.extend(files.map(|entry| format!("file {}", entry.expect("a directory entry").path().display())));
        assert!(left.is_empty(), "left behind: {left:#?}");
    }

    /// Waits until QEMU has made its monitor, so that wrong arguments are reported as such.
    fn wait_for_monitor(&mut self) {
        let socket = self.directory.path().join("control");
        while !socket.exists() {
            // There is nothing to wait on but this and the death of QEMU.
            if let Some(status) = process::wait(&mut self.child, Duration::from_millis(10)) {
                panic!("QEMU ends at once, {status}: {}", self.logs());
            }
        }
        drop(dial(&socket, Duration::from_secs(5)));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        // No panic here: it could be the second one.
        self.child.kill().ok();
        process::wait(&mut self.child, Duration::from_secs(30));
    }
}
