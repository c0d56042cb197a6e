//! Compiles the `.proto` files with protox, a compiler in Rust: nobody needs `protoc`, nothing generated is
//! committed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    let files = ["shoal/v1/expert.proto", "shoal/v1/router.proto", "shoal/v1/chat.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("shoal.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Activation bytes are decoded as slices of the receive buffer, not copied.
        .bytes(".shoal.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
