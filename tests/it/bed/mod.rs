//! The test bed from the tests' side: guests under three flavours of QEMU, the writer inside the guest and the oracle
//! that knows what it wrote, targets that misbehave, an S3 server with a proxy that misbehaves, and the product's
//! binary.
#![allow(dead_code, reason = "a test bed offers more than the tests of the day take")]

pub(crate) mod agent;
mod backing;
pub(crate) mod cli;
pub(crate) mod control;
pub(crate) mod disk;
pub(crate) mod faults;
pub(crate) mod flavour;
mod fuse;
pub(crate) mod oracle;
pub(crate) mod point_in_time;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod s3;
pub(crate) mod s3_proxy;
pub(crate) mod vm;
pub(crate) mod writer;
