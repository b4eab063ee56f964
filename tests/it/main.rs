//! Tests on real parts; `tests/bed/setup` installs them.

mod bed;
mod crash;
mod faults;
mod instants;
mod scene;
mod smoke;
