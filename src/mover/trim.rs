//! Discards what nobody will read any more from the snapshot under a pull.
//!
//! The guest's first write to a cluster waits until the old data is in the fleece. For what was read already, or will
//! not be read, that is in vain: discarded, it is not copied any more, and the fleece shrinks while the pull goes on.
//!
//! A discarded range can neither be read nor asked for its state. So the state of the whole disk is asked for first and
//! kept here, two bits for each cluster; then what needs no reading goes at once, and the rest behind the reads.

use crate::{
    extent::{ByteRange, Work},
    nbd::{Chunk, Content},
};
use std::collections::VecDeque;

/// Bytes that are kept or discarded together: QEMU copies no less.
const CLUSTER: u64 = 64 << 10;
/// The largest disk whose state is kept, in bytes: 64 MiB of memory for 16 TiB.
const LARGEST: u64 = 16 << 40;
/// What was read is discarded in runs of this many bytes.
const RUN: u64 = 4 << 20;
/// What is not read is discarded at once where it has so many bytes in a row; shorter pieces go with what is around them.
const EARLY: u64 = 1 << 20;
/// The most that is discarded at once, in bytes. While a file system frees space, the guest's copies into the same
/// fleece wait.
const LONGEST: u64 = 32 << 20;
/// Discards that may be unanswered. One that is answered late is no reason to wait for it.
const OUTSTANDING: usize = 4;
/// Runs that wait for being sent. More only when the server answers no discard while it answers reads.
const WAITING: usize = 64;
/// What the answer to a discard may take of the server's send buffer, in bytes: some dozens and the kernel's bookkeeping.
const ANSWER: u64 = 1 << 10;

/// What a pull still needs of its disk, and the discards under way.
#[derive(Debug)]
pub(super) struct Trims {
    size: u64,
    read: Bits,
    zero: Bits,
    /// Nothing before this offset will be read any more, and all of it was discarded or waits for it.
    done: u64,
    /// The first run at or behind `done` that was discarded at once.
    early: Option<ByteRange>,
    waiting: VecDeque<ByteRange>,
    asked: Vec<u64>,
    refused: bool,
}

impl Trims {
    /// For a disk of `size` bytes; `None` when it is too large.
    pub(super) fn new(size: u64) -> Option<Self> {
        (size <= LARGEST).then(|| Self {
            size,
            read: Bits::new(size),
            zero: Bits::new(size),
            done: 0,
            early: None,
            waiting: VecDeque::new(),
            asked: Vec::new(),
            refused: false,
        })
    }

    /// Keeps work for later. It is in whole clusters; the last one ends with the disk.
    pub(super) fn keep(&mut self, work: &[(ByteRange, Work)]) {
        for (range, kind) in work {
            match kind {
                Work::Read => self.read.set(*range),
                Work::Zero => self.zero.set(*range),
            }
        }
    }

    /// The next work from `start` on, and where it ends.
    pub(super) fn work(&self, start: u64) -> (Vec<(ByteRange, Work)>, u64) {
        let end = (start + LONGEST).min(self.size);
        let mut work = Vec::new();
        let mut at = start;
        while at < end {
            let kind = self.kind(at);
            let from = at;
            while at < end && self.kind(at) == kind {
                at += CLUSTER;
            }
            work.extend(ByteRange::new(from, at.min(end)).zip(kind));
        }
        (work, end)
    }

    fn kind(&self, at: u64) -> Option<Work> {
        if self.read.get(at) { Some(Work::Read) } else { self.zero.get(at).then_some(Work::Zero) }
    }

    /// All work is kept: the next range from `start` on that can be discarded at once. It is waiting when this returns
    /// an offset; the next one is to be looked for from there.
    pub(super) fn begin(&mut self, start: u64) -> Option<u64> {
        let run = self.next_early(start)?;
        if self.early.is_none() {
            self.early = Some(run);
        }
        self.push(run);
        Some(run.end())
    }

