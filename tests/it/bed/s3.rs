//! A real S3 server: one process, whose buckets are directories, on a port of its own.
//!
//! It differs from S3 in two respects. A key cannot be both an object and the "directory" of others (`a` beside `a/b`),
//! because both are files. And the `ETag` of a read during which the key is overwritten may be the one before, though
//! the bytes are whole; a put on condition of that tag fails, so no update is lost.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use object_store::aws::{AmazonS3Builder, S3ConditionalPut};

use super::flavour::tool;
use super::process;

/// The region of every server.
pub(crate) const REGION: &str = "us-east-1";
/// The access key that every server takes.
pub(crate) const ACCESS_KEY: &str = "VFTESTACCESSKEY";
/// Its secret.
pub(crate) const SECRET_KEY: &str = "vf-test-secret-key";

/// How long a server may take to answer. It takes some ten milliseconds on an idle machine.
const START: Duration = Duration::from_secs(30);

/// A running server; dropping it kills it, and what it holds stays.
#[derive(Debug)]
pub(crate) struct S3Server {
    /// The server.
    child: Child,
    /// Where it listens.
    address: SocketAddr,
    /// The caller's directory.
    directory: PathBuf,
}

impl S3Server {
    /// Starts one over this directory, with the buckets that an earlier one left there. The file system must have
    /// extended attributes.
    pub(crate) fn start(directory: &Path) -> Self {
        fs::create_dir_all(directory.join("buckets")).expect("a directory");
        // Between the choice of a free port and its use another process may take it.
        for _ in 0..10 {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
            let address = listener.local_addr().expect("an address");
            drop(listener);
            if let Some(child) = spawn(directory, address) {
                return Self { child, address, directory: directory.to_owned() };
            }
        }
        panic!("the S3 server does not start: {}", log(directory));
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL, without a bucket: requests are path-style.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Creates a bucket.
    pub(crate) fn create_bucket(&self, name: &str) {
        fs::create_dir(self.bucket(name)).expect("a new bucket");
    }

    /// The directory of a bucket, where an object is a file of its key's name: to look at what is there, or to damage
    /// it. The server's own files there begin with `.sgwtmp`.
    pub(crate) fn bucket(&self, name: &str) -> PathBuf {
        self.directory.join("buckets").join(name)
    }

    /// SIGKILL, as when its machine loses power, except that nothing written is lost.
    pub(crate) fn kill(&mut self) {
        process::kill9(&mut self.child);
    }

    /// Starts it again after [`S3Server::kill`], on the same port.
    pub(crate) fn restart(&mut self) {
        let child = spawn(&self.directory, self.address);
        self.child = child.unwrap_or_else(|| panic!("the S3 server does not start again: {}", self.log()));
    }

    /// What it has printed: a line for each request, now and then two run together.
    pub(crate) fn log(&self) -> String {
        log(&self.directory)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The client's settings for a bucket at an endpoint: a server's, or that of a proxy before it.
pub(crate) fn client(endpoint: &str, bucket: &str) -> AmazonS3Builder {
    AmazonS3Builder::new()
        .with_endpoint(endpoint)
        .with_allow_http(true)
        .with_region(REGION)
        .with_access_key_id(ACCESS_KEY)
        .with_secret_access_key(SECRET_KEY)
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
}

/// The same for a program that takes its settings from the environment.
pub(crate) fn environment(endpoint: &str) -> [(&'static str, String); 5] {
    [
        ("AWS_ENDPOINT_URL", endpoint.to_owned()),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_REGION", REGION.to_owned()),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
    ]
}

/// What the server of this directory has printed.
fn log(directory: &Path) -> String {
    fs::read_to_string(directory.join("s3.log")).unwrap_or_default()
}

/// Starts a server and waits until it answers; `None` when it ends, as it does when the port is taken.
fn spawn(directory: &Path, address: SocketAddr) -> Option<Child> {
    let log = File::options().create(true).append(true).open(directory.join("s3.log")).expect("a log");
    // Unlike any other server's, lest the one that took the port answers in its place.
    let health = format!("/ready-{}-{}", std::process::id(), address.port());
    let child = process::spawn_tethered(|command| {
        // Settings of whoever runs the tests, such as for the region, are not meant for this server.
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.env("ROOT_ACCESS_KEY", ACCESS_KEY).env("ROOT_SECRET_KEY", SECRET_KEY);
        command.arg(tool("S3_SERVER"));
        command.args(["--port", &address.to_string(), "--region", REGION, "--health", &health, "posix"]);
        command.arg(directory.join("buckets")).current_dir(directory);
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second descriptor")).stderr(log);
    });
    let mut child = child.expect("starting the S3 server");
    let deadline = Instant::now() + START;
    while !answers(address, &health) {
        if process::wait(&mut child, Duration::from_millis(10)).is_some() {
            return None;
        }
        if Instant::now() > deadline {
            process::kill9(&mut child);
            panic!("the S3 server at {address} does not answer within {START:?}");
        }
    }
    Some(child)
}

/// Whether the server there says that it is ready.
fn answers(address: SocketAddr, health: &str) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(START))?;
        stream
            .write_all(format!("GET {health} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes())?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).map(|_| reply)
    };
    ask().is_ok_and(|reply| reply.starts_with("HTTP/1.1 200 "))
}
