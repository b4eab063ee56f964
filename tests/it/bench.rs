//! Measurements, run by `bench/run` alone: tables on standard output, no assertions on times.
#![allow(clippy::unwrap_used, reason = "tests; the exemption for test functions leaves out what they call")]

mod content;
mod full;
mod guest;
mod incremental;
mod limit;
mod measure;
mod push;
mod restore;