    /// The next run that is not read and long enough.
    fn next_early(&self, start: u64) -> Option<ByteRange> {
        let mut at = start;
        while at < self.size {
            let from = self.read.next(at, false, self.size);
            let to = self.read.next(from, true, self.size);
            if to - from >= EARLY {
                return ByteRange::new(from, to);
            }
            at = to;
        }
        None
    }

    /// Everything before `end` was read and handed on, or needed no reading.
    pub(super) fn passed(&mut self, end: u64) {
        loop {
            let stop = self.early.map_or(self.size, ByteRange::start);
            let limit = end.min(stop);
            if let Some(run) = ByteRange::new(self.done, limit).filter(|run| run.len() >= RUN || limit == stop) {
                self.done = limit;
                self.push(run);
            }
            match self.early {
                Some(early) if end >= early.start() => {
                    self.done = early.end();
                    self.early = self.next_early(early.end());
                }
                _ => break,
            }
        }
        // Nothing is lost by it but fleece space.
        let surplus = self.waiting.len().saturating_sub(WAITING);
        self.waiting.drain(..surplus);
    }

    fn push(&mut self, run: ByteRange) {
        let mut rest = Some(run);
        while let Some(run) = rest {
            let (first, behind) = run.split_at(run.start() + LONGEST);
            self.waiting.extend(first);
            rest = behind;
        }
    }

    /// Something waits, and too much is unanswered to send it.
    pub(super) fn is_full(&self) -> bool {
        !self.waiting.is_empty() && self.asked.len() >= OUTSTANDING
    }

    /// The next range to discard, if one may be sent.
    pub(super) fn next(&mut self) -> Option<ByteRange> {
        if self.refused {
            self.waiting.clear();
        }
        if self.asked.len() < OUTSTANDING { self.waiting.pop_front() } else { None }
    }

    /// It was sent.
    pub(super) fn asked(&mut self, cookie: u64) {
        self.asked.push(cookie);
    }

    /// Bytes of answers that are outstanding.
    pub(super) fn outstanding(&self) -> u64 {
        self.asked.len() as u64 * ANSWER
    }

    /// Whether this chunk answers a discard. One that fails is no reason to give the backup up, but to stop discarding.
    pub(super) fn answered(&mut self, chunk: &Chunk) -> bool {
        let Some(place) = self.asked.iter().position(|cookie| *cookie == chunk.cookie) else { return false };
        match &chunk.content {
            Content::None => {}
            Content::Error { errno } => {
                if !self.refused {
                    tracing::debug!(errno, "the snapshot takes no discards; the fleece keeps what it has");
                }
                self.refused = true;
            }
            _ => return false,
        }
        if chunk.done {
            self.asked.swap_remove(place);
        }
        true
    }
}

