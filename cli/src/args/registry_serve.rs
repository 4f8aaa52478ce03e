//! Arguments of `kiln registry`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::store::{Format, parse_duration};
use clap::{Args, Subcommand};

#[derive(Subcommand)]
pub(crate) enum RegistryCommand {
    /// Serve a registry until SIGTERM or Ctrl-C
    ///
    /// SIGHUP makes it read accounts, certificates and rights again, SIGUSR1 collect garbage now.
    Serve(Box<ServeArgs>),
    /// Remove what nothing refers to from the directory of a registry that nobody serves
    Gc(CollectArgs),
}

#[derive(Args)]
pub(crate) struct CollectArgs {
    /// Where the registry keeps what it has [default: /var/lib/kiln-registry as root,
    /// ~/.local/share/kiln-registry as a user]
    #[arg(value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// File with the settings of the registry: dir, gc-grace and gc-untagged count; what is said here wins
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Only tell what would be removed, and why; somebody may serve the registry meanwhile
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Leave alone what somebody had to do with within this time (7d, 12h, 30m) [default: 1d]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(crate) grace: Option<Duration>,
    /// Remove manifests, too, that no tag, no index and no subject leads to
    #[arg(long)]
    pub(crate) untagged: bool,
    /// Tell of what stays, too
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// File with the settings; what is said here wins
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Where the registry keeps what it has [default: /var/lib/kiln-registry as root,
    /// ~/.local/share/kiln-registry as a user]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Serve the images of kiln's store (the one that --root names) for others to pull
    #[arg(long, conflicts_with_all = ["dir", "mirror"])]
    pub(crate) store: bool,
    /// Where it listens; port 0 takes a free one [default: 127.0.0.1:5000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Speak TLS with the certificate in this file, in PEM form, and those above it
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The private key of that certificate
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Ask for a password, one of this file of `htpasswd -B`
    #[arg(long, value_name = "FILE")]
    pub(crate) htpasswd: Option<PathBuf>,
    /// Refuse everything that would change something
    #[arg(long)]
    pub(crate) read_only: bool,
    /// With --store: let others push images into the store, and delete them. What is pushed has its name without a
    /// host, and builds on this machine may stand on it
    #[arg(long, conflicts_with_all = ["read_only", "dir", "mirror"])]
    pub(crate) push: bool,
    /// Fetch what is asked for and not there from this registry, and keep it; nobody can push then
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) mirror: Option<String>,
    /// Let everybody who can reach it push and pull, where others than this machine can
    #[arg(long)]
    pub(crate) anyone: bool,
    /// Take passwords without TLS, because something in front of it speaks TLS
    #[arg(long)]
    pub(crate) plain_http: bool,
}
