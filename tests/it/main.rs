//! Tests on real parts; `tests/bed/setup` installs them.

mod bed;
mod dependencies;
mod smoke;
