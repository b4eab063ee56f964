//! `virt-fleece repository prune`

use super::{
    CliError,
    output::Output,
    progress::Steps,
    repository_args::{REPOSITORY_HELP, RepositoryArgs},
    size::show_size,
};
use crate::repository::{PruneOptions, PruneProgress, PruneSummary, Repository};
use clap::Args;
use std::{
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

#[derive(Debug, Args)]
#[command(after_help = prune_help())]
pub(super) struct PruneArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Wait this many seconds for backups that run; what is left then is removed by the next prune
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u64,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
}

fn prune_help() -> String {
    format!(
        "Backups may go on all the time: what one of them needs is never removed. A prune that was interrupted, or has \
        to wait for backups that began before it, is taken up by the next one. A backup that cannot be read stops it: \
        nobody knows what that one needs (`virt-fleece forget` it, or repair it).\n\n\
        Examples:\n  \
        virt-fleece repository prune --repository /srv/backup --dry-run\n  \
        virt-fleece repository prune --repository s3://backups/prod --wait 3600\n\n{REPOSITORY_HELP}"
    )
}

pub(super) async fn run(args: PruneArgs) -> Result<ExitCode, CliError> {
    let repository = args.repository.open().await?;
    let options = PruneOptions { dry_run: args.dry_run, wait: Duration::from_secs(args.wait) };
    let summary = prune(&repository, options).await?;
    args.output.result(&summary, || text(&summary, args.dry_run));
    Ok(ExitCode::SUCCESS)
}

/// Prunes and shows progress. A signal ends it between two steps; the next prune goes on.
pub(super) async fn prune(repository: &Arc<Repository>, options: PruneOptions) -> Result<PruneSummary, CliError> {
    let progress = PruneProgress::default();
    let show = async {
        let (mut marked, mut swept) = (Steps::new("reading indexes"), Steps::new("removing chunks"));
        loop {
            let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
            if read(&progress.condemned) == 0 {
                marked.set(read(&progress.backups_read), read(&progress.backups), || "backups".into());
            } else {
                marked.finish();
                swept.set(read(&progress.deleted), read(&progress.condemned), || "chunks".into());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::select! {
        summary = repository.prune(options, &progress) => Ok(summary?),
        (signal, code) = super::backup_run::signal() => {
            Err(CliError::Signal { message: format!("{signal}: the next prune takes this one up"), code })
        }
        () = show => Err(CliError::Usage("the progress ended".into())),
    }
}

fn text(summary: &PruneSummary, dry_run: bool) -> String {
    let mut lines = Vec::new();
    if summary.resumed {
        lines.push("took up an earlier prune".to_owned());
    }
    let condemned = format!("{} chunks ({})", summary.condemned_chunks, show_size(summary.condemned_bytes));
    if dry_run {
        lines.push(format!("of {} chunks, {condemned} are needed by no backup", summary.chunks));
    } else if summary.waits_for.is_empty() {
        lines.push(format!("removed {} of {condemned} that no backup needed", summary.deleted_chunks));
        if summary.rescued_chunks > 0 {
            lines.push(format!("{} were needed again meanwhile", summary.rescued_chunks));
        }
    } else {
        lines.push(format!("{condemned} will be removed once these backups have ended; then run it again:"));
        lines.extend(summary.waits_for.iter().map(|session| format!("  {session}")));
    }
    lines.join("\n")
}
