//! Takes the code out of the README, so that `tests/readme.rs` compiles and runs it as it stands.

use std::{env, error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let readme = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../README.md");
    println!("cargo::rerun-if-changed={}", readme.display());
    let text = fs::read_to_string(&readme)?;
    let blocks = text.split("```rust\n").skip(1).filter_map(|rest| rest.split("```").next());
    let code = blocks.collect::<Vec<_>>().join("\n");
    fs::write(Path::new(&env::var("OUT_DIR")?).join("readme.rs"), code)?;
    Ok(())
}
