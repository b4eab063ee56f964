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
mod s3_bed;
mod scene;
mod serve_nbd;
mod smoke;
