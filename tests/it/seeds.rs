//! The seeds of the fuzz targets are taken to their end: a seed that is refused halfway teaches the fuzzer little.
#![allow(clippy::unwrap_used, reason = "tests; the exemption for test functions leaves out what they call")]

use std::{fs, path::Path};
use virt_fleece::{
    image::{ImageError, ImageSink, Manifest, SinkSummary},
    mover::{PullProgress, PullRequest, pull},
    nbd::{NbdClient, NbdError, REQUEST},
    qmp::{
        LineDecoder,
        libvirt::{decode_message, message::body_length},
    },
};

/// Name and content of each seed of a target.
fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.display().to_string(), fs::read(&path).unwrap())
    };
    let seeds: Vec<_> = fs::read_dir(directory).unwrap().map(read).collect();
    assert!(seeds.len() > 1, "{target}");
    seeds
}

#[test]
fn of_the_monitor() {
    for (name, seed) in seeds("qmp") {
        let mut decoder = LineDecoder::default();
        decoder.push(&seed[1..]);
        let mut count = 0;
        while decoder.next_message().unwrap_or_else(|error| panic!("{name}: {error}")).is_some() {
            count += 1;
        }
        assert_eq!(count, seed.split(|byte| *byte == b'\n').count() - 1, "{name}");
    }
}

#[test]
fn of_libvirt() {
    for (name, seed) in seeds("libvirt") {
        let mut rest = seed.as_slice();
        while let Some(word) = rest.first_chunk() {
            let (message, more) = rest.split_at(body_length(*word).unwrap() + 4);
            let message = decode_message(message).unwrap_or_else(|error| panic!("{name}: {error}"));
            rest = &more[message.fds as usize..];
        }
        assert!(rest.is_empty(), "{name}");
    }
}

#[tokio::test]
async fn of_nbd() {
    let contexts = ["base:allocation".to_owned(), "qemu:dirty-bitmap:b".to_owned()];
    for (name, seed) in seeds("nbd") {
        let stream = tokio::io::join(seed.as_slice(), tokio::io::sink());
        let mut client = NbdClient::connect(stream, "disk", &contexts).await.unwrap();
        let end = loop {
            if let Err(error) = client.receive(REQUEST).await {
                break error;
            }
        };
        assert!(matches!(end, NbdError::Closed), "{name}: {end:?}");
    }
}

struct NullSink;

impl ImageSink for NullSink {
    fn write(&mut self, _: virt_fleece::extent::Piece) -> Result<(), ImageError> {
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<SinkSummary, ImageError> {
        Ok(SinkSummary { data_bytes: 0, zero_bytes: 0, new_bytes: 0, stored_bytes: 0, content: None })
    }
}

#[tokio::test]
async fn of_pulls() {
    for (name, seed) in seeds("pull") {
        let bitmap = (seed[0] % 2 == 1).then(|| "b".to_owned());
        let request = PullRequest {
            export: "disk".into(),
            size: None,
            bitmap,
            unit: 64 << 10,
            always: None,
            bandwidth: None,
            credit: None,
            discard: false,
        };
        let stream = tokio::io::join(&seed[1..], tokio::io::sink());
        let result = pull(stream, &request, Box::new(NullSink), &PullProgress::default()).await;
        let size = result.unwrap().size;
        assert!(size == 256 << 10 || size == 8192, "{name}");
    }
}

#[test]
fn of_manifests() {
    for (name, seed) in seeds("manifest") {
        Manifest::parse(&seed, Path::new(&name)).unwrap();
    }
}
