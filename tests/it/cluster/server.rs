//! The servers of a cluster as child processes.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Stdio};

use crate::bed::process;

/// A server of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Server {
    /// etcd
    Etcd,
    /// kube-apiserver
    ApiServer,
}

impl Server {
    /// As `tests/cluster/run` names it.
    fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::ApiServer => "kube-apiserver",
        }
    }

    /// The name of its log.
    pub(super) fn log(self) -> String {
        format!("{}.log", self.name())
    }
}

/// A running server; dropping it kills it.
#[derive(Debug)]
pub(super) struct Process(Child);

impl Process {
    /// Starts a server of a prepared directory.
    pub(super) fn start(directory: &Path, server: Server) -> Self {
        let log = File::options().create(true).append(true).open(directory.join(server.log())).expect("a log");
        // The script becomes the server, and that keeps the tether.
        let child = process::spawn_tethered(|command| {
            command.arg(super::scripts().join("run")).arg(directory).arg(server.name());
            command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second descriptor")).stderr(log);
        });
        Self(child.unwrap_or_else(|error| panic!("starting {}: {error}", server.name())))
    }

    /// Its process id.
    pub(super) fn pid(&self) -> String {
        self.0.id().to_string()
    }

    /// SIGKILL, and waits for the end.
    pub(super) fn kill(&mut self) {
        process::kill9(&mut self.0);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
