//! `virt-fleece forget`

use super::{
    CliError,
    forget_plan::{Plan, by_id, by_rule},
    output::Output,
    repository_args::{REPOSITORY_HELP, RepositoryArgs},
};
use crate::{
    backup::BackupId,
    chain::{Keep, RetentionRule},
};
use clap::{ArgGroup, Args};
use jiff::{Span, tz::TimeZone};
use std::process::ExitCode;

#[derive(Debug, Args)]
#[command(
    after_help = help(),
    override_usage = "virt-fleece forget [OPTIONS] --repository <URL> --keep-… <N>...\n       \
        virt-fleece forget [OPTIONS] --repository <URL> --backup <ID>...",
    group(ArgGroup::new("what").required(true).multiple(true).args(["backups", "keep_last", "keep_hourly",
        "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly", "keep_within"])),
)]
pub(super) struct ForgetArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Only the backups of this VM; without it the rule is applied to each VM by itself
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Forget exactly these, even if they cannot be read
    #[arg(long = "backup", value_name = "ID", num_args = 1.., conflicts_with = "KeepArgs")]
    backups: Vec<BackupId>,
    /// Show what would be kept, and why, and what would be forgotten; change nothing
    #[arg(long)]
    dry_run: bool,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
    // The last one: its heading is for all that follows.
    #[command(flatten)]
    keep: KeepArgs,
}

/// The rule.
#[derive(Debug, Args)]
#[command(next_help_heading = "Rule: what to keep of each VM")]
struct KeepArgs {
    /// The newest N backups
    #[arg(long, value_name = "N")]
    keep_last: Option<u32>,
    /// The newest backup of each of the last N hours that have one
    #[arg(long, value_name = "N")]
    keep_hourly: Option<u32>,
    /// The same for days
    #[arg(long, value_name = "N")]
    keep_daily: Option<u32>,
    /// For weeks, from Monday on
    #[arg(long, value_name = "N")]
    keep_weekly: Option<u32>,
    /// For months
    #[arg(long, value_name = "N")]
    keep_monthly: Option<u32>,
    /// For years
    #[arg(long, value_name = "N")]
    keep_yearly: Option<u32>,
    /// All that are at most so much older than the VM's newest one: `36h`, `14d`, `2w`, `3mo`, `1y6mo` (`m` is a
    /// minute)
    #[arg(long, value_name = "DURATION")]
    keep_within: Option<Span>,
    /// Where days, weeks and months begin, such as Europe/Berlin
    #[arg(long, value_name = "NAME", default_value = "UTC", value_parser = time_zone)]
    time_zone: TimeZone,
}

fn help() -> String {
    format!(
        "A backup is kept when any part of the rule wants it. `--keep-daily 7` keeps the newest backup of each of the \
        last seven days on which there was one. The newest backup of a VM is never forgotten by a rule: the next one \
        builds on it. Backups do not depend on each other: any of them can go.\n\n\
        Forgetting frees no space; `virt-fleece repository prune` does.\n\n\
        When a backup of a VM cannot be read, its age is not known and no rule is applied to that VM. Forget that \
        backup by its id, or make it readable; exit code 5 or 6 says that this happened.\n\n\
        Examples:\n  \
        virt-fleece forget --repository /srv/backup --keep-last 10 --keep-daily 14 --dry-run\n  \
        virt-fleece forget --repository s3://backups/prod --keep-hourly 24 --keep-daily 7 \\\n      \
        --keep-weekly 5 --keep-monthly 12 --time-zone Europe/Berlin\n  \
        virt-fleece forget --repository /srv/backup --vm web --keep-within 14d\n  \
        virt-fleece forget --repository /srv/backup --vm web --backup 20261125T010203Z-00ff00ff\n\n{REPOSITORY_HELP}"
    )
}

fn time_zone(name: &str) -> Result<TimeZone, String> {
    TimeZone::get(name).map_err(|_| "no such time zone, or this machine has no time zone database (tzdata)".to_owned())
}

impl KeepArgs {
    fn rule(&self) -> Result<RetentionRule, CliError> {
        let keep = Keep {
            keep_last: self.keep_last.unwrap_or(0),
            keep_hourly: self.keep_hourly.unwrap_or(0),
            keep_daily: self.keep_daily.unwrap_or(0),
            keep_weekly: self.keep_weekly.unwrap_or(0),
            keep_monthly: self.keep_monthly.unwrap_or(0),
            keep_yearly: self.keep_yearly.unwrap_or(0),
        };
        RetentionRule::new(keep, self.keep_within, self.time_zone.clone())
            .map_err(|error| CliError::Usage(error.to_string()))
    }
}

/// Runs it.
pub(super) async fn run(args: ForgetArgs) -> Result<ExitCode, CliError> {
    let rule = if args.backups.is_empty() { Some(args.keep.rule()?) } else { None };
    let repository = args.repository.open().await?;
    let vm = args.vm.as_deref();
    let mut plan: Plan = match &rule {
        Some(rule) => by_rule(&repository, vm, rule).await?,
        None => by_id(&repository, vm, &args.backups).await?,
    };
    plan.dry_run = args.dry_run;
    if !args.dry_run {
        for backup in plan.to_forget() {
            repository.forget_named(backup).await?;
            tracing::info!(backup = %backup.id(), "forgotten");
        }
        // A manifest that came back with a power cut would name chunks that a prune has removed.
        repository.storage().flush().await?;
    }
    args.output.result(&plan, || plan.text(&args.keep.time_zone));
    for refusal in &plan.refused {
        eprintln!("error: {}", refusal.message());
    }
    Ok(plan.exit_code())
}
