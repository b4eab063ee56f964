//! The disks of a test VM, laid out in QEMU as libvirt lays them out.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::flavour::tool;

/// How the guest sees a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    /// A PCI device of its own.
    VirtioBlk {
        /// Whether an iothread handles it.
        iothread: bool,
    },
    /// A LUN of a virtio-scsi controller.
    ScsiHd {
        /// Whether it hangs on the controller that an iothread handles.
        iothread: bool,
    },
    /// A port of the AHCI controller that machine type `q35` has.
    Ide,
}

/// Format of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// No format; as libvirt does, the device sits on the file node itself.
    Raw,
    /// qcow2, which can keep persistent bitmaps.
    Qcow2,
}

/// What a disk shall be.
#[derive(Debug, Clone)]
pub(crate) struct DiskSpec {
    /// Volume name; serial of the disk and stem of its file too.
    pub(crate) volume: String,
    /// How the guest sees it.
    pub(crate) bus: Bus,
    /// Format of the image.
    pub(crate) format: Format,
    /// Virtual size in bytes.
    pub(crate) size: u64,
    /// Device id: `ua-<volume>` as in `KubeVirt`, unless changed; `None` for a device without id.
    pub(crate) qdev: Option<String>,
    /// Bytes a second of a throttle filter on top, if there is to be one.
    pub(crate) throttle: Option<u64>,
    /// Whether errors stop the VM (as `KubeVirt` sets it) or reach the guest.
    pub(crate) stop_on_error: bool,
    /// Where the image is; the VM's own directory when `None`.
    pub(crate) directory: Option<PathBuf>,
}

impl DiskSpec {
    /// A raw disk on virtio-blk without iothread.
    pub(crate) fn new(volume: &str, size: u64) -> Self {
        Self {
            volume: volume.to_owned(),
            bus: Bus::VirtioBlk { iothread: false },
            format: Format::Raw,
            size,
            qdev: Some(format!("ua-{volume}")),
            throttle: None,
            stop_on_error: true,
            directory: None,
        }
    }

    /// On this bus.
    pub(crate) fn bus(mut self, bus: Bus) -> Self {
        self.bus = bus;
        self
    }

    /// In this format.
    pub(crate) fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// With this device id, or none.
    pub(crate) fn qdev(mut self, id: Option<&str>) -> Self {
        self.qdev = id.map(str::to_owned);
        self
    }

    /// With a throttle filter on top.
    pub(crate) fn throttled(mut self, bytes_per_second: u64) -> Self {
        self.throttle = Some(bytes_per_second);
        self
    }

    /// Whether I/O errors stop the VM.
    pub(crate) fn stop_on_error(mut self, stop: bool) -> Self {
        self.stop_on_error = stop;
        self
    }

    /// With its image in this directory, where it outlives the VM.
    pub(crate) fn in_directory(mut self, directory: &Path) -> Self {
        self.directory = Some(directory.to_owned());
        self
    }
}

/// A disk of a VM.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    /// What it is.
    pub(crate) spec: DiskSpec,
    /// Its place among the VM's disks, from 1, as in libvirt's node names.
    index: usize,
    /// The image.
    pub(crate) path: PathBuf,
}

impl Disk {
    /// Makes the image, unless it is there, in the given directory if the specification names none.
    pub(crate) fn create(spec: &DiskSpec, index: usize, directory: &Path) -> Self {
        let suffix = if spec.format == Format::Raw { "raw" } else { "qcow2" };
        let path = spec.directory.as_deref().unwrap_or(directory).join(format!("{}.{suffix}", spec.volume));
        if !path.exists() {
            match spec.format {
                Format::Raw => File::create(&path).and_then(|file| file.set_len(spec.size)).expect("making an image"),
                Format::Qcow2 => {
                    let mut create = Command::new(tool("QEMU_IMG"));
                    create.args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(spec.size.to_string());
                    assert!(create.status().expect("starting qemu-img").success(), "qemu-img create failed");
                }
            }
        }
        Self { spec: spec.clone(), index, path }
    }

