//! The NBD client against real servers, and against one that lies.
#![allow(clippy::unwrap_used, reason = "tests; the exemption for test functions leaves out what they call")]

pub(crate) mod scripted;
pub(crate) mod servers;

use scripted::{ALLOCATION, Request, greet, honest_option, next_option, option_reply, serve};
use servers::{Server, changed_image, sparse_image};
use std::{future::Future, time::Duration};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, timeout},
};
use virt_fleece::nbd::{self, Chunk, Content, NbdClient, NbdError, REQUEST};

const SIZE: u64 = 1 << 20;

fn contexts(bitmap: bool) -> Vec<String> {
    let names = ["base:allocation", "qemu:dirty-bitmap:b"];
    names[..=usize::from(bitmap)].iter().map(ToString::to_string).collect()
}

async fn connect(stream: UnixStream, bitmap: bool) -> Result<NbdClient, NbdError> {
    NbdClient::connect(stream, "disk", &contexts(bitmap)).await
}

/// Nothing may take longer than this.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.expect("no end in sight")
}

/// All chunks of one answer.
async fn answer(client: &mut NbdClient, cookie: u64) -> Result<Vec<Content>, NbdError> {
    let mut contents = Vec::new();
    loop {
        let Chunk { cookie: of, done, content } = client.receive(REQUEST).await?;
        assert_eq!(of, cookie);
        contents.push(content);
        if done {
            return Ok(contents);
        }
    }
}

/// The bytes of a range, however the server cuts them.
async fn read(client: &mut NbdClient, offset: u64, length: u32) -> Vec<u8> {
    let cookie = client.ask_read(offset, length).await.unwrap();
    let mut bytes = vec![0xee; length as usize];
    for content in answer(client, cookie).await.unwrap() {
        match content {
            Content::Data { offset: at, bytes: part } => {
                let at = usize::try_from(at - offset).unwrap();
                bytes[at..at + part.len()].copy_from_slice(&part);
            }
            Content::Hole { offset: at, length } => {
                let at = usize::try_from(at - offset).unwrap();
                bytes[at..at + length as usize].fill(0);
            }
            Content::None => {}
            other => panic!("{other:?}"),
        }
    }
    bytes
}

/// The state of every byte by context: flags of each 512 bytes of a range.
async fn states(client: &mut NbdClient, offset: u64, length: u32, count: usize) -> Vec<Vec<u32>> {
    let cookie = client.ask_status(offset, length).await.unwrap();
    let mut states = vec![Vec::new(); count];
    for content in answer(client, cookie).await.unwrap() {
        let Content::Status { context, extents } = content else { panic!("{content:?}") };
        for extent in extents {
            let sectors = usize::try_from(extent.length / 512).unwrap();
            states[context].extend(std::iter::repeat_n(extent.flags, sectors));
        }
    }
    states
}

#[tokio::test]
async fn bytes_and_states_of_qemus_own_server_are_those_of_the_image() {
    let directory = TempDir::new().unwrap();
    let image = directory.path().join("disk.qcow2");
    let (before, after) = changed_image(&image);
    let server = Server::storage_daemon(&image);
    let mut client = soon(connect(server.connect().await, true)).await.unwrap();
    assert_eq!(client.size(), after.len() as u64);
    for offset in (0..client.size()).step_by(65_536) {
        let length = REQUEST.min(client.size() - offset);
        let place = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
        let length = u32::try_from(length).unwrap();
        assert!(read(&mut client, offset, length).await == after[place.clone()], "{offset}");
        let states = states(&mut client, offset, length, 2).await;
        // Zero is a promise, and so is clean.
        for (sector, zero) in states[0].iter().enumerate() {
            let at = place.start + sector * 512;
            assert!(zero & 2 == 0 || after[at..at + 512].iter().all(|byte| *byte == 0), "{at} is not zero");
        }
        assert!(states[1].iter().all(|dirty| *dirty == states[1][0]), "the bitmap knows whole 64 KiB only");
        assert!(states[1][0] & 1 == 1 || before[place.clone()] == after[place], "{offset} is not clean");
    }
    client.disconnect().await.unwrap();
}

