//! A libvirt daemon that lies, floods or falls silent.
#![allow(clippy::unwrap_used, reason = "tests; the exemption for test functions leaves out what they call")]

use serde_json::json;
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};
use virt_fleece::qmp::{
    Monitor, QmpError, TimeLimits,
    libvirt::{
        LibvirtConnection, LibvirtMonitor,
        message::{Header, Kind, MAX_MESSAGE, body_length, decode_message, encode_message},
        xdr::Encoder,
    },
};

const LIMITS: TimeLimits = TimeLimits { greeting: Duration::from_secs(5), command: Duration::from_secs(10) };
const SHORT: TimeLimits = TimeLimits { greeting: Duration::from_millis(300), command: Duration::from_millis(300) };

const AUTH_LIST: i32 = 66;
const LOOKUP_BY_UUID: i32 = 24;
const LIST_ALL_DOMAINS: i32 = 273;
const MONITOR_COMMAND: i32 = 1;
const QEMU_PROGRAM: u32 = 0x2000_8087;

fn listen() -> (TempDir, PathBuf, UnixListener) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("libvirt-sock");
    let listener = UnixListener::bind(&path).unwrap();
    (directory, path, listener)
}

async fn receive(stream: &mut UnixStream) -> Option<Header> {
    let mut word = [0; 4];
    stream.read_exact(&mut word).await.ok()?;
    let mut bytes = word.to_vec();
    bytes.resize(body_length(word).unwrap() + 4, 0);
    stream.read_exact(&mut bytes[4..]).await.unwrap();
    Some(decode_message(&bytes).unwrap().header)
}

fn reply(call: Header, payload: &[u8]) -> Vec<u8> {
    encode_message(Header { kind: Kind::Reply, ..call }, 0, payload).unwrap()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// A domain that runs.
fn domain() -> Vec<u8> {
    let mut encoder = Encoder::new();
    encoder.string("ns_vm", 100).unwrap().fixed_opaque(&[7; 16]).i32(3);
    encoder.into_bytes()
}

/// What an honest daemon would answer.
fn honest(call: Header) -> Vec<u8> {
    match (call.program, call.procedure) {
        (QEMU_PROGRAM, MONITOR_COMMAND) => string(r#"{"return": {}}"#),
        (_, AUTH_LIST) => words(&[1, 0]),
        (_, LOOKUP_BY_UUID) => domain(),
        (_, LIST_ALL_DOMAINS) => [words(&[1]), domain(), words(&[1])].concat(),
        _ => Vec::new(),
    }
}

fn string(text: &str) -> Vec<u8> {
    let mut encoder = Encoder::new();
    encoder.string(text, usize::MAX).unwrap();
    encoder.into_bytes()
}

/// Serves one client: `script` says what to send instead of the honest answer; `None` closes.
fn serve(
    listener: UnixListener,
    mut script: impl FnMut(Header) -> Option<Vec<u8>> + Send + 'static,
) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        while let Some(call) = receive(&mut stream).await {
            let Some(said) = script(call) else { return };
            if stream.write_all(&said).await.is_err() {
                return;
            }
        }
    })
}

/// What connecting says to a daemon that says this to the first call.
async fn first_answer(limits: TimeLimits, said: impl Fn(Header) -> Option<Vec<u8>> + Send + 'static) -> QmpError {
    let (_directory, path, listener) = listen();
    let _daemon = serve(listener, said);
    LibvirtConnection::connect(&path, limits).await.unwrap_err()
}

/// What a monitor command says when the daemon passes on this answer, in XDR, as QEMU's.
async fn monitor_answer(payload: Vec<u8>) -> QmpError {
    let (_directory, path, listener) = listen();
    let _daemon = serve(listener, move |call| {
        let is_command = call.program == QEMU_PROGRAM;
        Some(reply(call, &if is_command { payload.clone() } else { honest(call) }))
    });
    let connection = Arc::new(LibvirtConnection::connect(&path, LIMITS).await.unwrap());
    let domain = connection.domains().await.unwrap().remove(0);
    let monitor = LibvirtMonitor::open(connection, &domain).await.unwrap();
    monitor.call(json!({ "execute": "query-status" }), Vec::new()).await.unwrap_err()
}