    /// The node that bitmaps live on.
    pub(crate) fn format_node(&self) -> String {
        match self.spec.format {
            Format::Raw => format!("libvirt-{}-storage", self.index),
            Format::Qcow2 => format!("libvirt-{}-format", self.index),
        }
    }

    /// The node under the device.
    pub(crate) fn top_node(&self) -> String {
        match self.spec.throttle {
            Some(_) => format!("libvirt-{}-filter", self.index),
            None => self.format_node(),
        }
    }

    /// What `query-block` calls the device, and what `qom-set` and `qemu-io -d` take.
    pub(crate) fn device(&self) -> Option<String> {
        let id = self.spec.qdev.as_deref()?;
        Some(match self.spec.bus {
            Bus::VirtioBlk { .. } => format!("/machine/peripheral/{id}/virtio-backend"),
            Bus::ScsiHd { .. } | Bus::Ide => id.to_owned(),
        })
    }

    /// QEMU's arguments for the nodes and the device.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let storage = format!("libvirt-{}-storage", self.index);
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: &Value| arguments.extend([option.to_owned(), value.to_string()]);
        add(
            "-blockdev",
            &json!({"driver": "file", "filename": self.path, "node-name": storage, "read-only": false,
                "discard": "unmap", "cache": {"direct": false, "no-flush": false}}),
        );
        if self.spec.format == Format::Qcow2 {
            add(
                "-blockdev",
                &json!({"driver": "qcow2", "file": storage, "node-name": self.format_node(), "read-only": false,
                    "discard": "unmap", "cache": {"direct": false, "no-flush": false}}),
            );
        }
        if let Some(limit) = self.spec.throttle {
            let group = format!("throttle-{}", self.spec.volume);
            add("-object", &json!({"qom-type": "throttle-group", "id": group, "limits": {"bps-total": limit}}));
            add(
                "-blockdev",
                &json!({"driver": "throttle", "node-name": self.top_node(), "throttle-group": group,
                    "file": self.format_node()}),
            );
        }
        add("-device", &self.device_properties());
        arguments
    }

    /// The `-device` argument.
    fn device_properties(&self) -> Value {
        let policy = if self.spec.stop_on_error { "stop" } else { "report" };
        let mut device = json!({
            "drive": self.top_node(), "serial": self.spec.volume, "write-cache": "on",
            "werror": policy, "rerror": policy,
        });
        if let Some(id) = &self.spec.qdev {
            device["id"] = json!(id);
        }
        match self.spec.bus {
            Bus::VirtioBlk { iothread } => {
                device["driver"] = json!("virtio-blk-pci");
                if iothread {
                    device["iothread"] = json!(format!("iothread{}", 1 + self.index % 2));
                }
            }
            Bus::ScsiHd { iothread } => {
                device["driver"] = json!("scsi-hd");
                device["bus"] = json!(format!("{}.0", scsi_controller(iothread)));
                device["lun"] = json!(self.index);
            }
            Bus::Ide => {
                device["driver"] = json!("ide-hd");
                device["bus"] = json!(format!("ide.{}", self.index % 6));
            }
        }
        device
    }
}

/// Name of the SCSI controller with or without iothread.
pub(crate) fn scsi_controller(iothread: bool) -> &'static str {
    if iothread { "scsi1" } else { "scsi0" }
}

/// The bytes of a disk from its image: a raw file, or a qcow2 file with its backing files.
pub(crate) fn read_image(path: &Path) -> Vec<u8> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("reading {}: {error}", path.display()));
    if !bytes.starts_with(b"QFI\xfb") {
        return bytes;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let raw = directory.path().join("raw");
    let mut convert = Command::new(tool("QEMU_IMG"));
    convert.args(["convert", "--force-share", "-f", "qcow2", "-O", "raw"]).arg(path).arg(&raw);
    assert!(convert.status().expect("starting qemu-img").success(), "qemu-img convert {} failed", path.display());
    fs::read(raw).expect("a converted image")
}