#[tokio::test]
async fn qemu_nbd_and_nbdkit_are_read_to_a_last_byte_that_is_no_multiple_of_anything() {
    let directory = TempDir::new().unwrap();
    let image = directory.path().join("disk.raw");
    let content = sparse_image(&image, 3_000_000 - 3_000_000 % 512, 30, 50_000);
    let odd = directory.path().join("odd.raw");
    let odd_content = sparse_image(&odd, 300_001, 30, 5000);
    for (server, content) in [
        (Server::qemu_nbd(&image, &["-f", "raw"]), content),
        (Server::nbdkit(&["file", odd.to_str().unwrap()]), odd_content),
    ] {
        let mut client = soon(connect(server.connect().await, false)).await.unwrap();
        assert_eq!(client.size(), content.len() as u64);
        for (number, expected) in content.chunks(REQUEST as usize).enumerate() {
            let bytes = read(&mut client, number as u64 * REQUEST, u32::try_from(expected.len()).unwrap()).await;
            assert!(bytes == expected, "{number}");
        }
    }
}

#[tokio::test]
async fn what_a_real_server_does_not_have_is_refused_by_name() {
    let directory = TempDir::new().unwrap();
    let image = directory.path().join("disk.raw");
    sparse_image(&image, SIZE, 0, 1);
    let server = Server::qemu_nbd(&image, &["-f", "raw"]);
    let error = soon(connect(server.connect().await, true)).await.unwrap_err();
    assert!(error.to_string().contains("it has no qemu:dirty-bitmap:b"), "{error}");
    let error = soon(NbdClient::connect(server.connect().await, "another", &contexts(false))).await.unwrap_err();
    assert!(matches!(&error, NbdError::Refused { .. }) && error.to_string().contains("another"), "{error}");
    let server = Server::nbdkit(&["--no-sr", "memory", "1M"]);
    let error = soon(connect(server.connect().await, false)).await.unwrap_err();
    assert!(matches!(error, NbdError::Refused { option: "structured replies", .. }), "{error:?}");
}

#[tokio::test]
async fn an_error_of_a_real_server_keeps_its_number_and_the_connection() {
    for (error, errno) in [("EIO", 5), ("EINVAL", 22), ("ENOSPC", 28)] {
        let parameters = [&format!("error={error}"), "error-pread-rate=100%"];
        let server = Server::nbdkit(&["--filter=error", "memory", "1M", parameters[0], parameters[1]]);
        let mut client = soon(connect(server.connect().await, false)).await.unwrap();
        for _ in 0..3 {
            let cookie = client.ask_read(0, 65_536).await.unwrap();
            let contents = soon(answer(&mut client, cookie)).await.unwrap();
            let failed = contents.iter().any(|content| matches!(content, Content::Error { errno: e } if *e == errno));
            assert!(failed, "{contents:?}");
        }
        assert_eq!(states(&mut client, 0, 65_536, 1).await[0].len(), 128);
    }
}

#[tokio::test]
async fn slow_answers_of_a_real_server_are_waited_for_together() {
    let server = Server::nbdkit(&["--filter=delay", "pattern", "1M", "delay-read=1"]);
    let mut client = soon(connect(server.connect().await, false)).await.unwrap();
    let begun = Instant::now();
    let mut open: Vec<u64> = Vec::new();
    for number in 0..4 {
        open.push(client.ask_read(number * 4096, 4096).await.unwrap());
    }
    while !open.is_empty() {
        let chunk = soon(client.receive(REQUEST)).await.unwrap();
        if let Content::Data { offset, bytes } = &chunk.content {
            assert_eq!(bytes[..8], offset.to_be_bytes());
        }
        open.retain(|cookie| !chunk.done || *cookie != chunk.cookie);
    }
    let took = begun.elapsed();
    assert!((Duration::from_millis(900)..Duration::from_millis(3500)).contains(&took), "{took:?}");
}

#[tokio::test]
async fn a_server_that_is_killed_closes_the_connection() {
    let mut server = Server::nbdkit(&["--filter=delay", "memory", "1M", "delay-read=60"]);
    let mut client = soon(connect(server.connect().await, false)).await.unwrap();
    client.ask_read(0, 512).await.unwrap();
    server.kill();
    let error = soon(client.receive(REQUEST)).await.unwrap_err();
    assert!(matches!(error, NbdError::Closed), "{error:?}");
}

