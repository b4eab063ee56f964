//! The guest agent behind a Unix socket (a virtio-serial port).

use super::{GuestAgent, GuestAgentError};
use crate::{qmp::LineDecoder, reason::printable};
use futures::{FutureExt, future::BoxFuture};
use serde_json::{Value, json};
use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, timeout, timeout_at},
};

/// For the channel to be in step, and for small commands.
const QUICK: Duration = Duration::from_secs(5);
/// Tells the agent's parser to forget what it has of an unfinished command (QEMU `docs/interop/qemu-ga-ref`).
const RESET: u8 = 0xff;

/// A connected guest agent.
#[derive(Debug)]
pub struct QgaSocket {
    path: String,
    stream: UnixStream,
}

impl QgaSocket {
    /// Connects; does not wait for an agent to answer.
    pub async fn connect(path: &Path) -> Result<Self, GuestAgentError> {
        let shown = path.display().to_string();
        match UnixStream::connect(path).await {
            Ok(stream) => Ok(Self { path: shown, stream }),
            Err(source) => Err(GuestAgentError::Io { path: shown, source }),
        }
    }

    /// Throws away what an earlier client left in the channel: everything up to the answer with our number.
    async fn synchronize(&mut self, then: &str, limit: Duration) -> Result<LineDecoder, GuestAgentError> {
        let number = u64::from(getrandom::u32().unwrap_or(1));
        let mut request = vec![RESET];
        request
            .extend(json!({"execute": "guest-sync-delimited", "arguments": {"id": number}}).to_string().into_bytes());
        request.push(b'\n');
        request.extend(then.as_bytes());
        let deadline = Instant::now() + limit;
        self.write(&request).await?;
        let silent = || GuestAgentError::NoAnswer { command: "guest-sync-delimited".into(), limit };
        let mut decoder = LineDecoder::default();
        loop {
            let bytes = timeout_at(deadline, self.read()).await.map_err(|_| silent())??;
            // The delimiter comes before the answer: older input ends there.
            let fresh = match bytes.iter().rposition(|byte| *byte == RESET) {
                Some(at) => {
                    decoder = LineDecoder::default();
                    &bytes[at + 1..]
                }
                None => &bytes[..],
            };
            decoder.push(fresh);
            loop {
                match decoder.next_message() {
                    Ok(Some(message)) if message["return"] == number => return Ok(decoder),
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => {
                        decoder = LineDecoder::default();
                        break;
                    }
                }
            }
        }
    }

    /// A command that must only reach an agent that is known to listen.
    async fn call(&mut self, command: &str, limit: Duration) -> Result<Value, GuestAgentError> {
        let decoder = self.synchronize("", QUICK).await?;
        self.write(format!("{}\n", json!({"execute": command})).as_bytes()).await?;
        self.answer(command, decoder, limit).await
    }

    async fn answer(
        &mut self,
        command: &str,
        mut decoder: LineDecoder,
        limit: Duration,
    ) -> Result<Value, GuestAgentError> {
        let deadline = Instant::now() + limit;
        let silent = || GuestAgentError::NoAnswer { command: command.to_owned(), limit };
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => {
                    if let Some(error) = message.get("error") {
                        let description = printable(error["desc"].as_str().unwrap_or("no reason given"), 500);
                        return Err(GuestAgentError::Refused { command: command.to_owned(), description });
                    }
                    return Ok(message["return"].clone());
                }
                Ok(None) => {}
                Err(error) => {
                    return Err(GuestAgentError::Refused {
                        command: command.to_owned(),
                        description: error.to_string(),
                    });
                }
            }
            let bytes = timeout_at(deadline, self.read()).await.map_err(|_| silent())??;
            decoder.push(&bytes);
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), GuestAgentError> {
        let silent = GuestAgentError::NoAnswer { command: "anything".into(), limit: QUICK };
        let written = timeout(QUICK, self.stream.write_all(bytes)).await.map_err(|_| silent)?;
        written.map_err(|source| GuestAgentError::Io { path: self.path.clone(), source })
    }

    async fn read(&mut self) -> Result<Vec<u8>, GuestAgentError> {
        let failed = |source| GuestAgentError::Io { path: self.path.clone(), source };
        let mut buffer = vec![0; 4096];
        let count = self.stream.read(&mut buffer).await.map_err(failed)?;
        if count == 0 {
            return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
        }
        buffer.truncate(count);
        Ok(buffer)
    }
}

impl GuestAgent for QgaSocket {
    fn ping(&mut self) -> BoxFuture<'_, Result<(), GuestAgentError>> {
        async { self.call("guest-ping", QUICK).await.map(drop) }.boxed()
    }

    fn freeze(&mut self, limit: Duration) -> BoxFuture<'_, Result<u64, GuestAgentError>> {
        async move {
            let answer = self.call("guest-fsfreeze-freeze", limit).await?;
            let odd = || GuestAgentError::Refused {
                command: "guest-fsfreeze-freeze".into(),
                description: "it did not say how many file systems are frozen".into(),
            };
            answer.as_u64().ok_or_else(odd)
        }
        .boxed()
    }

    fn thaw(&mut self, limit: Duration) -> BoxFuture<'_, Result<(), GuestAgentError>> {
        // In one piece with the synchronisation: an agent that is still busy freezing answers nothing now, but thaws
        // as soon as it comes to it, whether or not anybody waits for that.
        async move {
            let command = "guest-fsfreeze-thaw";
            let decoder = self.synchronize(&format!("{}\n", json!({"execute": command})), limit).await?;
            self.answer(command, decoder, limit).await.map(drop)
        }
        .boxed()
    }

    fn duplicate_fd(&self) -> Option<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned().ok()
    }
}
