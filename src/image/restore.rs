//! From a chain back to a disk.

use super::{
    ChainDirectory, ImageError, ImageSink, Manifest, RawSink,
    qcow2::{ChainReader, Qcow2Options, Qcow2Writer},
    verify::volume_chain,
};
use crate::extent::{ByteRange, Piece};
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

/// The content of a disk, read in order. Its calls block.
pub trait PieceSource: Send {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// The next piece, proved to be what was backed up; `None` at the end. Pieces cover the whole disk.
    fn next_piece(&mut self) -> Result<Option<Piece>, ImageError>;

    /// Instead: shows all parts to `take`, in any order and from several threads at once, until it refuses one. `None`
    /// from a source that has but one order.
    fn scatter(&mut self, _take: Take<'_>) -> Option<Result<(), ImageError>> {
        None
    }
}

/// A part of a disk, as [`PieceSource::scatter`] shows it.
#[derive(Debug)]
pub enum Part<'a> {
    /// Bytes at an offset.
    Data {
        /// Byte offset.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// A range that reads as zeroes.
    Zero(ByteRange),
}

impl Part<'_> {
    fn length(&self) -> u64 {
        match self {
            Self::Data { bytes, .. } => bytes.len() as u64,
            Self::Zero(range) => range.len(),
        }
    }
}

/// Who takes parts.
pub type Take<'a> = &'a (dyn Fn(Part<'_>) -> Result<(), ImageError> + Sync);

impl PieceSource for ChainReader {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn next_piece(&mut self) -> Result<Option<Piece>, ImageError> {
        Self::next_piece(self)
    }
}

/// Where to restore to.
#[derive(Debug, Clone, Copy)]
pub struct RestoreTarget<'a> {
    /// A file that does not exist, or a block device.
    pub path: &'a Path,
    /// For files; devices are always raw.
    pub format: RestoreFormat,
    /// Overwrite what exists.
    pub force: bool,
    /// Directory of the backups, where nothing may be restored to.
    pub protected: Option<&'a Path>,
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

/// Restores one volume of a chain. The whole chain is checked, content included, before the first byte is written.
pub fn restore_volume(
    directory: &ChainDirectory,
    manifest: &Manifest,
    volume: &str,
    target: &RestoreTarget<'_>,
) -> Result<RestoredVolume, ImageError> {
    check_target(target)?;
    let links = volume_chain(directory, manifest, volume)?;
    for link in &links {
        interrupted(target)?;
        link.check_digest()?;
    }
    let mut reader = ChainReader::new(links.into_iter().map(|link| link.image).collect());
    restore_source(&mut reader, volume, target)
}

/// Whether a target can be restored to, before anything is read.
pub fn check_target(target: &RestoreTarget<'_>) -> Result<(), ImageError> {
    if let Some(protected) = target.protected {
        refuse_inside(protected, target.path)?;
    }
    // A device always exists; it is named on purpose.
    if target.path.exists() && !is_device(target.path) && !target.force {
        return Err(ImageError::Exists { path: target.path.to_owned() });
    }
    Ok(())
}

/// Whether this is a block device.
pub fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// Opens a block device that nobody uses.
pub fn open_device(path: &Path) -> Result<fs::File, ImageError> {
    // For block devices O_EXCL says: not while it is mounted or otherwise claimed (`open(2)`).
    let exclusive = rustix::fs::OFlags::EXCL.bits().cast_signed();
    let device = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(path);
    device.map_err(ImageError::io("open (is it mounted?)", path))
}

/// Restores from a source. A file gets its name only when it is complete and durable.
pub fn restore_source(
    source: &mut dyn PieceSource,
    volume: &str,
    target: &RestoreTarget<'_>,
) -> Result<RestoredVolume, ImageError> {
    check_target(target)?;
    let (path, size) = (target.path, source.size());
    if is_device(path) {
        copy_raw(source, RawSink::device(open_device(path)?, path.to_owned(), size)?, target)?;
    } else {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        if let Err(error) = restore_file(source, &partial, target) {
            let _ = fs::remove_file(&partial);
            return Err(error);
        }
    }
    Ok(RestoredVolume { volume: volume.to_owned(), path: path.to_owned(), virtual_size: size })
}

/// A target among the backups would overwrite one, or be taken for one.
fn refuse_inside(directory: &Path, target: &Path) -> Result<(), ImageError> {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = parent.canonicalize().map_err(ImageError::io("open", parent))?;
    let real = target.canonicalize().unwrap_or_else(|_| parent.clone());
    if parent.starts_with(directory) || real.starts_with(directory) {
        return Err(ImageError::InsideBackups { path: target.to_owned() });
    }
    Ok(())
}

fn restore_file(source: &mut dyn PieceSource, partial: &Path, target: &RestoreTarget<'_>) -> Result<(), ImageError> {
    let size = source.size();
    let _ = fs::remove_file(partial);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(partial);
    let file = file.map_err(ImageError::io("create", partial))?;
    match target.format {
        RestoreFormat::Raw => copy_raw(source, RawSink::new(file, partial.to_owned(), size)?, target)?,
        RestoreFormat::Qcow2 => {
            let options = Qcow2Options { virtual_size: size, backing: None, compress: false };
            copy(source, Box::new(Qcow2Writer::new(file, partial.to_owned(), options)), target)?;
        }
    }
    if target.force {
        fs::rename(partial, target.path).map_err(ImageError::io("rename", partial))?;
    } else {
        // Whatever appeared at the target meanwhile is not ours to replace.
        fs::hard_link(partial, target.path).map_err(ImageError::io("create", target.path))?;
        fs::remove_file(partial).map_err(ImageError::io("remove", partial))?;
    }
    let parent = target.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let handle = fs::File::open(parent).map_err(ImageError::io("open", parent))?;
    handle.sync_all().map_err(ImageError::io("write", parent))
}

/// In whatever order the source likes best.
fn copy_raw(source: &mut dyn PieceSource, sink: RawSink, target: &RestoreTarget<'_>) -> Result<(), ImageError> {
    let scattered = source.scatter(&|part| {
        interrupted(target)?;
        sink.place(&part)?;
        target.progress.fetch_add(part.length(), Ordering::Relaxed);
        Ok(())
    });
    match scattered {
        Some(done) => done.and_then(|()| Box::new(sink).finish().map(drop)),
        None => copy(source, Box::new(sink), target),
    }
}

fn copy(
    source: &mut dyn PieceSource,
    mut sink: Box<dyn ImageSink>,
    target: &RestoreTarget<'_>,
) -> Result<(), ImageError> {
    while let Some(piece) = source.next_piece()? {
        interrupted(target)?;
        let end = piece.range().map_or(0, ByteRange::end);
        sink.write(piece)?;
        target.progress.store(end, Ordering::Relaxed);
    }
    sink.finish().map(drop)
}

fn interrupted(target: &RestoreTarget<'_>) -> Result<(), ImageError> {
    if target.cancelled.load(Ordering::Relaxed) { Err(ImageError::Interrupted) } else { Ok(()) }
}
