//! The store from outside: what survives which accident, what is shared, what is collected.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod accidents;
mod collection;
mod contents;
mod crash;
mod directories;
mod layers;
mod support;
