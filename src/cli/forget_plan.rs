//! What `virt-fleece forget` is about to do, or has done.

use super::CliError;
use crate::{
    backup::BackupId,
    chain::{DatedBackup, RetentionRule},
    repository::{Catalogue, Manifest, NamedBackup, Repository, RepositoryError},
};
use comfy_table::Table;
use jiff::{Timestamp, tz::TimeZone};
use serde::Serialize;
use std::{
    collections::{BTreeMap, HashSet},
    process::ExitCode,
    sync::Arc,
};

/// The result of the command.
#[derive(Debug, Serialize)]
pub(super) struct Plan {
    /// Whether nothing was done.
    pub(super) dry_run: bool,
    /// How many stay, of those that were looked at.
    kept: usize,
    /// How many go.
    forgotten: usize,
    backups: Vec<Line>,
    /// VMs of which nothing goes, because something cannot be read.
    pub(super) refused: Vec<Refusal>,
    /// The objects of those that go.
    #[serde(skip)]
    objects: Vec<NamedBackup>,
}

/// A backup.
#[derive(Debug, Serialize)]
struct Line {
    /// None: the backup cannot be read.
    vm: Option<String>,
    id: BackupId,
    point_in_time: Option<Timestamp>,
    kept: bool,
    /// Why it is kept.
    reasons: Vec<String>,
}

/// A VM to which the rule was not applied.
#[derive(Debug, Serialize)]
pub(super) struct Refusal {
    /// None: not one of its backups can be read, so that nobody knows whose they are.
    vm: Option<String>,
    unreadable: Vec<Unreadable>,
}

/// A backup that cannot be read.
#[derive(Debug, Serialize)]
struct Unreadable {
    /// None: it is not known which one it is.
    id: Option<BackupId>,
    message: String,
    /// The content is bad, rather than out of reach.
    damaged: bool,
}

impl Unreadable {
    fn new(error: &RepositoryError) -> Self {
        let id = error.object().and_then(|object| object.rsplit('/').next()?.parse().ok());
        let mut message = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            message = format!("{message}: {cause}");
            source = cause.source();
        }
        Self { id, message, damaged: error.is_integrity() }
    }
}

impl Refusal {
    /// What happened, and the way out.
    pub(super) fn message(&self) -> String {
        let (of_vm, option) = match &self.vm {
            Some(vm) => (format!("VM `{vm}`"), format!(" --vm {vm}")),
            None => ("a VM that is not known by name".into(), String::new()),
        };
        let mut lines =
            vec![format!("nothing of {of_vm} was forgotten: {} of its backups cannot be read", self.unreadable.len())];
        for unreadable in &self.unreadable {
            lines.push(format!("  {}", unreadable.message));
            lines.push(match &unreadable.id {
                Some(id) if unreadable.damaged => {
                    format!("    to give it up: virt-fleece forget{option} --backup {id}; then run this again")
                }
                _ => "    once that is solved, run this again".into(),
            });
        }
        lines.join("\n")
    }
}

/// What a rule says, about one VM or all.
pub(super) async fn by_rule(
    repository: &Arc<Repository>,
    vm: Option<&str>,
    rule: &RetentionRule,
) -> Result<Plan, CliError> {
    let Catalogue { manifests, damaged } = repository.catalogue(vm).await?;
    if let Some(vm) = vm
        && manifests.is_empty()
        && damaged.is_empty()
    {
        let vms = repository.vms().await?;
        let known = if vms.is_empty() { "none".into() } else { vms.join(", ") };
        return Err(RepositoryError::NotFound { what: format!("backup of VM `{vm}`"), known }.into());
    }
    let mut vms: BTreeMap<String, Vec<Manifest>> = BTreeMap::new();
    for manifest in manifests {
        vms.entry(manifest.backup.vm.clone()).or_default().push(manifest);
    }
    let (mut backups, mut refused) = (Vec::new(), Vec::new());
    // By the directory of the VM; an error that names no object may be about any of them.
    let (mut astray, unplaced): (Vec<_>, Vec<_>) = damaged.iter().partition(|error| directory_of(error).is_some());
    let now = Timestamp::now();
    for (name, manifests) in vms {
        let directory = manifests.first().map(|first| repository.manifest_name(&name, &first.backup.id));
        let is_mine = |error: &&RepositoryError| directory_of(error) == directory.as_deref().and_then(parent);
        let mine: Vec<_> = astray.extract_if(.., |error| is_mine(error)).collect();
        let unreadable: Vec<_> = mine.into_iter().chain(unplaced.iter().copied()).map(Unreadable::new).collect();
        if unreadable.is_empty() {
            backups.extend(decide(&name, &manifests, rule, now));
        } else {
            refused.push(Refusal { vm: Some(name), unreadable });
        }
    }
    if !astray.is_empty() {
        let unreadable = astray.into_iter().map(Unreadable::new).collect();
        refused.push(Refusal { vm: vm.map(str::to_owned), unreadable });
    }
    let mut plan = Plan::new(backups, refused);
    let going = plan.backups.iter().filter(|line| !line.kept);
    let objects = going.filter_map(|line| Some(repository.name_backup(line.vm.as_deref()?, &line.id)));
    plan.objects = objects.collect();
    Ok(plan)
}

