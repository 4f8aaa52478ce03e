//! The release binary: one static file.

use std::path::PathBuf;
use std::process::Command;

use crate::step::{self, Failure};

/// One file that runs anywhere, at a fixed address: see `docs/adr/0019-fixed-address.md`.
const FLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

/// Builds `kiln` in release mode, linked statically, and returns its path.
///
/// With `--target`, the flags reach only kiln's own code and not build scripts, and the result has
/// a directory of its own: plain `cargo build` keeps its flags and its cache. `KILN_BENCH_BINARY` names one
/// that is there already.
pub(crate) fn release() -> Result<PathBuf, Failure> {
    if let Some(program) = std::env::var_os("KILN_BENCH_BINARY") {
        step::note("the binary that KILN_BENCH_BINARY names");
        return Ok(program.into());
    }
    let triple = host_triple()?;
    let mut build = step::cargo();
    build.args(["build", "--release", "-p", "kiln", "--target", &triple]);
    build.env("RUSTFLAGS", FLAGS);
    step::note(&format!("with RUSTFLAGS='{FLAGS}'"));
    step::show(&mut build)?;
    Ok(step::target_dir()?.join(triple).join("release").join("kiln"))
}

/// Triple that the running compiler builds for.
pub(crate) fn host_triple() -> Result<String, Failure> {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(step::repository()).arg("-vV");
    let version = step::read(&mut rustc)?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let missing = || Failure::Output { line: step::typed(&rustc), expected: "a `host:` line" };
    host.map(str::to_owned).ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_triple_is_that_of_the_running_compiler() {
        let triple = host_triple().expect("rustc runs us");
        assert!(triple.contains(std::env::consts::ARCH), "{triple}");
    }
}
