//! Tests on real parts; `tests/bed/setup` installs them.

mod bed;
mod bench;
mod chain;
mod crash;
mod dependencies;
mod faults;
mod guest_agent;
mod hostile_libvirt;
mod hostile_monitor;
mod instants;
mod libvirt;
mod libvirt_daemon;
mod nbd;
mod pull;
mod scene;
mod seeds;
mod smoke;
