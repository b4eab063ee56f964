//! What there is to do: asks an export for the state of its ranges.

use super::{PullError, PullRequest};
use crate::{
    extent::{ByteRange, Run, Work, align, intersection, plan},
    nbd::{self, Content, NbdClient, NbdError, StatusExtent},
};
use tokio::io::{AsyncRead, AsyncWrite};

/// Bytes whose state is asked for at once. An answer holds 8 bytes for each change of state, at worst for every 4 KiB
/// of a fragmented file and every 64 KiB of the bitmap: 68 KiB, which the server's send buffer takes like any reply.
const WINDOW: u64 = 32 << 20;
/// Bytes about whose beginning is asked where the state seldom changes: the answer is one extent, however long. Nearly as
/// many as a request can name, and a multiple of every unit.
const STRETCH: u64 = (4 << 30) - WINDOW;

/// How closely is looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// To know how much there is.
    Once,
    /// To rely on it.
    Surely,
}

/// Looks at an export from its beginning to its end.
#[derive(Debug)]
pub(super) struct Survey {
    /// The last answer was of one kind: the next one may reach far.
    calm: bool,
}

/// States from an offset on: what reads as zeroes, what changed.
type States = (Vec<Run>, Option<Vec<Run>>);

impl Survey {
    pub(super) fn new() -> Self {
        Self { calm: true }
    }

    /// The work from `start` on, as far as one answer reaches, in whole clusters. No read may be outstanding.
    pub(super) async fn next<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        client: &mut NbdClient<S>,
        request: &PullRequest,
        start: u64,
        look: Look,
    ) -> Result<(Vec<(ByteRange, Work)>, u64), PullError> {
        let (size, unit) = (client.size(), request.unit);
        let border = |at: u64| if at == size { at } else { at / unit * unit };
        if self.calm {
            let (work, end) = work(client, request, (start, STRETCH), true, look).await?;
            if border(end) > start && (end - start >= WINDOW || end == size) {
                return Ok(cut(&work, border(end), request, size));
            }
            self.calm = false;
        }
        let (mut all, mut at) = (Vec::new(), start);
        // An answer that ends within a cluster is cut back to its border; one that does not even fill a cluster is
        // continued.
        loop {
            let (more, end) = work(client, request, (at, WINDOW), false, look).await?;
            self.calm = match more.as_slice() {
                [] => end - at >= WINDOW,
                [(range, _)] => range.len() >= WINDOW,
                _ => false,
            };
            all.extend(more);
            at = end;
            if border(at) > start {
                return Ok(cut(&all, border(at), request, size));
            }
        }
    }
}

/// Whole clusters up to a border.
fn cut(work: &[(ByteRange, Work)], border: u64, request: &PullRequest, size: u64) -> (Vec<(ByteRange, Work)>, u64) {
    let cut = |(range, kind): &(ByteRange, Work)| Some((range.split_at(border).0?, *kind));
    let work: Vec<_> = work.iter().filter_map(cut).collect();
    (align(&work, request.unit, size), border)
}

/// The work of a range, as far as one answer reaches. `first`: as far as all of it is of one kind.
async fn work<S: AsyncRead + AsyncWrite + Unpin>(
    client: &mut NbdClient<S>,
    request: &PullRequest,
    (start, length): (u64, u64),
    first: bool,
    look: Look,
) -> Result<(Vec<(ByteRange, Work)>, u64), PullError> {
    let size = client.size();
    let length = length.min(size - start);
    let (mut zero, dirty) = states(client, request, start, length, first).await?;
    if let Some(Run { length, set: false }) = dirty.as_deref().and_then(<[Run]>::first)
        && first
        && !overlaps(request.always, start, *length)
    {
        // Whether what is unchanged reads as zeroes does not matter, however often that changes.
        zero = vec![Run { length: *length, set: false }];
    }
    let (mut work, mut end) = plan(start, &zero, dirty.as_deref(), request.always);
    if look == Look::Surely && work.iter().any(|(_, kind)| *kind == Work::Zero) {
        // Asked twice: for a qcow2 overlay QEMU looks at the fleece first and at the live disk then. A guest that
        // discards a block between the two looks makes data of the point in time appear as zeroes; the second answer
        // finds the data in the fleece.
        let again = states(client, request, start, length, first).await?.0;
        (work, end) = plan(start, &intersection(&zero, &again), dirty.as_deref(), request.always);
    }
    let end = end.min(size);
    if end <= start {
        return Err(NbdError::Protocol("a block status without progress".into()).into());
    }
    Ok((work, end))
}

fn overlaps(always: Option<ByteRange>, start: u64, length: u64) -> bool {
    let range = ByteRange::with_length(start, length);
    always.zip(range).is_some_and(|(always, range)| always.intersection(range).is_some())
}

async fn states<S: AsyncRead + AsyncWrite + Unpin>(
    client: &mut NbdClient<S>,
    request: &PullRequest,
    at: u64,
    length: u64,
    first: bool,
) -> Result<States, PullError> {
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    let cookie = if first { client.ask_first_status(at, length).await? } else { client.ask_status(at, length).await? };
    let mut zero: Option<Vec<Run>> = None;
    let mut dirty: Option<Vec<Run>> = None;
    loop {
        let chunk = client.receive(0).await?;
        if chunk.cookie != cookie {
            return Err(NbdError::Protocol("an answer to no question".into()).into());
        }
        let runs = |extents: Vec<StatusExtent>, flag: u32| {
            Some(extents.iter().map(|e| Run { length: e.length, set: e.flags & flag != 0 }).collect())
        };
        match chunk.content {
            Content::Status { extents, .. } if first && extents.len() > 1 => {
                // An answer of any length could be more than the server's send buffer takes.
                return Err(NbdError::Protocol("a block status of more than the one extent asked for".into()).into());
            }
            Content::Status { context: 0, extents } if zero.is_none() => zero = runs(extents, nbd::STATE_ZERO),
            Content::Status { context: 1, extents } if dirty.is_none() => dirty = runs(extents, nbd::STATE_DIRTY),
            Content::Status { .. } => {
                return Err(NbdError::Protocol("a context twice in a block status".into()).into());
            }
            Content::Error { errno } => return Err(NbdError::Read { offset: at, errno }.into()),
            Content::None => {}
            _ => return Err(NbdError::Protocol("data in answer to a block status".into()).into()),
        }
        if chunk.done {
            break;
        }
    }
    let missing = || PullError::from(NbdError::Protocol("a context is missing in a block status".into()));
    let zero = zero.ok_or_else(missing)?;
    if request.bitmap.is_some() && dirty.is_none() {
        return Err(missing());
    }
    Ok((zero, dirty))
}