#[tokio::test]
async fn chunks_that_no_server_may_send_are_refused_at_once() {
    type Lie = fn(Request) -> Vec<u8>;
    let lies: &[(&str, Lie)] = &[
        ("more data than asked for", |r| r.data(true, 0, &vec![0; REQUEST as usize + 1])),
        ("empty data", |r| r.data(true, 0, &[])),
        ("gigabytes in a header", |r| {
            let mut reply = r.data(true, 0, &[0; 8]);
            reply[16] = 0x7f;
            reply
        }),
        ("an empty hole", |r| r.hole(true, 0, 0)),
        ("half a hole", |r| r.chunk(true, 2, &[0; 8])),
        ("nothing, and more to come", |r| r.chunk(false, 0, &[])),
        ("nothing, with bytes", |r| r.chunk(true, 0, &[0; 4])),
        ("an unknown chunk", |r| r.chunk(true, 77, &[0; 16])),
        ("half an error", |r| r.chunk(true, 0x8001, &[0; 5])),
        ("a huge error", |r| r.chunk(true, 0x8001, &vec![1; 100_000])),
        ("no chunk at all", |_| vec![7; 64]),
        ("a simple reply", |r| [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &r.cookie.to_be_bytes()].concat()),
        ("an extent of no length", |r| r.status(true, ALLOCATION, &[(4096, 0), (0, 0)])),
        ("an unknown context", |r| r.status(true, 99, &[(4096, 0)])),
        ("no extents", |r| r.status(true, ALLOCATION, &[])),
        ("half an extent", |r| r.chunk(true, 5, &[0, 0, 0, 5, 0, 0, 0, 1, 0])),
        ("extents without end", |r| r.status(true, ALLOCATION, &vec![(1, 0); (256 << 10) + 1])),
    ];
    for (case, lie) in lies {
        let mut client = connect(serve(SIZE, move |request| Some(lie(request))), false).await.unwrap();
        client.ask_read(0, 65_536).await.unwrap();
        let error = soon(client.receive(REQUEST)).await.unwrap_err();
        assert!(matches!(error, NbdError::Protocol(_)), "{case}: {error:?}");
    }
    let mut client = connect(serve(SIZE, |request| Some(request.honest()[..1000].to_vec())), false).await.unwrap();
    client.ask_read(0, 65_536).await.unwrap();
    let silent = timeout(Duration::from_millis(200), client.receive(REQUEST)).await;
    assert!(silent.is_err(), "half a chunk is none: {silent:?}");
}

/// What connecting says when this option is answered with this.
async fn handshake_with(option: u32, said: impl Fn() -> Vec<u8> + Send + 'static) -> NbdError {
    let (stream, mut server) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        greet(&mut server).await?;
        while let Some((number, data)) = next_option(&mut server).await {
            let reply = if number == option { said() } else { honest_option(number, &data, SIZE) };
            server.write_all(&reply).await.ok()?;
        }
        Some(())
    });
    soon(connect(stream, false)).await.unwrap_err()
}

