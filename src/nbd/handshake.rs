//! Fixed newstyle handshake.

use super::{NbdError, wire::*};
use crate::reason::printable;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

/// What the handshake settled.
#[derive(Debug)]
pub(super) struct Settled {
    /// Bytes of the export.
    pub(super) size: u64,
    /// Reads may ask for an answer in one chunk.
    pub(super) unfragmented: bool,
    /// Ranges can be discarded.
    pub(super) trims: bool,
    /// Ids of the contexts, in the order in which they were asked for.
    pub(super) contexts: Vec<u32>,
}

/// Negotiates `export` with structured replies and these metadata contexts, all of which must be there.
pub(super) async fn negotiate(
    stream: &mut BufReader<impl AsyncRead + AsyncWrite + Unpin>,
    export: &str,
    contexts: &[String],
) -> Result<Settled, NbdError> {
    if stream.read_u64().await? != MAGIC_INIT || stream.read_u64().await? != MAGIC_OPTION {
        return Err(NbdError::Protocol("no newstyle greeting".into()));
    }
    let flags = stream.read_u16().await?;
    if flags & FLAGS_HANDSHAKE != FLAGS_HANDSHAKE {
        return Err(NbdError::Protocol("the server does not know the fixed newstyle handshake".into()));
    }
    stream.write_u32(u32::from(FLAGS_HANDSHAKE)).await?;

    option(stream, OPT_STRUCTURED_REPLY, &[]).await?;
    reply(stream, OPT_STRUCTURED_REPLY, "structured replies").await?;

    let mut payload = sized(export);
    payload.extend(u32::try_from(contexts.len()).unwrap_or(u32::MAX).to_be_bytes());
    contexts.iter().for_each(|name| payload.extend(sized(name)));
    option(stream, OPT_SET_META_CONTEXT, &payload).await?;
    let mut ids = vec![None; contexts.len()];
    for count in 0.. {
        let (kind, body) = reply(stream, OPT_SET_META_CONTEXT, "metadata contexts").await?;
        if kind == REP_ACK {
            break;
        }
        patience(count)?;
        if kind == REP_META_CONTEXT && body.len() >= 4 {
            let (id, name) = body.split_at(4);
            if let Some(at) = contexts.iter().position(|wanted| wanted.as_bytes() == name) {
                ids[at] = Some(u32::from_be_bytes([id[0], id[1], id[2], id[3]]));
            }
        }
    }
    let missing = contexts.iter().zip(&ids).find(|(_, id)| id.is_none());
    if let Some((name, _)) = missing {
        return Err(NbdError::Refused { option: "metadata contexts", message: format!("it has no {name}") });
    }

    let mut payload = sized(export);
    payload.extend(0_u16.to_be_bytes());
    option(stream, OPT_GO, &payload).await?;
    let mut info = None;
    for count in 0.. {
        let (kind, body) = reply(stream, OPT_GO, "the export").await?;
        if kind == REP_ACK {
            break;
        }
        patience(count)?;
        if kind == REP_INFO && body.len() == 12 && body[..2] == INFO_EXPORT.to_be_bytes() {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&body[2..10]);
            info = Some((u64::from_be_bytes(bytes), u16::from_be_bytes([body[10], body[11]])));
        }
    }
    let (size, flags) = info.ok_or_else(|| NbdError::Protocol("the size of the export is missing".into()))?;
    if size > MAX_SIZE {
        return Err(NbdError::Protocol(format!("an export of {size} bytes")));
    }
    let unfragmented = flags & EXPORT_SEND_DF != 0;
    let trims = flags & EXPORT_SEND_TRIM != 0 && flags & EXPORT_READ_ONLY == 0;
    Ok(Settled { size, unfragmented, trims, contexts: ids.into_iter().flatten().collect() })
}

/// An option may be answered by several replies, but not without end.
fn patience(count: u32) -> Result<(), NbdError> {
    if count < MAX_REPLIES { Ok(()) } else { Err(NbdError::Protocol("option replies without end".into())) }
}

fn sized(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

async fn option(
    stream: &mut BufReader<impl AsyncRead + AsyncWrite + Unpin>,
    number: u32,
    payload: &[u8],
) -> Result<(), NbdError> {
    let mut request = MAGIC_OPTION.to_be_bytes().to_vec();
    request.extend(number.to_be_bytes());
    request.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    request.extend(payload);
    stream.write_all(&request).await?;
    Ok(())
}

async fn reply(
    stream: &mut BufReader<impl AsyncRead + AsyncWrite + Unpin>,
    number: u32,
    name: &'static str,
) -> Result<(u32, Vec<u8>), NbdError> {
    if stream.read_u64().await? != MAGIC_OPTION_REPLY || stream.read_u32().await? != number {
        return Err(NbdError::Protocol("an answer to another option".into()));
    }
    let kind = stream.read_u32().await?;
    let length = stream.read_u32().await?;
    if length > MAX_OPTION_REPLY {
        return Err(NbdError::Protocol(format!("an option reply of {length} bytes")));
    }
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body).await?;
    if kind & REP_ERROR != 0 {
        let text = printable(&String::from_utf8_lossy(&body), 300);
        let message = if text.is_empty() { format!("error {}", kind & !REP_ERROR) } else { text };
        return Err(NbdError::Refused { option: name, message });
    }
    Ok((kind, body))
}
