//! `kiln.lock`: which image each name stands for, beside the Dockerfile and under version control.
//!
//! Read `text.rs` first, what the file says; then `place.rs`, where it is; then `pins.rs`, what a build makes of it.
//! Decided in `docs/adr/0043-a-lock-file-pins-names.md`.

mod pins;
mod place;
mod text;

use std::io;
use std::path::Path;
use std::sync::Arc;

use kiln_llb::Location;
use kiln_oci::Reference;

use crate::Dockerfile;

pub(crate) use pins::{Pins, Remark, Saved};
pub(crate) use place::LockPlace;

/// What the file is called.
pub(crate) const NAME: &str = "kiln.lock";

/// More than this is no lock file.
const MAX_BYTES: u64 = 1 << 20;

/// What a build has to do with the lock file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LockMode {
    /// What it pins counts. It is not written.
    #[default]
    Read,
    /// The same, and what it lacks is added.
    Add,
    /// Every name is looked up anew, and pinned to what it leads to now.
    Update,
    /// It has to pin every name that the build stands on.
    Strict,
    /// It does not count.
    Off,
}

impl LockMode {
    /// Whether the build writes it.
    pub fn writes(self) -> bool {
        matches!(self, Self::Add | Self::Update)
    }

    /// The same pins, and nothing is written.
    pub(crate) fn reading(self) -> Self {
        if self.writes() { Self::Read } else { self }
    }
}

/// What is wrong with a lock file, or with what was asked of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// It is damaged: nothing in it counts.
    #[error("{file}:{line}: {message}")]
    Form { file: String, line: usize, message: String },
    /// A later kiln has written it.
    #[error("{file} has version {found}, and this kiln reads version {known}")]
    Version { file: String, found: i64, known: i64 },
    /// No honest one is so large.
    #[error("{file} is larger than {limit_bytes} bytes")]
    TooLarge { file: String, limit_bytes: u64 },
    /// It is a link, a directory, or nobody may read it.
    #[error("cannot read {file}")]
    Unreadable { file: String, source: io::Error },
    /// Nothing of it has changed then.
    #[error("cannot write {file}")]
    Unwritable { file: String, source: io::Error },
    /// It should be written, and there is nowhere to write it.
    #[error("{what} has no place for a kiln.lock to be written to")]
    NoPlace { what: &'static str },
    /// [`LockMode::Strict`], and there is a name that it does not pin.
    #[error("{}", missing(file.as_deref(), reference))]
    Missing {
        /// `None`: there is none.
        file: Option<String>,
        reference: Box<Reference>,
        at: Option<(Arc<Dockerfile>, Location)>,
    },
}

fn missing(file: Option<&str>, reference: &Reference) -> String {
    let name = reference.familiar();
    match file {
        Some(file) => format!("{file} does not pin {name}"),
        None => format!("there is no kiln.lock that would pin {name}"),
    }
}

/// As users would type it.
fn shown(path: &Path) -> String {
    path.strip_prefix("./").unwrap_or(path).display().to_string()
}
