//! A build as verified data: operations in a content-addressed graph.
//!
//! Tour: [`definition`] is a graph as it travels, operations still encoded; [`graph`] is the same graph decoded and
//! checked; [`op`] has the operations; [`source_map`] leads from a vertex to the user's text; [`caps`] names what
//! operations may ask for; [`state`] is the builder frontends make graphs with. `wire` is the only file that sees protobuf.
//!
//! Absent on purpose: how an operation is carried out or keyed, and any I/O.

pub mod caps;
pub mod definition;
pub mod env_list;
pub mod error;
pub mod graph;
mod load;
pub mod op;
mod source_caps;
pub mod source_map;
pub mod state;
pub mod wire;

pub use definition::{Definition, LinuxResources, OpMetadata, ProgressGroup};
pub use env_list::EnvList;
pub use error::LlbError;
pub use graph::{Edge, Graph, Vertex, VertexDigest, vertex_digest};
pub use op::{InputIndex, Op, OutputIndex};
pub use source_map::{SourceInfo, SourceLocation, SourceMap, SourcePosition, SourceRange};
pub use state::State;
