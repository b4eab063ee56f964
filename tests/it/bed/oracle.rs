//! The writer's stream, computed: what write number n of thread t puts where.
//!
//! `tests/bed/README.md` specifies the stream. A [`Replay`] remembers per sector only the number of the write it
//! belongs to (1.6 % of the disk) and makes bytes on demand, so a million writes replay in a fraction of a second.

use std::ops::Range;

/// What the writer addresses and stamps.
pub(crate) const SECTOR: usize = 512;
/// [`SECTOR`] in the type of offsets.
const SECTOR_BYTES: u64 = 512;
/// Marks, in a [`Replay`], that the sector's last write zeroed it.
const ZEROED: u64 = 1 << 63;

/// The parameters of a stream: those of the writer's `start` and the disks' sizes.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    /// `seed=`
    pub(crate) seed: u64,
    /// `threads=`
    pub(crate) threads: u32,
    /// `zero=`: per cent of the writes that zero
    pub(crate) zero: u64,
    /// Sizes in bytes of the disks, in the order of `disks=`.
    pub(crate) disks: Vec<u64>,
}

/// One write of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Op {
    /// The thread that issues it.
    pub(crate) thread: u32,
    /// Its number within the thread, from 1.
    pub(crate) number: u64,
    /// Index of the disk.
    pub(crate) disk: usize,
    /// First byte on the disk.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) length: u64,
    /// Whether it zeroes instead of writing data.
    pub(crate) zero: bool,
    /// The stream's random word, from which the data is made.
    a: u64,
}

/// The specification's `mix`.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A count of sectors or a sector's index as an index into memory.
fn index(value: u64) -> usize {
    usize::try_from(value).expect("a disk that fits into memory")
}

impl Stream {
    /// The bytes of a disk that a thread writes.
    pub(crate) fn region(&self, thread: u32, disk: usize) -> Range<u64> {
        let size = self.disks[disk];
        let share = size / u64::from(self.threads) / 4096 * 4096;
        let start = u64::from(thread) * share;
        let end = if thread == self.threads - 1 { size / SECTOR_BYTES * SECTOR_BYTES } else { start + share };
        start..end
    }

    /// Write `number` (from 1) of `thread`.
    pub(crate) fn op(&self, thread: u32, number: u64) -> Op {
        let disk = index((number - 1) % self.disks.len() as u64);
        let a = mix(self.seed ^ mix(u64::from(thread) << 32) ^ mix(number));
        let b = mix(a);
        let c = mix(b);
        let Range { start, end } = self.region(thread, disk);
        let unit = if a.is_multiple_of(8) { 512 } else { 4096 };
        let offset = start + c % ((end - start) / unit) * unit;
        let length = (unit * (1 + b % 8)).min((end - offset) / SECTOR_BYTES * SECTOR_BYTES);
        let zero = (a >> 32) % 100 < self.zero;
        Op { thread, number, disk, offset, length, zero, a }
    }

    /// The thread whose region holds this byte of the disk.
    pub(crate) fn thread_at(&self, disk: usize, offset: u64) -> u32 {
        let share = self.disks[disk] / u64::from(self.threads) / 4096 * 4096;
        u32::try_from(offset / share).unwrap_or(u32::MAX).min(self.threads - 1)
    }

    /// The write that the stamp of this sector of thread `thread` claims, if that write goes there at all.
    pub(crate) fn claimed(&self, thread: u32, disk: usize, offset: u64, sector: &[u8]) -> Option<Op> {
        let stamp = Stamp::read(sector)?;
        let here = stamp.thread == thread && stamp.disk as usize == disk && stamp.offset == offset && stamp.number > 0;
        let op = here.then(|| self.op(thread, stamp.number))?;
        (op.disk == disk && !op.zero && op.range().contains(&offset)).then_some(op)
    }
}

impl Op {
    /// The bytes of the disk that it covers.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.length
    }

    /// Indices of the sectors that it covers.
    pub(crate) fn sectors(&self) -> Range<usize> {
        index(self.offset / SECTOR_BYTES)..index((self.offset + self.length) / SECTOR_BYTES)
    }

    /// What it leaves in the sector at `offset`.
    pub(crate) fn fill(&self, offset: u64, sector: &mut [u8; SECTOR]) {
        if self.zero {
            sector.fill(0);
            return;
        }
        let disk = u32::try_from(self.disk).expect("a handful of disks");
        sector[0..8].copy_from_slice(b"VFWRITE1");
        sector[8..12].copy_from_slice(&self.thread.to_le_bytes());
        sector[12..16].copy_from_slice(&disk.to_le_bytes());
        sector[16..24].copy_from_slice(&self.number.to_le_bytes());
        sector[24..32].copy_from_slice(&offset.to_le_bytes());
        for (i, word) in (0u64..).zip(sector[32..256].chunks_exact_mut(8)) {
            word.copy_from_slice(&mix(self.a ^ offset ^ i).to_le_bytes());
        }
        sector[256..].fill((self.number % 251) as u8 + 1);
    }
}

/// The first 32 bytes of a data sector, as found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Thread.
    pub(crate) thread: u32,
    /// Index of the disk.
    pub(crate) disk: u32,
    /// Number of the write.
    pub(crate) number: u64,
    /// Byte on the disk.
    pub(crate) offset: u64,
}

