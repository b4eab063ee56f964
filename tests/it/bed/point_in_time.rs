//! The oracle: which instant of the writer's stream a set of restored disks shows, if it is one at all.

use std::collections::BTreeSet;

use super::oracle::{Op, Replay, SECTOR, Stamp, Stream, sector_of};

/// How far behind the newest stamp the instant may lie: zeroing writes leave no stamp, nor do data writes zeroed over.
const STAMPLESS: u64 = 64;

/// The instant that a set of disks shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PointInTime {
    /// One for each thread.
    pub(crate) threads: Vec<Cut>,
}

/// Where one thread was cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut {
    /// The disks hold exactly the writes 1 to this number.
    pub(crate) number: u64,
    /// Greatest number of which that is true as well: zeroing what is zero already leaves no trace.
    pub(crate) latest: u64,
    /// Write `number + 1` is there in a part of its sectors: it was under way and the block layer had split it.
    pub(crate) torn: bool,
}

impl PointInTime {
    /// Finds the instant of disks that were empty before the stream's first write.
    ///
    /// The error names the first difference and what it breaks.
    pub(crate) fn find(images: &[impl AsRef<[u8]>], stream: &Stream) -> Result<Self, String> {
        Self::find_after(images, &Replay::new(stream))
    }

    /// Finds the instant, known not to be before `earlier`'s: an earlier backup's, or disks with content at the start.
    pub(crate) fn find_after(images: &[impl AsRef<[u8]>], earlier: &Replay) -> Result<Self, String> {
        let stream = earlier.stream();
        let images: Vec<&[u8]> = images.iter().map(AsRef::as_ref).collect();
        assert_eq!(images.len(), stream.disks.len(), "one image per disk of the stream");
        for (disk, (image, size)) in images.iter().zip(&stream.disks).enumerate() {
            if image.len() as u64 != *size {
                return Err(format!("disk {disk} has {} bytes instead of {size}", image.len()));
            }
        }
        let mut replay = earlier.clone();
        let threads =
            (0..stream.threads).map(|thread| find_thread(&images, &mut replay, thread)).collect::<Result<_, _>>()?;
        let found = Self { threads };
        odd_tails(&images, &replay)?;
        Ok(found)
    }

    /// Per thread the number of the last write that is there entirely.
    pub(crate) fn numbers(&self) -> Vec<u64> {
        self.threads.iter().map(|cut| cut.number).collect()
    }

    /// Whether any thread's next write is there in part.
    pub(crate) fn torn(&self) -> bool {
        self.threads.iter().any(|cut| cut.torn)
    }

    /// Asserts that the instant lies between two of the writer's reports, taken before and after the cut.
    ///
    /// One write more than the later report says may be there: the one under way.
    pub(crate) fn assert_between(&self, before: &[u64], after: &[u64]) {
        for (thread, cut) in self.threads.iter().enumerate() {
            let (low, high) = (before[thread], after[thread]);
            assert!(
                cut.latest >= low && cut.number <= high + 1,
                "thread {thread} was cut at {cut:?}, outside {low}..={high} where the writer was"
            );
        }
    }
}

/// The sectors of a thread's regions that differ from the model.
type Differences = BTreeSet<(usize, usize)>;

/// Finds one thread's cut and leaves the model there.
fn find_thread(images: &[&[u8]], replay: &mut Replay, thread: u32) -> Result<Cut, String> {
    let newest = newest_stamp(images, replay.stream(), thread);
    let known = replay.numbers()[thread as usize];
    // One before the newest, because the newest may be the torn one.
    replay.advance(thread, newest.saturating_sub(1).max(known));
    let mut differences = compare(images, replay, thread);
    let mut violation = None;
    let mut torn = None;
    let mut exact: Option<Cut> = None;
    let mut model = replay.clone();
    loop {
        let number = model.numbers()[thread as usize];
        match &mut exact {
            Some(cut) if differences.is_empty() => cut.latest = number,
            Some(cut) => {
                replay.advance(thread, cut.number);
                return Ok(*cut);
            }
            None if differences.is_empty() => exact = Some(Cut { number, latest: number, torn: false }),
            None => {}
        }
        if number >= newest && exact.is_none() && violation.is_none() {
            violation = Some(describe(images, &model, thread, newest, &differences));
        }
        if number >= newest.max(known) + STAMPLESS {
            break;
        }
        let next = replay.stream().op(thread, number + 1);
        if exact.is_none() && torn.is_none() && holds_part_of(images, &next, &differences) {
            torn = Some(Cut { number, latest: number, torn: true });
        }
        model.step(thread);
        for sector in next.sectors() {
            if model.matches(next.disk, sector, images[next.disk]) {
                differences.remove(&(next.disk, sector));
            } else {
                differences.insert((next.disk, sector));
            }
        }
    }
    let cut = exact.or(torn).ok_or_else(|| violation.unwrap_or_default())?;
    replay.advance(thread, cut.number);
    Ok(cut)
}

