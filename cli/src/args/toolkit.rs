//! Arguments of the layer toolkit.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use kiln_oci::Reference;

use super::store::Format;

#[derive(Args)]
pub(crate) struct LayerArgs {
    #[command(subcommand)]
    pub(crate) command: LayerCommand,
}

#[derive(Subcommand)]
#[command(defer = true)]
pub(crate) enum LayerCommand {
    /// List the layers of an image, lowest first
    Ls(LayerLsArgs),
    /// Show which layer put a file there, and which space is wasted
    Show(LayerShowArgs),
}

#[derive(Args)]
pub(crate) struct LayerLsArgs {
    /// Image name or ID
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// Show whole instructions, however long
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct LayerShowArgs {
    /// Image name or ID
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// Only this file, or this directory and what is below it
    #[arg(value_name = "PATH")]
    pub(crate) path: Option<OsString>,
    /// List all wasted files [default: the 20 largest]
    #[arg(short, long)]
    pub(crate) all: bool,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct DiffArgs {
    /// Image name or ID; alone, a container's
    #[arg(value_name = "IMAGE_A|CONTAINER")]
    pub(crate) one: String,
    /// Image name or ID
    #[arg(value_name = "IMAGE_B")]
    pub(crate) other: Option<String>,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct CpArgs {
    /// Keep owners, setuid bits, capabilities and devices
    #[arg(short, long)]
    pub(crate) archive: bool,
    /// Copy what a link leads to (inside the image), not the link
    #[arg(short = 'L', long)]
    pub(crate) follow_link: bool,
    /// What to copy; a directory with `/.` behind it: what is in it
    #[arg(value_name = "[CONTAINER|IMAGE:/]PATH")]
    pub(crate) source: OsString,
    /// A directory to copy into, a new name, or - for a tar on standard output
    #[arg(value_name = "-|[CONTAINER:/]PATH")]
    pub(crate) destination: PathBuf,
}

#[derive(Args)]
pub(crate) struct MutateArgs {
    /// Name for the new image; may be given several times
    #[arg(short, long = "tag", value_name = "NAME[:TAG]", required = true)]
    pub(crate) tag: Vec<Reference>,
    /// A tar (plain, gzip or zstd, - for standard input) that becomes a layer; may be given several
    /// times
    #[arg(long, value_name = "LAYER.tar")]
    pub(crate) append: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) limits: super::store::LimitArgs,
    /// Environment variable; without a value, the one of the environment
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Remove an environment variable, before others are set; may be given several times
    #[arg(long, value_name = "NAME")]
    pub(crate) unset_env: Vec<String>,
    /// Label
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,
    /// Remove a label, before others are set; may be given several times
    #[arg(long, value_name = "NAME")]
    pub(crate) unset_label: Vec<String>,
    /// Entrypoint: one program, or a JSON list of words, or nothing to have none; the command goes
    /// with the old one
    #[arg(long, value_name = "PROGRAM|[\"WORD\",…]")]
    pub(crate) entrypoint: Option<String>,
    /// Command: one program, or a JSON list of words, or nothing to have none
    #[arg(long, value_name = "PROGRAM|[\"WORD\",…]")]
    pub(crate) cmd: Option<String>,
    /// User
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Port that the image listens on; may be given several times
    #[arg(long, value_name = "PORT[/PROTOCOL]")]
    pub(crate) expose: Vec<String>,
    /// Directory that containers have as a volume; may be given several times
    #[arg(long, value_name = "DIR")]
    pub(crate) volume: Vec<String>,
    /// Signal that asks a container to end, or nothing for the usual one
    #[arg(long, value_name = "SIGNAL")]
    pub(crate) stop_signal: Option<String>,
    /// What HEALTHCHECK is given in a Dockerfile: NONE, or [OPTIONS] CMD …; or nothing to have none
    #[arg(long, value_name = "NONE|[OPTION…] CMD …", allow_hyphen_values = true)]
    pub(crate) healthcheck: Option<String>,
    /// Make one layer of those above the base, or of all
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "own")]
    pub(crate) squash: Option<SquashWhat>,
    /// The base for --squash [default: the image with a name that has most of the same layers]
    #[arg(long, value_name = "IMAGE", requires = "squash")]
    pub(crate) base: Option<String>,
    /// Image name or ID
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum SquashWhat {
    /// The layers above the base
    Own,
    /// All layers
    All,
}

#[derive(Args)]
pub(crate) struct FlattenArgs {
    /// Name for the new image; may be given several times
    #[arg(short, long = "tag", value_name = "NAME[:TAG]", required = true)]
    pub(crate) tag: Vec<Reference>,
    /// Image name or ID
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
}
