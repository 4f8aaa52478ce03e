//! Snapshots: file trees kept as chains, mounted with overlayfs.
//!
//! Read [`Snapshotter`] first, then [`Overlay`]; `mount` talks to the kernel, `sidecar` is the one
//! file format here.
//!
//! # Invariants
//! - A tree is handed out as a descriptor of a detached mount: no mount namespace ever shows it,
//!   and it is gone when its last descriptor is closed or the process dies.
//! - A committed upperdir is only ever a lowerdir again.
//! - Several snapshots may show one upperdir ([`Snapshotter::commit_layer`],
//!   [`Snapshotter::commit_delta`]); it goes with the last.
//! - After a crash a committed snapshot is wholly there or not listed. Active ones may be partial;
//!   their only use then is [`Snapshotter::remove_active`].
//! - Nothing is synced to disk here; whoever keeps records about snapshots owns the barrier.

#![deny(unsafe_code)]

mod choice;
mod copying;
mod disk;
mod error;
mod fuse;
mod mount;
mod overlay;
mod places;
mod sidecar;
mod snapshotter;
mod sys;

#[cfg(test)]
mod conformance;

pub use choice::{Backend, open};
pub use copying::Copying;
pub use disk::{content_bytes, disk_bytes};
pub use error::Error;
pub use mount::MAX_LOWER;
pub use overlay::Overlay;
pub use snapshotter::{Changes, Form, LayerForm, Needs, OpenOptions, Overhead, Snapshotter};
