//! The server's side of the fixed newstyle handshake.

use super::super::wire::*;
use super::{Export, Fault, MAX_REQUEST, Settled, Source, options};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest option, in bytes; the protocol limits names to 4096.
const MAX_OPTION: u32 = 16 << 10;
/// Options that one client may send.
const MAX_OPTIONS: usize = 128;

/// Negotiates; `None` when the client left without choosing the export.
pub(super) async fn negotiate<S: Source>(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    export: &Export<S>,
) -> Result<Option<Settled>, Fault> {
    let mut greeting = MAGIC_INIT.to_be_bytes().to_vec();
    greeting.extend(MAGIC_OPTION.to_be_bytes());
    greeting.extend(FLAGS_HANDSHAKE.to_be_bytes());
    writer.write_all(&greeting).await?;
    let flags = match reader.read_u32().await {
        Ok(flags) => flags,
        // Somebody only looked whether the server lives.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if flags & !u32::from(FLAGS_HANDSHAKE) != 0 {
        return Err(Fault::Protocol(format!("unknown flags {flags:#x}")));
    }
    let mut options = Options { writer, export, settled: Settled::default(), zeroes: flags & FLAG_NO_ZEROES == 0 };
    for _ in 0..MAX_OPTIONS {
        if reader.read_u64().await? != MAGIC_OPTION {
            return Err(Fault::Protocol("an option without its magic".into()));
        }
        let option = reader.read_u32().await?;
        let length = reader.read_u32().await?;
        if length > MAX_OPTION {
            // Nobody reads that much for nothing.
            options.refuse(option, REP_ERR_TOO_BIG, "the option is too long").await?;
            return Err(Fault::Protocol(format!("an option of {length} bytes")));
        }
        let mut payload = vec![0; length as usize];
        reader.read_exact(&mut payload).await?;
        match options.answer(option, &payload).await? {
            Next::Option => {}
            Next::Transmission => return Ok(Some(options.settled)),
            Next::End => return Ok(None),
        }
    }
    Err(Fault::Protocol("too many options".into()))
}

enum Next {
    Option,
    Transmission,
    End,
}

struct Options<'a, W, S> {
    writer: &'a mut W,
    export: &'a Export<S>,
    settled: Settled,
    /// The client wants the 124 zeroes of old.
    zeroes: bool,
}

