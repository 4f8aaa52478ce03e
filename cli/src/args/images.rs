//! Arguments of the commands that list, write and read images.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use kiln_build::export::{ArchiveFormat, Compress, Packing, PackingError};
use kiln_oci::Platform;

use super::registry::RegistryArgs;
use super::store::{Format, PruneArgs};
use super::{HistoryArgs, NamesArgs, RmiArgs, TagArgs};

#[derive(Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

#[derive(Subcommand)]
#[command(defer = true)]
pub(crate) enum ImageCommand {
    /// List images
    #[command(alias = "list")]
    Ls(ImagesArgs),
    /// Show an image's config as JSON
    Inspect(NamesArgs),
    /// Show the instructions that made an image
    History(HistoryArgs),
    /// Give an image another name
    Tag(TagArgs),
    /// Remove image names, and images without another name
    #[command(alias = "remove")]
    Rm(RmiArgs),
    /// Remove images without a name and the cache that no image needs
    Prune(PruneArgs),
    /// Show what is said of an image: where it comes from, what is in it
    Attestations(AttestationsArgs),
    /// Show which images stand on which
    Tree,
    /// Write images to a tar archive
    Save(SaveArgs),
    /// Read images from a docker or OCI archive or an OCI layout directory
    Load(LoadArgs),
}

#[derive(Args)]
pub(crate) struct AttestationsArgs {
    /// Only of this kind: provenance, sbom, or a predicate type
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) kind: Option<String>,
    /// Only of the image for this platform
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = crate::platforms::parse)]
    pub(crate) platform: Option<Platform>,
    /// Print what is said as JSON, not the list. Of several platforms, this machine's counts
    #[arg(long, value_enum, value_name = "PART")]
    pub(crate) show: Option<StatementPart>,
    /// How to print the list
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT", conflicts_with = "show")]
    pub(crate) format: Format,
    #[command(flatten)]
    pub(crate) registries: RegistryArgs,
    /// Name or ID of an image, docker://NAME for one of a registry, oci:DIR[:TAG], or oci-archive:FILE[:TAG]
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
}

/// A part of a statement.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StatementPart {
    /// What is said
    Predicate,
    /// That, with what it is said of
    Statement,
}

#[derive(Args)]
pub(crate) struct ImagesArgs {
    /// Only image IDs
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Whole image IDs
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// The digests of manifests, too
    #[arg(long)]
    pub(crate) digests: bool,
    /// Only some: dangling=true|false, reference=PATTERN, label=NAME[=VALUE], before=IMAGE, since=IMAGE
    #[arg(short, long, value_name = "WHAT=VALUE")]
    pub(crate) filter: Vec<String>,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
    /// Only images of this name; * and ? stand for anything
    #[arg(value_name = "NAME[:TAG]")]
    pub(crate) name: Option<String>,
}

// How layers are packed.
#[derive(Args)]
pub(crate) struct CompressionArgs {
    /// Layers made here: uncompressed, gzip, zstd or estargz [default: uncompressed for docker, gzip for
    /// oci]
    #[arg(long, value_name = "NAME")]
    compression: Option<String>,
    /// gzip and estargz 0 to 9, zstd 1 to 22
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    compression_level: Option<i64>,
    /// Layers that came from elsewhere, too; otherwise they stay as they came
    #[arg(long)]
    force_compression: bool,
}

impl CompressionArgs {
    pub(crate) fn compress(&self, default: Packing) -> Result<Compress, PackingError> {
        let name = self.compression.as_deref();
        Compress::of_options(name, self.compression_level, self.force_compression, default)
    }

    /// Whether somebody has asked for any of it.
    pub(crate) fn is_given(&self) -> bool {
        self.compression.is_some() || self.compression_level.is_some() || self.force_compression
    }
}

#[derive(Args)]
pub(crate) struct SaveArgs {
    /// File to write [default: standard output, when it is no terminal]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Who shall read it
    #[arg(long, value_enum, default_value_t = SaveFormat::Docker, value_name = "FORMAT")]
    pub(crate) format: SaveFormat,
    #[command(flatten)]
    pub(crate) compression: CompressionArgs,
    /// Image names or IDs
    #[arg(value_name = "IMAGE", required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum SaveFormat {
    /// docker, podman, and readers of OCI layouts
    #[value(alias = "docker-archive")]
    Docker,
    /// An OCI layout alone
    #[value(alias = "oci-archive")]
    Oci,
}

impl SaveFormat {
    pub(crate) fn archive(self) -> ArchiveFormat {
        match self {
            SaveFormat::Docker => ArchiveFormat::Docker,
            SaveFormat::Oci => ArchiveFormat::Oci,
        }
    }

    /// As other tools save in this form.
    pub(crate) fn packing(self) -> Packing {
        match self {
            SaveFormat::Docker => Packing::UNCOMPRESSED,
            SaveFormat::Oci => Packing::GZIP,
        }
    }
}

#[derive(Args)]
pub(crate) struct LoadArgs {
    /// Archive, OCI layout directory or skopeo's `dir:` to read [default: standard input]
    #[arg(short, long, value_name = "PLACE")]
    pub(crate) input: Option<PathBuf>,
    /// Of images for several platforms, only this one [default: this machine's; the others are kept
    /// with it]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platform: Option<Platform>,
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) limits: super::store::LimitArgs,
}

#[derive(Args)]
pub(crate) struct ExportArgs {
    /// File to write [default: standard output, when it is no terminal]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Name or ID of a container, or of an image
    #[arg(value_name = "CONTAINER|IMAGE")]
    pub(crate) image: String,
}
