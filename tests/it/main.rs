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
mod matrix;
mod nbd;
mod pull;
mod repository;
mod repository_damage;
mod repository_format;
mod repository_scene;
mod s3_bed;
mod scene;
mod seeds;
mod smoke;
mod store;
