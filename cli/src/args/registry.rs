//! Arguments of the commands that speak with registries.

use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand};
use kiln_build::registry::PullPolicy;
use kiln_oci::{Platform, Reference};
use kiln_registry::{Mirror, MirrorError};

use super::images::CompressionArgs;
use super::store::{Format, LimitArgs, parse_duration};

// How registries are reached, beside what the configuration file says.
#[derive(Args, Clone, Default)]
pub(crate) struct RegistryArgs {
    /// A registry that may speak plain http, and whose certificate is not checked; may be given several times
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) insecure_registry: Vec<String>,
    /// Read the images of REGISTRY from MIRROR first [default REGISTRY: docker.io]; may be given several times
    #[arg(long, value_name = "[REGISTRY=]MIRROR")]
    pub(crate) registry_mirror: Vec<MirrorOf>,
    /// Give up on a manifest or blob that takes longer, all tries together [default: 3m for a manifest, 6h for a
    /// blob]
    #[arg(long, value_name = "TIME", value_parser = parse_deadline)]
    pub(crate) transfer_timeout: Option<Duration>,
}

/// A time in which something can come.
pub(crate) fn parse_deadline(text: &str) -> Result<Duration, String> {
    let deadline = parse_duration(text)?;
    if deadline.is_zero() { Err("nothing comes in no time".to_owned()) } else { Ok(deadline) }
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

// When an image that a container is made of is looked for in its registry.
#[derive(Args)]
pub(crate) struct RunPullArgs {
    /// Ask the registry for the image: always, missing (when it is not in the store) or never
    /// [default: missing]
    #[arg(long, value_name = "WHEN", env = "KILN_PULL", hide_env = true)]
    pub(crate) pull: Option<PullPolicy>,
    /// The image for this platform [default: what the name leads to, or this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = crate::platforms::parse)]
    pub(crate) platform: Option<Platform>,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
}

// When the images that a build stands on are looked for in registries.
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

#[derive(Args)]
pub(crate) struct CopyArgs {
    /// All platforms of the image, with the index that lists them [default: this machine's]
    #[arg(short, long, conflicts_with = "platform")]
    pub(crate) all: bool,
    /// The image for this platform, and no other
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = crate::platforms::parse)]
    pub(crate) platform: Option<Platform>,
    /// What refers to the image as well, between registries and OCI layouts: signatures, bills of materials
    #[arg(long)]
    pub(crate) referrers: bool,
    /// Print only the digest
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// From here: docker://NAME, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], or a name in the
    /// store
    #[arg(value_name = "SOURCE")]
    pub(crate) from: String,
    /// To there: docker://NAME, oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME], or a name in the
    /// store
    #[arg(value_name = "DESTINATION")]
    pub(crate) to: String,
}

#[derive(Args)]
pub(crate) struct ManifestArgs {
    #[command(subcommand)]
    pub(crate) command: ManifestCommand,
}

#[derive(Subcommand)]
pub(crate) enum ManifestCommand {
    /// Begin a list of images of registries, one for each platform
    Create(ManifestCreateArgs),
    /// Print a list, or what the registry has under a name, as JSON
    Inspect(ManifestInspectArgs),
    /// Change what a list says about one of its images, or without an image about itself
    Annotate(ManifestAnnotateArgs),
    /// Push a list as an index, with what its images consist of
    Push(ManifestPushArgs),
    /// Show what refers to an image: signatures, bills of materials, whatever is attached to it
    Referrers(ManifestReferrersArgs),
    /// Forget lists
    Rm(ManifestRmArgs),
}

#[derive(Args)]
pub(crate) struct ManifestCreateArgs {
    /// Add to a list that is there
    #[arg(short, long)]
    pub(crate) amend: bool,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// Name of the list
    #[arg(value_name = "LIST")]
    pub(crate) list: Reference,
    /// Images of registries; one for several platforms adds them all
    #[arg(value_name = "IMAGE", required = true)]
    pub(crate) images: Vec<Reference>,
}

#[derive(Args)]
pub(crate) struct ManifestInspectArgs {
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// Name of a list, or of an image of a registry
    #[arg(value_name = "NAME")]
    pub(crate) name: Reference,
}

#[derive(Args)]
pub(crate) struct ManifestAnnotateArgs {
    /// Operating system
    #[arg(long)]
    pub(crate) os: Option<String>,
    /// Processor
    #[arg(long)]
    pub(crate) arch: Option<String>,
    /// Variant of the processor
    #[arg(long)]
    pub(crate) variant: Option<String>,
    /// Version of the operating system
    #[arg(long, value_name = "VERSION")]
    pub(crate) os_version: Option<String>,
    /// Features of the operating system
    #[arg(long, value_name = "FEATURE[,FEATURE…]", value_delimiter = ',')]
    pub(crate) os_features: Vec<String>,
    /// Annotation; may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) annotation: Vec<String>,
    /// Name of the list
    #[arg(value_name = "LIST")]
    pub(crate) list: Reference,
    /// The image, as it was added
    #[arg(value_name = "IMAGE")]
    pub(crate) image: Option<Reference>,
}

#[derive(Args)]
pub(crate) struct ManifestPushArgs {
    /// Forget the list when it was pushed
    #[arg(short, long)]
    pub(crate) purge: bool,
    /// Print only the digest
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// Name of the list
    #[arg(value_name = "LIST")]
    pub(crate) list: Reference,
    /// Under another name
    #[arg(value_name = "NAME")]
    pub(crate) to: Option<Reference>,
}

#[derive(Args)]
pub(crate) struct ManifestReferrersArgs {
    /// Only what is of this kind
    #[arg(long, value_name = "TYPE")]
    pub(crate) artifact_type: Option<String>,
    /// Of the image for this platform [default: of what the name leads to, which may be an index]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = crate::platforms::parse)]
    pub(crate) platform: Option<Platform>,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// An image of a registry, or oci:DIR[:TAG], oci-archive:FILE[:TAG]
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
}

#[derive(Args)]
pub(crate) struct ManifestRmArgs {
    /// Names of lists
    #[arg(value_name = "LIST", required = true)]
    pub(crate) lists: Vec<Reference>,
}

#[derive(Args)]
pub(crate) struct SearchArgs {
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 25)]
    pub(crate) limit: usize,
    /// Print only names
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// What names shall hold; HOST/ before it searches another registry than Docker Hub
    #[arg(value_name = "[HOST[:PORT]/]TERM")]
    pub(crate) term: String,
}
