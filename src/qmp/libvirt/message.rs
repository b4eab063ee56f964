//! Messages of libvirt's RPC: the fixed header, and what errors look like.
//!
//! Layout, from libvirt's `src/rpc/virnetprotocol.x` (unchanged on the wire since libvirt 0.9, 2011): a length word that
//! counts itself, six header words (program, version, procedure, type, serial, status), for the two types "with
//! descriptors" one more word with their number, then the payload in XDR. The descriptors themselves follow the
//! message, each on one byte of its own (`virNetSocketSendFD`).

use super::xdr::{Decoder, Encoder, XdrError};
use crate::{
    qmp::{ErrorClass, QmpError},
    reason::printable,
};

/// The program with libvirt's public API (`remote_protocol.x`).
pub const REMOTE_PROGRAM: u32 = 0x2000_8086;
/// The program with what only QEMU has (`qemu_protocol.x`).
pub const QEMU_PROGRAM: u32 = 0x2000_8087;
/// The program of keepalives (`virkeepaliveprotocol.x`), "keep" in ASCII.
pub const KEEPALIVE_PROGRAM: u32 = 0x6b65_6570;
/// The version of all three.
pub const PROGRAM_VERSION: u32 = 1;

/// The longest message after its length word: `VIR_NET_MESSAGE_MAX`, 32 MiB in today's libvirt (16 MiB before 4.x).
pub const MAX_MESSAGE: usize = 32 << 20;
/// The longest string in a message: `VIR_NET_MESSAGE_STRING_MAX` and `REMOTE_STRING_MAX`, 4 MiB. A monitor command and
/// its answer are one string each, so libvirt cannot pass on a longer one.
pub const MAX_STRING: usize = 4 << 20;
/// The most descriptors that a message may announce (`VIR_NET_MESSAGE_NUM_FDS_MAX`).
pub const MAX_FDS: u32 = 32;
/// Length word and header.
pub const HEADER_LENGTH: usize = 28;

const LENGTH_WORD: usize = 4;

/// `VIR_ERR_INTERNAL_ERROR` (`virterror.h`): whatever went wrong inside libvirt, a lost monitor too.
pub const ERR_INTERNAL: i32 = 1;
/// `VIR_ERR_OPERATION_FAILED`.
pub const ERR_OPERATION_FAILED: i32 = 9;
/// `VIR_ERR_SYSTEM_ERROR`.
pub const ERR_SYSTEM: i32 = 38;
/// `VIR_ERR_RPC`: a message could not be encoded or decoded, for instance an answer of more than 4 MiB.
pub const ERR_RPC: i32 = 39;
/// `VIR_ERR_NO_DOMAIN`.
pub const ERR_NO_DOMAIN: i32 = 42;

/// Which way a message goes and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A call, to the daemon.
    Call,
    /// Its answer.
    Reply,
    /// An event or a keepalive, in either direction; has no answer.
    Event,
    /// A piece of a stream. This client opens none.
    Stream,
    /// A call with descriptors.
    CallWithFds,
    /// An answer with descriptors.
    ReplyWithFds,
    /// A hole in a stream (since libvirt 3.4).
    StreamHole,
}

impl Kind {
    const ALL: [Self; 7] =
        [Self::Call, Self::Reply, Self::Event, Self::Stream, Self::CallWithFds, Self::ReplyWithFds, Self::StreamHole];

    fn to_wire(self) -> u32 {
        match self {
            Self::Call => 0,
            Self::Reply => 1,
            Self::Event => 2,
            Self::Stream => 3,
            Self::CallWithFds => 4,
            Self::ReplyWithFds => 5,
            Self::StreamHole => 6,
        }
    }
}

/// A message's header without its status, which the decoded body tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Which program.
    pub program: u32,
    /// Which version of it.
    pub version: u32,
    /// Which procedure of the program.
    pub procedure: i32,
    /// What the message is.
    pub kind: Kind,
    /// Ties an answer to its call; 0 in events.
    pub serial: u32,
}

/// A decoded message.
#[derive(Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// The header.
    pub header: Header,
    /// How many one-byte packets with a descriptor follow on the socket.
    pub fds: u32,
    /// The rest.
    pub body: Body<'a>,
}

/// What a message carries.
#[derive(Debug, PartialEq, Eq)]
pub enum Body<'a> {
    /// The procedure's own data.
    Payload(&'a [u8]),
    /// The daemon refused the call.
    Error(LibvirtError),
}

