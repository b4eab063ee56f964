//! A monitor that lies, floods or falls silent: a guest may own its QEMU. Every call ends within its limit, with an
//! error that says what is wrong, and nothing grows without bounds.
#![allow(clippy::unwrap_used, reason = "tests; the exemption for test functions leaves out what they call")]

use futures::future::join_all;
use serde_json::{Value, json};
use std::{
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::broadcast::error::RecvError,
};
use virt_fleece::qmp::{
    ErrorClass, MAX_LINE, Monitor, Qmp, QmpError, TimeLimits, UnixMonitor,
    command::{QueryBlock, QueryStatus},
};

const LIMITS: TimeLimits = TimeLimits { greeting: Duration::from_secs(5), command: Duration::from_secs(10) };
const SHORT: TimeLimits = TimeLimits { greeting: Duration::from_millis(300), command: Duration::from_millis(300) };

/// QEMU's end of the socket.
struct Peer {
    stream: BufReader<UnixStream>,
}

impl Peer {
    async fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    async fn say(&mut self, message: Value) {
        self.write(format!("{message}\r\n").as_bytes()).await;
    }

    async fn answer(&mut self, request: &Value, value: Value) {
        self.say(json!({ "return": value, "id": request["id"] })).await;
    }
}

/// A socket that somebody listens at.
fn listen() -> (TempDir, PathBuf, UnixListener) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    (directory, path, listener)
}

/// What connecting to this server says.
async fn connect_to<F: Future<Output = ()>>(limits: TimeLimits, serve: impl FnOnce(UnixStream) -> F) -> QmpError {
    let (_directory, path, listener) = listen();
    let server = async {
        serve(listener.accept().await.unwrap().0).await;
        // The connection stays open unless the server dropped it.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        result = UnixMonitor::connect(&path, limits) => result.unwrap_err(),
        () = server => unreachable!("never ends"),
    }
}

/// A connection after an honest beginning.
async fn connected(limits: TimeLimits) -> (UnixMonitor, Peer) {
    let (_directory, path, listener) = listen();
    let server = async {
        let mut peer = Peer { stream: BufReader::new(listener.accept().await.unwrap().0) };
        peer.say(json!({ "QMP": { "version": {}, "capabilities": ["oob"] } })).await;
        let request = peer.read().await;
        assert_eq!(request["execute"], "qmp_capabilities");
        peer.answer(&request, json!({})).await;
        peer
    };
    let (monitor, peer) = tokio::join!(UnixMonitor::connect(&path, limits), server);
    (monitor.unwrap(), peer)
}

fn ask(name: &str) -> Value {
    json!({ "execute": name })
}

/// What a call sees when QEMU says this instead of an answer.
async fn outcome(said: &[u8]) -> QmpError {
    let (monitor, mut peer) = connected(LIMITS).await;
    let (result, ()) = tokio::join!(monitor.call(ask("x"), vec![]), async {
        peer.read().await;
        peer.write(said).await;
    });
    result.unwrap_err()
}

#[tokio::test]
async fn whoever_does_not_greet_like_qemu_is_refused() {
    for greeting in [&b"SSH-2.0-OpenSSH\r\n"[..], b"{\"return\": {}}\n", b"[]\n", b"\0\0\0\x1c\x20\0\x80\x86\n"] {
        let error = connect_to(LIMITS, async |mut stream| stream.write_all(greeting).await.unwrap()).await;
        assert!(matches!(error, QmpError::Protocol { .. }), "{error:?}");
    }
    let error = connect_to(LIMITS, async |stream| drop(stream)).await;
    assert!(matches!(error, QmpError::Closed { .. }), "{error:?}");
    // A greeting that does not end: no error of the writer, since nobody reads on.
    let error = connect_to(LIMITS, async |mut stream| while stream.write_all(&[b'x'; 4096]).await.is_ok() {}).await;
    assert!(error.to_string().contains("a line of more than"), "{error}");
}

