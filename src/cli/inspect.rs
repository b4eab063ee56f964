//! `virt-fleece inspect`

use super::{CliError, connection::VmArgs, output::Output, size::show_size};
use crate::{
    fleecing::{Disks, EngineChoice, Observation, SessionError, SkippedDevice, View, choose},
    qmp::{Capabilities, command::QueryStatus},
};
use clap::Args;
use serde::Serialize;
use std::{process::ExitCode, time::Duration};

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  virt-fleece inspect --qmp /run/vm/web.qmp")]
pub(super) struct InspectArgs {
    #[command(flatten)]
    vm_args: VmArgs,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
}

#[derive(Debug, Serialize)]
struct Inspection {
    vm: Option<String>,
    uuid: Option<String>,
    state: String,
    qemu_version: String,
    engine: EngineChoice,
    copy_before_write_refused: Option<String>,
    snapshot_access_refused: Option<String>,
    volumes: Vec<InspectedVolume>,
    skipped: Vec<SkippedDevice>,
    /// What is in QEMU of a session that was cut short, or of one that runs.
    leftovers: String,
    interrupted_backup: Option<String>,
}

#[derive(Debug, Serialize)]
struct InspectedVolume {
    name: String,
    device: String,
    node: String,
    format: &'static str,
    virtual_size: u64,
    bitmaps: Vec<String>,
}

pub(super) async fn run(args: InspectArgs) -> Result<ExitCode, CliError> {
    let connection = args.vm_args.connect().await?;
    let _lock = connection.lock(Duration::ZERO).await?;
    let qmp = connection.qmp();
    let status = qmp.execute(&QueryStatus {}).await.map_err(SessionError::qmp("reading the VM's state"))?;
    let capabilities = Capabilities::probe(qmp).await.map_err(SessionError::qmp("probing QEMU"))?;
    let disks = Disks::discover(qmp).await?;
    let seen = Observation::take(qmp).await.map_err(SessionError::qmp("looking for leftovers"))?;
    let leftover = connection.journal().leftover().map_err(SessionError::local("reading the journal"))?;
    let inspection = Inspection {
        vm: connection.name().map(str::to_owned),
        uuid: connection.uuid().map(str::to_owned),
        state: status.status,
        qemu_version: capabilities.version.qemu.to_string(),
        engine: choose(None, &capabilities)?,
        copy_before_write_refused: capabilities.copy_before_write,
        snapshot_access_refused: capabilities.snapshot_access,
        volumes: disks
            .volumes
            .into_iter()
            .map(|volume| InspectedVolume {
                format: volume.source_format(),
                bitmaps: volume.bitmaps.iter().filter_map(|bitmap| bitmap.name.clone()).collect(),
                name: volume.name,
                device: volume.qdev,
                node: volume.format_node,
                virtual_size: volume.virtual_size,
            })
            .collect(),
        skipped: disks.skipped,
        leftovers: seen.describe(),
        interrupted_backup: leftover.map(|leftover| leftover.begin.backup),
    };
    args.output.result(&inspection, || text(&inspection));
    Ok(ExitCode::SUCCESS)
}

fn text(inspection: &Inspection) -> String {
    let mut lines = vec![
        format!(
            "VM {}, {}, QEMU {}",
            inspection.vm.as_deref().unwrap_or("(no name)"),
            inspection.state,
            inspection.qemu_version
        ),
        format!("engine {}: {}", inspection.engine.engine, inspection.engine.why),
        match inspection.engine.view {
            View::SnapshotAccess => "reads through a snapshot-access node".into(),
            View::Overlay => "reads through the fleece (a qcow2 overlay)".into(),
        },
    ];
    for volume in &inspection.volumes {
        lines.push(format!(
            "volume {}: {} {} on {}, bitmaps: {}",
            volume.name,
            show_size(volume.virtual_size),
            volume.format,
            volume.device,
            if volume.bitmaps.is_empty() { "none".into() } else { volume.bitmaps.join(", ") }
        ));
    }
    lines.extend(inspection.skipped.iter().map(|device| format!("skipped {}: {}", device.name, device.reason)));
    lines.push(format!("left by earlier backups: {}", inspection.leftovers));
    lines.join("\n")
}