/// Why a message is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The length word is out of bounds.
    #[error("a message of {0} bytes")]
    Length(u32),
    /// The length word does not fit what was given.
    #[error("a message that says {said} bytes and has {actual}")]
    LengthMismatch {
        /// The length word.
        said: u32,
        /// Bytes given.
        actual: usize,
    },
    /// No such type.
    #[error("a message of unknown type {0}")]
    Kind(u32),
    /// No such status.
    #[error("a message of unknown status {0}")]
    Status(u32),
    /// More descriptors than a message may have.
    #[error("a message with {0} descriptors")]
    Fds(u32),
    /// A value in it is malformed.
    #[error("a malformed message: {0}")]
    Xdr(XdrError),
}

impl From<XdrError> for MessageError {
    fn from(error: XdrError) -> Self {
        Self::Xdr(error)
    }
}

/// An error as libvirt reports it (`virNetMessageError`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtError {
    /// `virErrorNumber` of `virterror.h`.
    pub code: i32,
    /// `virErrorDomain`: which part of libvirt says so.
    pub domain: i32,
    /// The text for people.
    pub message: String,
}

impl LibvirtError {
    /// The error as the monitor's edge knows it. [`libvirt_code`] finds the numbers again.
    pub(super) fn refused(self, command: &str) -> QmpError {
        let Self { code, domain, message } = self;
        QmpError::Refused {
            command: command.to_owned(),
            class: ErrorClass::Other(format!("{CLASS_PREFIX}{code}:{domain}")),
            description: format!("{message} (libvirt error {code}, domain {domain})"),
        }
    }
}

const CLASS_PREFIX: &str = "libvirt:";

/// Code and domain (`virErrorNumber`, `virErrorDomain`) when libvirt refused a call, not QEMU.
pub fn libvirt_code(error: &QmpError) -> Option<(i32, i32)> {
    let QmpError::Refused { class: ErrorClass::Other(class), .. } = error else { return None };
    let (code, domain) = class.strip_prefix(CLASS_PREFIX)?.split_once(':')?;
    Some((code.parse().ok()?, domain.parse().ok()?))
}

/// How many bytes follow the length word. For a reader, before it allocates anything.
pub fn body_length(length_word: [u8; 4]) -> Result<usize, MessageError> {
    let length = u32::from_be_bytes(length_word);
    let body = usize::try_from(length).unwrap_or(usize::MAX).checked_sub(LENGTH_WORD);
    body.filter(|body| (HEADER_LENGTH - LENGTH_WORD..=MAX_MESSAGE).contains(body)).ok_or(MessageError::Length(length))
}

/// Decodes a whole message, length word included.
pub fn decode_message(bytes: &[u8]) -> Result<Message<'_>, MessageError> {
    let mut decoder = Decoder::new(bytes);
    let said = decoder.u32()?;
    let body = body_length(said.to_be_bytes())?;
    if body + LENGTH_WORD != bytes.len() {
        return Err(MessageError::LengthMismatch { said, actual: bytes.len() });
    }
    let (program, version, procedure) = (decoder.u32()?, decoder.u32()?, decoder.i32()?);
    let kind = decoder.u32()?;
    let kind = Kind::ALL.into_iter().find(|known| known.to_wire() == kind).ok_or(MessageError::Kind(kind))?;
    let (serial, status) = (decoder.u32()?, decoder.u32()?);
    let fds = if matches!(kind, Kind::CallWithFds | Kind::ReplyWithFds) { decoder.u32()? } else { 0 };
    if fds > MAX_FDS {
        return Err(MessageError::Fds(fds));
    }
    let body = match status {
        // 2: a stream goes on.
        0 | 2 => Body::Payload(decoder.rest()),
        1 => Body::Error(decode_error(decoder)?),
        other => return Err(MessageError::Status(other)),
    };
    Ok(Message { header: Header { program, version, procedure, kind, serial }, fds, body })
}

/// Encodes a message of this client: a call, or a keepalive's answer. `fds` only counts with [`Kind::CallWithFds`].
pub fn encode_message(header: Header, fds: u32, payload: &[u8]) -> Result<Vec<u8>, XdrError> {
    let words = if header.kind == Kind::CallWithFds { HEADER_LENGTH + 4 } else { HEADER_LENGTH };
    let length = words + payload.len();
    let limit = MAX_MESSAGE + LENGTH_WORD;
    let too_long = XdrError::TooLong { length, limit };
    if length > limit {
        return Err(too_long);
    }
    let mut encoder = Encoder::new();
    encoder
        .u32(u32::try_from(length).map_err(|_| too_long)?)
        .u32(header.program)
        .u32(header.version)
        .i32(header.procedure)
        .u32(header.kind.to_wire())
        .u32(header.serial)
        // Status "ok", the only one that a client sends.
        .u32(0);
    if header.kind == Kind::CallWithFds {
        encoder.u32(fds);
    }
    // Payloads are whole XDR words, so this adds no padding: with padding the length would be wrong.
    debug_assert!(payload.len().is_multiple_of(4), "a payload of {} bytes", payload.len());
    encoder.fixed_opaque(payload);
    Ok(encoder.into_bytes())
}

