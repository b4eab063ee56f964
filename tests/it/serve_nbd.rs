//! `serve-nbd` before real clients: `qemu-img`, `qemu-io`, `nbdcopy`, clients that break the protocol, and a guest that
//! boots with its disk on the served volume.

mod client;
mod served;
mod speed;

use crate::bed::{
    cli::Cli,
    disk::{Bus, DiskSpec, Format},
    flavour::{Flavour, tool},
    vm::Vm,
    writer::fnv1a64,
};
use client::Client;
use served::{CHUNK, Server, Stored, VOLUME};
use std::{
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
    process::{Command, Output},
    time::Duration,
};

/// Not a multiple of the chunk: three leaves of the index, the middle one all zeroes.
const SIZE: u64 = (130 << 20) + 3 * 512;

/// Runs a program that must succeed.
fn run(command: &mut Command) -> Output {
    let output = command.output().expect("starting a program");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let shown = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{command:?} ends with {}: {}{}", output.status, shown.0, shown.1);
    output
}

fn qemu_img(arguments: &[&str]) -> String {
    let output = run(Command::new(tool("QEMU_IMG")).args(arguments));
    String::from_utf8(output.stdout).expect("text")
}

/// `qemu-io` is installed beside `qemu-img`.
fn qemu_io(uri: &str, command: &str) -> Output {
    let program = tool("QEMU_IMG").with_file_name("qemu-io");
    Command::new(program).args(["-r", "-f", "raw", "-c", command, uri]).output().expect("starting qemu-io")
}

#[test]
fn copies_are_the_volume_and_holes_are_seen() {
    let stored = Stored::new(SIZE);
    let server = Server::start(&stored, &[]);
    let raw = stored.directory.path().join("expected.raw");
    std::fs::write(&raw, &stored.content).expect("a file");
    let raw = raw.to_str().expect("text");
    qemu_img(&["compare", "-f", "raw", "-F", "raw", raw, &server.uri]);

    let copy = stored.directory.path().join("copy.raw");
    qemu_img(&["convert", "-f", "raw", "-O", "raw", &server.uri, copy.to_str().expect("text")]);
    assert!(std::fs::read(&copy).expect("a copy") == stored.content, "the copy differs");
    // Another implementation of the protocol, where it is installed: four connections, structured replies.
    if Command::new("nbdcopy").arg("--version").output().is_ok() {
        let copy = stored.directory.path().join("nbdcopy.raw");
        run(Command::new("nbdcopy").arg(&server.uri).arg(&copy));
        assert!(std::fs::read(&copy).expect("a copy") == stored.content, "nbdcopy's copy differs");
    }

    let map = qemu_img(&["map", "--output=json", "-f", "raw", &server.uri]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).expect("JSON");
    let mut at = 0;
    for extent in &map {
        let (start, length) =
            (extent["start"].as_u64().expect("a start"), extent["length"].as_u64().expect("a length"));
        assert_eq!(start, at, "{map:?}");
        at += length;
        for chunk in start / CHUNK..(start + length).div_ceil(CHUNK) {
            let hole = extent["zero"] == true && extent["data"] == false;
            assert_eq!(hole, stored.is_zero(chunk), "chunk {chunk}: {extent}");
        }
    }
    assert_eq!(at, SIZE);
    assert!(map.len() > 4, "{map:?}");
    let info = qemu_img(&["info", "--output=json", "-f", "raw", &server.uri]);
    assert!(info.contains(&SIZE.to_string()), "{info}");
    server.stop();
}

#[test]
fn any_part_can_be_read_over_many_connections_at_once() {
    // Odd to the byte: only what speaks the protocol itself can say so.
    let stored = Stored::new(SIZE + 100);
    let server = Server::start(&stored, &["--cache", "1M"]);
    std::thread::scope(|scope| {
        for number in 0..4_u64 {
            let (server, stored) = (&server, &stored);
            scope.spawn(move || {
                let mut client = Client::connect(&server.socket, number % 2 == 0);
                assert_eq!(client.size, SIZE + 100);
                let mut random = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                for round in 0..150_u64 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let length = if round % 50 == 0 { 8 << 20 } else { 1 + (random >> 20) % (3 * CHUNK) };
                    // Half of it where the data is.
                    let room = if round % 2 == 0 { SIZE + 100 } else { 12 << 20 };
                    let offset = (random >> 33) % room;
                    let length = length.min(SIZE + 100 - offset);
                    let found = client.read(offset, length as u32, round % 3 == 0).expect("readable");
                    let expected = &stored.content[offset as usize..][..length as usize];
                    assert!(found == expected, "{length} bytes at {offset} differ");
                }
                client.leave();
            });
        }
    });
    // Many requests before the first reply is received.
    let mut client = Client::connect(&server.socket, true);
    let offsets: Vec<u64> = (0..300).map(|number| number * 37_777 % (SIZE - 5000)).collect();
    let cookies: Vec<u64> = offsets.iter().map(|offset| client.ask(0, 0, *offset, 5000)).collect();
    let mut replies = client.collect(&cookies);
    for (cookie, offset) in cookies.iter().zip(offsets) {
        let found = replies.remove(cookie).expect("a reply").expect("readable");
        assert!(found == stored.content[offset as usize..][..5000], "{offset}");
    }
    server.stop();
}