impl<W: AsyncWrite + Unpin, S: Source> Options<'_, W, S> {
    async fn answer(&mut self, option: u32, payload: &[u8]) -> Result<Next, Fault> {
        match option {
            OPT_EXPORT_NAME => return self.export_name(payload).await,
            OPT_ABORT => {
                // The client may be gone already.
                let _ = self.reply(option, REP_ACK, &[]).await;
                return Ok(Next::End);
            }
            OPT_LIST | OPT_STRUCTURED_REPLY if !payload.is_empty() => {
                self.refuse(option, REP_ERR_INVALID, "this option has no data").await?;
            }
            OPT_LIST => {
                let name = self.export.name.as_bytes();
                let mut server = (name.len() as u32).to_be_bytes().to_vec();
                server.extend(name);
                server.extend(self.export.description.as_bytes());
                self.reply(option, REP_SERVER, &server).await?;
                self.reply(option, REP_ACK, &[]).await?;
            }
            OPT_STRUCTURED_REPLY => {
                self.settled.structured = true;
                self.reply(option, REP_ACK, &[]).await?;
            }
            OPT_INFO | OPT_GO => match options::info(payload) {
                None => self.refuse(option, REP_ERR_INVALID, "the option is malformed").await?,
                Some((name, _)) if !self.export.is_called(name) => self.refuse_export(option).await?,
                Some((_, wanted)) => {
                    self.infos(option, &wanted).await?;
                    self.reply(option, REP_ACK, &[]).await?;
                    if option == OPT_GO {
                        return Ok(Next::Transmission);
                    }
                }
            },
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.contexts(option, payload).await?,
            _ => self.refuse(option, REP_ERR_UNSUPPORTED, "this server does not know the option").await?,
        }
        Ok(Next::Option)
    }

    /// The way of old clients: there is no answer to a wrong name but the end.
    async fn export_name(&mut self, name: &[u8]) -> Result<Next, Fault> {
        if !self.export.is_called(name) {
            return Err(Fault::Protocol("it asked for an export that does not exist".into()));
        }
        let mut answer = self.export.source.size().to_be_bytes().to_vec();
        answer.extend(self.flags().to_be_bytes());
        if self.zeroes {
            answer.extend([0; 124]);
        }
        self.writer.write_all(&answer).await?;
        Ok(Next::Transmission)
    }

    async fn infos(&mut self, option: u32, wanted: &[u16]) -> Result<(), Fault> {
        let mut export = INFO_EXPORT.to_be_bytes().to_vec();
        export.extend(self.export.source.size().to_be_bytes());
        export.extend(self.flags().to_be_bytes());
        self.reply(option, REP_INFO, &export).await?;
        let mut blocks = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        let sizes = [1, self.export.source.preferred_block().min(MAX_REQUEST), MAX_REQUEST];
        blocks.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
        self.reply(option, REP_INFO, &blocks).await?;
        for (info, text) in [(INFO_NAME, &self.export.name), (INFO_DESCRIPTION, &self.export.description)] {
            if wanted.contains(&info) {
                let mut answer = info.to_be_bytes().to_vec();
                answer.extend(text.as_bytes());
                self.reply(option, REP_INFO, &answer).await?;
            }
        }
        Ok(())
    }

    async fn contexts(&mut self, option: u32, payload: &[u8]) -> Result<(), Fault> {
        let sets = option == OPT_SET_META_CONTEXT;
        if sets {
            // Whatever comes, what was chosen before counts no more.
            self.settled.allocation = false;
        }
        if !self.settled.structured {
            return self.refuse(option, REP_ERR_INVALID, "contexts need structured replies first").await;
        }
        let Some(contexts) = options::contexts(payload) else {
            return self.refuse(option, REP_ERR_INVALID, "the option is malformed").await;
        };
        if !self.export.is_called(contexts.export) {
            return self.refuse_export(option).await;
        }
        // A list without a question means all; a namespace can be listed, but not chosen.
        if contexts.allocation || (!sets && (contexts.base || contexts.is_empty)) {
            let mut context = u32::from(sets).to_be_bytes().to_vec();
            context.extend(BASE_ALLOCATION.as_bytes());
            self.reply(option, REP_META_CONTEXT, &context).await?;
            self.settled.allocation |= sets;
        }
        self.reply(option, REP_ACK, &[]).await
    }

    fn flags(&self) -> u16 {
        let df = if self.settled.structured { EXPORT_SEND_DF } else { 0 };
        EXPORT_HAS_FLAGS | EXPORT_READ_ONLY | EXPORT_MULTI_CONN | EXPORT_SEND_CACHE | df
    }

    async fn refuse_export(&mut self, option: u32) -> Result<(), Fault> {
        let text = format!("there is no such export; there is `{}`", self.export.name);
        self.refuse(option, REP_ERR_UNKNOWN, &text).await
    }

    async fn refuse(&mut self, option: u32, error: u32, text: &str) -> Result<(), Fault> {
        self.reply(option, error, text.as_bytes()).await
    }

    async fn reply(&mut self, option: u32, kind: u32, payload: &[u8]) -> Result<(), Fault> {
        let mut reply = MAGIC_OPTION_REPLY.to_be_bytes().to_vec();
        reply.extend(option.to_be_bytes());
        reply.extend(kind.to_be_bytes());
        reply.extend((payload.len() as u32).to_be_bytes());
        reply.extend(payload);
        self.writer.write_all(&reply).await?;
        Ok(())
    }
}