#[tokio::test]
async fn a_handshake_that_lies_or_never_ends_is_refused() {
    let protocol = |case: &str, error: NbdError| assert!(matches!(error, NbdError::Protocol(_)), "{case}: {error:?}");
    for option in [8, 10, 7] {
        let oversized = move || {
            let mut reply = option_reply(option, 3, &[]);
            reply[16] = 0x7f;
            reply
        };
        protocol("oversized", handshake_with(option, oversized).await);
        protocol("another option", handshake_with(option, move || option_reply(option + 1, 1, &[])).await);
        protocol("garbage", handshake_with(option, || vec![9; 64]).await);
        let text = handshake_with(option, move || option_reply(option, (1 << 31) + 2, b"\x1b[2Jno\n")).await;
        assert!(text.to_string().ends_with(":  [2Jno "), "{text:?}");
    }
    for option in [10, 7] {
        let endless = move || option_reply(option, 3, &[0; 12]).repeat(10_000);
        protocol("endless", handshake_with(option, endless).await);
    }
    protocol("no size", handshake_with(7, || option_reply(7, 1, &[])).await);
    let absurd = || {
        let info = [&[0; 2][..], &[0xff; 10]].concat();
        [option_reply(7, 3, &info), option_reply(7, 1, &[])].concat()
    };
    protocol("an absurd size", handshake_with(7, absurd).await);
    for greeting in
        [&b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0"[..], b"SSH-2.0-OpenSSH_9.9\r\n", b"NBDMAGICIHAVEOPT\0\0"]
    {
        let (stream, mut server) = UnixStream::pair().unwrap();
        server.write_all(greeting).await.unwrap();
        protocol("greeting", soon(connect(stream, false)).await.unwrap_err());
    }
    let (stream, server) = UnixStream::pair().unwrap();
    drop(server);
    assert!(matches!(connect(stream, false).await, Err(NbdError::Closed)));
}

/// As `stop` and migration do, through the monitor, while a client with this many requests under way does not read.
/// How long it took, unless QEMU hangs.
async fn drain_with(requests: u64) -> Option<Duration> {
    let directory = TempDir::new().unwrap();
    let disk = directory.path().join("disk.raw");
    std::fs::write(&disk, vec![7; 16 << 20]).unwrap();
    let monitor = directory.path().join("qmp");
    let server = Server::start("QEMU_10", |_| {
        let arguments = ["-machine", "none", "-nodefaults", "-display", "none", "-qmp"];
        let mut arguments: Vec<String> = arguments.map(str::to_owned).into();
        arguments.push(format!("unix:{},server=on,wait=off", monitor.display()));
        let node = format!("driver=raw,node-name=disk,file.driver=file,file.filename={}", disk.display());
        arguments.extend(["-blockdev".to_owned(), node]);
        arguments
    });
    let mut control = Control::connect(&monitor).await;
    let address = serde_json::json!({ "type": "unix", "data": { "path": server.socket } });
    control.execute("nbd-server-start", serde_json::json!({ "addr": address })).await;
    control.execute("block-export-add", serde_json::json!({ "type": "nbd", "id": "e", "node-name": "disk" })).await;
    let contexts = contexts(false);
    let mut client = NbdClient::connect(server.connect().await, "disk", &contexts).await.unwrap();
    for number in 0..requests {
        client.ask_read(number * REQUEST, u32::try_from(REQUEST).unwrap()).await.unwrap();
    }
    // Long enough for QEMU to have the replies in its socket, or to be stuck with them.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let begun = Instant::now();
    let stopped = timeout(Duration::from_secs(4), control.execute("stop", serde_json::json!({}))).await;
    stopped.ok().map(|()| begun.elapsed())
}

/// A monitor, command by command.
struct Control(virt_fleece::qmp::UnixMonitor);

impl Control {
    async fn connect(path: &std::path::Path) -> Self {
        let begun = Instant::now();
        loop {
            match virt_fleece::qmp::UnixMonitor::connect(path, virt_fleece::qmp::TimeLimits::default()).await {
                Ok(monitor) => return Self(monitor),
                Err(error) => assert!(begun.elapsed() < Duration::from_secs(30), "{error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn execute(&mut self, command: &str, arguments: serde_json::Value) {
        use virt_fleece::qmp::Monitor;
        let command = serde_json::json!({ "execute": command, "arguments": arguments });
        self.0.call(command, Vec::new()).await.unwrap();
    }
}

#[tokio::test]
async fn qemu_stops_at_once_while_all_the_credit_is_in_use_and_nobody_reads() {
    let requests = (nbd::credit() / (REQUEST + 64)).max(1);
    let took = drain_with(requests).await.unwrap_or_else(|| panic!("{requests} requests hang QEMU"));
    assert!(took < Duration::from_secs(3), "{took:?}");
    // More than the credit hangs it: otherwise the test proves nothing.
    assert!(drain_with(64).await.is_none(), "64 requests should hang QEMU");
}

#[tokio::test]
async fn good_bye_is_said() {
    let (stream, mut server) = UnixStream::pair().unwrap();
    let server = async move {
        scripted::handshake(&mut server, SIZE).await.unwrap();
        let request = scripted::receive(&mut server).await.unwrap();
        assert_eq!(request.command, scripted::DISCONNECT);
        assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
    };
    let client = async { connect(stream, false).await.unwrap().disconnect().await.unwrap() };
    soon(async { tokio::join!(server, client) }).await;
}
