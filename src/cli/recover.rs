//! `virt-fleece recover`

use super::{CliError, connection::VmArgs, output::Output};
use crate::{
    fleecing::{Leftover, Recovered, recover},
    image::ChainDirectory,
};
use clap::Args;
use std::{process::ExitCode, time::Duration};

#[derive(Debug, Args)]
#[command(
    after_help = "`virt-fleece backup` does the same before it begins. Nothing of other tools is touched, and it \
    can be run at any time.\n\nExample:\n  virt-fleece recover --qmp /run/vm/web.qmp"
)]
pub(super) struct RecoverArgs {
    #[command(flatten)]
    vm_args: VmArgs,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
}

pub(super) async fn run(args: RecoverArgs) -> Result<ExitCode, CliError> {
    let mut connection = args.vm_args.connect().await?;
    let _lock = connection.lock(Duration::ZERO).await?;
    let mut journal = connection.journal();
    let agent = connection.agent.as_mut().ok().and_then(Option::as_mut);
    let recovered = recover(&connection.qmp, &mut journal, agent, head_of_leftover).await?;
    args.output.result(&recovered, || text(&recovered));
    Ok(ExitCode::SUCCESS)
}

/// The newest complete backup that has the volume, in the directory that the session worked for. In doubt (the
/// directory is gone or damaged) none: the bitmaps are removed and the next backup is a full one.
pub(super) fn head_of_leftover(leftover: &Leftover, volume: &str) -> Option<String> {
    let directory = ChainDirectory::open(&leftover.begin.target).ok()?;
    let latest = directory.latest(&leftover.begin.vm).ok()??;
    latest.volume(volume).map(|_| latest.id.to_string())
}

/// For people.
pub(super) fn text(recovered: &Recovered) -> String {
    if recovered.is_nothing() {
        return "nothing was left by an earlier backup".into();
    }
    let mut lines = Vec::new();
    if let Some(backup) = &recovered.backup {
        lines.push(format!("backup {backup} had been cut short"));
    }
    lines.extend(recovered.removed.iter().map(|removed| format!("removed {removed}")));
    if recovered.continued {
        lines.push("let the CPUs run again".into());
    }
    if recovered.thawed {
        lines.push("thawed the guest's file systems".into());
    }
    if recovered.bitmaps > 0 {
        lines.push(format!("put {} dirty bitmaps in order", recovered.bitmaps));
    }
    lines.join("\n")
}
