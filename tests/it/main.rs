//! Tests on real parts; `tests/bed/setup` installs them.

mod bed;
mod crash;
mod instants;
mod scene;
mod smoke;
