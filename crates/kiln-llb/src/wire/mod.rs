//! Conversion between Kiln's graph types and protobuf messages; only this module sees protobuf.

mod decode;
mod encode;

pub use decode::{
    DecodedOp, decode_op, definition_from_bytes, definition_from_proto, mount as mount_from_proto, platform_from_proto,
};
pub use encode::{
    definition_to_proto, encode_op, encode_terminal, platform_to_proto, range_to_proto, source_info_to_proto,
};
