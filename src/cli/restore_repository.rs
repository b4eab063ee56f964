//! `virt-fleece restore --repository`

use super::{
    CliError,
    restore::{Format, RestoreArgs, Restored, blocking, with_progress},
};
use crate::{
    extent::{ByteRange, Piece},
    image::{ImageError, RestoreTarget, RestoredVolume, is_device, open_device, restore_source},
    repository::{
        CheckOptions, CheckProgress, Manifest, Repository, RepositoryError, RepositorySource, VolumeReader,
        restore_in_place,
    },
};
use std::{
    fs::OpenOptions,
    io::{IsTerminal, Seek, SeekFrom, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
};

pub(super) async fn restore(
    args: RestoreArgs,
    repository: Arc<Repository>,
    cancelled: Arc<AtomicBool>,
) -> Result<Restored, CliError> {
    let manifest = find(&args, &repository).await?;
    let names: Vec<&str> = manifest.volumes.iter().map(|volume| volume.name.as_str()).collect();
    if let Some(volume) = &args.volume
        && manifest.volume(volume).is_none()
    {
        return Err(RepositoryError::NotFound { what: format!("volume `{volume}`"), known: names.join(", ") }.into());
    }
    if args.target == Path::new("-") {
        return to_stdout(&args, repository, &manifest).await;
    }
    // What exists is changed bit by bit: not before everything is known to be there.
    if args.in_place || is_device(&args.target) {
        check_presence(&args, &repository, &manifest).await?;
    }
    if args.in_place {
        return in_place(&args, repository, &manifest, cancelled).await;
    }
    let mut volumes = Vec::new();
    for (volume, path) in args.targets(&names)? {
        let source = source(&repository, &manifest, &volume)?;
        let size = manifest.volume(&volume).map_or(0, |volume| volume.virtual_size);
        let (format, force) = (args.format.format().0, args.force);
        let protected = repository.storage().directory().map(Path::to_owned);
        let cancelled = Arc::clone(&cancelled);
        let restored = blocking(move || {
            let mut source = source;
            let done = AtomicU64::new(0);
            let target = RestoreTarget {
                path: &path,
                format,
                force,
                protected: protected.as_deref(),
                progress: &done,
                cancelled: &cancelled,
            };
            Ok(with_progress(&volume, size, &done, || restore_source(&mut source, &volume, &target))?)
        });
        volumes.push(restored.await?);
    }
    Ok(Restored::new(&manifest.backup, volumes))
}

async fn find(args: &RestoreArgs, repository: &Arc<Repository>) -> Result<Manifest, CliError> {
    let by_id = args.backup() != "latest";
    let vm = match args.vm() {
        Some(vm) => Some(vm.to_owned()),
        None if by_id => None,
        None => Some(RestoreArgs::only_vm(&repository.vms().await?)?),
    };
    Ok(repository.find(vm.as_deref(), args.backup()).await?)
}

fn source(repository: &Arc<Repository>, manifest: &Manifest, volume: &str) -> Result<RepositorySource, CliError> {
    let stored = manifest.volume(volume);
    let missing = || RepositoryError::NotFound { what: format!("volume `{volume}`"), known: "others".into() };
    let reader = VolumeReader::new(Arc::clone(repository), stored.ok_or_else(missing)?)?;
    Ok(RepositorySource::new(&reader))
}

async fn check_presence(args: &RestoreArgs, repository: &Arc<Repository>, manifest: &Manifest) -> Result<(), CliError> {
    let options = CheckOptions {
        vm: Some(manifest.backup.vm.clone()),
        backup: Some(manifest.backup.id.to_string()),
        read_percent: 0,
    };
    let never = AtomicBool::new(false);
    let checked = repository.check(&options, &CheckProgress::default(), &never).await?;
    match checked.backups.iter().flat_map(|backup| &backup.problems).next() {
        Some(problem) => {
            let object = format!("backup {} (nothing was written to {})", manifest.backup.id, args.target.display());
            Err(RepositoryError::Damaged { object, detail: problem.clone() }.into())
        }
        None => Ok(()),
    }
}

async fn in_place(
    args: &RestoreArgs,
    repository: Arc<Repository>,
    manifest: &Manifest,
    cancelled: Arc<AtomicBool>,
) -> Result<Restored, CliError> {
    let path = &args.target;
    let volume = args.volume.as_deref().and_then(|volume| manifest.volume(volume));
    let volume = volume.ok_or_else(|| CliError::Usage("--in-place needs --volume".into()))?;
    if args.format != Format::Raw {
        return Err(CliError::Usage("--in-place works on raw images and devices".into()));
    }
    let mut file = if is_device(path) {
        open_device(path)?
    } else {
        OpenOptions::new().read(true).write(true).open(path).map_err(ImageError::io("open", path))?
    };
    let available = file.seek(SeekFrom::End(0)).map_err(ImageError::io("measure", path))?;
    if available < volume.virtual_size {
        return Err(ImageError::TooSmall { path: path.clone(), available, needed: volume.virtual_size }.into());
    }
    let reader = VolumeReader::new(repository, volume)?;
    let (done, name) = (Arc::new(AtomicU64::new(0)), volume.name.clone());
    let shown = tokio::spawn({
        let (done, size, name) = (Arc::clone(&done), volume.virtual_size, name.clone());
        async move {
            let mut progress = super::progress::Progress::new("restoring", [name]);
            loop {
                progress.set(0, done.load(std::sync::atomic::Ordering::Relaxed), size);
                progress.tick();
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        }
    });
    let result = restore_in_place(&reader, Arc::new(file), &done, &cancelled).await;
    shown.abort();
    let restored = RestoredVolume { volume: name, path: path.clone(), virtual_size: volume.virtual_size };
    Ok(Restored { in_place: Some(result?), ..Restored::new(&manifest.backup, vec![restored]) })
}

async fn to_stdout(args: &RestoreArgs, repository: Arc<Repository>, manifest: &Manifest) -> Result<Restored, CliError> {
    let volume = args.volume.clone().ok_or_else(|| CliError::Usage("`--output -` needs --volume".into()))?;
    if args.format != Format::Raw {
        return Err(CliError::Usage(
            "standard output takes raw images only: a qcow2 file is not written in order".into(),
        ));
    }
    if std::io::stdout().is_terminal() {
        return Err(CliError::Usage("standard output is a terminal: redirect it, or pipe it on".into()));
    }
    let mut source = source(&repository, manifest, &volume)?;
    let size = manifest.volume(&volume).map_or(0, |volume| volume.virtual_size);
    let name = volume.clone();
    // A reader that is gone ends it by an error of the write.
    blocking(move || {
        use crate::image::PieceSource;
        let done = AtomicU64::new(0);
        with_progress(&name, size, &done, || {
            let mut sink = StdoutSink(std::io::stdout().lock());
            while let Some(piece) = source.next_piece()? {
                let end = piece.range().map_or(0, ByteRange::end);
                sink.write(piece)?;
                done.store(end, std::sync::atomic::Ordering::Relaxed);
            }
            sink.finish()
        })?;
        Ok(())
    })
    .await?;
    let restored = RestoredVolume { volume, path: "-".into(), virtual_size: size };
    Ok(Restored::new(&manifest.backup, vec![restored]))
}

struct StdoutSink(std::io::StdoutLock<'static>);

impl StdoutSink {
    fn put(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.0.write_all(bytes).map_err(ImageError::io("write", "standard output"))
    }

    fn write(&mut self, piece: Piece) -> Result<(), ImageError> {
        match piece {
            Piece::Data { bytes, .. } => self.put(&bytes),
            Piece::Zero(range) => {
                let zeroes = vec![0; 1 << 20];
                let mut left = range.len();
                while left > 0 {
                    let now = left.min(zeroes.len() as u64);
                    self.put(&zeroes[..now as usize])?;
                    left -= now;
                }
                Ok(())
            }
        }
    }

    fn finish(mut self) -> Result<(), ImageError> {
        self.0.flush().map_err(ImageError::io("write", "standard output"))
    }
}
