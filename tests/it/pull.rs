//! Pulls: what reaches the sink is exact, or there is an error that says why; the target's pace never reaches the server.
#![allow(clippy::unwrap_used, reason = "tests; the exemption for test functions leaves out what they call")]

mod discard;
mod map;
mod sinks;

use crate::nbd::{
    scripted::{ALLOCATION, BITMAP, DISCONNECT, READ, Request, STATUS, content, handshake, receive, serve},
    servers::{Random, Server, changed_image, sparse_image},
};
use map::Map;
use sinks::{FnSink, Image, MemorySink};
use std::{
    future::Future,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tempfile::TempDir;
use tokio::{io::AsyncWriteExt, net::UnixStream, time::timeout};
use virt_fleece::{
    image::{ImageError, ImageSink},
    mover::{PullError, PullProgress, PullRequest, PullSummary, pull},
    nbd::{self, NbdError, REQUEST},
};

const SIZE: u64 = 1 << 20;
/// Bytes of a chunk's header and its offset.
const OVERHEAD: u64 = 28;

fn request(bitmap: bool) -> PullRequest {
    let bitmap = bitmap.then(|| "b".to_owned());
    PullRequest {
        export: "disk".into(),
        size: None,
        bitmap,
        unit: 64 << 10,
        always: None,
        bandwidth: None,
        credit: None,
        discard: false,
    }
}

async fn pull_from(stream: UnixStream, bitmap: bool, sink: Box<dyn ImageSink>) -> Result<PullSummary, PullError> {
    soon(pull(stream, &request(bitmap), sink, &PullProgress::default())).await
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), future).await.expect("no end in sight")
}

/// A full pull of 1 MiB of data whose reads are answered like this, and what the sink got.
async fn pull_of(read: impl Fn(Request) -> Vec<u8> + Send + 'static) -> (PullError, Arc<Mutex<Image>>) {
    let answer = move |request: Request| if request.command == READ { read(request) } else { request.all_data() };
    let (sink, image) = MemorySink::over(vec![0; usize::try_from(SIZE).unwrap()]);
    let result = pull_from(serve(SIZE, move |request| Some(answer(request))), false, sink).await;
    (result.unwrap_err(), image)
}

#[tokio::test]
async fn a_full_pull_of_a_sparse_image_is_exact() {
    let directory = TempDir::new().unwrap();
    for (number, (size, extents, longest)) in
        [(20 << 20, 50, 1 << 20), ((9 << 20) + 512, 400, 9000), (65_536 - 512, 3, 4000), (7 << 20, 0, 1)]
            .into_iter()
            .enumerate()
    {
        let path = directory.path().join(format!("{number}.raw"));
        let content = sparse_image(&path, size, extents, longest);
        let server = Server::qemu_nbd(&path, &["-f", "raw"]);
        let (sink, image) = MemorySink::over(vec![0xaa; content.len()]);
        let progress = PullProgress::default();
        let summary = soon(pull(server.connect().await, &request(false), sink, &progress)).await.unwrap();
        let image = image.lock().unwrap();
        assert!(image.finished && image.bytes == content, "{number}");
        assert_eq!((summary.size, summary.dirty_bytes), (size, size));
        assert_eq!(progress.total.load(Ordering::Relaxed), summary.read_bytes);
        assert!(extents > 0 || summary.read_bytes == 0, "holes are not read");
    }
}

#[tokio::test]
async fn an_incremental_pull_takes_what_changed_and_what_was_zeroed() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.qcow2");
    let (before, after) = changed_image(&path);
    let server = Server::storage_daemon(&path);
    let (sink, image) = MemorySink::over(before);
    let summary = pull_from(server.connect().await, true, sink).await.unwrap();
    assert!(image.lock().unwrap().bytes == after);
    assert!(summary.dirty_bytes < 40 * (51_200 + 2 * 65_536), "only what is dirty: {summary:?}");
}