#[tokio::test]
async fn an_honest_fake_is_believed() {
    // Otherwise the other tests prove nothing.
    let error = monitor_answer(string(r#"{"error": {"class": "GenericError", "desc": "as told"}}"#)).await;
    assert_eq!(error.to_string(), "query-status was refused: as told");
}

#[tokio::test]
async fn absurd_lengths_types_and_numbers_end_the_connection() {
    let over = u32::try_from(MAX_MESSAGE).unwrap() + 5;
    for (case, said) in [
        ("no length", words(&[0, 0])),
        ("less than a header", words(&[27])),
        ("over the limit", words(&[over, 0])),
        ("4 GiB", words(&[u32::MAX])),
        ("an unknown type", words(&[28, 0x2000_8086, 1, 66, 9, 1, 0])),
        ("an unknown status", words(&[28, 0x2000_8086, 1, 66, 1, 1, 9])),
        ("descriptors without end", words(&[32, 0x2000_8086, 1, 66, 5, 1, 0, u32::MAX])),
        ("an error that is none", words(&[28, 0x2000_8086, 1, 66, 1, 1, 1])),
        ("another protocol", b"{\"QMP\": {\"version\": {}}}\r\n".to_vec()),
    ] {
        let error = first_answer(LIMITS, move |_| Some(said.clone())).await;
        assert!(matches!(error, QmpError::Protocol { .. }), "{case}: {error:?}");
    }
}

#[tokio::test]
async fn payloads_that_are_not_what_the_procedure_promises_name_it() {
    let domains = words(&[u32::MAX]);
    for (case, payload) in [
        ("nothing", Vec::new()),
        ("a count that nothing holds", words(&[20])),
        ("too many", domains.clone()),
        ("more than there should be", words(&[1, 0, 0])),
    ] {
        let error = first_answer(LIMITS, move |call| Some(reply(call, &payload))).await;
        assert!(error.to_string().contains("the answer to libvirt authentication"), "{case}: {error}");
    }
    for (case, payload) in [
        ("too many", domains),
        ("a name of 4 GiB", words(&[1, u32::MAX, 0, 0])),
        ("a name that is no text", [words(&[1, 4]), vec![0xff; 4], vec![0; 24]].concat()),
        ("half a domain", words(&[1, 0, 0, 0])),
    ] {
        let (_directory, path, listener) = listen();
        let _daemon = serve(listener, move |call| {
            let lie = call.procedure == LIST_ALL_DOMAINS;
            Some(reply(call, &if lie { payload.clone() } else { honest(call) }))
        });
        let connection = LibvirtConnection::connect(&path, LIMITS).await.unwrap();
        let error = connection.domains().await.unwrap_err();
        assert!(error.to_string().contains("the answer to virConnectListAllDomains"), "{case}: {error}");
    }
}

#[tokio::test]
async fn a_monitor_answer_that_is_heavy_deep_or_no_json_is_a_decoding_error() {
    let heavy = format!(r#"{{"return": [{}0]}}"#, r#"{"":0},"#.repeat(500_000));
    let deep = r#"{"return":"#.repeat(100_000);
    for answer in [heavy.as_str(), &deep, "", "[]", "{}", "\0", "{\"return\": "] {
        let error = monitor_answer(string(answer)).await;
        assert!(matches!(error, QmpError::Decode { .. }), "{error:?}");
    }
    // What libvirt's limit does not allow, and no text.
    for payload in [string(&"x".repeat((4 << 20) + 1)), [words(&[4]), vec![0xff; 4]].concat()] {
        let error = monitor_answer(payload).await;
        assert!(matches!(error, QmpError::Protocol { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn an_early_end_is_told_from_silence() {
    let error = first_answer(LIMITS, |_| None).await;
    assert!(matches!(error, QmpError::Closed { .. }), "{error:?}");

    let (_directory, path, listener) = listen();
    let daemon = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        receive(&mut stream).await;
        // A promise of 32 MiB; memory grows with what comes, not with it.
        stream.write_all(&words(&[32 << 20, 0x2000_8086])).await.unwrap();
    });
    let error = LibvirtConnection::connect(&path, LIMITS).await.unwrap_err();
    assert!(matches!(error, QmpError::Closed { .. }), "{error:?}");
    daemon.await.unwrap();

    let error = first_answer(SHORT, |_| Some(Vec::new())).await;
    assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
}

#[tokio::test]
async fn a_daemon_that_drips_or_floods_is_a_timeout_within_the_limit() {
    let begun = Instant::now();
    // Of answers to no question, events and streams there is no end.
    for kind in [Kind::Reply, Kind::Event, Kind::Stream, Kind::Call, Kind::StreamHole] {
        let error = first_answer(SHORT, move |call| {
            let stray = Header { kind, serial: 4711, ..call };
            Some(encode_message(stray, 0, &[7; 64]).unwrap().repeat(10_000))
        });
        let error = error.await;
        assert!(matches!(error, QmpError::Timeout { .. }), "{kind:?}: {error:?}");
    }
    let (_directory, path, listener) = listen();
    let daemon = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let call = receive(&mut stream).await.unwrap();
        for byte in reply(call, &[0; 4096]) {
            if stream.write_all(&[byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let error = LibvirtConnection::connect(&path, SHORT).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
    daemon.abort();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn nobody_listens_and_nobody_accepts() {
    let (_directory, path, listener) = listen();
    let error = LibvirtConnection::connect(&path, SHORT).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
    drop(listener);
    let error = LibvirtConnection::connect(&path, SHORT).await.unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }), "{error:?}");
}
