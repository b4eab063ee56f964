//! From what an export says about its ranges to what has to be read.

use super::ByteRange;

/// What has to be done with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Read it.
    Read,
    /// Take it as zeroes.
    Zero,
}

/// State of consecutive ranges, by length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Bytes, at least 1.
    pub length: u64,
    /// Whether it holds: "reads as zeroes", "is dirty".
    pub set: bool,
}

/// Work for the disk from `start` on, as far as both maps reach: `zero` says what reads as zeroes, `dirty` what changed
/// (`None`: everything counts). `always` counts as dirty whatever the map says. The shorter map decides how far this
/// goes (the tail of the longer one must not be dropped: the caller asks again from the returned end); work is in
/// ascending order.
pub fn plan(
    start: u64,
    zero: &[Run],
    dirty: Option<&[Run]>,
    always: Option<ByteRange>,
) -> (Vec<(ByteRange, Work)>, u64) {
    let everything = [Run { length: u64::MAX - start, set: true }];
    let dirty = dirty.unwrap_or(&everything);
    let mut zero = Cursor::new(start, zero);
    let mut dirty = Cursor::new(start, dirty);
    let mut work: Vec<(ByteRange, Work)> = Vec::new();
    let mut at = start;
    while let (Some((zero_end, is_zero)), Some((dirty_end, is_dirty))) = (zero.at(at), dirty.at(at)) {
        let mut end = zero_end.min(dirty_end);
        let mut wanted = is_dirty;
        if let Some(always) = always {
            if at >= always.start() && at < always.end() {
                wanted = true;
                end = end.min(always.end());
            } else if at < always.start() {
                end = end.min(always.start());
            }
        }
        if wanted && let Some(range) = ByteRange::new(at, end) {
            let kind = if is_zero { Work::Zero } else { Work::Read };
            match work.last_mut() {
                Some((last, last_kind)) if *last_kind == kind && last.end() == at => {
                    if let Some(joined) = ByteRange::new(last.start(), end) {
                        *last = joined;
                    }
                }
                _ => work.push((range, kind)),
            }
        }
        at = end;
    }
    (work, at)
}

/// Where both maps of the same ranges are set, as far as the shorter one reaches.
pub fn intersection(left: &[Run], right: &[Run]) -> Vec<Run> {
    let (mut left, mut right) = (Cursor::new(0, left), Cursor::new(0, right));
    let mut both = Vec::new();
    let mut at = 0;
    while let (Some((left_end, in_left)), Some((right_end, in_right))) = (left.at(at), right.at(at)) {
        let end = left_end.min(right_end);
        both.push(Run { length: end - at, set: in_left && in_right });
        at = end;
    }
    both
}

/// Widens what is read to whole clusters (the last one ends with the disk); what is zero gives way. A cluster that is
/// zero only in part is read: the rest of it may be what the parent has. `work` must begin and end on cluster borders
/// of the disk.
pub fn align(work: &[(ByteRange, Work)], cluster: u64, size: u64) -> Vec<(ByteRange, Work)> {
    let mut reads: Vec<ByteRange> = Vec::new();
    let mut read = |start: u64, end: u64| {
        let start = start / cluster * cluster;
        let end = end.div_ceil(cluster).saturating_mul(cluster).min(size);
        match reads.last_mut() {
            Some(last) if last.end() >= start => {
                *last = ByteRange::new(last.start(), end.max(last.end())).unwrap_or(*last);
            }
            _ => reads.extend(ByteRange::new(start, end)),
        }
    };
    for (range, kind) in work {
        match kind {
            Work::Read => read(range.start(), range.end()),
            Work::Zero => {
                if !range.start().is_multiple_of(cluster) {
                    read(range.start(), range.start());
                }
                if !range.end().is_multiple_of(cluster) && range.end() < size {
                    read(range.end(), range.end());
                }
            }
        }
    }
    let mut aligned: Vec<(ByteRange, Work)> = reads.iter().map(|range| (*range, Work::Read)).collect();
    let mut next_read = 0;
    for (range, kind) in work {
        if *kind != Work::Zero {
            continue;
        }
        let mut rest = Some(*range);
        while next_read < reads.len() && reads[next_read].end() <= range.start() {
            next_read += 1;
        }
        let mut read = next_read;
        while let Some(zero) = rest {
            let Some(hit) = reads.get(read).filter(|hit| hit.start() < zero.end()) else {
                aligned.push((zero, Work::Zero));
                break;
            };
            if let Some(before) = ByteRange::new(zero.start(), hit.start()) {
                aligned.push((before, Work::Zero));
            }
            rest = ByteRange::new(hit.end().max(zero.start()), zero.end());
            read += 1;
        }
    }
    aligned.sort_by_key(|(range, _)| range.start());
    aligned
}