/// The error's other fields (domain, strings, numbers, network) only repeat what the text says.
fn decode_error(mut decoder: Decoder<'_>) -> Result<LibvirtError, XdrError> {
    let (code, domain) = (decoder.i32()?, decoder.i32()?);
    let message = decoder.optional(|d| d.string(MAX_STRING))?.unwrap_or("no text");
    // libvirt quotes QEMU's stderr.
    let message = printable(message, 2000);
    Ok(LibvirtError { code, domain, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEADER: Header =
        Header { program: REMOTE_PROGRAM, version: PROGRAM_VERSION, procedure: 66, kind: Kind::Call, serial: 1 };

    /// A reply with this status word and payload.
    fn reply(status: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = encode_message(Header { kind: Kind::Reply, ..HEADER }, 0, payload).unwrap();
        bytes[24..28].copy_from_slice(&status.to_be_bytes());
        bytes
    }

    #[test]
    fn a_call_has_the_bytes_that_libvirt_expects() {
        let expected: Vec<u8> = [28u32, 0x2000_8086, 1, 66, 0, 1, 0].into_iter().flat_map(u32::to_be_bytes).collect();
        assert_eq!(encode_message(HEADER, 0, &[]).unwrap(), expected);
    }

    #[test]
    fn the_number_of_descriptors_follows_the_header() {
        let header = Header { kind: Kind::CallWithFds, ..HEADER };
        let bytes = encode_message(header, 1, b"data").unwrap();
        let expected = Message { header, fds: 1, body: Body::Payload(b"data") };
        assert_eq!(decode_message(&bytes).unwrap(), expected);
        let mut many = bytes;
        many[28..32].copy_from_slice(&33u32.to_be_bytes());
        assert_eq!(decode_message(&many), Err(MessageError::Fds(33)));
    }

    #[test]
    fn an_error_keeps_code_domain_and_text() {
        let mut payload = Encoder::new();
        payload.i32(42).i32(10).optional(Some("no\ndomain"), |e, t| e.string(t, 100).map(drop)).unwrap().i32(2);
        let bytes = reply(1, &payload.into_bytes());
        let Body::Error(error) = decode_message(&bytes).unwrap().body else { panic!("no error") };
        let error = error.refused("virDomainLookupByName");
        assert_eq!(error.to_string(), "virDomainLookupByName was refused: no domain (libvirt error 42, domain 10)");
        assert_eq!(libvirt_code(&error), Some((42, 10)));
    }

    #[test]
    fn lengths_out_of_bounds_are_refused_before_reading() {
        assert_eq!(body_length([0; 4]), Err(MessageError::Length(0)));
        assert_eq!(body_length(27u32.to_be_bytes()), Err(MessageError::Length(27)));
        assert_eq!(body_length(28u32.to_be_bytes()), Ok(24));
        assert_eq!(body_length([0xff; 4]), Err(MessageError::Length(u32::MAX)));
        assert!(encode_message(HEADER, 0, &vec![0; MAX_MESSAGE]).is_err());
    }

    #[test]
    fn unknown_types_and_statuses_are_refused() {
        let mut bytes = encode_message(HEADER, 0, &[]).unwrap();
        bytes[19] = 9;
        assert_eq!(decode_message(&bytes), Err(MessageError::Kind(9)));
        assert_eq!(decode_message(&reply(7, &[])), Err(MessageError::Status(7)));
        assert!(matches!(decode_message(&[0, 0, 0, 40, 1]), Err(MessageError::LengthMismatch { .. })));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0u8..8, status in 0u8..4) {
            let _ = decode_message(&bytes);
            // The same with a header that gets past the first checks.
            if let (Ok(length), true) = (u32::try_from(bytes.len()), bytes.len() >= HEADER_LENGTH) {
                bytes[..4].copy_from_slice(&length.to_be_bytes());
                bytes[16..20].copy_from_slice(&[0, 0, 0, kind]);
                bytes[24..28].copy_from_slice(&[0, 0, 0, status]);
                let _ = decode_message(&bytes);
            }
        }
    }
}
