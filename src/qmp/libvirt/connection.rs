//! An open connection to a libvirt daemon, and the few procedures that this crate needs besides the monitor.
//!
//! Procedure numbers and argument layouts are facts of `src/remote/remote_protocol.x`; libvirt never changes one that
//! was released.

use super::{
    domain::{Domain, DomainState, DomainUuid},
    message::{ERR_NO_DOMAIN, LibvirtError, MAX_STRING},
    rpc::{CallError, Procedure, RpcClient},
    xdr::{Decoder, Encoder, XdrError},
};
use crate::qmp::{QmpError, TimeLimits};
use std::{fmt, os::fd::OwnedFd, path::Path, time::Duration};

const CONNECT_OPEN: Procedure = Procedure::remote(1, "virConnectOpen");
const CONNECT_CLOSE: Procedure = Procedure::remote(2, "virConnectClose");
const LOOKUP_BY_NAME: Procedure = Procedure::remote(23, "virDomainLookupByName");
const LOOKUP_BY_UUID: Procedure = Procedure::remote(24, "virDomainLookupByUUID");
const AUTH_LIST: Procedure = Procedure::remote(66, "libvirt authentication");
const GET_STATE: Procedure = Procedure::remote(212, "virDomainGetState");
const LIST_ALL_DOMAINS: Procedure = Procedure::remote(273, "virConnectListAllDomains");

/// `REMOTE_AUTH_TYPE_LIST_MAX`.
const MAX_AUTH_TYPES: usize = 20;
/// `REMOTE_DOMAIN_LIST_MAX`.
const MAX_DOMAINS: usize = 16384;
/// Names in an error; a server with hundreds of machines would fill the screen.
const SHOWN_NAMES: usize = 20;

/// Which of the daemon's two QEMU drivers. A daemon has one of them: the session driver when it runs as an ordinary
/// user, the system driver when it runs as root, and it refuses the other's URI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// `qemu:///session`: `KubeVirt`'s launchers with `runtimeUser` 107, the rule since 0.59.
    Session,
    /// `qemu:///system`: launchers that run as root, and ordinary hosts.
    System,
}

impl Driver {
    /// What to ask the daemon for.
    pub fn uri(self) -> &'static str {
        match self {
            Self::Session => "qemu:///session",
            Self::System => "qemu:///system",
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.uri())
    }
}

/// An authenticated connection with an open driver. Closed when dropped.
#[derive(Debug)]
pub struct LibvirtConnection {
    rpc: RpcClient,
    driver: Driver,
    limits: TimeLimits,
}

impl LibvirtConnection {
    /// Connects to the daemon's socket and opens the driver that it has. Every step ends within `limits.greeting`,
    /// every later call within `limits.command` unless it says otherwise.
    pub async fn connect(socket: &Path, limits: TimeLimits) -> Result<Self, QmpError> {
        let rpc = Self::authenticate(socket, limits).await?;
        // A refused open leaves the connection as it was, so the second try needs no second connection.
        match open(&rpc, Driver::Session, limits).await {
            Ok(()) => Ok(Self { rpc, driver: Driver::Session, limits }),
            Err(CallError::Libvirt(_)) => match open(&rpc, Driver::System, limits).await {
                Ok(()) => Ok(Self { rpc, driver: Driver::System, limits }),
                Err(error) => Err(error.into_qmp(CONNECT_OPEN.name)),
            },
            Err(error) => Err(error.into_qmp(CONNECT_OPEN.name)),
        }
    }

    /// The same with this driver and no other.
    pub async fn connect_to(socket: &Path, driver: Driver, limits: TimeLimits) -> Result<Self, QmpError> {
        let rpc = Self::authenticate(socket, limits).await?;
        open(&rpc, driver, limits).await.map_err(|error| error.into_qmp(CONNECT_OPEN.name))?;
        Ok(Self { rpc, driver, limits })
    }

