//! Fleecing backups of running QEMU virtual machines.
//!
//! During a backup, old data that the guest overwrites goes to a temporary local *fleece* image instead of the backup
//! target, so a slow, full or dead target never stalls the guest. Dependencies between the modules point downwards
//! only, in this order (a test holds it):
//!
//! `cli` → `controller`, `agent` → `operator`, `run` → `fleecing`, `mover` → `repository` → `image`, `nbd`, `guest_agent` → `qmp` →
//! `backup`, `chain`, `extent`
//!
//! `api` and `kubevirt` are types that only `cli`, `controller` and `agent` use; nobody else knows of Kubernetes.
//! `operator` is what the processes of the operator have in common: health, metrics.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("sizes of disks and files are taken for addressable: build for a 64-bit target");

pub mod agent;
pub mod api;
pub mod backup;
pub mod chain;
pub mod cli;
pub mod controller;
pub mod extent;
pub mod fleecing;
pub mod guest_agent;
pub mod image;
pub mod kubevirt;
pub mod mover;
pub mod nbd;
pub mod operator;
pub mod qmp;
pub mod reason;
pub mod repository;
pub mod run;