#[tokio::test]
async fn read_answers_that_do_not_fit_the_request_are_refused() {
    type Lie = fn(Request) -> Vec<u8>;
    let lies: &[(&str, Lie)] = &[
        ("before the request", |r| r.data(true, r.offset.wrapping_sub(1), &vec![0; 65_536])),
        ("behind the request", |r| r.data(true, r.offset + 1, &vec![0; 65_536])),
        ("near the end of 64 bits", |r| r.data(true, u64::MAX - 5, &[0; 4096])),
        ("only a part", |r| r.data(true, r.offset, &vec![0; 65_535])),
        ("nothing", |r| r.chunk(true, 0, &[])),
        ("one half twice", |r| {
            [r.data(false, r.offset, &vec![1; 32_768]), r.data(true, r.offset, &vec![1; 32_768])].concat()
        }),
        ("all of it twice", |r| [r.data(false, r.offset, &vec![1; 65_536]), r.honest()].concat()),
        ("halves that overlap", |r| {
            [r.data(false, r.offset + 32_767, &vec![1; 32_769]), r.data(true, r.offset, &vec![1; 32_768])].concat()
        }),
        ("a hole over data", |r| [r.data(false, r.offset + 100, &[0; 8]), r.hole(true, r.offset, 65_536)].concat()),
        ("a hole that does not end", |r| r.hole(true, r.offset, u32::MAX)),
        ("an answer to no question", |r| Request { cookie: r.cookie + 100, ..r }.honest()),
        ("a second answer", |r| [r.honest(), r.honest()].concat()),
        ("a block status", |r| r.status(true, ALLOCATION, &[(65_536, 0)])),
    ];
    for (case, lie) in lies {
        let (error, image) = pull_of(lie).await;
        assert!(matches!(error, PullError::Nbd(NbdError::Protocol(_))), "{case}: {error:?}");
        assert!(!image.lock().unwrap().finished, "{case}");
    }
}

#[tokio::test]
async fn answers_in_pieces_and_out_of_order_are_put_together() {
    let (stream, mut server) = UnixStream::pair().unwrap();
    let most = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&most);
    tokio::spawn(async move {
        handshake(&mut server, SIZE).await?;
        let mut held: Vec<Request> = Vec::new();
        loop {
            // Everything that is asked for is read before anything is answered, the last request first.
            match timeout(Duration::from_millis(50), receive(&mut server)).await {
                Ok(Some(request)) if request.command == STATUS => {
                    server.write_all(&request.all_data()).await.ok()?;
                }
                Ok(Some(request)) if request.command == READ => {
                    held.push(request);
                    let bytes = held.iter().map(|request| request.length + OVERHEAD).sum::<u64>();
                    seen.fetch_max(bytes, Ordering::Relaxed);
                }
                Ok(_) => return Some(()),
                Err(_) => {
                    for request in held.drain(..).rev() {
                        for part in (0..request.length).step_by(16 << 10).collect::<Vec<_>>().into_iter().rev() {
                            let bytes = [content(request.offset + part); 16 << 10];
                            let reply = request.data(part == 0, request.offset + part, &bytes);
                            server.write_all(&reply).await.ok()?;
                        }
                    }
                }
            }
        }
    });
    let (sink, image) = MemorySink::over(vec![0; usize::try_from(SIZE).unwrap()]);
    pull_from(stream, false, sink).await.unwrap();
    assert!(image.lock().unwrap().bytes.iter().enumerate().all(|(at, byte)| *byte == content(at as u64)));
    let most = most.load(Ordering::Relaxed);
    assert!(most > nbd::credit() / 3 && most <= nbd::credit(), "{most} bytes under way");
}

