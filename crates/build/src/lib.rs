//! Joins everything: a Dockerfile and a context become an image in the store.
//!
//! Read [`build`](build()) first, then `ops/`, then [`Engine`], `image.rs` and `export/`.
//!
//! # Invariants
//! - Only this crate knows both the frontend's definition and the solver.
//! - Nothing is compressed, and no tar is written, before somebody asks for it.
//! - A name is set last: whatever it leads to is in the store already.

#![forbid(unsafe_code)]

mod archive;
mod attest;
mod bases;
mod build;
pub mod builds;
mod cache;
mod cache_mounts;
mod cancel;
mod check;
pub mod container;
mod context;
mod context_files;
mod dockerfile;
mod engine;
mod entitlement;
mod error;
pub mod export;
pub mod fsck;
pub mod gc;
mod image;
mod import;
mod input;
mod last_build;
mod layers;
mod layout;
mod load;
mod load_layers;
mod load_oci;
mod lock;
mod lowering;
mod named_context;
mod no_cache;
mod ops;
mod platforms;
mod purl;
mod redact;
pub mod registry;
mod remote_cache;
mod remote_context;
mod request;
mod reread;
mod sbom;
mod secrets;
mod select;
mod shell;
mod solve;
mod source;
mod ssh;
mod stand;
mod step_claim;
mod step_costs;
pub mod streams;
pub mod toolkit;
mod tree;
pub mod usage;
mod watch;
pub mod why;
mod world;

pub use attest::{Attestations, Place, ProvenanceMode, ProvenanceSpec, SbomSpec};
pub use build::{Built, Progress, build};
pub use cache_mounts::{
    CacheMountImport, CacheMountInfo, CacheMountRecord, cache_mount_bytes, cache_mount_users, cache_mounts,
    export_cache_mount, find_cache_mounts, import_cache_mount, remove_cache_mount,
};
pub use cancel::BuildCancel;
pub use check::{Checked, check, outline, targets};
pub use dockerfile::Dockerfile;
pub use engine::Engine;
pub use entitlement::{Entitlement, EntitlementError};
pub use error::{BuildError, OpError};
pub use import::{ImportRequest, import};
pub use input::{DockerfileSource, StandardInput};
pub use last_build::{BuildOrigin, FailedStep, LastBuild, WhichBuild, last_build};
pub use layout::{LayoutImage, load_layout};
pub use load::{ARCHIVE_BYTES, Loaded, load};
pub use lock::{LockError, LockMode};
pub use named_context::{NamedContext, NamedContextError, NamedSource};
pub use no_cache::{NoCache, StepChoice};
pub use remote_cache::{CacheSource, CacheTarget};
pub use remote_context::{ContextOpener, ContextSource, MainContext, TreeContext};
pub use request::BuildRequest;
pub use secrets::{Secret, SecretSpec, SecretStore, SpecError};
pub use shell::{ShellRequest, ShellState, ShellStep, StepNumber, shell};
pub use source::{Fault, NoSecrets, SecretSource, SourceError, SourceOptions};
pub use ssh::{SshAgents, SshSpec};
pub use watch::{News, Reads, WatchError, Watcher, reads};
