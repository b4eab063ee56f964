//! `virt-fleece serve-nbd`

use super::{
    CliError,
    output::Output,
    repository_args::{REPOSITORY_HELP, RepositoryArgs},
    size::parse_size,
};
use crate::{
    extent::{ByteRange, Piece, Run},
    nbd::{Export, PrivateSocket, Source, Unserved, Until, serve},
    repository::{Manifest, RandomReader, Repository, RepositoryError, RepositorySession, StoredVolume, Unreadable},
};
use clap::Args;
use serde::Serialize;
use std::{
    collections::HashSet,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// Failures that are remembered so as to be logged once.
const REMEMBERED: usize = 4096;
/// How long the repository may take to hear that it ended; otherwise a prune finds out.
const END_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{REPOSITORY_HELP}"))]
pub(super) struct ServeArgs {
    #[command(flatten)]
    repository: RepositoryArgs,
    /// The VM; can be left out when there is only one, or --backup names an id
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// The point to serve
    #[arg(long, value_name = "ID", default_value = "latest")]
    backup: String,
    /// The volume; can be left out when there is only one
    #[arg(long, value_name = "NAME")]
    volume: Option<String>,
    /// Unix socket to listen on, for your user only; what a dead server left there is replaced
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// End when the last client has left (each run of qemu-img is a client)
    #[arg(long)]
    once: bool,
    /// Memory for chunks that were read
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size)]
    cache: u64,
    /// Form of the result
    #[arg(short, long, value_enum, default_value_t)]
    pub(super) output: Output,
}

const EXAMPLES: &str = "\
The volume is served read-only until SIGINT or SIGTERM, to any number of clients. When it is ready, its NBD address is \
printed on standard output. Chunks are fetched, decrypted and checked as clients read them: one that is damaged answers \
with an I/O error (EIO) at its bytes and is named on standard error; everything else can still be read. While it runs, \
no prune removes what it serves.

Examples:
  virt-fleece serve-nbd --repository s3://backups/prod --vm web --volume rootdisk \\
      --socket /run/web.sock &
  URI='nbd+unix:///rootdisk?socket=/run/web.sock'

Copy it, or see where it has data:
  nbdcopy \"$URI\" restored.raw
  qemu-img convert -f raw -O qcow2 \"$URI\" restored.qcow2
  qemu-img map -f raw \"$URI\"

Boot it now, with what the guest writes in an overlay:
  qemu-img create -f qcow2 -F raw -b \"$URI\" overlay.qcow2
  qemu-system-x86_64 -m 2G -drive file=overlay.qcow2,if=virtio,format=qcow2

Take single files out of it:
  guestfish --ro --format=raw -a 'nbd://?socket=/run/web.sock' -i copy-out /etc/fstab .
  modprobe nbd; qemu-nbd --read-only --format=raw --connect=/dev/nbd0 \"$URI\"
  mount -o ro /dev/nbd0p1 /mnt

One copy, and the server ends by itself:
  virt-fleece serve-nbd … --once & nbdcopy \"$URI\" restored.raw";

/// What is said when the server is ready.
#[derive(Debug, Serialize)]
struct Ready {
    uri: String,
    socket: PathBuf,
    export: String,
    vm: String,
    backup: String,
    point_in_time: jiff::Timestamp,
    volume: String,
    virtual_size: u64,
}

pub(super) async fn run(args: ServeArgs) -> Result<ExitCode, CliError> {
    // From here on a signal ends it in order.
    let mut signal = std::pin::pin!(super::backup_run::signal());
    let repository = tokio::select! {
        repository = args.repository.open() => repository?,
        _ = &mut signal => return Err(RepositoryError::Interrupted.into()),
    };
    let session = protect(&repository).await?;
    let opened = tokio::select! {
        opened = open(&args, repository, session.as_ref()) => opened,
        _ = &mut signal => Err(RepositoryError::Interrupted.into()),
    };
    let served = match opened {
        Ok((export, ready)) => match PrivateSocket::bind(&args.socket) {
            Ok(socket) => {
                args.output.result(&ready, || ready.uri.clone());
                let until = if args.once { Until::ClientsLeft } else { Until::Told };
                serve(&socket, Arc::new(export), until, async {
                    signal.await;
                })
                .await;
                Ok(ExitCode::SUCCESS)
            }
            Err(error) => Err(error.into()),
        },
        Err(error) => Err(error),
    };
    if let Some(session) = session {
        let _ = tokio::time::timeout(END_LIMIT, session.end()).await;
    }
    served
}

