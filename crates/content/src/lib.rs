//! What the store knows: blobs, images and their names, layers, cached results, leases.
//!
//! Read [`Store`] first, then `blobs.rs`, `records.rs`, `lease.rs` and `containers.rs`; `pins.rs` for garbage collection,
//! `index.rs`, `journal.rs` and `sidecars.rs` for what survives damage.
//!
//! # Invariants
//! - A blob's file name is the digest of its bytes; it is complete or not there.
//! - Nothing points to what is not there: data first, then the record, then the name.
//! - Records are an index in SQLite. One made since the last [`Store::barrier`] carries the boot id
//!   and is dropped after a reboot: its data may not have reached the disk.
//! - What a handle hands out is pinned until the handle is gone; garbage collection removes only what
//!   nobody has pinned.
//! - Locks go with their process; there is no pid file.

#![forbid(unsafe_code)]

mod blobs;
mod containers;
mod error;
mod files;
mod index;
mod journal;
mod lease;
mod packed;
mod pins;
mod records;
mod reserve;
mod sidecars;
mod space;
mod store;
mod survey;
mod tables;

pub use blobs::Ingest;
pub use containers::ContainerUse;
pub use error::Error;
pub use files::{BlobFile, Files};
pub use index::Rebuilt;
pub use lease::Lease;
pub use packed::{KeptBlob, PackedRecord};
pub use pins::{Claim, Claims, Pin, Pinnable};
pub use records::{CacheRecord, ImageRecord, LayerBlob, LayerRecord, Named, SourceRecord};
pub use reserve::ReleasedReserve;
pub use space::Space;
pub use store::{Store, check_place};
pub use survey::{Expected, Survey, Usage};