/// The directory of the object that an error is about: one for each VM.
fn directory_of(error: &RepositoryError) -> Option<&str> {
    error.object().and_then(parent)
}

fn parent(object: &str) -> Option<&str> {
    object.rsplit_once('/').map(|(directory, _)| directory)
}

fn decide(vm: &str, manifests: &[Manifest], rule: &RetentionRule, now: Timestamp) -> Vec<Line> {
    let dated = |manifest: &Manifest| DatedBackup {
        id: manifest.backup.id.to_string(),
        sequence: manifest.backup.sequence,
        point_in_time: manifest.backup.point_in_time,
    };
    let dated: Vec<_> = manifests.iter().map(dated).collect();
    let of = |id: &str| manifests.iter().find(|manifest| manifest.backup.id.as_str() == id);
    let line = |decision: crate::chain::Decision| {
        let backup = &of(&decision.id)?.backup;
        Some(Line {
            vm: Some(vm.to_owned()),
            id: backup.id.clone(),
            point_in_time: Some(backup.point_in_time),
            kept: decision.is_kept(),
            reasons: decision.reasons,
        })
    };
    rule.decide(&dated, now).into_iter().filter_map(line).collect()
}

/// Exactly these backups, readable or not.
pub(super) async fn by_id(repository: &Arc<Repository>, vm: Option<&str>, ids: &[BackupId]) -> Result<Plan, CliError> {
    let objects = repository.named(vm, ids).await?;
    let (mut backups, mut vms) = (Vec::new(), HashSet::new());
    for object in &objects {
        let record = match repository.read_named(object).await {
            Ok(manifest) => Some(manifest.backup),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the backup to forget cannot be read");
                None
            }
        };
        let (name, point_in_time) = record.map_or((None, None), |record| (Some(record.vm), Some(record.point_in_time)));
        vms.extend(name.clone());
        let name = name.or_else(|| vm.map(str::to_owned));
        backups.push(Line { vm: name, id: object.id().clone(), point_in_time, kept: false, reasons: Vec::new() });
    }
    for vm in vms {
        if let Some(latest) = repository.latest(&vm).await?
            && ids.contains(&latest.backup.id)
        {
            tracing::warn!(vm, "this is the newest backup: the next one of this VM has to read its disks as a whole");
        }
    }
    Ok(Plan { objects, ..Plan::new(backups, Vec::new()) })
}

impl Plan {
    fn new(backups: Vec<Line>, refused: Vec<Refusal>) -> Self {
        let kept = backups.iter().filter(|line| line.kept).count();
        let forgotten = backups.len() - kept;
        Self { dry_run: false, kept, forgotten, backups, refused, objects: Vec::new() }
    }

    /// The backups that go.
    pub(super) fn to_forget(&self) -> &[NamedBackup] {
        &self.objects
    }

    /// 5 or 6 when the rule was not applied to a VM.
    pub(super) fn exit_code(&self) -> ExitCode {
        let mut unreadable = self.refused.iter().flat_map(|refusal| &refusal.unreadable);
        match (self.refused.is_empty(), unreadable.any(|unreadable| unreadable.damaged)) {
            (true, _) => ExitCode::SUCCESS,
            (false, true) => ExitCode::from(5),
            (false, false) => ExitCode::from(6),
        }
    }

    /// For people.
    pub(super) fn text(&self, time_zone: &TimeZone) -> String {
        let mut lines = Vec::new();
        if !self.backups.is_empty() {
            lines.push(self.table(time_zone));
        }
        let forgotten = match self.forgotten {
            1 => "1 backup".to_owned(),
            many => format!("{many} backups"),
        };
        lines.push(if self.dry_run {
            format!("{forgotten} would be forgotten, {} kept; this was a dry run, nothing was changed", self.kept)
        } else if self.forgotten > 0 {
            format!("{forgotten} forgotten, {} kept; `virt-fleece repository prune` frees the space", self.kept)
        } else {
            format!("{forgotten} forgotten, {} kept", self.kept)
        });
        lines.join("\n")
    }

    fn table(&self, time_zone: &TimeZone) -> String {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.set_header(["VM", "BACKUP", "POINT IN TIME", "", "WHY"]);
        for line in &self.backups {
            let time = line.point_in_time.map(|time| time.to_zoned(time_zone.clone()));
            table.add_row([
                line.vm.clone().unwrap_or_else(|| "?".into()),
                line.id.to_string(),
                time.map_or_else(|| "?".into(), |time| time.strftime("%Y-%m-%d %H:%M:%S %Z").to_string()),
                if line.kept { "keep" } else { "forget" }.to_owned(),
                line.reasons.join(", "),
            ]);
        }
        table.trim_fmt()
    }
}
