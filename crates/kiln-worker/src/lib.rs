//! How each operation is keyed and carried out on this machine.
//!
//! Tour: [`key`] is the byte-exact part, what makes two operations the same.
//!
//! Absent on purpose: when and whether an operation runs (the solver decides), the layout of bytes on disk (the store's),
//! namespaces (the executor's), and anything about Dockerfiles.

pub mod key;
