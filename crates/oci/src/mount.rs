//! What a process finds mounted below its root, as data.
//!
//! The root itself, other trees and secret files travel beside this data as open descriptors
//! (`docs/adr/0002-trees-travel-as-fds.md`); a mount names them by their position.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One mount below a process's root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mount {
    /// A host file or directory.
    Bind(BindMount),
    /// Files of an open tree.
    Tree(TreeMount),
    /// A file in memory that exists for this process only: a secret.
    File(FileMount),
    /// An empty file system in memory.
    Tmpfs(TmpfsMount),
}

impl Mount {
    /// Absolute path inside.
    pub fn target(&self) -> &str {
        match self {
            Mount::Bind(BindMount { target, .. })
            | Mount::Tree(TreeMount { target, .. })
            | Mount::File(FileMount { target, .. })
            | Mount::Tmpfs(TmpfsMount { target, .. }) => target,
        }
    }
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

/// Files of an open tree made visible inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeMount {
    /// Position of a detached mount among the descriptors that travel beside; no two mounts share
    /// one.
    pub input: usize,
    /// What of it is shown: a path resolved once, inside it. Empty: its root, which may then be a
    /// file or a socket as well.
    pub source: String,
    /// Absolute path inside; made when missing.
    pub target: String,
    /// Writes are refused.
    pub read_only: bool,
}

/// A read-only file in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMount {
    /// Position of a descriptor with its content among those that travel beside; content never
    /// stands in here, because this is data that gets printed.
    pub input: usize,
    /// Absolute path inside; made when missing.
    pub target: String,
    /// Permission bits.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// An empty file system in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsMount {
    /// Absolute path inside; made when missing.
    pub target: String,
    /// Upper bound in bytes; `None`: the kernel's default, half the memory.
    pub size_bytes: Option<u64>,
    /// Permission bits of its root; `None`: the kernel's default, 1777.
    pub mode: Option<u32>,
    /// Whether programs in it can be executed.
    pub executable: bool,
}