    /// A daemon asks nothing of a client that runs as root or has no polkit to ask (`remoteDispatchAuthList`); after
    /// that answer the client counts as authenticated.
    async fn authenticate(socket: &Path, limits: TimeLimits) -> Result<RpcClient, QmpError> {
        let rpc = RpcClient::connect(socket, limits.greeting).await?;
        let answer = rpc
            .call(AUTH_LIST, Vec::new(), Vec::new(), limits.greeting)
            .await
            .map_err(|error| error.into_qmp(AUTH_LIST.name))?;
        let types = decode(&rpc, AUTH_LIST, &answer, |d| d.array(MAX_AUTH_TYPES, Decoder::i32))?;
        if types.contains(&0) {
            return Ok(rpc);
        }
        let names: Vec<_> = types
            .iter()
            .map(|number| match number {
                1 => "SASL".to_owned(),
                2 => "polkit".to_owned(),
                other => format!("type {other}"),
            })
            .collect();
        let message = format!(
            "the daemon behind {} wants {} authentication, which is not supported: run as root or as the daemon's user",
            rpc.peer(),
            names.join(" or ")
        );
        // VIR_ERR_AUTH_UNAVAILABLE of VIR_FROM_RPC, as libvirt's own client would say.
        Err(LibvirtError { code: 79, domain: 7, message }.refused(AUTH_LIST.name))
    }

    /// Which driver the daemon has.
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// The time limits.
    pub fn limits(&self) -> TimeLimits {
        self.limits
    }

    /// The daemon's socket, as it was given.
    pub fn socket(&self) -> &str {
        self.rpc.peer()
    }

    /// All domains, running or not.
    pub async fn domains(&self) -> Result<Vec<Domain>, QmpError> {
        // "I want the list", flags: none, so no filter.
        let mut arguments = Encoder::new();
        arguments.i32(1).u32(0);
        self.query(LIST_ALL_DOMAINS, arguments, |d| {
            let domains = d.array(MAX_DOMAINS, Domain::decode)?;
            d.u32()?;
            Ok(domains)
        })
        .await
    }

    /// The domain of this name. The error for an unknown one says which there are.
    pub async fn domain_by_name(&self, name: &str) -> Result<Domain, QmpError> {
        let mut arguments = Encoder::new();
        arguments.string(name, MAX_STRING).map_err(|error| refused_argument(LOOKUP_BY_NAME.name, &error))?;
        let found = self.find(LOOKUP_BY_NAME, arguments).await?;
        match found {
            Some(domain) => Ok(domain),
            None => Err(self.unknown(LOOKUP_BY_NAME, &format!("named '{}'", name.escape_debug())).await),
        }
    }

    /// The domain with this UUID. The error for an unknown one says which there are.
    pub async fn domain_by_uuid(&self, uuid: DomainUuid) -> Result<Domain, QmpError> {
        match self.find_by_uuid(uuid).await? {
            Some(domain) => Ok(domain),
            None => Err(self.unknown(LOOKUP_BY_UUID, &format!("with UUID {uuid}")).await),
        }
    }

    /// The domain with this UUID, if there still is one.
    pub(super) async fn find_by_uuid(&self, uuid: DomainUuid) -> Result<Option<Domain>, QmpError> {
        let mut arguments = Encoder::new();
        uuid.encode(&mut arguments);
        self.find(LOOKUP_BY_UUID, arguments).await
    }

    /// The domain's state now.
    pub async fn domain_state(&self, domain: &Domain) -> Result<DomainState, QmpError> {
        let mut arguments = Encoder::new();
        domain.encode(&mut arguments).map_err(|error| refused_argument(GET_STATE.name, &error))?.u32(0);
        let state = self.query(GET_STATE, arguments, |d| {
            let state = d.i32()?;
            // Why it is so: a number per state, only good for display.
            d.i32()?;
            Ok(state)
        });
        state.await.map(DomainState::from_wire)
    }

    /// Takes leave and waits until the daemon has closed the driver.
    pub async fn close(self) -> Result<(), QmpError> {
        let closed = self.rpc.call(CONNECT_CLOSE, Vec::new(), Vec::new(), self.limits.greeting).await;
        closed.map(drop).map_err(|error| error.into_qmp(CONNECT_CLOSE.name))
    }

