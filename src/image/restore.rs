//! From a chain back to a disk.

use super::{
    ChainDirectory, ImageError, ImageSink, Manifest, RawSink,
    qcow2::{ChainReader, Qcow2Options, Qcow2Writer},
    verify::volume_chain,
};
use std::{
    fs::{self, OpenOptions},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

/// The format of what is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RestoreFormat {
    /// The disk's bytes, sparse.
    #[default]
    Raw,
    /// One qcow2 image that stands on nothing.
    Qcow2,
}

/// What to restore.
#[derive(Debug)]
pub struct RestoreRequest<'a> {
    /// Where the backup is.
    pub directory: &'a ChainDirectory,
    /// The backup.
    pub manifest: &'a Manifest,
    /// The volume.
    pub volume: &'a str,
    /// A file that does not exist, or a block device.
    pub target: &'a Path,
    /// For files; devices are always raw.
    pub format: RestoreFormat,
    /// Overwrite what exists.
    pub force: bool,
    /// Bytes restored so far.
    pub progress: &'a AtomicU64,
    /// Set from elsewhere: stop.
    pub cancelled: &'a AtomicBool,
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct RestoredVolume {
    /// The volume.
    pub volume: String,
    /// Where it is now.
    pub path: PathBuf,
    /// Bytes of the disk.
    pub virtual_size: u64,
}

/// Restores one volume. The whole chain is checked, content included, before the first byte is written. A file gets
/// its name only when it is complete and durable.
pub fn restore_volume(request: &RestoreRequest<'_>) -> Result<RestoredVolume, ImageError> {
    let target = request.target;
    let existing = fs::metadata(target).ok();
    let is_device = existing.as_ref().is_some_and(|metadata| metadata.file_type().is_block_device());
    refuse_inside(request.directory, target)?;
    // A device always exists; it is named on purpose.
    if existing.is_some() && !is_device && !request.force {
        return Err(ImageError::Exists { path: target.to_owned() });
    }
    let links = volume_chain(request.directory, request.manifest, request.volume)?;
    for link in &links {
        interrupted(request)?;
        link.check_digest()?;
    }
    let mut reader = ChainReader::new(links.into_iter().map(|link| link.image).collect());
    let size = reader.size();
    if is_device {
        // For block devices O_EXCL says: not while it is mounted or otherwise claimed (`open(2)`).
        let exclusive = rustix::fs::OFlags::EXCL.bits().cast_signed();
        let device = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(target);
        let device = device.map_err(ImageError::io("open (is it mounted?)", target))?;
        copy(&mut reader, Box::new(RawSink::device(device, target.to_owned(), size)?), request)?;
    } else {
        let mut partial = target.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let result = restore_file(&mut reader, &partial, size, request);
        if let Err(error) = result {
            let _ = fs::remove_file(&partial);
            return Err(error);
        }
    }
    Ok(RestoredVolume { volume: request.volume.to_owned(), path: target.to_owned(), virtual_size: size })
}

/// A target among the backups would overwrite one, or be taken for one.
fn refuse_inside(directory: &ChainDirectory, target: &Path) -> Result<(), ImageError> {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = parent.canonicalize().map_err(ImageError::io("open", parent))?;
    let real = target.canonicalize().unwrap_or_else(|_| parent.clone());
    if parent.starts_with(directory.path()) || real.starts_with(directory.path()) {
        return Err(ImageError::InsideBackups { path: target.to_owned() });
    }
    Ok(())
}

fn restore_file(
    reader: &mut ChainReader,
    partial: &Path,
    size: u64,
    request: &RestoreRequest<'_>,
) -> Result<(), ImageError> {
    let _ = fs::remove_file(partial);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(partial);
    let file = file.map_err(ImageError::io("create", partial))?;
    let sink: Box<dyn ImageSink> = match request.format {
        RestoreFormat::Raw => Box::new(RawSink::new(file, partial.to_owned(), size)?),
        RestoreFormat::Qcow2 => {
            let options = Qcow2Options { virtual_size: size, backing: None, compress: false };
            Box::new(Qcow2Writer::new(file, partial.to_owned(), options))
        }
    };
    copy(reader, sink, request)?;
    if request.force {
        fs::rename(partial, request.target).map_err(ImageError::io("rename", partial))?;
    } else {
        // Whatever appeared at the target meanwhile is not ours to replace.
        fs::hard_link(partial, request.target).map_err(ImageError::io("create", request.target))?;
        fs::remove_file(partial).map_err(ImageError::io("remove", partial))?;
    }
    let parent = request.target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let handle = fs::File::open(parent).map_err(ImageError::io("open", parent))?;
    handle.sync_all().map_err(ImageError::io("write", parent))
}

fn copy(
    reader: &mut ChainReader,
    mut sink: Box<dyn ImageSink>,
    request: &RestoreRequest<'_>,
) -> Result<(), ImageError> {
    while let Some(piece) = reader.next_piece()? {
        interrupted(request)?;
        sink.write(piece)?;
        request.progress.store(reader.position(), Ordering::Relaxed);
    }
    sink.finish().map(drop)
}

fn interrupted(request: &RestoreRequest<'_>) -> Result<(), ImageError> {
    if request.cancelled.load(Ordering::Relaxed) { Err(ImageError::Interrupted) } else { Ok(()) }
}
