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
    /// A flash chip of the machine; the volume is to be named `pflash<unit>`, as the product names it.
    Pflash {
        /// Which: 0 holds the firmware, 1 its variables.
        unit: u8,
    },
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
    /// The image's file name; `<volume>.<format>` when `None`.
    pub(crate) file_name: Option<String>,
    /// The block device that is the disk, instead of a file.
    pub(crate) block_device: Option<PathBuf>,
    /// Name of the node that holds the image; libvirt's style when `None`.
    pub(crate) node: Option<String>,
    /// Whether there is a copy-on-read filter, above the throttle filter if that is there too.
    pub(crate) copy_on_read: bool,
    /// Whether QEMU opens it to read only.
    pub(crate) read_only: bool,
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
            file_name: None,
            block_device: None,
            node: None,
            copy_on_read: false,
            read_only: false,
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

    /// With its image in a file of this name.
    pub(crate) fn file_named(mut self, name: &str) -> Self {
        self.file_name = Some(name.to_owned());
        self
    }

    /// On this block device, whose size must be the disk's.
    pub(crate) fn on_block_device(mut self, device: &Path) -> Self {
        self.block_device = Some(device.to_owned());
        self
    }

    /// With this name for the node that holds the image.
    pub(crate) fn node_named(mut self, name: &str) -> Self {
        self.node = Some(name.to_owned());
        self
    }

    /// With a copy-on-read filter on top.
    pub(crate) fn copy_on_read(mut self) -> Self {
        self.copy_on_read = true;
        self
    }

    /// Opened to read only.
    pub(crate) fn read_only(mut self) -> Self {
        self.read_only = true;
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
        let name = spec.file_name.clone().unwrap_or_else(|| format!("{}.{suffix}", spec.volume));
        let file = spec.directory.as_deref().unwrap_or(directory).join(name);
        let path = spec.block_device.clone().unwrap_or(file);
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
        match (&self.spec.node, self.spec.format) {
            (Some(node), _) => node.clone(),
            (None, Format::Raw) => format!("libvirt-{}-storage", self.index),
            (None, Format::Qcow2) => format!("libvirt-{}-format", self.index),
        }
    }

    /// The node under the copy-on-read filter.
    fn limited_node(&self) -> String {
        match self.spec.throttle {
            Some(_) => format!("libvirt-{}-filter", self.index),
            None => self.format_node(),
        }
    }

    /// The node under the device.
    pub(crate) fn top_node(&self) -> String {
        if self.spec.copy_on_read { format!("CoR-{}", self.spec.volume) } else { self.limited_node() }
    }

    /// All nodes, from the top.
    pub(crate) fn nodes(&self) -> Vec<String> {
        let mut nodes = vec![self.top_node(), self.limited_node(), self.format_node(), self.storage_node()];
        nodes.dedup();
        nodes
    }

    /// The protocol node.
    fn storage_node(&self) -> String {
        match self.spec.format {
            Format::Raw => self.format_node(),
            Format::Qcow2 => format!("libvirt-{}-storage", self.index),
        }
    }

    /// What `query-block` calls the device, and what `qom-set` and `qemu-io -d` take.
    pub(crate) fn device(&self) -> Option<String> {
        let id = self.spec.qdev.as_deref()?;
        Some(match self.spec.bus {
            Bus::VirtioBlk { .. } => format!("/machine/peripheral/{id}/virtio-backend"),
            Bus::ScsiHd { .. } | Bus::Ide => id.to_owned(),
            Bus::Pflash { unit } => format!("/machine/system.flash{unit}"),
        })
    }

    /// QEMU's arguments for the nodes and the device.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let storage = self.storage_node();
        let driver = if self.spec.block_device.is_some() { "host_device" } else { "file" };
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: &Value| arguments.extend([option.to_owned(), value.to_string()]);
        add(
            "-blockdev",
            &json!({"driver": driver, "filename": self.path, "node-name": storage, "read-only": self.spec.read_only,
                "discard": "unmap", "cache": {"direct": false, "no-flush": false}}),
        );
        if self.spec.format == Format::Qcow2 {
            add(
                "-blockdev",
                &json!({"driver": "qcow2", "file": storage, "node-name": self.format_node(),
                    "read-only": self.spec.read_only, "discard": "unmap", "cache": {"direct": false, "no-flush": false}}),
            );
        }
        if let Some(limit) = self.spec.throttle {
            let group = format!("throttle-{}", self.spec.volume);
            add("-object", &json!({"qom-type": "throttle-group", "id": group, "limits": {"bps-total": limit}}));
            add(
                "-blockdev",
                &json!({"driver": "throttle", "node-name": self.limited_node(), "throttle-group": group,
                    "file": self.format_node()}),
            );
        }
        if self.spec.copy_on_read {
            add(
                "-blockdev",
                &json!({"driver": "copy-on-read", "node-name": self.top_node(), "file": self.limited_node()}),
            );
        }
        // The machine has its flash chips itself and takes the nodes as options of its own.
        if !matches!(self.spec.bus, Bus::Pflash { .. }) {
            add("-device", &self.device_properties());
        }
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
            Bus::Pflash { .. } => unreachable!("no -device"),
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