#[test]
fn states_of_blocks() {
    let stored = Stored::new(SIZE);
    let server = Server::start(&stored, &[]);
    let mut client = Client::connect(&server.socket, true);
    let mut at = 0;
    let mut runs = Vec::new();
    while at < SIZE {
        let states = client.states(at, u32::try_from(SIZE - at).expect("small"), false);
        for (length, zero) in states {
            runs.push((at, length, zero));
            at += u64::from(length);
        }
    }
    assert_eq!(at, SIZE);
    for (start, length, zero) in &runs {
        let chunks = start / CHUNK..(start + u64::from(*length)).div_ceil(CHUNK);
        assert!(chunks.into_iter().all(|chunk| stored.is_zero(chunk) == *zero), "{start} {length} {zero}");
    }
    assert!(runs.windows(2).all(|pair| pair[0].2 != pair[1].2), "runs are as long as they can be: {runs:?}");
    let one = client.states(100, 64 << 20, true);
    assert_eq!(one.len(), 1);
    assert_eq!(u64::from(one[0].0), u64::from(runs[0].1) - 100);
    // Within a hole, across the border of a leaf.
    assert_eq!(client.states(66 << 20, 62 << 20, false), vec![(62 << 20, true)]);
    server.stop();
}

#[test]
fn a_damaged_chunk_fails_where_it_is_and_nowhere_else() {
    let stored = Stored::new(SIZE);
    let (damaged, missing) = (1, 3);
    let object = stored.object(damaged);
    let path = stored.repository().join(&object);
    let mut bytes = std::fs::read(&path).expect("the chunk");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).expect("damage");
    std::fs::remove_file(stored.repository().join(stored.object(missing))).expect("damage");

    let server = Server::start(&stored, &[]);
    for structured in [true, false] {
        let mut client = Client::connect(&server.socket, structured);
        for chunk in 0..8 {
            let found = client.read(chunk * CHUNK + 5, 1000, false);
            if [damaged, missing].contains(&chunk) {
                assert_eq!(found, Err(5), "chunk {chunk}");
            } else {
                let expected = &stored.content[(chunk * CHUNK + 5) as usize..][..1000];
                assert!(found.as_deref() == Ok(expected), "chunk {chunk}");
            }
        }
        // A request that only touches it fails as a whole, and the connection goes on.
        assert_eq!(client.read(0, 2 * CHUNK as u32, false), Err(5));
        assert!(client.read(0, CHUNK as u32, false).is_ok());
    }
    let failed = qemu_io(&server.uri, &format!("read {} 512", damaged * CHUNK));
    let shown = String::from_utf8_lossy(&failed.stdout).into_owned() + &String::from_utf8_lossy(&failed.stderr);
    assert!(shown.contains("Input/output error"), "{shown}");
    assert!(qemu_io(&server.uri, &format!("read {} 512", 2 * CHUNK)).status.success());
    let log = server.stop();
    for object in [object, stored.object(missing)] {
        assert_eq!(log.matches(object.as_str()).count(), 1, "{object} in {log}");
    }
}

