//! Rules of the source tree that a program can check: who may know whom, what every file says first, how long it may be.
//! Fast, and needs neither a daemon nor privileges.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod capabilities;
mod files;
mod rooms;
