//! A registry: OCI's distribution specification 1.1, on a directory of its own or with images that others keep.
//!
//! Read [`Settings`] first, then `server.rs`: connections become requests. `route.rs` and `range.rs` read what
//! clients ask for, `api` answers it, one file a family of requests, `refusal.rs` says no in the words of the
//! specification. `directory` is what there is on the disk, [`Images`] what others have, `pushed.rs` joins the two where
//! others take what is pushed, `verified.rs` keeps what was damaged from being given out, `accounts.rs` and
//! `rights.rs` say who may have it, `tls.rs` speaks TLS, `mirror.rs` fetches what is missing from another registry,
//! `collect.rs` of `directory` removes what nothing refers to, `metrics.rs` counts, `reports.rs` tells what went wrong.
//!
//! # Invariants
//! - Clients are hostile: heads, bodies, sessions and connections have limits in bytes, number and time, and
//!   whoever waits for a client stops waiting.
//! - No file has a name that was not parsed into a repository, a tag, a digest or a session first.
//! - A blob is under its digest only when the digest was compared. Data is durable before what leads to it is
//!   there, and the tag comes last: whoever is killed in between leaves what nobody sees.
//! - A digest opens nothing: a blob is read through a repository that has it, by whoever may read that one.
//! - One process owns a directory.

#![forbid(unsafe_code)]

mod accounts;
mod api;
mod body;
mod connection;
mod directory;
mod images;
mod metrics;
mod mirror;
mod pushed;
pub mod range;
mod refusal;
mod reports;
mod rights;
pub mod route;
mod server;
mod settings;
mod tls;
mod transfer;
mod verified;
mod version;

pub use accounts::AccountsError;
pub use directory::{Collected, DirectoryError, Judged, Kind, collect_offline};
pub use images::{Found, FoundManifest, Images, ImagesError, NotTaken, Part, Parts, Pushed, Takes};
pub use pushed::{FollowError, follow_offline};
pub use rights::{Right, Rule, RuleError, Who};
pub use server::{Control, Server, StartError};
pub use settings::{Collection, Content, Limits, MirrorOf, Settings, TlsFiles};
