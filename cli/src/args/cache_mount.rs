//! Arguments of `kiln cache-mount`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::store::{Format, LimitArgs};

#[derive(Args)]
pub(crate) struct CacheMountArgs {
    #[command(subcommand)]
    pub(crate) command: CacheMountCommand,
}

impl CacheMountArgs {
    pub(crate) fn limits(&self) -> Option<&LimitArgs> {
        match &self.command {
            CacheMountCommand::Import(args) => Some(&args.limits),
            _ => None,
        }
    }
}

#[derive(Subcommand)]
#[command(defer = true)]
pub(crate) enum CacheMountCommand {
    /// List cache mounts, those last used first
    #[command(alias = "list")]
    Ls(LsArgs),
    /// Remove cache mounts that no build uses
    #[command(alias = "remove")]
    Rm(RmArgs),
    /// Write what is in a cache mount as a tar
    Export(ExportArgs),
    /// Make a cache mount of a tar
    Import(ImportArgs),
}

#[derive(Args)]
pub(crate) struct LsArgs {
    /// Only names
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Whole names
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Only some: id=PATTERN, until=TIME (not used for 7d, 12h, 30m), in-use=true|false
    #[arg(short, long, value_name = "WHAT=VALUE")]
    pub(crate) filter: Vec<String>,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

#[derive(Args)]
pub(crate) struct RmArgs {
    /// All of them
    #[arg(short, long, conflicts_with_all = ["filter", "ids"])]
    pub(crate) all: bool,
    /// Those of `ls --filter`
    #[arg(short, long, value_name = "WHAT=VALUE", conflicts_with = "ids")]
    pub(crate) filter: Vec<String>,
    /// IDs, or beginnings of names
    #[arg(value_name = "ID", required_unless_present_any = ["all", "filter"])]
    pub(crate) ids: Vec<String>,
}

#[derive(Args)]
pub(crate) struct ExportArgs {
    /// ID, or beginning of a name
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// File to write, or - for standard output [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct ImportArgs {
    /// ID, as RUN --mount=type=cache has it: its id, or its target
    #[arg(value_name = "ID")]
    pub(crate) id: String,
    /// A tar (plain, gzip, zstd, bzip2 or xz), or - for standard input
    #[arg(value_name = "FILE")]
    pub(crate) source: PathBuf,
    /// Replace what is in a cache mount that is there
    #[arg(short, long)]
    pub(crate) force: bool,
    /// The mode that the mount asks for, in octal [default: 0755]
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    pub(crate) mode: Option<u32>,
    /// The owner that the mount asks for [default: 0]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) uid: Option<u32>,
    /// The group that the mount asks for [default: 0]
    #[arg(long, value_name = "NUMBER")]
    pub(crate) gid: Option<u32>,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
    mode.ok_or_else(|| format!("{text:?} is no mode such as 0755"))
}
