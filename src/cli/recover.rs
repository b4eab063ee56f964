//! `virt-fleece recover`

use super::{CliError, connection::VmArgs, output::Output};
use crate::{
    fleecing::{Head, Leftover, Recovered, recover},
    image::ChainDirectory,
    repository::Location,
};
use clap::Args;
use std::{path::Path, process::ExitCode, time::Duration};

/// How long a repository may take to say whether a backup is there.
const LOOK_LIMIT: Duration = Duration::from_secs(20);

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
    let (qmp, agent) = (connection.qmp().clone(), connection.guest_agent());
    let recovered = recover(&qmp, &mut journal, agent, async |leftover| head(leftover, None).await).await?;
    args.output.result(&recovered, || text(&recovered));
    Ok(ExitCode::SUCCESS)
}

/// The newest complete backup at the target that the session worked for. `access`: the way there, where the caller
/// knows it; otherwise the environment does.
pub(super) async fn head(leftover: &Leftover, access: Option<&Location>) -> Option<Head> {
    let begin = &leftover.begin;
    let Some(object) = &begin.object else {
        // In doubt (the directory is gone or damaged) no backup: the next one reads everything.
        let latest = ChainDirectory::open(Path::new(&begin.target)).and_then(|it| it.latest(&begin.vm)).ok().flatten();
        return Some(latest.map_or_else(Head::default, |latest| Head {
            volumes: Some(latest.volumes.iter().map(|volume| volume.name.clone()).collect()),
            backup: Some(latest.backup.id.to_string()),
        }));
    };
    let location = match access.filter(|access| access.url == begin.target) {
        Some(location) => location.clone(),
        None => Location {
            url: begin.target.clone(),
            s3_endpoint: std::env::var("AWS_ENDPOINT_URL").ok(),
            ..Location::default()
        },
    };
    let exists = async { location.open()?.exists(object).await };
    let backup = match tokio::time::timeout(LOOK_LIMIT, exists).await {
        Ok(Ok(true)) => Some(begin.backup.clone()),
        Ok(Ok(false)) => begin.parent.clone(),
        Ok(Err(_)) | Err(_) => {
            tracing::warn!("{} cannot be reached: the next backup puts the dirty bitmaps in order", begin.target);
            return None;
        }
    };
    Some(Head { backup, volumes: None })
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
