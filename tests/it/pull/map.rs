//! What a server says of its blocks.

use crate::nbd::{scripted::Request, servers::Random};

/// A map of states in blocks, and the answers of a server that cuts them at will.
pub(super) struct Map(Vec<bool>);

const BLOCK: u64 = 16 << 10;

impl Map {
    pub(super) fn random(random: &mut Random, size: u64) -> Self {
        let mut state = false;
        let mut blocks = Vec::new();
        while (blocks.len() as u64) < size.div_ceil(BLOCK) {
            state = !state;
            let longest = if random.below(4) == 0 { 300 } else { 9 };
            blocks.extend(std::iter::repeat_n(state, usize::try_from(1 + random.below(longest)).unwrap()));
        }
        Self(blocks)
    }

    pub(super) fn at(&self, offset: u64) -> bool {
        self.0[usize::try_from(offset / BLOCK).unwrap()]
    }

    /// At most `count` extents from an offset on; not joined where `random` says so.
    pub(super) fn extents(&self, request: Request, count: usize, flag: u32, random: &mut Random) -> Vec<(u64, u32)> {
        let (mut offset, end) = (request.offset, request.offset + request.length);
        let mut extents: Vec<(u64, u32)> = Vec::new();
        while offset < end {
            let next = ((offset / BLOCK + 1) * BLOCK).min(end);
            let flags = if self.at(offset) { flag } else { 0 };
            let full = extents.len() == count;
            match extents.last_mut() {
                Some(last) if last.1 == flags && random.below(50) != 0 => last.0 += next - offset,
                _ if full => break,
                _ => extents.push((next - offset, flags)),
            }
            offset = next;
        }
        extents
    }
}
