//! The driver's end of the connection to a mover.

use super::{RunError, Stop};
use crate::{
    backup::{BackupId, BackupRecord},
    mover::{Channel, ChannelError, CompleteBackup, FromMover, PROTOCOL, Parent, PlannedVolume, ReadOrder, ToMover},
};
use std::os::fd::BorrowedFd;

/// A mover that serves this run.
#[derive(Debug)]
pub struct Mover {
    channel: Channel,
}

/// What a mover says of its target.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) parent: Option<Parent>,
    pub(super) offline: Vec<(String, u64)>,
}

impl Mover {
    /// On a connection to it.
    pub fn new(channel: Channel) -> Self {
        Self { channel }
    }

    /// What it says next; its failure is an error.
    pub(super) async fn receive(&mut self) -> Result<FromMover, RunError> {
        match self.channel.receive().await? {
            FromMover::Failed(failure) => Err(RunError::Mover(failure)),
            message => Ok(message),
        }
    }

    /// Says something. When it is gone, what it said before is the cause.
    async fn send(&mut self, message: &ToMover, fd: Option<BorrowedFd<'_>>) -> Result<(), RunError> {
        let Err(error) = self.channel.send(message, fd).await else { return Ok(()) };
        loop {
            match self.channel.receive().await {
                Ok(FromMover::Failed(failure)) => return Err(RunError::Mover(failure)),
                Ok(_) => {}
                Err(_) => return Err(error.into()),
            }
        }
    }

    pub(super) async fn hello(
        &mut self,
        vm: &str,
        stop: &mut (impl Future<Output = Stop> + Unpin),
    ) -> Result<Opened, RunError> {
        let hello = ToMover::Hello { protocol: PROTOCOL, vm: vm.to_owned() };
        self.send(&hello, None).await?;
        let answer = tokio::select! {
            answer = self.receive() => answer?,
            stop = stop => return Err(RunError::Stopped(stop)),
        };
        match answer {
            FromMover::Opened { protocol: PROTOCOL, parent, offline } => Ok(Opened { parent, offline }),
            FromMover::Opened { protocol, .. } => {
                let detail = format!("it speaks version {protocol}, this agent {PROTOCOL}: an upgrade is under way");
                Err(ChannelError::Protocol(detail).into())
            }
            _ => Err(unexpected("a greeting")),
        }
    }

    /// The address of the target, and the object that makes the backup complete.
    pub(super) async fn begin(
        &mut self,
        backup: BackupId,
        volumes: Vec<PlannedVolume>,
    ) -> Result<(String, Option<String>), RunError> {
        self.send(&ToMover::Begin { backup, volumes }, None).await?;
        match self.receive().await? {
            FromMover::Begun { address, object } => Ok((address, object)),
            _ => Err(unexpected("the address of its target")),
        }
    }

    pub(super) async fn read(&mut self, order: ReadOrder, fd: Option<BorrowedFd<'_>>) -> Result<(), RunError> {
        self.send(&ToMover::Read(order), fd).await
    }

    pub(super) async fn commit(&mut self, record: BackupRecord) -> Result<CompleteBackup, RunError> {
        self.send(&ToMover::Commit { record: Box::new(record) }, None).await?;
        loop {
            match self.receive().await? {
                FromMover::Progress { .. } => {}
                FromMover::Committed { manifest, repository } => {
                    let backup = if repository {
                        serde_json::from_value(manifest).map(CompleteBackup::Repository)
                    } else {
                        serde_json::from_value(manifest).map(CompleteBackup::Chain)
                    };
                    return backup.map_err(|error| ChannelError::Protocol(error.to_string()).into());
                }
                _ => return Err(unexpected("the end of its work")),
            }
        }
    }
}

pub(super) fn unexpected(expected: &str) -> RunError {
    ChannelError::Protocol(format!("the mover was to say {expected}, and said something else")).into()
}
