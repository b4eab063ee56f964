//! Pulls that discard behind them: what is gone is never asked for again, and what the server says to it changes nothing.

use super::{
    map::Map,
    pull, request,
    sinks::{FnSink, MemorySink},
    soon,
};
use crate::nbd::{
    scripted::{ALLOCATION, BITMAP, READ, Request, STATUS, TAKES_TRIMS, TRIM, content, serve, serve_as},
    servers::Random,
};
use std::sync::{Arc, Mutex};
use virt_fleece::mover::{PullProgress, PullRequest};

const CLUSTER: u64 = 64 << 10;

/// A snapshot of which ranges can be discarded: reads and states of what is gone fail, as QEMU's do.
struct Snapshot {
    size: u64,
    zero: Map,
    dirty: Map,
    gone: Vec<bool>,
    random: Random,
}

impl Snapshot {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let size = (24 << 20) + 512 * random.below(200);
        let (zero, dirty) = (Map::random(&mut random, size), Map::random(&mut random, size));
        let gone = vec![false; usize::try_from(size.div_ceil(CLUSTER)).unwrap()];
        Self { size, zero, dirty, gone, random }
    }

    fn byte(&self, at: u64) -> u8 {
        if self.zero.at(at) { 0 } else { content(at) }
    }

    fn is_gone(&self, request: Request) -> bool {
        let clusters = request.offset / CLUSTER..(request.offset + request.length).div_ceil(CLUSTER);
        clusters.into_iter().any(|cluster| self.gone[usize::try_from(cluster).unwrap()])
    }

    fn answer(&mut self, request: Request) -> Vec<u8> {
        match request.command {
            TRIM => {
                let whole = request.offset.div_ceil(CLUSTER)..(request.offset + request.length) / CLUSTER;
                whole.into_iter().for_each(|cluster| self.gone[usize::try_from(cluster).unwrap()] = true);
                request.simple(0)
            }
            _ if self.is_gone(request) => request.error(22),
            READ => {
                let bytes: Vec<u8> =
                    (request.offset..request.offset + request.length).map(|at| self.byte(at)).collect();
                request.data(true, request.offset, &bytes)
            }
            STATUS => {
                let mut out = request.status(false, ALLOCATION, &self.zero.extents(request, 9, 2, &mut self.random));
                out.extend(request.status(true, BITMAP, &self.dirty.extents(request, 9, 1, &mut self.random)));
                out
            }
            other => panic!("command {other}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_gone_is_never_asked_for_and_in_the_end_all_is_gone() {
    const CLEAN: u8 = 0xcc;
    for seed in 0..20_u64 {
        let snapshot = Snapshot::new(seed);
        let size = snapshot.size;
        let expected: Vec<u8> = (0..size).map(|at| snapshot.byte(at)).collect();
        let wanted: Vec<bool> = (0..size).map(|at| snapshot.dirty.at(at)).collect();
        let snapshot = Arc::new(Mutex::new(snapshot));
        let served = Arc::clone(&snapshot);
        let stream = serve_as(size, TAKES_TRIMS, move |request| {
            // The good-bye is the last word.
            (request.command != 2).then(|| served.lock().unwrap().answer(request))
        });
        let (sink, image) = MemorySink::over(vec![CLEAN; expected.len()]);
        let wanted_pull = PullRequest { discard: true, ..request(true) };
        let summary = soon(pull(stream, &wanted_pull, sink, &PullProgress::default())).await.unwrap();
        let image = image.lock().unwrap();
        for (at, byte) in image.bytes.iter().enumerate() {
            assert!(*byte == expected[at] || !wanted[at] && *byte == CLEAN, "seed {seed}: {byte} at {at}");
        }
        let gone = snapshot.lock().unwrap().gone.iter().filter(|gone| **gone).count();
        assert!(summary.read_bytes > 0 && gone + 65 > wanted.len() / 65_536, "seed {seed}: {gone} clusters");
    }
}

/// The server discards and says that it failed; or it does not take discards at all.
#[tokio::test]
async fn refused_discards_end_discarding_and_nothing_else() {
    for (flags, expected) in [(Some(TAKES_TRIMS), 1..=4), (None, 0..=0)] {
        let trims = Arc::new(Mutex::new(0));
        let counted = Arc::clone(&trims);
        let size = 40 << 20;
        let script = move |request: Request| match request.command {
            TRIM => {
                *counted.lock().unwrap() += 1;
                Some(if *counted.lock().unwrap() % 2 == 0 { request.simple(22) } else { request.error(5) })
            }
            READ => Some(request.honest()),
            STATUS => Some(request.all_data()),
            _ => None,
        };
        let stream = match flags {
            Some(flags) => serve_as(size, flags, script),
            None => serve(size, script),
        };
        let wanted = PullRequest { discard: true, ..request(false) };
        let summary = soon(pull(stream, &wanted, Box::new(FnSink(|| Ok(()))), &PullProgress::default())).await;
        assert_eq!(summary.unwrap().read_bytes, size);
        assert!(expected.contains(&*trims.lock().unwrap()), "{} discards", trims.lock().unwrap());
    }
}