    /// A call with arguments and descriptors; its result's XDR.
    pub(super) async fn call(
        &self,
        procedure: Procedure,
        arguments: Encoder,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Vec<u8>, CallError> {
        self.rpc.call(procedure, arguments.into_bytes(), fds, limit).await
    }

    /// Decodes a whole result.
    pub(super) fn decode<T>(
        &self,
        procedure: Procedure,
        answer: &[u8],
        read: impl FnOnce(&mut Decoder<'_>) -> Result<T, XdrError>,
    ) -> Result<T, QmpError> {
        decode(&self.rpc, procedure, answer, read)
    }

    async fn query<T>(
        &self,
        procedure: Procedure,
        arguments: Encoder,
        read: impl FnOnce(&mut Decoder<'_>) -> Result<T, XdrError>,
    ) -> Result<T, QmpError> {
        let answer = self.call(procedure, arguments, Vec::new(), self.limits.command).await;
        let answer = answer.map_err(|error| error.into_qmp(procedure.name))?;
        self.decode(procedure, &answer, read)
    }

    async fn find(&self, procedure: Procedure, arguments: Encoder) -> Result<Option<Domain>, QmpError> {
        match self.call(procedure, arguments, Vec::new(), self.limits.command).await {
            Ok(answer) => self.decode(procedure, &answer, Domain::decode).map(Some),
            Err(CallError::Libvirt(error)) if error.code == ERR_NO_DOMAIN => Ok(None),
            Err(error) => Err(error.into_qmp(procedure.name)),
        }
    }

    async fn unknown(&self, procedure: Procedure, what: &str) -> QmpError {
        let known = match self.domains().await {
            Err(error) if error.is_disconnected() => return error,
            // The list is only a courtesy.
            Err(_) => String::new(),
            Ok(domains) if domains.is_empty() => "; it knows none".to_owned(),
            Ok(domains) => {
                let names: Vec<_> =
                    domains.iter().take(SHOWN_NAMES).map(|domain| domain.name.escape_debug().to_string()).collect();
                let more = domains.len().saturating_sub(SHOWN_NAMES);
                let more = if more == 0 { String::new() } else { format!(" and {more} more") };
                format!("; it knows {}{more}", names.join(", "))
            }
        };
        // VIR_FROM_QEMU.
        let message = format!("libvirt knows no domain {what}{known}");
        LibvirtError { code: ERR_NO_DOMAIN, domain: 10, message }.refused(procedure.name)
    }
}

impl Drop for LibvirtConnection {
    fn drop(&mut self) {
        self.rpc.send_and_forget(CONNECT_CLOSE);
    }
}

async fn open(rpc: &RpcClient, driver: Driver, limits: TimeLimits) -> Result<(), CallError> {
    let mut arguments = Encoder::new();
    arguments
        .optional(Some(driver.uri()), |e, uri| e.string(uri, MAX_STRING).map(drop))
        .map_err(|error| CallError::Transport(refused_argument(CONNECT_OPEN.name, &error)))?
        // Flags: read and write.
        .u32(0);
    rpc.call(CONNECT_OPEN, arguments.into_bytes(), Vec::new(), limits.greeting).await.map(drop)
}

fn decode<T>(
    rpc: &RpcClient,
    procedure: Procedure,
    answer: &[u8],
    read: impl FnOnce(&mut Decoder<'_>) -> Result<T, XdrError>,
) -> Result<T, QmpError> {
    let mut decoder = Decoder::new(answer);
    let value = read(&mut decoder).and_then(|value| decoder.finish().map(|()| value));
    value.map_err(|error| QmpError::Protocol {
        peer: rpc.peer().to_owned(),
        detail: format!("the answer to {}: {error}", procedure.name),
    })
}

/// The error for an argument that no message can carry. Nothing was sent.
pub(super) fn refused_argument(command: &str, error: &XdrError) -> QmpError {
    LibvirtError { code: super::message::ERR_RPC, domain: 0, message: format!("an argument does not fit: {error}") }
        .refused(command)
}
