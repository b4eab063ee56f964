//! End marks: whether a disk was made smaller between two backups, though its size says nothing.
//!
//! The last bit of a bitmap is set by merging in the bitmap of a scratch node of the same size, on which the last bytes
//! were written over NBD: QEMU has no command that sets a bit, and a bitmap of another size is refused.

use super::{Session, SessionDisk, SessionError, names::Slot};
use crate::{
    chain::{GRANULARITY, VolumePlan, last_granule},
    nbd::{Content, NbdClient, NbdError},
    qmp::command::*,
};
use std::{
    collections::HashMap,
    io,
    time::{Duration, Instant},
};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};

/// How long QEMU may take to write to a scratch node and to end its export.
const LIMIT: Duration = Duration::from_secs(10);
/// The bitmap on a scratch node.
const SCRATCH: &str = "end";

impl Session {
    /// Makes the scratch nodes. They stay until the teardown: an empty one costs nothing.
    pub(super) async fn prepare_end_marks(&mut self) -> Result<(), SessionError> {
        let slots: Vec<_> = self.disks.iter().map(|disk| (disk.slot, disk.volume.virtual_size)).collect();
        for (slot, size) in slots {
            self.note(&super::Entry::MarkEnd(slot.0))?;
            self.prepare_end_mark(slot, size).await?;
        }
        Ok(())
    }

    async fn prepare_end_mark(&self, slot: Slot, size: u64) -> Result<(), SessionError> {
        let attempt = || SessionError::qmp("preparing an end mark");
        let node = BlockdevAdd { node_name: slot.end(), options: NodeOptions::NullCo { size } };
        self.qmp.execute(&node).await.map_err(attempt())?;
        let bitmap = BitmapAdd {
            node: slot.end(),
            name: SCRATCH.into(),
            granularity: GRANULARITY,
            persistent: false,
            disabled: false,
        };
        self.qmp.execute(&bitmap).await.map_err(attempt())?;
        let export = BlockExportAdd {
            kind: "nbd",
            id: slot.export(),
            node_name: slot.end(),
            name: slot.export(),
            writable: true,
            bitmaps: Vec::new(),
        };
        self.qmp.execute(&export).await.map_err(attempt())?;
        let stuck = |what: String| SessionError::Stuck { what, limit: LIMIT };
        let written = timeout(LIMIT, self.write_last(slot, size)).await;
        written
            .map_err(|_| stuck(format!("a write to {}", slot.end())))?
            .map_err(|error| SessionError::local("writing to a scratch node")(io::Error::other(error)))?;
        self.qmp.execute(&BlockExportDel { id: slot.export(), mode: "hard" }).await.map_err(attempt())?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let exports = self.qmp.execute(&QueryBlockExports {}).await.map_err(attempt())?;
            if !exports.iter().any(|export| export.id == slot.export()) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(stuck(format!("export {}", slot.export())));
            }
            sleep(Duration::from_millis(2)).await;
        }
    }

    async fn write_last(&self, slot: Slot, size: u64) -> Result<(), NbdError> {
        let Some(last) = last_granule(size) else { return Ok(()) };
        let stream = self.connect().map_err(io::Error::other)?;
        stream.set_nonblocking(true)?;
        let mut client = NbdClient::connect(UnixStream::from_std(stream)?, &slot.export(), &[]).await?;
        client.ask_zeroes(last.start(), u32::try_from(last.len()).unwrap_or(GRANULARITY)).await?;
        loop {
            let chunk = client.receive(0).await?;
            if let Content::Error { errno } = chunk.content {
                return Err(NbdError::Read { offset: last.start(), errno });
            }
            if chunk.done {
                return client.disconnect().await;
            }
        }
    }

    /// Sets the last bit of a new end mark. Refused, and with it the point in time, when the disk has another size by now.
    pub(super) fn set_end_mark(disk: &SessionDisk, target: String) -> TransactionAction {
        TransactionAction::BlockDirtyBitmapMerge(BitmapMerge {
            node: disk.volume.format_node.clone(),
            target,
            bitmaps: vec![BitmapRef { node: disk.slot.end(), name: SCRATCH.into() }],
        })
    }

    /// Why the point in time was refused: a disk of another size is what [`Session::set_end_mark`] is refused for.
    pub(super) async fn or_resized(&self, error: SessionError) -> SessionError {
        let Ok(nodes) = self.qmp.execute(&QueryNamedBlockNodes { flat: Some(true) }).await else { return error };
        let resized = |disk: &&SessionDisk| {
            let node = nodes.iter().find(|node| node.node_name == disk.volume.format_node);
            node.is_some_and(|node| node.image.virtual_size != disk.volume.virtual_size)
        };
        match self.disks.iter().find(resized) {
            Some(disk) => SessionError::Resized { volume: disk.volume.name.clone() },
            None => error,
        }
    }

    /// Behind the point in time no disk can be resized. Between the plan and it one could.
    pub(super) async fn check_end_marks(&self) -> Result<(), SessionError> {
        let attempt = SessionError::qmp("looking for end marks");
        let nodes = self.qmp.execute(&QueryNamedBlockNodes { flat: Some(true) }).await.map_err(attempt)?;
        let nodes: HashMap<&str, &BlockNodeInfo> = nodes.iter().map(|node| (node.node_name.as_str(), node)).collect();
        for disk in &self.disks {
            let VolumePlan::Incremental { bitmap, .. } = &disk.plan else { continue };
            let name = bitmap.end_mark();
            let bitmaps = nodes.get(disk.volume.format_node.as_str()).map(|node| node.dirty_bitmaps.as_slice());
            let mark = bitmaps.unwrap_or_default().iter().find(|mark| mark.name.as_deref() == Some(&name));
            if mark.is_none_or(|mark| mark.count == 0) {
                return Err(SessionError::Resized { volume: disk.volume.name.clone() });
            }
        }
        Ok(())
    }
}
