//! A domain as libvirt's wire names it, and what state it is in.

use super::{
    message::MAX_STRING,
    xdr::{Decoder, Encoder, XdrError},
};
use std::{fmt, str::FromStr};

/// A domain's UUID: the same over restarts of the machine, unlike its [`Domain::id`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DomainUuid([u8; 16]);

/// A text that is no UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a UUID")]
pub struct NotUuid(String);

impl FromStr for DomainUuid {
    type Err = NotUuid;

    /// 32 hexadecimal digits, dashes anywhere between bytes.
    fn from_str(text: &str) -> Result<Self, NotUuid> {
        let refused = || NotUuid(text.chars().take(80).collect());
        let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
        let mut bytes = [0; 16];
        if digits.len() != 32 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(refused());
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| refused())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| refused())?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for DomainUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let dash = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// A domain that libvirt knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Its name. `KubeVirt` calls it `<namespace>_<VMI name>`.
    pub name: String,
    /// Its UUID.
    pub uuid: DomainUuid,
    /// The run's number, absent while it does not run. The daemon never gives a number twice and keeps it over its own
    /// restart (it is in the status XML), so an equal number means the same QEMU process.
    pub id: Option<i32>,
}

impl Domain {
    /// `remote_nonnull_domain`.
    pub(super) fn encode<'a>(&self, encoder: &'a mut Encoder) -> Result<&'a mut Encoder, XdrError> {
        Ok(encoder.string(&self.name, MAX_STRING)?.fixed_opaque(&self.uuid.0).i32(self.id.unwrap_or(-1)))
    }

    /// `remote_nonnull_domain`.
    pub(super) fn decode(decoder: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let name = decoder.string(MAX_STRING)?.to_owned();
        let bytes = decoder.fixed_opaque(16)?;
        let uuid = DomainUuid(bytes.try_into().map_err(|_| XdrError::Truncated { needed: 16, left: bytes.len() })?);
        let id = decoder.i32()?;
        Ok(Self { name, uuid, id: (id >= 0).then_some(id) })
    }
}

impl DomainUuid {
    /// `remote_uuid`.
    pub(super) fn encode(self, encoder: &mut Encoder) {
        encoder.fixed_opaque(&self.0);
    }
}

/// `virDomainState`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    /// No state known.
    None,
    /// The guest runs.
    Running,
    /// The guest waits for a resource (not with QEMU).
    Blocked,
    /// The guest is stopped, QEMU is there: the monitor answers.
    Paused,
    /// The guest is going down, QEMU is there.
    ShuttingDown,
    /// There is no QEMU.
    ShutOff,
    /// There is no QEMU, or only what the crash left.
    Crashed,
    /// The guest sleeps, QEMU is there.
    Suspended,
    /// A state that this version does not know.
    Other(i32),
}

impl DomainState {
    /// Reads the number that libvirt sends.
    pub(super) fn from_wire(state: i32) -> Self {
        match state {
            0 => Self::None,
            1 => Self::Running,
            2 => Self::Blocked,
            3 => Self::Paused,
            4 => Self::ShuttingDown,
            5 => Self::ShutOff,
            6 => Self::Crashed,
            7 => Self::Suspended,
            other => Self::Other(other),
        }
    }

    /// Whether there is no QEMU to talk to. A crashed domain can have one left (`on_crash` = preserve), which then has
    /// an id.
    pub fn is_off(self) -> bool {
        matches!(self, Self::ShutOff)
    }
}

impl fmt::Display for DomainState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Self::None => "without a state",
            Self::Running => "running",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting down",
            Self::ShutOff => "shut off",
            Self::Crashed => "crashed",
            Self::Suspended => "suspended",
            Self::Other(number) => return write!(f, "in state {number}"),
        };
        f.write_str(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_reads_with_and_without_dashes_and_prints_as_libvirt_does() {
        let uuid: DomainUuid = "07F7D36A4CF74F71B7FFD7B84CD3FA5C".parse().unwrap();
        assert_eq!(uuid.to_string(), "07f7d36a-4cf7-4f71-b7ff-d7b84cd3fa5c");
        assert_eq!(uuid.to_string().parse(), Ok(uuid));
        for text in ["", "07f7d36a", "zzf7d36a-4cf7-4f71-b7ff-d7b84cd3fa5c", "+7f7d36a-4cf7-4f71-b7ff-d7b84cd3fa5c"] {
            assert!(text.parse::<DomainUuid>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_domain_that_is_off_has_no_id() {
        let uuid = "07f7d36a-4cf7-4f71-b7ff-d7b84cd3fa5c".parse().unwrap();
        for id in [None, Some(7)] {
            let domain = Domain { name: "ns_vm".into(), uuid, id };
            let mut encoder = Encoder::new();
            domain.encode(&mut encoder).unwrap();
            let bytes = encoder.into_bytes();
            assert_eq!(Domain::decode(&mut Decoder::new(&bytes)).unwrap(), domain);
        }
    }
}