/// The greatest number among the stamps of a thread that the stream really puts where they are.
fn newest_stamp(images: &[&[u8]], stream: &Stream, thread: u32) -> u64 {
    let mut newest = 0;
    for (disk, image) in images.iter().enumerate() {
        let region = stream.region(thread, disk);
        for offset in region.step_by(SECTOR) {
            let sector = sector_of(image, sector_at(offset));
            if let Some(op) = stream.claimed(thread, disk, offset, sector) {
                newest = newest.max(op.number);
            }
        }
    }
    newest
}

/// Index of the sector at a byte offset.
fn sector_at(offset: u64) -> usize {
    usize::try_from(offset / SECTOR as u64).expect("an image in memory")
}

/// All sectors of a thread's regions that differ from the model.
fn compare(images: &[&[u8]], replay: &Replay, thread: u32) -> Differences {
    let mut differences = Differences::new();
    for (disk, image) in images.iter().enumerate() {
        let region = replay.stream().region(thread, disk);
        for sector in sector_at(region.start)..sector_at(region.end) {
            if !replay.matches(disk, sector, image) {
                differences.insert((disk, sector));
            }
        }
    }
    differences
}

/// Whether all that differs is sectors of `op` as `op` leaves them.
fn holds_part_of(images: &[&[u8]], op: &Op, differences: &Differences) -> bool {
    let mut filled = [0; SECTOR];
    !differences.is_empty()
        && differences.len() <= op.sectors().len()
        && differences.iter().all(|(disk, sector)| {
            op.fill((sector * SECTOR) as u64, &mut filled);
            *disk == op.disk && op.sectors().contains(sector) && filled[..] == *sector_of(images[*disk], *sector)
        })
}

/// Says what the first difference from the model, which holds all writes up to the newest stamp, means.
fn describe(images: &[&[u8]], model: &Replay, thread: u32, newest: u64, differences: &Differences) -> String {
    let Some(&(disk, sector)) = differences.first() else { return String::new() };
    let offset = (sector * SECTOR) as u64;
    let found = sector_of(images[disk], sector);
    let expected = model.owner(disk, sector);
    let wanted = expected.map_or_else(|| "the content from before the stream".to_owned(), |n| format!("write {n}"));
    let shown = match Stamp::read(found) {
        Some(stamp) => format!("{stamp:?}"),
        None if found.iter().all(|byte| *byte == 0) => "zeros".to_owned(),
        None => format!("bytes without a stamp ({:02x?}…)", &found[..8]),
    };
    let kind = match expected {
        Some(number) if held_before(model, thread, number, disk, sector, found) => {
            format!("order/completeness violation: write {number} is missing although write {newest} is there")
        }
        _ => "corruption: no prefix of the stream leaves these bytes here".to_owned(),
    };
    let count = differences.len();
    format!(
        "thread {thread}, disk {disk}, offset {offset:#x}: expected {wanted}, found {shown}; {kind} \
         ({count} sectors differ from writes 1..={newest})"
    )
}

/// Whether the sector held these bytes at some time before write `number`.
fn held_before(model: &Replay, thread: u32, number: u64, disk: usize, sector: usize, found: &[u8]) -> bool {
    let offset = (sector * SECTOR) as u64;
    let mut filled = [0; SECTOR];
    let earlier = |n| Some(model.stream().op(thread, n)).filter(|op| op.disk == disk && op.range().contains(&offset));
    let written = (1..number).filter_map(earlier).any(|op| {
        op.fill(offset, &mut filled);
        filled[..found.len()] == *found
    });
    written || model.matches_base(disk, sector, found)
}

/// Checks the bytes after the last whole sector, which no thread writes.
fn odd_tails(images: &[&[u8]], replay: &Replay) -> Result<(), String> {
    for (disk, image) in images.iter().enumerate() {
        let whole = image.len() / SECTOR;
        if whole * SECTOR < image.len() && !replay.matches(disk, whole, image) {
            return Err(format!("disk {disk}: the {} bytes after the last sector changed", image.len() % SECTOR));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