struct Cursor<'a> {
    runs: &'a [Run],
    /// End of the first run.
    end: u64,
}

impl<'a> Cursor<'a> {
    fn new(start: u64, runs: &'a [Run]) -> Self {
        let end = runs.first().map_or(start, |run| start.saturating_add(run.length));
        Self { runs, end }
    }

    /// End and state of the run at `offset`, which never goes back.
    fn at(&mut self, offset: u64) -> Option<(u64, bool)> {
        while !self.runs.is_empty() && self.end <= offset {
            self.runs = &self.runs[1..];
            self.end = self.runs.first().map_or(self.end, |run| self.end.saturating_add(run.length));
        }
        self.runs.first().map(|run| (self.end, run.set))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        proptest::collection::vec((1u64..40, any::<bool>()).prop_map(|(length, set)| Run { length, set }), 0..12)
    }

    fn spread(runs: &[Run]) -> Vec<bool> {
        runs.iter().flat_map(|run| std::iter::repeat_n(run.set, usize::try_from(run.length).unwrap())).collect()
    }

    proptest! {
        #[test]
        fn the_plan_equals_a_byte_by_byte_model(start in 0u64..100, zero in runs(), dirty in proptest::option::of(runs()), always in (0u64..300, 1u64..100)) {
            let always = ByteRange::with_length(always.0, always.1);
            let (work, end) = plan(start, &zero, dirty.as_deref(), always);
            let zero = spread(&zero);
            let dirty = dirty.map_or(vec![true; zero.len()], |dirty| spread(&dirty));
            let covered = zero.len().min(dirty.len()) as u64;
            prop_assert_eq!(end, start + covered);
            for i in 0..covered {
                let at = start + i;
                let is_always = always.is_some_and(|range| range.start() <= at && at < range.end());
                let wanted = dirty[usize::try_from(i).unwrap()] || is_always;
                let expected = wanted.then_some(if zero[usize::try_from(i).unwrap()] { Work::Zero } else { Work::Read });
                let found = work.iter().find(|(range, _)| range.start() <= at && at < range.end()).map(|(_, kind)| *kind);
                prop_assert_eq!(found, expected, "at {}", at);
            }
            prop_assert!(work.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.start()));
        }

        #[test]
        fn the_intersection_equals_a_byte_by_byte_model(left in runs(), right in runs()) {
            let both = spread(&intersection(&left, &right));
            let model: Vec<bool> = spread(&left).iter().zip(spread(&right)).map(|(l, r)| *l && r).collect();
            prop_assert_eq!(both, model);
        }

        #[test]
        fn aligned_work_is_whole_clusters_and_forgets_nothing(zero in runs(), dirty in runs(), always in 0u64..300) {
            // Neither need begin on a border.
            let always = ByteRange::with_length(always, 1000);
            let (work, end) = plan(0, &zero, Some(&dirty), always);
            let aligned = align(&work, 8, end);
            prop_assert!(aligned.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.start()));
            for (range, _) in &aligned {
                prop_assert_eq!(range.start() % 8, 0);
                prop_assert!(range.end() % 8 == 0 || range.end() == end);
            }
            for (range, kind) in &work {
                for at in range.start()..range.end() {
                    let found = aligned.iter().find(|(r, _)| r.start() <= at && at < r.end()).map(|(_, k)| *k);
                    prop_assert!(found == Some(Work::Read) || (found == Some(Work::Zero) && *kind == Work::Zero));
                }
            }
        }
    }
}