#[test]
fn clients_that_break_the_protocol_harm_nobody() {
    let stored = Stored::new(SIZE);
    let server = Server::start(&stored, &[]);
    let mut witness = Client::connect(&server.socket, true);
    for (name, script) in client::hostile() {
        let before = witness.read(CHUNK, 700, false);
        assert!(before.as_deref() == Ok(&stored.content[CHUNK as usize..][..700]), "before {name}");
        script(&server.socket);
        println!("survived: {name}");
    }
    assert!(witness.read(5, 700, false).is_ok());
    let memory = server.peak_memory();
    assert!(memory < 400 << 20, "{} MiB", memory >> 20);
    assert_eq!(Client::connect(&server.socket, false).size, SIZE);
    witness.leave();
    let log = server.stop();
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn wrong_requests_are_refused_and_the_connection_goes_on() {
    let stored = Stored::new(SIZE);
    let server = Server::start(&stored, &[]);
    for structured in [true, false] {
        let mut client = Client::connect(&server.socket, structured);
        let (read, write, trim, cache, zeroes, status) = (0, 1, 4, 5, 6, 7);
        let cases = [
            ("read behind the end", read, 0, SIZE, 1, Err(22)),
            ("read over the end", read, 0, SIZE - 1, 2, Err(22)),
            ("read at the end of numbers", read, 0, u64::MAX, 2, Err(22)),
            ("read nothing", read, 0, 0, 0, Err(22)),
            ("read too much", read, 0, 0, (32 << 20) + 1, Err(22)),
            ("read 4 GiB", read, 0, 0, u32::MAX, Err(22)),
            ("unknown flag", read, 1 << 9, 0, 1, Err(22)),
            ("unknown command", 77, 0, 0, 1, Err(22)),
            ("trim", trim, 0, 0, 4096, Err(1)),
            ("write zeroes", zeroes, 0, 0, 4096, Err(1)),
            ("cache", cache, 0, 0, 4096, Ok(())),
        ];
        for (name, command, flags, offset, length, expected) in cases {
            let cookie = client.ask(command, flags, offset, length);
            assert_eq!(client.reply(cookie, if command == read { length } else { 0 }).map(drop), expected, "{name}");
        }
        let cookie = client.ask(write, 0, 0, 70_000);
        client.send(&vec![7; 70_000]);
        assert_eq!(client.reply(cookie, 0).map(drop), Err(1), "write");
        if !structured {
            let cookie = client.ask(status, 0, 0, 4096);
            assert_eq!(client.reply(cookie, 0).map(drop), Err(22), "status without context");
        }
        assert!(client.read(0, 100, false).as_deref() == Ok(&stored.content[..100]));
        client.leave();
    }
    server.stop();
}

#[test]
fn the_socket_is_private_and_is_taken_from_the_dead_only() {
    let stored = Stored::new(1 << 20);
    let server = Server::start(&stored, &["-o", "json"]);
    let ready = server.ready.clone();
    assert_eq!((ready["volume"].as_str(), ready["virtual_size"].as_u64()), (Some(VOLUME), Some(1 << 20)));
    assert_eq!(ready["uri"].as_str(), Some(server.uri.as_str()));
    let mode = std::fs::metadata(&server.socket).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let refused = |socket: &Path| {
        let serve = Cli::new(["serve-nbd", "-o", "json", "--vm", "web", "--repository"]).arg(stored.repository());
        let outcome = serve.arg("--socket").arg(socket).env("VIRT_FLEECE_PASSPHRASE", served::PASSPHRASE).run();
        assert_eq!(outcome.status.code(), Some(6), "{outcome:?}");
        crate::scene::reason(&outcome)
    };
    assert_eq!(refused(&server.socket), "SocketInUse");
    assert_eq!(Client::connect(&server.socket, true).size, 1 << 20, "the first one goes on");
    let file = stored.directory.path().join("file");
    std::fs::write(&file, "precious").expect("a file");
    assert_eq!(refused(&file), "SocketPathTaken");
    assert_eq!(std::fs::read(&file).expect("still there"), b"precious");
    assert_eq!(refused(&stored.directory.path().join("no/such/directory")), "SocketFailed");

    let socket = server.socket.clone();
    server.kill();
    assert!(socket.exists());
    let server = Server::start(&stored, &[]);
    assert_eq!(Client::connect(&server.socket, true).size, 1 << 20);
    // Somebody else's socket in its place is left alone.
    std::fs::remove_file(&socket).expect("removed");
    let other = UnixListener::bind(&socket).expect("another server");
    server.stop();
    assert!(socket.exists());
    drop(other);
}

#[test]
fn it_ends_in_order_and_leaves_nothing() {
    let stored = Stored::new(1 << 20);
    let sessions = || std::fs::read_dir(stored.repository().join("sessions")).map_or(0, Iterator::count);
    let server = Server::start(&stored, &[]);
    assert_eq!(sessions(), 1, "a prune has to wait for it");
    let client = Client::connect(&server.socket, true);
    let socket = server.socket.clone();
    server.stop();
    drop(client);
    assert!(!socket.exists());
    assert_eq!(sessions(), 0);

    let mut server = Server::start(&stored, &["--once"]);
    // Whoever only asks what there is does not count.
    drop(std::os::unix::net::UnixStream::connect(&server.socket).expect("a server"));
    let (first, second) = (Client::connect(&server.socket, true), Client::connect(&server.socket, false));
    first.leave();
    assert_eq!(server.ends_within(Duration::from_millis(500)), None, "a client is still there");
    second.leave();
    assert_eq!(server.ends_within(Duration::from_secs(30)), Some(0));
    assert!(!socket.exists());
}

#[test]
fn what_is_not_there_is_said() {
    let stored = Stored::new(1 << 20);
    let fails = |arguments: &[&str]| {
        let serve = Cli::new(["serve-nbd", "-o", "json", "--repository"]).arg(stored.repository());
        let serve = serve.arg("--socket").arg(stored.directory.path().join("s"));
        let serve = arguments.iter().fold(serve, Cli::arg);
        let outcome = serve.env("VIRT_FLEECE_PASSPHRASE", served::PASSPHRASE).run().failure();
        (crate::scene::reason(&outcome), outcome.stderr)
    };
    for arguments in [["--vm", "mail"], ["--volume", "other"], ["--backup", "20200101T000000Z-00000000"]] {
        let (reason, text) = fails(&arguments);
        assert_eq!(reason, "NotFound", "{arguments:?}");
        assert!(text.contains("there is"), "{text}");
    }
    assert_eq!(std::fs::read_dir(stored.repository().join("sessions")).map_or(0, Iterator::count), 0);
}

#[test]
fn a_guest_boots_on_an_overlay_over_the_served_volume() {
    guest_on_an_overlay(Flavour::Qemu10);
}

#[test]
fn a_guest_of_the_allow_listed_qemu_boots_on_an_overlay_too() {
    guest_on_an_overlay(Flavour::Allowlist);
}

/// The guest reads the served volume through the overlay, and what it writes stays there.
fn guest_on_an_overlay(flavour: Flavour) {
    let stored = Stored::new(SIZE);
    let server = Server::start(&stored, &["--cache", "8M"]);
    let overlay = stored.directory.path().join("data.qcow2");
    let path = overlay.to_str().expect("text");
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &server.uri, path]);

    let disk = DiskSpec::new("data", SIZE).format(Format::Qcow2).in_directory(stored.directory.path());
    let mut vm = Vm::builder(flavour).disk(disk.bus(Bus::VirtioBlk { iothread: true })).start();
    let mut guest = vm.writer();
    assert_eq!(guest.size("data"), SIZE);
    let mut expected = stored.content.clone();
    let check = |guest: &mut crate::bed::writer::Writer, expected: &[u8]| {
        // The rest behind the last 4096 bytes is what the guest's O_DIRECT cannot read.
        for (offset, length) in [(0, 4 << 20), (7 << 20, 4 << 20), (64 << 20, 1 << 20), (128 << 20, 2 << 20)] {
            let part = &expected[offset as usize..][..length as usize];
            assert_eq!(guest.read("data", offset, length), fnv1a64(part), "{length} bytes at {offset}");
        }
    };
    check(&mut guest, &expected);
    // What the guest writes is in the overlay, and only there.
    guest.write("data", (1 << 20) + 4096, 8192, 0x5a);
    expected[(1 << 20) + 4096..][..8192].fill(0x5a);
    check(&mut guest, &expected);
    vm.quit();
    let raw = stored.directory.path().join("expected.raw");
    std::fs::write(&raw, &expected).expect("a file");
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw.to_str().expect("text"), path]);
    let mut client = Client::connect(&server.socket, true);
    let found = client.read(1 << 20, 1 << 20, false).expect("readable");
    assert!(found == stored.content[1 << 20..2 << 20], "the served volume is as it was");
    server.stop();
}

