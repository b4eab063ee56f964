//! Reads an export and feeds a sink.
//!
//! Two sides: this one speaks NBD and never waits for the target while replies are outstanding; the sink runs on a
//! thread of its own and may hang in the kernel for as long as its target does. Between them stand buffers of bounded
//! number: a read is asked for only when there is one for its reply, so back-pressure of the target ends here.

use super::{
    Bandwidth,
    asked::Asked,
    survey::{Look, Survey},
    trim::Trims,
};
use crate::{
    extent::{ByteRange, Piece, Work},
    image::{ImageError, ImageSink, SinkSummary},
    nbd::{self, Content, NbdClient, NbdError},
    reason::{Reason, Retry},
};
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
};

/// Buffers between NBD and sink, each of [`nbd::REQUEST`] bytes: 16 MiB. A longer request takes several.
const BUFFERS: usize = 256;

/// What to read.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// Name of the export.
    pub export: String,
    /// Bytes that the disk has; an export of another size is refused. `None`: as many as the export says.
    pub size: Option<u64>,
    /// Bitmap that says what changed; `None`: everything is read.
    pub bitmap: Option<String>,
    /// Bytes in whose multiples the sink takes content: a power of two, at least 64 KiB, at most 32 MiB.
    pub unit: u64,
    /// Read in any case.
    pub always: Option<ByteRange>,
    /// Shared limit.
    pub bandwidth: Option<Arc<Bandwidth>>,
    /// Most bytes that may be outstanding: what the send buffer of the server's socket takes ([`nbd::credit_of_peer`]).
    /// `None`: what it takes in any case.
    pub credit: Option<u64>,
    /// Discard what was read, or needs no reading, if the export allows it. It must be one whose state never changes
    /// (`snapshot-access`), and is of no use afterwards.
    pub discard: bool,
}

/// How far a pull is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct PullProgress {
    /// Bytes to read in all; 0 until known.
    pub total: AtomicU64,
    /// Bytes read so far.
    pub read: AtomicU64,
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullSummary {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that counted as changed (all of them in a full backup).
    pub dirty_bytes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// What the sink made of it.
    pub sink: SinkSummary,
}

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The snapshot could not be read.
    #[error("the snapshot could not be read")]
    Nbd(#[from] NbdError),
    /// The target could not be written.
    #[error("the target could not be written")]
    Sink(#[source] ImageError),
    /// The sink's thread ended without a word.
    #[error("the thread that writes the target died")]
    SinkDied,
}

impl Reason for PullError {
    fn reason(&self) -> &str {
        match self {
            Self::Nbd(error) => error.reason(),
            Self::Sink(error) => error.reason(),
            Self::SinkDied => "InternalError",
        }
    }

    fn retry(&self) -> Retry {
        Retry::Backoff
    }
}

type Delivery = (Piece, OwnedSemaphorePermit);

/// Reads everything that the request names into the sink. `Ok` only when every byte was read and the sink made it
/// durable. Dropping the future closes the connection at once; a sink that hangs is left to its thread.
pub async fn pull<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    request: &PullRequest,
    sink: Box<dyn ImageSink>,
    progress: &PullProgress,
) -> Result<PullSummary, PullError> {
    let mut contexts = vec!["base:allocation".to_owned()];
    contexts.extend(request.bitmap.iter().map(|name| format!("qemu:dirty-bitmap:{name}")));
    let client = NbdClient::connect(stream, &request.export, &contexts).await?;
    if let Some(size) = request.size.filter(|size| *size != client.size()) {
        // A shorter one would pass for a whole disk.
        return Err(NbdError::Protocol(format!("an export of {} bytes for a disk of {size}", client.size())).into());
    }
    let trims = Some(client.size()).filter(|_| request.discard && client.can_trim()).and_then(Trims::new);
    let (pieces, outcome) = start_sink(sink)?;
    let mut reader = Reader {
        size: client.size(),
        client,
        request,
        progress,
        pieces,
        buffers: Arc::new(Semaphore::new(BUFFERS)),
        credit: request.credit.unwrap_or_else(nbd::credit),
        asked: VecDeque::new(),
        trims,
        dirty_bytes: 0,
        read_bytes: 0,
    };
    let read = reader.run().await;
    let (size, dirty_bytes, read_bytes) = (reader.size, reader.dirty_bytes, reader.read_bytes);
    let Reader { client, pieces, .. } = reader;
    match read {
        Ok(()) => {
            // All of it: the sink may finish.
            let _ = pieces.send(None);
            client.disconnect().await.ok();
        }
        // The sink's own error is the cause when it is gone.
        Err(PullError::SinkDied) => {}
        Err(error) => return Err(error),
    }
    drop(pieces);
    let sink = outcome.await.map_err(|_| PullError::SinkDied)?.map_err(PullError::Sink)?;
    Ok(PullSummary { size, dirty_bytes, read_bytes, sink })
}