impl Stamp {
    /// The stamp, if the sector begins with one.
    pub(crate) fn read(sector: &[u8]) -> Option<Self> {
        let rest = sector.strip_prefix(b"VFWRITE1")?;
        let short = |at: usize| Some(u32::from_le_bytes(rest.get(at..at + 4)?.try_into().ok()?));
        let long = |at: usize| Some(u64::from_le_bytes(rest.get(at..at + 8)?.try_into().ok()?));
        Some(Self { thread: short(0)?, disk: short(4)?, number: long(8)?, offset: long(16)? })
    }
}

/// Model disks: what they hold when each thread has done so many writes.
#[derive(Debug, Clone)]
pub(crate) struct Replay {
    /// The stream that is replayed.
    stream: Stream,
    /// Per disk and sector the number of its last write, with [`ZEROED`]; 0: none yet.
    owners: Vec<Vec<u64>>,
    /// Per thread the number of its last write.
    numbers: Vec<u64>,
    /// What the disks held before the first write; zeros when empty.
    base: Vec<Vec<u8>>,
}

impl Replay {
    /// Empty (zeroed) disks.
    pub(crate) fn new(stream: &Stream) -> Self {
        Self::over(stream, Vec::new())
    }

    /// Disks that held these bytes before the first write; zeros when `base` is empty.
    pub(crate) fn over(stream: &Stream, base: Vec<Vec<u8>>) -> Self {
        let owners = stream.disks.iter().map(|size| vec![0; index(size.div_ceil(SECTOR_BYTES))]).collect();
        Self { stream: stream.clone(), owners, numbers: vec![0; stream.threads as usize], base }
    }

    /// The stream that is replayed.
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Per thread the number of its last write.
    pub(crate) fn numbers(&self) -> &[u64] {
        &self.numbers
    }

    /// Does the thread's next write.
    pub(crate) fn step(&mut self, thread: u32) -> Op {
        let done = &mut self.numbers[thread as usize];
        *done += 1;
        let op = self.stream.op(thread, *done);
        let owner = op.number | if op.zero { ZEROED } else { 0 };
        self.owners[op.disk][op.sectors()].fill(owner);
        op
    }

    /// Advances a thread to its write `number`; going back is not possible.
    pub(crate) fn advance(&mut self, thread: u32, number: u64) {
        assert!(number >= self.numbers[thread as usize], "a replay only goes forward");
        while self.numbers[thread as usize] < number {
            self.step(thread);
        }
    }

    /// Advances all threads, one number each.
    pub(crate) fn advance_all(&mut self, numbers: &[u64]) {
        assert_eq!(numbers.len(), self.numbers.len(), "one number per thread");
        for (thread, number) in (0u32..).zip(numbers) {
            self.advance(thread, *number);
        }
    }

    /// The write to which a sector belongs, if any yet.
    pub(crate) fn owner(&self, disk: usize, sector: usize) -> Option<u64> {
        match self.owners[disk][sector] & !ZEROED {
            0 => None,
            number => Some(number),
        }
    }

    /// The bytes of one sector; the last one of an odd-sized disk is padded with zeros.
    pub(crate) fn fill(&self, disk: usize, sector: usize, bytes: &mut [u8; SECTOR]) {
        let offset = sector as u64 * SECTOR_BYTES;
        match self.owners[disk][sector] {
            0 => {
                bytes.fill(0);
                if let Some(base) = self.base.get(disk) {
                    let held = &base[sector * SECTOR..base.len().min((sector + 1) * SECTOR)];
                    bytes[..held.len()].copy_from_slice(held);
                }
            }
            owner if owner & ZEROED != 0 => bytes.fill(0),
            number => self.stream.op(self.stream.thread_at(disk, offset), number).fill(offset, bytes),
        }
    }

    /// Whether these bytes are what the sector held before the stream.
    pub(crate) fn matches_base(&self, disk: usize, sector: usize, found: &[u8]) -> bool {
        match self.base.get(disk) {
            Some(base) => sector_of(base, sector) == found,
            None => found.iter().all(|byte| *byte == 0),
        }
    }

    /// All bytes of a disk.
    pub(crate) fn bytes(&self, disk: usize) -> Vec<u8> {
        let mut bytes = vec![0; index(self.stream.disks[disk])];
        let mut filled = [0; SECTOR];
        for (sector, target) in bytes.chunks_mut(SECTOR).enumerate() {
            self.fill(disk, sector, &mut filled);
            target.copy_from_slice(&filled[..target.len()]);
        }
        bytes
    }

    /// Whether an image's sector holds what this model holds.
    pub(crate) fn matches(&self, disk: usize, sector: usize, image: &[u8]) -> bool {
        let mut filled = [0; SECTOR];
        self.fill(disk, sector, &mut filled);
        let found = sector_of(image, sector);
        filled[..found.len()] == *found
    }
}

/// A sector of an image; short at the end of an odd-sized one.
pub(crate) fn sector_of(image: &[u8], sector: usize) -> &[u8] {
    &image[sector * SECTOR..image.len().min((sector + 1) * SECTOR)]
}

#[cfg(test)]
mod tests {
    use super::super::writer::fnv1a64;
    use super::*;

    #[test]
    fn agrees_with_an_implementation_in_another_language() {
        // The hashes are those of a Python program written from tests/bed/README.md.
        let stream = Stream { seed: 0x1234, threads: 3, zero: 20, disks: vec![1 << 20, (1 << 19) + 5 * 512 + 100] };
        let mut replay = Replay::new(&stream);
        replay.advance_all(&[500, 333, 251]);
        assert_eq!(fnv1a64(&replay.bytes(0)), 0x5962_059d_e5f1_850f);
        assert_eq!(fnv1a64(&replay.bytes(1)), 0x83e0_ffca_019c_b3e8);
    }
}
