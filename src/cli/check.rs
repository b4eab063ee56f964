//! Checking a repository: `verify --repository` and `repository check`.

use super::{CliError, output::Output, progress::Progress, restore::until_signal};
use crate::repository::{CheckOptions, CheckProgress, CheckSummary, Repository};
use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Checks, shows progress, prints what was found; exit code 5 for damage.
pub(super) async fn check(
    repository: Arc<Repository>,
    vm: Option<String>,
    backup: Option<String>,
    read_percent: u8,
    output: Output,
) -> Result<ExitCode, CliError> {
    let vm = match (vm, &backup) {
        (None, Some(backup)) if backup == "latest" => {
            Some(super::restore::RestoreArgs::only_vm(&repository.vms().await?)?)
        }
        (vm, _) => vm,
    };
    let options = CheckOptions { vm, backup, read_percent };
    let (cancelled, progress) = (Arc::new(AtomicBool::new(false)), Arc::new(CheckProgress::default()));
    let shown = tokio::spawn({
        let progress = Arc::clone(&progress);
        async move {
            let mut bar = Progress::new("reading", ["data".to_owned()]);
            loop {
                bar.set(0, progress.read.load(Ordering::Relaxed), progress.total.load(Ordering::Relaxed));
                bar.tick();
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    });
    let work = tokio::spawn({
        let cancelled = Arc::clone(&cancelled);
        async move { Ok(repository.check(&options, &progress, &cancelled).await?) }
    });
    let summary = until_signal(work, &cancelled).await;
    shown.abort();
    let summary = summary?;
    output.result(&summary, || text(&summary));
    Ok(if summary.is_good() { ExitCode::SUCCESS } else { ExitCode::from(5) })
}

fn text(summary: &CheckSummary) -> String {
    let mut lines = Vec::new();
    for backup in &summary.backups {
        let state = if backup.problems.is_empty() { "ok" } else { "DAMAGED" };
        lines.push(format!("{} {} {state}", backup.vm, backup.id));
        lines.extend(backup.problems.iter().map(|problem| format!("  {problem}")));
    }
    lines.extend(summary.unreadable.iter().map(|problem| format!("DAMAGED {problem}")));
    let damaged =
        summary.backups.iter().filter(|backup| !backup.problems.is_empty()).count() + summary.unreadable.len();
    lines.push(format!(
        "{} backups checked, {damaged} damaged; {} chunks needed, {} of them read{}",
        summary.backups.len() + summary.unreadable.len(),
        summary.needed_chunks,
        summary.read_chunks,
        match summary.unneeded_chunks {
            0 => String::new(),
            chunks => format!("; {chunks} chunks are not needed (`virt-fleece repository prune` removes them)"),
        }
    ));
    lines.join("\n")
}