/// One bit for each cluster of a disk.
#[derive(Debug)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(size: u64) -> Self {
        Self(vec![0; (size.div_ceil(CLUSTER).div_ceil(64)) as usize])
    }

    fn set(&mut self, range: ByteRange) {
        for cluster in range.start() / CLUSTER..range.end().div_ceil(CLUSTER) {
            if let Some(word) = self.0.get_mut((cluster / 64) as usize) {
                *word |= 1 << (cluster % 64);
            }
        }
    }

    fn get(&self, at: u64) -> bool {
        let cluster = at / CLUSTER;
        self.0.get((cluster / 64) as usize).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    /// First offset from `at` on at which the bit is `value`, at most `size`.
    fn next(&self, at: u64, value: bool, size: u64) -> u64 {
        let mut cluster = at / CLUSTER;
        while let Some(word) = self.0.get((cluster / 64) as usize) {
            let word = (if value { *word } else { !*word }) >> (cluster % 64);
            if word != 0 {
                return ((cluster + u64::from(word.trailing_zeros())) * CLUSTER).max(at).min(size);
            }
            cluster = (cluster / 64 + 1) * 64;
        }
        size
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn waiting(trims: &mut Trims) -> Vec<ByteRange> {
        trims.waiting.drain(..).collect()
    }

    fn begin(trims: &mut Trims) -> Vec<ByteRange> {
        let mut at = 0;
        while let Some(end) = trims.begin(at) {
            at = end;
        }
        waiting(trims)
    }

    proptest! {
        #[test]
        fn all_is_discarded_once_and_nothing_before_it_was_read(
            lengths in proptest::collection::vec((1u64..60, 0u8..4), 1..30),
            tail in 0u64..CLUSTER,
            step in 1u64..5,
        ) {
            let mut work = Vec::new();
            let mut at = 0;
            for (clusters, kind) in lengths {
                let range = ByteRange::with_length(at, clusters * CLUSTER).unwrap();
                at = range.end();
                work.extend([None, Some(Work::Zero), Some(Work::Read), Some(Work::Read)][usize::from(kind)].map(|k| (range, k)));
            }
            let size = at + tail;
            work.extend(ByteRange::new(at, size).map(|range| (range, Work::Read)));
            let mut trims = Trims::new(size).unwrap();
            trims.keep(&work);
            let mut gone = begin(&mut trims);
            let read_at = |at: u64| work.iter().any(|(r, k)| *k == Work::Read && r.start() <= at && at < r.end());
            for range in &gone {
                prop_assert!((range.start()..range.end()).step_by(CLUSTER as usize).all(|at| !read_at(at)));
            }
            let mut at = 0;
            let mut again = Vec::new();
            while at < size {
                let (window, end) = trims.work(at);
                for (range, kind) in window {
                    again.push((range, kind));
                    let mut read = range.start();
                    while kind == Work::Read && read < range.end() {
                        read = range.end().min(read + step * CLUSTER);
                        trims.passed(read);
                        let more = waiting(&mut trims);
                        prop_assert!(more.iter().all(|range| range.end() <= read));
                        gone.extend(more);
                    }
                }
                at = end;
            }
            trims.passed(size);
            gone.extend(waiting(&mut trims));
            gone.sort();
            prop_assert!(gone.iter().all(|range| range.len() <= LONGEST));
            prop_assert!(gone.windows(2).all(|pair| pair[0].end() == pair[1].start()), "{gone:?}");
            prop_assert_eq!((gone[0].start(), gone.last().unwrap().end()), (0, size));
            // What is kept is what was given, byte by byte.
            let kind = |work: &[(ByteRange, Work)], at| work.iter().find(|(r, _)| r.start() <= at && at < r.end()).map(|(_, k)| *k);
            for at in (0..size).step_by(CLUSTER as usize) {
                prop_assert_eq!(kind(&again, at), kind(&work, at));
            }
        }
    }

    #[test]
    fn discards_that_are_not_answered_are_bounded_and_a_refusal_ends_them() {
        let mut trims = Trims::new(1 << 30).unwrap();
        trims.keep(&[(ByteRange::new(0, 1 << 30).unwrap(), Work::Read)]);
        assert!(begin(&mut trims).is_empty());
        for end in (0..=1_u64 << 30).step_by(CLUSTER as usize) {
            trims.passed(end);
        }
        assert_eq!(trims.waiting.len(), WAITING);
        for cookie in 0..OUTSTANDING as u64 {
            assert!(trims.next().is_some());
            trims.asked(cookie);
        }
        assert_eq!((trims.next(), trims.is_full(), trims.outstanding()), (None, true, 4 << 10));
        let error = Chunk { cookie: 2, done: true, content: Content::Error { errno: 22 } };
        assert!(trims.answered(&error) && !trims.answered(&error));
        assert_eq!((trims.next(), trims.is_full(), trims.asked.len()), (None, false, 3));
        assert!(Trims::new(LARGEST + 512).is_none());
    }
}
