//! `virt-fleece repository info`

use super::{
    CliError,
    output::Output,
    progress::Steps,
    repository::Identity,
    repository_args::{REPOSITORY_HELP, RepositoryArgs},
    size::show_size,
};
use crate::repository::Catalogue;
use clap::Args;
use serde::Serialize;
use std::process::ExitCode;

#[derive(Debug, Args)]
#[command(after_help = help())]
pub(super) struct InfoArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
}

fn help() -> String {
    format!(
        "All chunks are listed, which takes a while and costs requests in a large bucket. Chunks that no backup needs \
        any more count until a prune.\n\nExamples:\n  \
        virt-fleece repository info --repository /srv/backup\n  \
        virt-fleece repository info --repository s3://backups/prod -o json\n\n{REPOSITORY_HELP}"
    )
}

#[derive(Debug, Serialize)]
struct Info {
    #[serde(flatten)]
    identity: Identity,
    key_slots: usize,
    vms: usize,
    backups: usize,
    /// Backups that are there and cannot be read.
    unreadable_backups: usize,
    chunk_objects: u64,
    chunk_bytes: u64,
    /// Sizes of all disks in all backups that can be read, holes included.
    logical_bytes: u64,
    /// `logical_bytes` for each of `chunk_bytes`; none while there are no chunks.
    deduplication_ratio: Option<f64>,
}

/// Runs it.
pub(super) async fn run(args: InfoArgs) -> Result<ExitCode, CliError> {
    let repository = args.repository.open().await?;
    let key_slots = repository.key_slots().await?.len();
    let Catalogue { manifests, damaged } = repository.catalogue(None).await?;
    for error in &damaged {
        tracing::warn!(error = error as &dyn std::error::Error, "a backup cannot be read");
    }
    let mut steps = Steps::new("listing chunks");
    let chunks = repository
        .chunk_usage(|done, total, usage| {
            steps.set(done, total, || format!("{} chunks, {}", usage.objects, show_size(usage.bytes)));
        })
        .await;
    steps.finish();
    let chunks = chunks?;
    let sizes = manifests.iter().flat_map(|manifest| &manifest.volumes).map(|volume| volume.virtual_size);
    let logical_bytes = sizes.fold(0, u64::saturating_add);
    let info = Info {
        identity: Identity::of(&repository),
        key_slots,
        vms: repository.count_vms().await?,
        backups: manifests.len(),
        unreadable_backups: damaged.len(),
        chunk_objects: chunks.objects,
        chunk_bytes: chunks.bytes,
        logical_bytes,
        deduplication_ratio: (chunks.bytes > 0).then(|| logical_bytes as f64 / chunks.bytes as f64),
    };
    args.output.result(&info, || text(&info));
    Ok(ExitCode::SUCCESS)
}

fn text(info: &Info) -> String {
    let mut lines = info.identity.lines();
    lines.push(format!("key slots   {}", info.key_slots));
    let unreadable = match info.unreadable_backups {
        0 => String::new(),
        some => format!(", {some} more CANNOT BE READ"),
    };
    lines.push(format!("backups     {} of {} VMs{unreadable}", info.backups, info.vms));
    lines.push(format!("chunks      {} in {} objects", show_size(info.chunk_bytes), info.chunk_objects));
    let ratio = info.deduplication_ratio.map_or_else(String::new, |ratio| {
        format!(", {ratio:.1} times what is stored (holes, deduplication and compression)")
    });
    lines.push(format!("disks       {} in all backups{ratio}", show_size(info.logical_bytes)));
    lines.join("\n")
}
