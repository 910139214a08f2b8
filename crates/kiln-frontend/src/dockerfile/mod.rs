//! The Dockerfile language: lines to nodes, nodes to instructions, instructions to LLB.

pub mod directive;
mod expand;
mod flags;
pub mod heredoc;
mod json_list;
pub mod parser;
mod pattern;
pub mod span;
mod suggest;
mod words;
