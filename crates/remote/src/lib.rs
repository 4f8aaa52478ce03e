//! Stores of cached results beyond this machine: directories and object stores.
//!
//! Read [`RemoteStore`] first (the contract), then [`ObjectName`] (what is kept under which name) and
//! [`Record`] (what a result is in words); `directory.rs` and `bucket.rs` are the stores.
//!
//! # Invariants
//! - A name is made of digests and an escaped scope: nothing foreign is ever part of a path.
//! - One record a key, one object a record: to look something up nothing is listed.
//! - What comes out of a store is foreign. A [`Record`] is checked when it is read; whoever reads a blob
//!   checks its digest.
//! - No error, name or record holds credentials.

#![forbid(unsafe_code)]

#[cfg(feature = "bucket")]
mod bucket;
mod directory;
mod name;
mod record;
mod store;

#[cfg(feature = "bucket")]
pub use bucket::{Bucket, BucketConfig, Provider};
pub use directory::Directory;
pub use name::{ObjectName, Scope};
pub use record::{MAX_LAYERS, MAX_RECORD_BYTES, Record, RecordError, RecordLayer};
pub use store::{Existing, RemoteError, RemoteStore, Stop};
