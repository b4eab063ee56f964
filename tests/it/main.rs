//! Tests on real parts; `tests/bed/setup` installs them.

mod bed;
mod bench;
mod chain;
mod crash;
mod dependencies;
mod faults;
mod guest_agent;
mod instants;
mod libvirt;
mod libvirt_daemon;
mod matrix;
mod scene;
mod smoke;
