//! Arguments of the commands that speak with registries.

use std::str::FromStr;

use clap::Args;
use kiln_build::registry::PullPolicy;
use kiln_oci::{Platform, Reference};
use kiln_registry::{Mirror, MirrorError};

use super::images::CompressionArgs;
use super::store::LimitArgs;

/// How registries are reached, beside what the configuration file says.
#[derive(Args, Clone, Default)]
pub(crate) struct RegistryArgs {
    /// A registry that may speak plain http, and whose certificate is not checked; may be given several times
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) insecure_registry: Vec<String>,
    /// Read the images of REGISTRY from MIRROR first [default REGISTRY: docker.io]; may be given several times
    #[arg(long, value_name = "[REGISTRY=]MIRROR")]
    pub(crate) registry_mirror: Vec<MirrorOf>,
}

/// A mirror and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MirrorOf {
    pub(crate) registry: String,
    pub(crate) mirror: Mirror,
}

impl FromStr for MirrorOf {
    type Err = MirrorError;

    fn from_str(text: &str) -> Result<Self, MirrorError> {
        let (registry, mirror) = text.split_once('=').unwrap_or(("docker.io", text));
        Ok(Self { registry: registry.to_owned(), mirror: mirror.parse()? })
    }
}

/// When an image that a container is made of is looked for in its registry.
#[derive(Args)]
pub(crate) struct RunPullArgs {
    /// Ask the registry for the image: always, missing (when it is not in the store) or never
    /// [default: missing]
    #[arg(long, value_name = "WHEN", env = "KILN_PULL", hide_env = true)]
    pub(crate) pull: Option<PullPolicy>,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
}

/// When the images that a build stands on are looked for in registries.
#[derive(Args)]
pub(crate) struct BaseArgs {
    /// Ask registries for base images: always, missing (those that are not in the store) or never; alone
    /// it means always [default: missing]
    #[arg(
        long,
        value_name = "WHEN",
        env = "KILN_PULL",
        hide_env = true,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "always"
    )]
    pub(crate) pull: Option<PullPolicy>,
    /// Ask no registry for anything; RUN steps and ADD of URLs are as they are
    #[arg(long)]
    pub(crate) offline: bool,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
}

#[derive(Args)]
pub(crate) struct PullArgs {
    /// The image for this platform [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platform: Option<Platform>,
    /// Print only the name
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// Image names
    #[arg(value_name = "NAME[:TAG|@DIGEST]", required = true)]
    pub(crate) names: Vec<Reference>,
}

#[derive(Args)]
pub(crate) struct PushArgs {
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    /// Print only the digest
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// Image name in the store; its registry gets it
    #[arg(value_name = "NAME[:TAG]", required = true)]
    pub(crate) names: Vec<Reference>,
}

#[derive(Args)]
pub(crate) struct LoginArgs {
    /// User [default: asked for on a terminal]
    #[arg(short, long, value_name = "NAME")]
    pub(crate) username: Option<String>,
    /// Read the password, or a token that stands for one, from standard input
    #[arg(long)]
    pub(crate) password_stdin: bool,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// The registry
    #[arg(value_name = "HOST[:PORT]", default_value = "docker.io")]
    pub(crate) registry: String,
}

#[derive(Args)]
pub(crate) struct LogoutArgs {
    /// The registry
    #[arg(value_name = "HOST[:PORT]", default_value = "docker.io")]
    pub(crate) registry: String,
}
