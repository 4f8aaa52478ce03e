//! A server that speaks S3, for the tests of remote caches: moto, which is Python.

use std::path::Path;
use std::process::Command;

use crate::bases::{Bases, ensure_dir};
use crate::step::{self, Failure};

/// What is installed from the Python package index, in these versions.
const PACKAGES: [&str; 3] = ["moto[s3]==5.1.22", "flask==3.1.3", "flask-cors==6.0.5"];

/// Changes whenever they do. The tests look for the directory of this name.
const NAME: &str = "s3-server-1";

/// Installs it beside the base trees, unless it is there. Without a network, or without pip, its tests are
/// skipped aloud.
pub(crate) fn ensure(bases: &Bases) {
    if let Err(failure) = ensure_dir(bases, NAME, install) {
        step::warn(&format!("the tests of S3 are skipped: {failure}"));
    }
}

fn install(dir: &Path) -> Result<(), Failure> {
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--no-compile", "--root-user-action", "ignore", "--target"]);
    step::show(pip.arg(dir).args(PACKAGES)).map(drop)
}
