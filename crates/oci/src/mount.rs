//! What a process finds mounted below its root, as data.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One mount below a process's root.
///
/// The root itself travels as an open detached mount (`docs/adr/0002-trees-travel-as-fds.md`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mount {
    /// A host file or directory.
    Bind(BindMount),
    /// An empty file system in memory.
    Tmpfs(TmpfsMount),
}

/// A host path made visible inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindMount {
    /// Absolute host path; a file or a directory.
    pub source: PathBuf,
    /// Absolute path inside; made when missing.
    pub target: String,
    /// Writes are refused.
    pub read_only: bool,
}

/// An empty file system in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsMount {
    /// Absolute path inside; made when missing.
    pub target: String,
    /// Upper bound in bytes; `None`: the kernel's default, half the memory.
    pub size_bytes: Option<u64>,
}