/// Keeps prunes from what is served. To be called before the backup is looked for: a prune that begins later waits for
/// this session. One that began earlier does not: the session adopts the backup.
async fn protect(repository: &Arc<Repository>) -> Result<Option<RepositorySession>, CliError> {
    match RepositorySession::start(Arc::clone(repository)).await {
        Ok(session) => Ok(Some(session)),
        // Whoever may only read shall be able to restore.
        Err(error @ RepositoryError::Storage { .. }) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the repository cannot be written: a prune does not know what is served, and may remove it once the \
                 backup is forgotten"
            );
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

async fn open(
    args: &ServeArgs,
    repository: Arc<Repository>,
    session: Option<&RepositorySession>,
) -> Result<(Export<ServedVolume>, Ready), CliError> {
    let vm = match &args.vm {
        None if args.backup == "latest" => Some(only_vm(repository.vms().await?)?),
        given => given.clone(),
    };
    let manifest = repository.find(vm.as_deref(), &args.backup).await?;
    if let Some(session) = session
        && !session.adopt(&manifest).await?
    {
        let known = "others; it was forgotten just now".into();
        return Err(RepositoryError::NotFound { what: format!("backup {}", manifest.backup.id), known }.into());
    }
    let volume = find_volume(&manifest, args.volume.as_deref())?;
    let reader = RandomReader::new(repository, volume, args.cache)?;
    let record = &manifest.backup;
    let export = Export {
        name: volume.name.clone(),
        description: format!("{} of {} as of {} ({})", volume.name, record.vm, record.point_in_time, record.id),
        source: ServedVolume { reader, failed: Mutex::default() },
    };
    let socket = std::path::absolute(&args.socket).unwrap_or_else(|_| args.socket.clone());
    let ready = Ready {
        uri: uri(&volume.name, &socket),
        socket,
        export: volume.name.clone(),
        vm: record.vm.clone(),
        backup: record.id.to_string(),
        point_in_time: record.point_in_time,
        volume: volume.name.clone(),
        virtual_size: volume.virtual_size,
    };
    Ok((export, ready))
}

fn only_vm(vms: Vec<String>) -> Result<String, CliError> {
    match <[String; 1]>::try_from(vms) {
        Ok([vm]) => Ok(vm),
        Err(vms) if vms.is_empty() => Err(CliError::Usage("there is no backup in the repository".into())),
        Err(vms) => Err(CliError::Usage(format!("name the VM with --vm; there is: {}", vms.join(", ")))),
    }
}

fn find_volume<'a>(manifest: &'a Manifest, name: Option<&str>) -> Result<&'a StoredVolume, CliError> {
    let known = || manifest.volumes.iter().map(|volume| volume.name.as_str()).collect::<Vec<_>>().join(", ");
    match (name, manifest.volumes.as_slice()) {
        (None, [volume]) => Ok(volume),
        (None, _) => Err(CliError::Usage(format!("name the volume with --volume; there is: {}", known()))),
        (Some(name), _) => manifest.volume(name).ok_or_else(|| {
            let what = format!("volume `{name}` in backup {}", manifest.backup.id);
            RepositoryError::NotFound { what, known: known() }.into()
        }),
    }
}

/// The address as NBD clients take it.
fn uri(export: &str, socket: &std::path::Path) -> String {
    use std::{fmt::Write, os::unix::ffi::OsStrExt};
    let encode = |bytes: &[u8], keep: &[u8]| {
        bytes.iter().fold(String::new(), |mut text, byte| {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) || keep.contains(byte) {
                text.push(char::from(*byte));
            } else {
                let _ = write!(text, "%{byte:02X}");
            }
            text
        })
    };
    let socket = encode(socket.as_os_str().as_bytes(), b"/");
    format!("nbd+unix:///{}?socket={socket}", encode(export.as_bytes(), b""))
}

/// A volume of a repository as the NBD server wants it.
#[derive(Debug)]
struct ServedVolume {
    reader: Arc<RandomReader>,
    /// What has been logged.
    failed: Mutex<HashSet<String>>,
}

impl ServedVolume {
    fn log(&self, error: &Unreadable) -> Unserved {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.len() >= REMEMBERED {
            failed.clear();
        }
        // The message names the object.
        if failed.insert(error.source.to_string()) {
            tracing::error!(
                offset = error.offset,
                error = &error.source as &dyn std::error::Error,
                "a part of the volume cannot be read"
            );
        }
        Unserved { offset: error.offset }
    }
}

impl Source for ServedVolume {
    fn size(&self) -> u64 {
        self.reader.shape().size
    }

    fn preferred_block(&self) -> u32 {
        self.reader.shape().chunk_size as u32
    }

    async fn read(&self, range: ByteRange) -> Result<Vec<Piece>, Unserved> {
        self.reader.read(range).await.map_err(|error| self.log(&error))
    }

    async fn zeroes(&self, range: ByteRange, most: usize) -> Result<Vec<Run>, Unserved> {
        self.reader.zeroes(range, most).await.map_err(|error| self.log(&error))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn addresses_are_encoded() {
        assert_eq!(super::uri("disk-1", Path::new("/run/a.sock")), "nbd+unix:///disk-1?socket=/run/a.sock");
        assert_eq!(super::uri("a/b c", Path::new("/tmp/x&y")), "nbd+unix:///a%2Fb%20c?socket=/tmp/x%26y");
    }
}