#[tokio::test]
async fn a_monitor_that_is_silent_or_drips_is_occupied_within_the_limit() {
    let begun = Instant::now();
    let (_directory, path, _listener) = listen();
    let error = UnixMonitor::connect(&path, SHORT).await.unwrap_err();
    assert!(matches!(error, QmpError::Occupied { .. }), "{error:?}");
    let error = connect_to(SHORT, async |mut stream| {
        for byte in b"{\"QMP\": ".iter().cycle() {
            if stream.write_all(&[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let error = error.await;
    assert!(matches!(error, QmpError::Occupied { .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_monitor_whose_queue_of_clients_is_full_is_occupied_within_the_limit() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    // As QEMU does: one client is served, one more may wait.
    listen(&listener, 1).unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = UnixStream::connect(&path).await {
        queued.push(stream);
    }
    let begun = Instant::now();
    let error = UnixMonitor::connect(&path, SHORT).await.unwrap_err();
    assert!(matches!(error, QmpError::Occupied { .. }), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn garbage_ends_the_connection_with_the_reason() {
    let nested = [&b"{\"return\":".repeat(100_000)[..], b"\n"].concat();
    for garbage in [&b"\x00\xff\xfe\n"[..], b"{\"return\": \n", b"17\n", b"{\"id\": 2}\n", &nested] {
        let error = outcome(garbage).await;
        assert!(matches!(error, QmpError::Protocol { .. }), "{error:?}");
        assert!(error.is_disconnected());
    }
}

#[tokio::test]
async fn an_endless_line_ends_the_connection() {
    let (monitor, mut peer) = connected(LIMITS).await;
    let flood = tokio::spawn(async move {
        peer.read().await;
        let block = vec![b'x'; 1 << 16];
        let mut sent = 0;
        while peer.stream.write_all(&block).await.is_ok() {
            sent += block.len();
        }
        sent
    });
    let error = monitor.call(ask("x"), vec![]).await.unwrap_err();
    assert!(error.to_string().contains("a line of more than 4194304 bytes"), "{error}");
    drop(monitor);
    assert!(flood.await.unwrap() < 2 * MAX_LINE, "nobody reads on");
}

#[tokio::test]
async fn a_line_that_would_become_much_memory_ends_the_connection() {
    let count = MAX_LINE / 8;
    let error = outcome(format!("{{\"return\": [{}{{}}], \"id\": 2}}\n", "{\"\":0},".repeat(count)).as_bytes()).await;
    assert!(matches!(&error, QmpError::Protocol { detail, .. } if detail.contains("bytes of memory")), "{error:?}");
}

#[tokio::test]
async fn answers_find_their_calls_in_any_order_among_those_to_no_question() {
    let (monitor, mut peer) = connected(LIMITS).await;
    let calls = (0..20).map(|number| monitor.call(ask(&format!("c{number}")), vec![]));
    let serve = async {
        let mut requests = Vec::new();
        for number in 0..20 {
            requests.push(peer.read().await);
            assert_eq!(requests[number]["execute"], format!("c{number}"), "sent in the order of the first polls");
        }
        for request in requests.iter().rev() {
            for id in [json!(0), json!(u64::MAX), json!(-1), json!("guardian-1"), json!({"a": []}), Value::Null] {
                peer.say(json!({ "return": "another's", "id": id })).await;
            }
            peer.say(json!({ "error": { "class": "GenericError", "desc": "another's" } })).await;
            peer.answer(request, request["execute"].clone()).await;
            peer.answer(request, json!("a second answer")).await;
        }
    };
    let (answers, ()) = tokio::join!(join_all(calls), serve);
    for (number, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap(), format!("c{number}"));
    }
}

#[tokio::test]
async fn an_answer_that_drips_is_a_timeout_and_harms_nobody_later() {
    let (monitor, mut peer) = connected(SHORT).await;
    let begun = Instant::now();
    let mut late = Value::Null;
    let drip = async {
        late = peer.read().await;
        peer.write(format!("{{\"id\": {}, ", late["id"]).as_bytes()).await;
        loop {
            peer.write(b" ").await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let error = tokio::select! {
        result = monitor.call(ask("slow"), vec![]) => result.unwrap_err(),
        () = drip => unreachable!("never ends"),
    };
    assert!(matches!(&error, QmpError::Timeout { command, .. } if command == "slow"), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    peer.write(b"\"return\": \"late\"}\n").await;
    let (next, ()) = tokio::join!(monitor.call(ask("next"), vec![]), async {
        let request = peer.read().await;
        peer.answer(&request, json!("own")).await;
    });
    assert_eq!(next.unwrap(), "own");
}

#[tokio::test]
async fn a_command_that_qemu_reads_in_part_ends_the_connection() {
    let (monitor, _peer) = connected(SHORT).await;
    // More than the socket's buffers hold.
    let large = json!({ "execute": "large", "arguments": { "text": "x".repeat(16 << 20) } });
    let error = monitor.call(large, vec![]).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
    let error = monitor.call(ask("next"), vec![]).await.unwrap_err();
    assert!(error.to_string().contains("did not read a command to its end"), "{error}");
}

#[tokio::test]
async fn the_end_of_the_connection_ends_calls_and_events() {
    let (monitor, mut peer) = connected(LIMITS).await;
    let mut events = monitor.events();
    let calls = join_all((0..3).map(|_| monitor.call(ask("x"), vec![])));
    let (results, ()) = tokio::join!(calls, async {
        for _ in 0..3 {
            peer.read().await;
        }
        peer.say(json!({ "event": "SHUTDOWN" })).await;
        peer.write(b"{\"return\": 1").await;
        drop(peer);
    });
    for result in results {
        assert!(matches!(result, Err(QmpError::Closed { .. })), "{result:?}");
    }
    assert_eq!(events.recv().await.unwrap()["event"], "SHUTDOWN");
    assert_eq!(events.recv().await, Err(RecvError::Closed));
    assert_eq!(monitor.events().recv().await, Err(RecvError::Closed));
    assert!(matches!(monitor.call(ask("x"), vec![]).await, Err(QmpError::Closed { .. })));
}

#[tokio::test]
async fn a_flood_of_events_is_dropped_not_queued() {
    let (monitor, mut peer) = connected(LIMITS).await;
    let mut events = monitor.events();
    let (result, ()) = tokio::join!(monitor.call(ask("x"), vec![]), async {
        let request = peer.read().await;
        for number in 0..1000 {
            peer.say(json!({ "event": "E", "data": number })).await;
        }
        peer.say(json!({ "event": "HUGE", "data": { "x": "y".repeat(1 << 20) } })).await;
        peer.say(json!({ "event": ["no", "name"], "id": request["id"] })).await;
        peer.answer(&request, json!({})).await;
    });
    result.unwrap();
    let Err(RecvError::Lagged(missed)) = events.recv().await else { panic!("queued") };
    assert_eq!(events.recv().await.unwrap()["data"], missed, "the oldest are lost");
    let mut last = Value::Null;
    while let Ok(event) = events.try_recv() {
        assert_ne!(event["event"], "HUGE");
        last = event;
    }
    assert_eq!(last["event"], json!(["no", "name"]));
}

#[tokio::test]
async fn a_refusal_keeps_class_and_a_short_printable_text_whatever_its_types() {
    let refused = async |error: Value| {
        let (monitor, mut peer) = connected(LIMITS).await;
        let (result, ()) = tokio::join!(monitor.call(ask("x"), vec![]), async {
            let id = peer.read().await["id"].clone();
            peer.say(json!({ "error": error, "id": id })).await;
        });
        result.unwrap_err()
    };
    let text = format!("\u{1b}[2Jcleared\n{}", "é".repeat(100_000));
    let error = refused(json!({ "class": "DeviceNotFound", "desc": text })).await;
    assert!(error.is_not_found());
    let QmpError::Refused { class, description, .. } = error else { panic!("{error:?}") };
    assert_eq!(class, ErrorClass::DeviceNotFound);
    assert!(description.starts_with(" [2Jcleared é") && description.chars().count() == 2000);
    for error in [json!("no"), json!(5), Value::Null, json!({ "class": [], "desc": {} })] {
        assert!(matches!(refused(error).await, QmpError::Refused { .. }));
    }
}

#[tokio::test]
async fn an_answer_of_the_wrong_shape_says_so() {
    let (monitor, mut peer) = connected(LIMITS).await;
    let qmp = Qmp::new(Arc::new(monitor));
    for value in [json!({ "running": "perhaps" }), json!([]), json!(-1e300), Value::Null] {
        let (result, ()) = tokio::join!(qmp.execute(&QueryStatus {}), async {
            let request = peer.read().await;
            peer.answer(&request, value.clone()).await;
        });
        assert!(matches!(result, Err(QmpError::Decode { command, .. }) if command == "query-status"), "{value}");
    }
    let (result, ()) = tokio::join!(qmp.execute(&QueryBlock {}), async {
        let request = peer.read().await;
        let size = json!({ "image": { "virtual-size": -5, "filename": "f", "format": "raw" }, "node-name": 7 });
        peer.answer(&request, json!([{ "device": "", "inserted": size }])).await;
    });
    assert!(matches!(result, Err(QmpError::Decode { command, .. }) if command == "query-block"));
}

#[tokio::test]
async fn a_client_that_goes_closes_the_connection() {
    let (monitor, mut peer) = connected(LIMITS).await;
    drop(monitor);
    assert_eq!(peer.stream.read(&mut [0]).await.unwrap(), 0);
}
