//! Words of the domain: digests, references, image JSON, platforms, mounts, ids.
//!
//! Read [`digest`] first, then [`reference`], [`image`], [`document`], [`snapshot`], [`mount`] and [`id_map`].
//!
//! # Invariants
//! - Pure: no file, no process, no clock.
//! - A value that parsed stays valid: past the door nobody re-checks a [`Digest`] or a [`Reference`].
//! - Image JSON written here is deterministic: same value, same bytes.

#![forbid(unsafe_code)]

mod digest;
pub mod document;
mod id_map;
pub mod image;
mod mount;
mod platform;
mod reference;
mod snapshot;

pub use digest::{ChainId, DiffId, Digest, DigestError, Sha256State, Sha256Writer};
pub use id_map::IdMap;
pub use mount::{BindMount, FileMount, Mount, TmpfsMount, TreeMount};
pub use platform::{Platform, PlatformError};
pub use reference::{Reference, ReferenceError};
pub use snapshot::{ActiveKey, SnapshotId, SnapshotIdError};
