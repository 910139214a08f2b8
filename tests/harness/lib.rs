//! The harness of the end-to-end tests: one daemon per test, the real `docker buildx`, real registries.
//!
//! A test reads as its story: a [`Fixture`] is the build context, a [`Daemon`] is started for it, [`Buildx`] builds it, and an
//! [`Image`] is what came out, read back byte by byte from the exported archive.
//!
//! ```no_run
//! use harness::{Daemon, Fixture};
//! let context = Fixture::new("=== Dockerfile\nFROM busybox\nRUN echo hello > /greeting\n");
//! let daemon = Daemon::start();
//! let image = daemon.buildx().build(&context).image();
//! assert_eq!(image.file("greeting").text(), "hello\n");
//! ```
//!
//! The tour: [`lab`] knows where the lab's images and clients are; [`process`] starts programs that cannot outlive the test;
//! [`daemon`], [`registry`], [`http`] and [`buildx`] are the actors, [`faults`] their bad day; [`fixture`] and [`image`] are what goes in and what comes out;
//! [`progress`] reads buildx's plain output; [`redact`] takes out what differs from run to run.
//!
//! Which daemon is tested: `kilnd` of the same target directory, or the program that `KILN_E2E_DAEMON` names. The second is how a
//! test is tried on the reference daemon before its expectation is believed, so nothing here looks behind the protocol.
//!
//! Deliberately absent: any knowledge of Kiln's crates. The harness sees what a user sees.

// A harness fails by panicking: that is how a test reports what it expected and what it saw.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, clippy::panic)]

pub mod buildx;
pub mod daemon;
pub mod faults;
pub mod fixture;
pub mod http;
pub mod image;
pub mod lab;
pub mod process;
pub mod progress;
pub mod redact;
pub mod registry;

pub use buildx::{Build, Buildx, Outcome};
pub use daemon::Daemon;
pub use faults::{Fault, Faults};
pub use fixture::Fixture;
pub use http::HttpServer;
pub use image::{Entry, Image, Kind, Layer};
pub use progress::{Progress, Step};
pub use redact::redact;
pub use registry::Registry;
