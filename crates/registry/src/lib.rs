//! Images and blobs in registries: OCI's distribution specification 1.1 and docker's schema 2.
//!
//! Read [`Client`] first: it holds connections and tokens. A [`Repository`] of it reads and writes
//! manifests (`manifest.rs`), reads blobs (`download.rs`, large ones over several connections: `pieces.rs`),
//! writes blobs (`upload.rs`, and `growing.rs` those that are still being made; `sending.rs` is one upload) and
//! lists tags (`list.rs`) and what refers to a manifest (`referrers.rs`). Below them `exchange.rs` sends one request as often as it takes, `auth.rs` answers the
//! registry's challenges, `host.rs` knows where a registry is, `trust.rs` whom to trust there (with `roots.rs`, the
//! system's authorities), `mirror.rs` where else to read, and `breaker.rs` whom not to ask for a while.
//!
//! # Invariants
//! - Registries are hostile: every answer has a limit in bytes and in time, and what a digest names is
//!   given out as verified only after the digest was compared.
//! - Credentials go to the registry they are for and to its token server, never to where either
//!   redirects, and never over plain http unless the registry is configured so.
//! - No message holds a credential, a token or a URL's query.
//! - `urls` in descriptors are never asked.

#![forbid(unsafe_code)]

mod auth;
mod body;
mod breaker;
mod challenge;
mod client;
pub mod credentials;
mod download;
mod error;
mod exchange;
mod growing;
mod host;
mod list;
mod manifest;
mod mirror;
mod pieces;
mod referrers;
mod roots;
mod search;
mod sending;
mod settings;
mod trust;
mod upload;

pub use client::{Client, Repository, Which};
pub use credentials::{Credential, CredentialError, CredentialSource, DockerConfig, NoCredentials};
pub use download::Sink;
pub use error::{Error, Fault};
pub use growing::{Growing, Grown};
pub use host::{credential_key, is_loopback};
pub use manifest::ManifestBytes;
pub use mirror::{Mirror, MirrorError};
pub use pieces::Ahead;
pub use search::Found;
pub use settings::{Clock, Settings, SystemClock};
pub use trust::web_client;
pub use upload::{BlobSource, Pushed};
