//! The node agent: carries out backups of the VMs of its node.
//!
//! It learns of them from the API server and reports there, and it needs it for nothing else: while the API server is
//! away runs go on, and end. Nothing in a VM depends on this process: what it leaves when it is killed is undone by the
//! next one ([`Agent::recover`]), and the guest runs meanwhile.

mod config;
mod kubelet;
mod leftovers;
mod metrics;
mod node;
mod orders;
mod police;
mod publish;
mod report;
mod work;

pub use config::AgentConfig;
pub use kubelet::{KubeletDirectory, KubeletError, PodSocket};
pub use node::{Agent, AgentError};
pub use orders::{Order, decide};
pub use report::Ending;
