//! Disks of a stopped VM, read from where they are mounted.

use super::{MoverError, PullProgress, PullSummary, config::OfflineVolume};
use crate::{
    extent::{ByteRange, Piece},
    image::{ImageError, ImageSink},
};
use bytes::Bytes;
use rustix::fs::{Mode, OFlags, SeekFrom};
use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, FileTypeExt},
    path::Path,
    sync::atomic::Ordering,
};

/// Read at once, in bytes.
const READ: u64 = 1 << 20;
/// The disk on a claim with a file system (KubeVirt, `pkg/container-disk`, `GetFilesystemDiskPath`).
const DISK_IMAGE: &str = "disk.img";

/// Opens a disk to read: a block device, or `disk.img` in a directory. Links are refused: the directory is the guest
/// owner's, who must not make us read another file.
pub(super) fn open(volume: &OfflineVolume) -> Result<File, MoverError> {
    let failed = |source: io::Error| MoverError::Offline { volume: volume.name.clone(), source };
    let path = Path::new(&volume.path);
    let metadata = path.symlink_metadata().map_err(failed)?;
    let path = if metadata.is_dir() { path.join(DISK_IMAGE) } else { path.to_owned() };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file: File = rustix::fs::open(&path, flags, Mode::empty()).map_err(|error| failed(error.into()))?.into();
    let kind = file.metadata().map_err(failed)?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(file);
    }
    Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a block device")))
}

/// Bytes of a disk that is a file or a block device.
pub fn disk_size(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// Reads a whole disk into a sink, holes as zeroes. `unit`: as in [`super::PullRequest`]. Blocks for as long as disk and
/// target do. `given_up` is asked now and then.
pub(super) fn read_all(
    file: &File,
    unit: u64,
    mut sink: Box<dyn ImageSink>,
    progress: &PullProgress,
    given_up: impl Fn() -> bool,
) -> Result<PullSummary, ImageError> {
    let failed = || ImageError::io("read", "the disk of the stopped VM");
    let size = disk_size(file).map_err(failed())?;
    progress.total.store(size, Ordering::Relaxed);
    let (mut at, mut read_bytes) = (0, 0);
    while at < size {
        let data = data_after(file, at, size).map_err(failed())?;
        // Outwards to whole units; what is before is a hole.
        let start = (data.start / unit * unit).max(at).min(size);
        let end = data.end.div_ceil(unit).saturating_mul(unit).min(size);
        if let Some(hole) = ByteRange::new(at, start) {
            sink.write(Piece::Zero(hole))?;
        }
        at = start;
        while at < end {
            if given_up() {
                return Err(failed()(io::ErrorKind::Interrupted.into()));
            }
            let mut bytes = vec![0; READ.min(end - at) as usize];
            file.read_exact_at(&mut bytes, at).map_err(failed())?;
            let length = bytes.len() as u64;
            sink.write(Piece::Data { offset: at, bytes: Bytes::from(bytes) })?;
            at += length;
            read_bytes += length;
            progress.read.store(at, Ordering::Relaxed);
        }
    }
    progress.read.store(size, Ordering::Relaxed);
    Ok(PullSummary { size, dirty_bytes: size, read_bytes, sink: sink.finish()? })
}

/// The next data at or after `at`; an empty range at the end where there is none. Where holes cannot be asked for,
/// everything is data.
fn data_after(file: &File, at: u64, size: u64) -> io::Result<std::ops::Range<u64>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(size..size),
        Err(rustix::io::Errno::INVAL) => return Ok(at..size),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(start.min(size)..end.min(size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::SinkSummary;
    use std::{io::Write, sync::Arc, sync::Mutex};

    struct Taken(Arc<Mutex<Vec<u8>>>);

    impl ImageSink for Taken {
        fn write(&mut self, piece: Piece) -> Result<(), ImageError> {
            let mut taken = self.0.lock().unwrap();
            assert_eq!(piece.range().unwrap().start(), taken.len() as u64, "nothing is left out");
            match piece {
                Piece::Data { bytes, .. } => taken.extend_from_slice(&bytes),
                Piece::Zero(range) => {
                    let end = taken.len() + range.len() as usize;
                    taken.resize(end, 0);
                }
            }
            Ok(())
        }

        fn finish(self: Box<Self>) -> Result<SinkSummary, ImageError> {
            Ok(SinkSummary { data_bytes: 0, zero_bytes: 0, new_bytes: 0, stored_bytes: 0, content: None })
        }
    }

    fn volume(path: &Path) -> OfflineVolume {
        OfflineVolume { name: "root".into(), path: path.display().to_string() }
    }

    #[test]
    fn a_sparse_disk_is_read_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let mut image = File::create(directory.path().join(DISK_IMAGE)).unwrap();
        let size = (5 << 20) + 4096;
        image.set_len(size).unwrap();
        image.write_all_at(&vec![7; 100_000], 1_234_567).unwrap();
        image.write_all_at(&[8; 4096], size - 4096).unwrap();
        image.flush().unwrap();
        let file = open(&volume(directory.path())).unwrap();
        let taken = Arc::new(Mutex::new(Vec::new()));
        let progress = PullProgress::default();
        let summary = read_all(&file, 64 << 10, Box::new(Taken(Arc::clone(&taken))), &progress, || false).unwrap();
        assert_eq!(*taken.lock().unwrap(), std::fs::read(directory.path().join(DISK_IMAGE)).unwrap());
        assert_eq!(summary.size, size);
        assert!(summary.read_bytes < 1 << 20, "{} bytes read of a sparse disk", summary.read_bytes);
        let given_up = read_all(&file, 64 << 10, Box::new(Taken(Arc::default())), &progress, || true);
        assert!(given_up.is_err());
    }

    #[test]
    fn links_and_pipes_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let secret = directory.path().join("secret");
        std::fs::write(&secret, "x").unwrap();
        let planted = directory.path().join("planted");
        std::fs::create_dir(&planted).unwrap();
        std::os::unix::fs::symlink(&secret, planted.join(DISK_IMAGE)).unwrap();
        assert!(open(&volume(&planted)).is_err());
        assert!(open(&volume(&directory.path().join("missing"))).is_err());
        std::fs::remove_file(planted.join(DISK_IMAGE)).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, planted.join(DISK_IMAGE), Mode::RUSR).unwrap();
        assert!(open(&volume(&planted)).is_err(), "and it does not hang");
    }
}