#[test]
fn a_prune_leaves_what_is_served() {
    let stored = Stored::new(SIZE);
    let chunks = || run(Command::new("find").arg(stored.repository().join("chunks")).args(["-type", "f"])).stdout.len();
    let all = chunks();
    let server = Server::start(&stored, &["-o", "json"]);
    let backup = server.ready["backup"].as_str().expect("an id").to_owned();
    let command = |arguments: &[&str]| {
        let command = Cli::new(arguments).arg("--repository").arg(stored.repository());
        command.env("VIRT_FLEECE_PASSPHRASE", served::PASSPHRASE).run().success()
    };
    command(&["forget", "--vm", "web", "--backup", &backup]);
    command(&["repository", "prune", "--wait", "1"]);
    assert_eq!(chunks(), all, "the server reads them");
    let mut client = Client::connect(&server.socket, true);
    assert!(client.read(0, 12 << 20, false).as_deref() == Ok(&stored.content[..12 << 20]));
    client.leave();
    server.stop();
    command(&["repository", "prune", "--wait", "1"]);
    assert_eq!(chunks(), 0);
}

#[test]
fn a_repository_that_cannot_be_written_is_served_too() {
    let stored = Stored::new(1 << 20);
    // Root may write whatever the mode says; a file where the directory ought to be stops it as well.
    let sessions = stored.repository().join("sessions");
    std::fs::remove_dir_all(&sessions).expect("removing the directory");
    std::fs::write(&sessions, "").expect("a file");
    let server = Server::start(&stored, &[]);
    let mut client = Client::connect(&server.socket, true);
    assert!(client.read(0, 1 << 20, false).as_deref() == Ok(&stored.content));
    let log = server.stop();
    assert!(log.contains("cannot be written"), "{log}");
}