#[tokio::test]
async fn a_sink_that_stalls_ends_the_asking_and_never_leaves_an_answer_unread() {
    const LARGE: u64 = 64 << 20;
    /// Bytes of the pull's buffers.
    const BUFFERS: u64 = 16 << 20;
    let (stream, mut server) = UnixStream::pair().unwrap();
    let (asked, most) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (asked_by, most_seen) = (Arc::clone(&asked), Arc::clone(&most));
    let server = tokio::spawn(async move {
        handshake(&mut server, LARGE).await.unwrap();
        let mut held: Vec<Request> = Vec::new();
        loop {
            match timeout(Duration::from_millis(if held.is_empty() { 60_000 } else { 2 }), receive(&mut server)).await {
                Ok(Some(request)) if request.command == STATUS => {
                    server.write_all(&request.all_data()).await.unwrap();
                }
                Ok(Some(request)) if request.command == READ => {
                    asked_by.fetch_add(request.length, Ordering::Relaxed);
                    held.push(request);
                    let bytes = held.iter().map(|request| request.length + OVERHEAD).sum::<u64>();
                    most_seen.fetch_max(bytes, Ordering::Relaxed);
                }
                Ok(end) => {
                    assert_eq!(end.map(|request| request.command), Some(DISCONNECT));
                    return;
                }
                Err(_) => {
                    for request in held.drain(..) {
                        // Would take longer if the client did not read.
                        let sent = timeout(Duration::from_secs(20), server.write_all(&request.honest())).await;
                        sent.expect("the client does not read").unwrap();
                    }
                }
            }
        }
    });
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let waits = Arc::clone(&gate);
    let sink = Box::new(FnSink(move || {
        drop(waits.1.wait_while(waits.0.lock().unwrap(), |open| !*open).unwrap());
        Ok(())
    }));
    let pulling = tokio::spawn(pull_from(stream, false, sink));
    // Until the asking stands still.
    let mut before = u64::MAX;
    while asked.load(Ordering::Relaxed) != before || before == 0 {
        before = asked.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!(before <= BUFFERS, "{before} bytes in memory");
    assert!(!pulling.is_finished() && !server.is_finished());
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(soon(pulling).await.unwrap().unwrap().read_bytes, LARGE);
    soon(server).await.unwrap();
    let most = most.load(Ordering::Relaxed);
    assert!(most <= nbd::credit(), "{most} bytes under way");
}

#[tokio::test]
async fn a_sink_that_stalls_lets_no_zeroes_pile_up() {
    const WINDOWS: u64 = 64;
    const WINDOW: u64 = 32 << 20;
    let looks = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&looks);
    // Every other cluster was zeroed.
    let stream = serve(WINDOWS * WINDOW, move |request| {
        if request.command == STATUS {
            counted.fetch_add(1, Ordering::Relaxed);
        }
        let clusters = u32::try_from(request.length / 65_536).unwrap();
        let dirty: Vec<(u64, u32)> = (0..clusters).map(|number| (65_536, number % 2)).collect();
        let mut reply = request.status(false, ALLOCATION, &[(request.length, 2)]);
        reply.extend(request.status(true, BITMAP, &dirty));
        (request.command == STATUS).then_some(reply)
    });
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let waits = Arc::clone(&gate);
    let sink = Box::new(FnSink(move || {
        drop(waits.1.wait_while(waits.0.lock().unwrap(), |open| !*open).unwrap());
        Ok(())
    }));
    let pulling = tokio::spawn(pull_from(stream, true, sink));
    let mut before = 0;
    while looks.load(Ordering::Relaxed) != before || before == 0 {
        before = looks.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    // A look far ahead, and all windows once to know the amount; then the same again, and two windows twice, in which
    // 256 pieces are.
    assert!(before <= 1 + WINDOWS + 1 + 4, "{before} looks");
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(soon(pulling).await.unwrap().unwrap().dirty_bytes, WINDOWS * WINDOW / 2);
    assert_eq!(looks.load(Ordering::Relaxed), 1 + WINDOWS + 1 + 2 * WINDOWS);
}

#[tokio::test]
async fn a_disk_that_hardly_changed_is_known_by_few_looks() {
    const LARGE: u64 = 1 << 40;
    const DIRTY: u64 = 700 << 30;
    const GRANULE: u64 = 64 << 10;
    let looks = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&looks);
    let stream = serve(LARGE, move |request| {
        if request.command == READ {
            return Some(request.honest());
        }
        counted.fetch_add(1, Ordering::Relaxed);
        let end = request.offset + request.length;
        // What is allocated changes with every granule; one of them is dirty.
        let map = (0..request.length.min(64 << 20) / GRANULE).map(|number| (GRANULE, 2 * u32::from(number % 2 == 1)));
        let borders = [request.offset, DIRTY, DIRTY + GRANULE, end];
        let dirty: Vec<(u64, u32)> = borders
            .windows(2)
            .map(|pair| [pair[0], pair[1]].map(|at| at.clamp(request.offset, end)))
            .filter(|[from, to]| from < to)
            .map(|[from, to]| (to - from, u32::from(from == DIRTY)))
            .collect();
        let mut reply = request.status(false, ALLOCATION, &map.collect::<Vec<_>>());
        reply.extend(request.status(true, BITMAP, &dirty));
        (request.command == STATUS).then_some(reply)
    });
    let summary = pull_from(stream, true, Box::new(FnSink(|| Ok(())))).await.unwrap();
    assert_eq!((summary.dirty_bytes, summary.read_bytes), (GRANULE, GRANULE));
    let looks = looks.load(Ordering::Relaxed);
    assert!(looks < 2 * (1024 + 100), "{looks} looks");
}

