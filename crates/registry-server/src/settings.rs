//! How a registry is set up.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kiln_registry::Client;

use crate::images::{Images, Takes};
use crate::rights::Rule;

/// Everything that one says to a registry before it starts.
pub struct Settings {
    /// What it has to give out.
    pub content: Content,
    /// Where it listens; port 0 takes one that is free.
    pub listen: SocketAddr,
    /// Speaks TLS with these, read again when they change; `None`: plain http.
    pub tls: Option<TlsFiles>,
    /// A file of `htpasswd -B`, read again when it changes; `None`: nobody is asked who they are, and everybody
    /// may do everything.
    pub accounts: Option<PathBuf>,
    /// Who may do what; none at all: every account may do everything.
    pub rights: Vec<Rule>,
    /// Nobody may push or delete.
    pub read_only: bool,
    /// What is not there is fetched from another registry; nobody may push.
    pub mirror: Option<MirrorOf>,
    /// How much is too much.
    pub limits: Limits,
    /// What is removed by itself.
    pub collection: Collection,
}

/// What a registry has.
#[derive(Clone)]
pub enum Content {
    /// What is below a directory of its own, which is made when it is not there.
    Directory(PathBuf),
    /// Images that somebody else keeps. They can be pulled; nobody may push or delete.
    Images(Arc<dyn Images>),
    /// The same, which others also push to: what they push is brought there, and kept as it came.
    Pushed {
        /// Who keeps the images.
        images: Arc<dyn Takes>,
        /// What was pushed, and what waits for its manifest: a directory that is made when it is not there. With
        /// [`Settings::read_only`] it may be another process's.
        directory: PathBuf,
    },
}

/// A certificate and its key, as PEM.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate, then those between it and an authority.
    pub certificates: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The registry behind a mirror.
#[derive(Clone)]
pub struct MirrorOf {
    /// Asks it; with its credentials, not with those of who asks the mirror.
    pub client: Client,
    /// `docker.io`
    pub domain: String,
    /// A tag is looked up again after so long; the old one is good when the registry does not answer.
    pub tag_life: Duration,
}

/// How much a client may ask for.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at once; more wait until one ends.
    pub connections: usize,
    /// Uploads that were begun and not ended.
    pub uploads: usize,
    /// A blob has at most so many bytes.
    pub blob_bytes: u64,
    /// Uploads, and blobs that no manifest needs yet, have at most so many bytes together; `None`: what the disk has
    /// room for.
    pub waiting_bytes: Option<u64>,
    /// A request's head, and a handshake of TLS, take at most so long.
    pub head: Duration,
    /// The time in which [`Limits::stall_bytes`] have to go through where somebody waits for them.
    pub stall: Duration,
    /// See [`Limits::stall`].
    pub stall_bytes: u64,
    /// An upload that nobody goes on with is forgotten after so long.
    pub upload_life: Duration,
    /// Requests that are being answered have so long when the registry ends.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            uploads: 1024,
            blob_bytes: 1 << 40,
            waiting_bytes: None,
            head: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            stall_bytes: 16 << 10,
            upload_life: Duration::from_secs(24 * 3600),
            drain: Duration::from_secs(10),
        }
    }
}

/// What garbage collection does.
#[derive(Debug, Clone)]
pub struct Collection {
    /// It runs so often; `None`: never by itself.
    pub every: Option<Duration>,
    /// What is younger stays: somebody may be about to push a manifest that refers to it.
    pub grace: Duration,
    /// Manifests without a tag that nothing refers to go as well.
    pub untagged: bool,
}

impl Default for Collection {
    fn default() -> Self {
        Self {
            every: Some(Duration::from_secs(3600)),
            grace: Duration::from_secs(24 * 3600),
            untagged: false,
        }
    }
}