/// The sink on its thread: pieces in, `None` for the end. A channel that closes without it means that the read failed:
/// the sink is dropped unfinished.
#[allow(clippy::type_complexity, reason = "both ends of two channels")]
fn start_sink(
    mut sink: Box<dyn ImageSink>,
) -> Result<(mpsc::Sender<Option<Delivery>>, oneshot::Receiver<Result<SinkSummary, ImageError>>), PullError> {
    let (pieces, incoming) = mpsc::channel::<Option<Delivery>>();
    let (sender, outcome) = oneshot::channel();
    let write_all = move || {
        for delivery in incoming {
            let Some((piece, buffer)) = delivery else {
                return Some(sink.finish());
            };
            if let Err(error) = sink.write(piece) {
                return Some(Err(error));
            }
            drop(buffer);
        }
        None
    };
    // A plain thread, not the runtime's pool: the runtime waits for its own at shutdown, and this one may hang.
    let spawned = std::thread::Builder::new().name("image-sink".into()).spawn(move || {
        if let Some(result) = write_all() {
            let _ = sender.send(result);
        }
    });
    spawned.map_err(|_| PullError::SinkDied)?;
    Ok((pieces, outcome))
}

struct Reader<'a, S> {
    client: NbdClient<S>,
    size: u64,
    request: &'a PullRequest,
    progress: &'a PullProgress,
    pieces: mpsc::Sender<Option<Delivery>>,
    buffers: Arc<Semaphore>,
    credit: u64,
    asked: VecDeque<Asked>,
    trims: Option<Trims>,
    dirty_bytes: u64,
    read_bytes: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Reader<'_, S> {
    async fn run(&mut self) -> Result<(), PullError> {
        let (mut total, mut at, mut survey) = (0, 0, Survey::new());
        while at < self.size {
            let look = if self.trims.is_some() { Look::Surely } else { Look::Once };
            let (work, end) = survey.next(&mut self.client, self.request, at, look).await?;
            self.trims.iter_mut().for_each(|trims| trims.keep(&work));
            total += work.iter().filter(|(_, kind)| *kind == Work::Read).map(|(range, _)| range.len()).sum::<u64>();
            at = end;
        }
        self.progress.total.store(total, Ordering::Relaxed);
        self.trim_early().await?;
        (at, survey) = (0, Survey::new());
        while at < self.size {
            let (work, end) = match &self.trims {
                // No state may be asked for where something was discarded.
                Some(trims) => trims.work(at),
                None => survey.next(&mut self.client, self.request, at, Look::Surely).await?,
            };
            for (range, kind) in work {
                self.dirty_bytes += range.len();
                match kind {
                    Work::Zero => {
                        // Behind the reads before it, to keep the order.
                        self.drain().await?;
                        // Small, but a sink that stalls would let them pile up without end.
                        let place = self.wait_for_buffers(1).await?;
                        self.deliver(Piece::Zero(range), place)?;
                    }
                    Work::Read => self.read(range).await?,
                }
            }
            self.drain().await?;
            at = end;
            self.trim(at).await?;
        }
        Ok(())
    }

    /// Discards what will not be read. The guest may write there the whole time.
    async fn trim_early(&mut self) -> Result<(), PullError> {
        let mut at = 0;
        while let Some(end) = self.trims.as_mut().and_then(|trims| trims.begin(at)) {
            at = end;
            self.send_trims().await?;
            while self.trims.as_ref().is_some_and(Trims::is_full) {
                self.receive().await?;
                self.send_trims().await?;
            }
        }
        Ok(())
    }

    /// Discards what lies before `end`: it was read and handed on, or needed no reading. Waits for no answer.
    async fn trim(&mut self, end: u64) -> Result<(), PullError> {
        if let Some(trims) = &mut self.trims {
            trims.passed(end);
        }
        self.send_trims().await
    }

    async fn send_trims(&mut self) -> Result<(), PullError> {
        let Some(trims) = &mut self.trims else { return Ok(()) };
        while let Some(range) = trims.next() {
            let length = u32::try_from(range.len()).unwrap_or(0);
            trims.asked(self.client.ask_trim(range.start(), length).await?);
        }
        Ok(())
    }

    async fn read(&mut self, range: ByteRange) -> Result<(), PullError> {
        let mut at = range.start();
        while at < range.end() {
            let length = nbd::request_length(self.credit).min(range.end() - at);
            if let Some(bandwidth) = &self.request.bandwidth {
                bandwidth.take(length).await;
            }
            while self.outstanding() + length > self.credit {
                self.receive().await?;
            }
            let needed = u32::try_from(length.div_ceil(nbd::REQUEST)).unwrap_or(u32::MAX);
            let buffer = loop {
                if let Ok(buffer) = Arc::clone(&self.buffers).try_acquire_many_owned(needed) {
                    break buffer;
                }
                if self.asked.is_empty() {
                    break self.wait_for_buffers(needed).await?;
                }
                self.receive().await?;
            };
            let cookie = self.client.ask_read(at, u32::try_from(length).unwrap_or(0)).await?;
            let range = ByteRange::with_length(at, length).ok_or(PullError::SinkDied)?;
            self.asked.push_back(Asked::new(cookie, range, buffer));
            at += length;
        }
        Ok(())
    }

    /// Waits at the target's pace: only here, and only while no read is outstanding. Answers to discards may be: of those
    /// the server's send buffer holds any that there can be.
    async fn wait_for_buffers(&self, number: u32) -> Result<OwnedSemaphorePermit, PullError> {
        Arc::clone(&self.buffers).acquire_many_owned(number).await.map_err(|_| PullError::SinkDied)
    }

    fn outstanding(&self) -> u64 {
        // Each reply has some dozens of bytes of headers.
        let reads = self.asked.iter().filter(|asked| !asked.done);
        let reads: u64 = reads.map(|asked| asked.range.len() - asked.received + 64).sum();
        reads + self.trims.as_ref().map_or(0, Trims::outstanding)
    }

    async fn drain(&mut self) -> Result<(), PullError> {
        while !self.asked.is_empty() {
            self.receive().await?;
        }
        Ok(())
    }

    /// Takes one chunk, and hands on what is complete, in order.
    async fn receive(&mut self) -> Result<(), PullError> {
        let chunk = self.client.receive(nbd::LONGEST_REQUEST).await?;
        if self.trims.as_mut().is_some_and(|trims| trims.answered(&chunk)) {
            return Ok(());
        }
        let stray = || PullError::from(NbdError::Protocol("an answer that nobody asked for".into()));
        let asked =
            self.asked.iter_mut().find(|asked| asked.cookie == chunk.cookie && !asked.done).ok_or_else(stray)?;
        let (offset, length) = match &chunk.content {
            Content::Data { offset, bytes } => (*offset, bytes.len() as u64),
            Content::Hole { offset, length } => (*offset, u64::from(*length)),
            Content::None => (asked.range.start(), 0),
            Content::Error { errno } => {
                return Err(NbdError::Read { offset: asked.range.start(), errno: *errno }.into());
            }
            Content::Status { .. } => return Err(stray()),
        };
        asked.take(offset, length).ok_or_else(stray)?;
        if let Content::Data { bytes, .. } = chunk.content {
            asked.put(offset, bytes);
        }
        if chunk.done {
            if asked.received != asked.range.len() {
                return Err(NbdError::Protocol("a read that was answered in part".into()).into());
            }
            asked.done = true;
        }
        while self.asked.front().is_some_and(|asked| asked.done) {
            let Some(asked) = self.asked.pop_front() else { break };
            self.read_bytes += asked.range.len();
            self.progress.read.store(self.read_bytes, Ordering::Relaxed);
            let end = asked.range.end();
            let (offset, (bytes, buffer)) = (asked.range.start(), asked.finish());
            self.deliver(Piece::Data { offset, bytes }, buffer)?;
            self.trim(end).await?;
        }
        Ok(())
    }

    fn deliver(&self, piece: Piece, buffer: OwnedSemaphorePermit) -> Result<(), PullError> {
        self.pieces.send(Some((piece, buffer))).map_err(|_| PullError::SinkDied)
    }
}