#[tokio::test]
async fn block_status_that_lies_is_refused() {
    type Lie = fn(Request) -> Vec<u8>;
    let lies: &[(&str, bool, Lie)] = &[
        ("no context", false, |r| r.chunk(true, 0, &[])),
        ("a context twice", false, |r| {
            [r.status(false, ALLOCATION, &[(4096, 0)]), r.status(true, ALLOCATION, &[(4096, 0)])].concat()
        }),
        ("no bitmap", true, |r| r.all_data()),
        ("a bitmap twice", true, |r| {
            let twice = r.status(false, BITMAP, &[(4096, 0)]).repeat(2);
            [twice, r.all_data()].concat()
        }),
        ("data", false, |r| r.data(true, 0, &[0; 16])),
        ("more than the one extent asked for", false, |r| {
            Request { one: false, ..r }.status(true, ALLOCATION, &[(4096, 0), (4096, 2)])
        }),
        ("an answer to no question", false, |r| Request { cookie: 77, ..r }.all_data()),
    ];
    for (case, bitmap, lie) in lies {
        let sink = Box::new(FnSink(|| Ok(())));
        let error = pull_from(serve(SIZE, move |request| Some(lie(request))), *bitmap, sink).await.unwrap_err();
        let protocol = matches!(error, PullError::Nbd(NbdError::Protocol(_)));
        // Data in answer to a status is more than the 0 bytes that were asked for.
        assert!(protocol, "{case}: {error:?}");
    }
    // Longer than the disk is no lie: the protocol lets the last extent reach behind the request.
    let stream = serve(SIZE, |request| {
        let behind = || request.status(true, ALLOCATION, &[(u64::from(u32::MAX), 0)]);
        Some(if request.command == READ { request.honest() } else { behind() })
    });
    let summary = pull_from(stream, false, Box::new(FnSink(|| Ok(())))).await.unwrap();
    assert_eq!(summary.read_bytes, SIZE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn contexts_that_answer_for_unequal_lengths_lose_no_dirty_block() {
    const CLEAN: u8 = 0xcc;
    for seed in 0..20_u64 {
        let mut random = Random(seed);
        let size = (8 << 20) + 512 * random.below(200);
        let (zero, dirty) = (Map::random(&mut random, size), Map::random(&mut random, size));
        let expected: Vec<u8> = (0..size).map(|at| if zero.at(at) { 0 } else { content(at) }).collect();
        let disk = expected.clone();
        // What is clean is as the parent has it; a whole 64 KiB may be read for one dirty block.
        let wanted: Vec<bool> = (0..size).map(|at| dirty.at(at)).collect();
        let stream = serve(size, move |request| {
            if request.command == READ {
                let place =
                    usize::try_from(request.offset).unwrap()..usize::try_from(request.offset + request.length).unwrap();
                return Some(request.data(true, request.offset, &disk[place]));
            }
            let mut count = || usize::try_from(1 + random.below(6)).unwrap();
            let (left, right) = (count(), count());
            let mut out = request.status(false, ALLOCATION, &zero.extents(request, left, 2, &mut random));
            out.extend(request.status(true, BITMAP, &dirty.extents(request, right, 1, &mut random)));
            Some(out)
        });
        let (sink, image) = MemorySink::over(vec![CLEAN; expected.len()]);
        pull_from(stream, true, sink).await.unwrap();
        let image = image.lock().unwrap();
        for (at, byte) in image.bytes.iter().enumerate() {
            let right = *byte == expected[at] || !wanted[at] && *byte == CLEAN;
            assert!(right, "seed {seed}: {byte} at {at}, dirty: {}", wanted[at]);
        }
    }
}

#[tokio::test]
async fn a_zero_that_turns_out_to_be_data_is_read() {
    // QEMU's status of a fleece overlay can say zero for a block that the guest discards at that very moment.
    let mut looks = 0;
    let stream = serve(SIZE, move |request| {
        if request.command == READ {
            return Some(request.honest());
        }
        looks += 1;
        // The first look only says how much there is; the second and the third are the two that have to agree.
        let flags = if looks == 2 { 3 } else { 0 };
        Some(request.status(true, ALLOCATION, &[(request.length, flags)]))
    });
    let (sink, image) = MemorySink::over(vec![0; usize::try_from(SIZE).unwrap()]);
    pull_from(stream, false, sink).await.unwrap();
    assert!(image.lock().unwrap().bytes.iter().enumerate().all(|(at, byte)| *byte == content(at as u64)));
}

#[tokio::test]
async fn errors_say_where_and_why() {
    let broken_at = |errno: u32| move |r: Request| if r.offset == 5 * REQUEST { r.error(errno) } else { r.honest() };
    let (error, image) = pull_of(broken_at(22)).await;
    assert!(matches!(error, PullError::Nbd(NbdError::Read { offset: 327_680, errno: 22 })), "{error:?}");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("the snapshot is broken"));
    assert!(image.lock().unwrap().reached <= 5 * REQUEST);
    let (error, _) = pull_of(broken_at(5)).await;
    assert!(matches!(error, PullError::Nbd(NbdError::Read { offset: 327_680, errno: 5 })), "{error:?}");

    let stream = serve(SIZE, |request| (request.command == STATUS).then(|| request.all_data()));
    let error = pull_from(stream, false, Box::new(FnSink(|| Ok(())))).await.unwrap_err();
    assert!(matches!(error, PullError::Nbd(NbdError::Closed)), "{error:?}");
    let stream = serve(SIZE, |request| Some(request.error(12)));
    let error = pull_from(stream, false, Box::new(FnSink(|| Ok(())))).await.unwrap_err();
    assert!(matches!(error, PullError::Nbd(NbdError::Read { offset: 0, errno: 12 })), "{error:?}");
}

#[tokio::test]
async fn an_export_that_is_shorter_than_the_disk_is_no_whole_disk() {
    for size in [SIZE - 512, SIZE + 512] {
        let wanted = PullRequest { size: Some(SIZE), ..request(false) };
        let stream = serve(size, |request| Some(request.honest()));
        let pulled = soon(pull(stream, &wanted, Box::new(FnSink(|| Ok(()))), &PullProgress::default())).await;
        let error = std::error::Error::source(&pulled.unwrap_err()).unwrap().to_string();
        assert!(error.contains(&format!("an export of {size} bytes for a disk of 1048576")), "{error}");
    }
}

#[tokio::test]
async fn the_sinks_own_error_is_the_one_that_is_told() {
    let honest = |request: Request| Some(if request.command == READ { request.honest() } else { request.all_data() });
    let full = || ImageError::io("write", "target")(std::io::ErrorKind::StorageFull.into());
    let mut calls = 0;
    let sink = Box::new(FnSink(move || {
        calls += 1;
        if calls < 3 { Ok(()) } else { Err(full()) }
    }));
    let error = pull_from(serve(64 << 20, honest), false, sink).await.unwrap_err();
    assert!(matches!(error, PullError::Sink(_)), "{error:?}");
    let sink = Box::new(FnSink(|| panic!("a defect in a sink (expected by the test)")));
    let error = pull_from(serve(64 << 20, honest), false, sink).await.unwrap_err();
    assert!(matches!(error, PullError::SinkDied), "{error:?}");
}

#[tokio::test]
async fn nbdkit_that_fails_is_an_error_and_one_that_recovers_is_not_noticed() {
    let server = Server::nbdkit(&["--filter=error", "pattern", "8M", "error=EIO", "error-pread-rate=100%"]);
    let error = pull_from(server.connect().await, false, Box::new(FnSink(|| Ok(())))).await.unwrap_err();
    assert!(matches!(error, PullError::Nbd(NbdError::Read { offset: 0, errno: 5 })), "{error:?}");

    // Fails for as long as the file is there; the filter above tries again.
    let directory = TempDir::new().unwrap();
    let trigger = directory.path().join("trigger");
    std::fs::write(&trigger, "").unwrap();
    let server = Server::nbdkit(&[
        "--filter=retry",
        "--filter=delay",
        "--filter=error",
        "pattern",
        "3000001",
        "retry-delay=1",
        "retry-exponential=no",
        "delay-read=2ms",
        "error=EIO",
        "error-pread-rate=100%",
        &format!("error-pread-file={}", trigger.display()),
    ]);
    let content: Vec<u8> = (0..375_001_u64).flat_map(|word| (word * 8).to_be_bytes()).take(3_000_001).collect();
    let (sink, image) = MemorySink::over(vec![1; content.len()]);
    let recover = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        std::fs::remove_file(&trigger).unwrap();
    };
    let (result, ()) = tokio::join!(pull_from(server.connect().await, false, sink), recover);
    result.unwrap();
    assert!(image.lock().unwrap().bytes == content);
}
