//! The Dockerfile language: lines to nodes, nodes to instructions, instructions to LLB.

pub(crate) mod convert;
pub mod directive;
mod expand;
mod flags;
pub mod heredoc;
pub mod instruction;
mod json_list;
pub mod lint;
pub mod mount;
pub mod parser;
mod pattern;
mod read;
pub mod span;
pub mod stage;
mod suggest;
mod words;
