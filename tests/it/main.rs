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
mod repository;
mod repository_damage;
mod repository_format;
mod repository_scene;
mod s3_bed;
mod scene;
mod smoke;
mod store;
