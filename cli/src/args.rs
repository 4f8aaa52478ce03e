//! The command line.

pub(crate) mod attest;
pub(crate) mod builds;
pub(crate) mod cache_mount;
pub(crate) mod confinement;
pub(crate) mod containers;
pub(crate) mod images;
pub(crate) mod limits;
pub(crate) mod network;
pub(crate) mod registry;
pub(crate) mod registry_serve;
pub(crate) mod store;
pub(crate) mod toolkit;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_build::export::Output;
use kiln_build::{Entitlement, SecretSpec, SshSpec, StepChoice, StepNumber};
use kiln_oci::{Platform, Reference};
use kiln_snapshotter::Backend;

/// Builds container images from Dockerfiles, runs them, and moves them. No daemon.
#[derive(Parser)]
#[command(name = "kiln", version, arg_required_else_help = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// Directory of the store [default: /var/lib/kiln as root, ~/.local/share/kiln as a user]
    #[arg(long, global = true, env = "KILN_ROOT", value_name = "DIR", hide_env = false)]
    pub(crate) root: Option<PathBuf>,
    /// Who keeps file trees: overlay, fuse-overlayfs, copy, or auto, which takes the first that works
    #[arg(long, global = true, env = "KILN_SNAPSHOTTER", value_name = "NAME", default_value_t)]
    pub(crate) snapshotter: Backend,
    #[command(subcommand)]
    pub(crate) command: Command,
}

// Only the arguments of the command that is asked for are built: all of them together cost a build that
// has nothing to do a quarter of its time. Then clap lets the help of a command begin with the doc comment of any
// group of arguments in it: such groups have comments that are none.
#[derive(Subcommand)]
#[command(defer = true)]
pub(crate) enum Command {
    /// Build an image from a Dockerfile
    Build(Box<BuildArgs>),
    /// Run a shell, or a command, where a step of the last build failed
    Shell(ShellArgs),
    /// Make an image out of a root file system
    Import(ImportArgs),
    /// List images
    Images(images::ImagesArgs),
    /// List, inspect, name and remove images
    Image(images::ImageArgs),
    /// Show containers and images as JSON
    Inspect(containers::InspectArgs),
    /// Show the instructions that made an image, or the builds of this store
    History(HistoryOrBuildsArgs),
    /// Show why steps of a build ran, and were not taken from the cache
    Why(builds::WhyArgs),
    /// Show what the steps of a build printed
    Log(builds::LogArgs),
    /// Remove image names, and images without another name
    Rmi(RmiArgs),
    /// Give an image another name
    Tag(TagArgs),
    /// Run a command in a new container
    Run(Box<RunArgs>),
    /// Make a container without starting it
    Create(Box<RunArgs>),
    /// List containers
    Ps(containers::PsArgs),
    #[command(flatten)]
    Life(containers::LifeCommand),
    /// The commands about containers under one name
    Container {
        #[command(subcommand)]
        command: containers::ContainerCommand,
    },
    /// Make, list and remove volumes
    Volume(containers::VolumeArgs),
    /// Make, list, join and remove networks
    Network(network::NetworkArgs),
    /// Write images to a tar archive
    Save(images::SaveArgs),
    /// Read images from a docker or OCI archive or an OCI layout directory
    Load(images::LoadArgs),
    /// Fetch images from registries
    Pull(registry::PullArgs),
    /// Send images to registries
    Push(registry::PushArgs),
    /// Look for repositories of a registry by name
    Search(registry::SearchArgs),
    /// Copy an image between registries, archives, OCI layouts and the store, as it is
    Copy(registry::CopyArgs),
    /// Make and push lists of images for several platforms
    Manifest(registry::ManifestArgs),
    /// Keep credentials for a registry, as docker does, after trying them
    Login(registry::LoginArgs),
    /// Forget the credentials for a registry
    Logout(registry::LogoutArgs),
    /// Be a registry
    Registry {
        #[command(subcommand)]
        command: registry_serve::RegistryCommand,
    },
    /// Write the files of a container or an image as a tar
    Export(images::ExportArgs),
    /// Look into the layers of an image
    Layer(toolkit::LayerArgs),
    /// Compare the files of two images; exit code 0: the same, 1: not the same. Of one container: show
    /// what it has changed
    Diff(toolkit::DiffArgs),
    /// Copy files out of an image or a container, or into a container
    Cp(toolkit::CpArgs),
    /// Make an image of another one: more layers, other settings, fewer layers
    Mutate(toolkit::MutateArgs),
    /// Make an image of another one with one layer
    Flatten(toolkit::FlattenArgs),
    /// List, remove, save and load the directories of RUN --mount=type=cache
    CacheMount(cache_mount::CacheMountArgs),
    /// Show what the store takes on disk
    Du(store::DuArgs),
    /// Remove what nothing needs, and cache as the policy says
    Gc(store::GcArgs),
    /// Remove images without a name and the cache that no image needs
    Prune(store::PruneArgs),
    /// Check the store
    Fsck(store::FsckArgs),
    /// Try what this machine's sandbox holds back
    Selftest(SelftestArgs),
    /// Show what of this machine kiln can use, and what helps where it cannot; exit code 0: builds can run
    Doctor(DoctorArgs),
}

#[derive(Args)]
pub(crate) struct BuildArgs {
    /// Name for the image; may be given several times
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    pub(crate) tag: Vec<Reference>,
    /// Dockerfile: a file, a URL, or - for standard input [default: Dockerfile in the context]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<String>,
    /// Another place for FROM and COPY --from: a directory, docker-image://, oci-layout://, a git
    /// repository or a URL
    #[arg(long, value_name = "NAME=PLACE")]
    pub(crate) build_context: Vec<String>,
    /// Value for an ARG; without a value, the one of the environment
    #[arg(long, value_name = "NAME[=VALUE]")]
    pub(crate) build_arg: Vec<String>,
    /// Label for the image
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) label: Vec<String>,
    /// Build for this platform [default: this machine's]; several make one image for all of them
    #[arg(long, value_name = "OS/ARCH[/VARIANT][,…]", value_delimiter = ',')]
    #[arg(value_parser = crate::platforms::parse)]
    pub(crate) platform: Vec<Platform>,
    /// Build this stage [default: the last]
    #[arg(long, value_name = "STAGE")]
    pub(crate) target: Option<String>,
    /// Run every step again, or only this one, by stage, by number in [STAGE N/M] or by line; may be given
    /// several times
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_name = "STAGE|[STAGE:]N|line:N")]
    pub(crate) no_cache: Vec<NoCacheOf>,
    /// Run the steps of these stages again; names that the Dockerfile does not have are passed by
    #[arg(long, value_name = "STAGE[,STAGE…]", value_delimiter = ',')]
    pub(crate) no_cache_filter: Vec<String>,
    /// Look for results here, too: in an image that was built with --cache-to type=inline, or type=local,src=DIR|
    /// registry|s3|gcs|azblob with attributes; may be given several times
    #[arg(long, value_name = "NAME|type=TYPE[,NAME=VALUE…]")]
    pub(crate) cache_from: Vec<String>,
    /// Leave results for other machines: type=local,dest=DIR|inline|registry|s3|gcs|azblob with attributes
    /// (mode=max: of all steps, not only of those in the image); may be given several times
    #[arg(long, value_name = "type=TYPE[,NAME=VALUE…]")]
    pub(crate) cache_to: Vec<String>,
    #[command(flatten)]
    pub(crate) bases: registry::BaseArgs,
    /// Pin base images to their digests in kiln.lock, beside the Dockerfile: add those that it lacks, update all
    /// that this build needs, or off, to build as if there were none; alone it means add [default: read it]
    #[arg(long, value_enum, value_name = "add|update|off", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "add", hide_possible_values = true)]
    pub(crate) lock: Option<LockWhat>,
    /// Fail where kiln.lock does not pin a base image; nothing is written
    #[arg(long, conflicts_with = "lock")]
    pub(crate) locked: bool,
    /// Run at most this many steps at once [default: all that can, as far as memory goes]
    #[arg(long, value_name = "N")]
    pub(crate) jobs: Option<std::num::NonZeroUsize>,
    #[command(flatten)]
    pub(crate) limits: store::LimitArgs,
    /// Line for the steps' /etc/hosts; host-gateway is the host's own address
    #[arg(long, value_name = "NAME:ADDRESS")]
    pub(crate) add_host: Vec<String>,
    /// Network of the RUN steps that choose none
    #[arg(long, value_enum, default_value_t = NetworkMode::Default, value_name = "MODE")]
    pub(crate) network: NetworkMode,
    /// OCI runtime that runs the RUN steps instead of kiln: crun or runc, by name or path
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) runtime: Option<PathBuf>,
    /// A secret for RUN --mount=type=secret; without src and env, the variable or file of that name
    #[arg(long, value_name = "id=ID[,src=FILE|,env=NAME]")]
    pub(crate) secret: Vec<SecretSpec>,
    /// An ssh agent for RUN --mount=type=ssh; without a socket, the one in SSH_AUTH_SOCK
    #[arg(long, value_name = "default|ID[=SOCKET]")]
    pub(crate) ssh: Vec<SshSpec>,
    /// File with certificates in PEM form that this build and its RUN steps shall trust, too; nothing of them is kept
    #[arg(long, value_name = "FILE")]
    pub(crate) ca_cert: Vec<PathBuf>,
    /// Let steps ask for network.host or security.insecure
    #[arg(long, value_name = "ENTITLEMENT")]
    pub(crate) allow: Vec<Entitlement>,
    /// Look for mistakes and build nothing; the same as --call=check
    #[arg(long, conflicts_with = "call")]
    pub(crate) check: bool,
    /// Do something else than build, as text or JSON (--call=check,format=json)
    #[arg(long, value_name = "WHAT[,format=json]", default_value = "build")]
    pub(crate) call: Call,
    /// How to show progress
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto, value_name = "MODE")]
    pub(crate) progress: ProgressMode,
    /// Print only the image ID
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// What to leave, instead of an image in the store: DIR, - or type=image|registry|oci|docker|tar|
    /// local|cacheonly with attributes; may be given several times
    #[arg(short, long, value_name = "DIR|-|type=TYPE[,NAME=VALUE…]")]
    pub(crate) output: Vec<Output>,
    /// Leave an image in the store, beside what --output says
    #[arg(long)]
    pub(crate) load: bool,
    /// Push the image under its names, and keep it in the store; the same as --output type=registry
    #[arg(long)]
    pub(crate) push: bool,
    /// Annotation for the image's manifest, its index or what points to them
    #[arg(long, value_name = "[TYPE[PLATFORM]:]NAME=VALUE")]
    pub(crate) annotation: Vec<String>,
    #[command(flatten)]
    pub(crate) attest: attest::AttestArgs,
    /// Write the image ID to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) iidfile: Option<PathBuf>,
    /// Write digests and names of the result to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) metadata_file: Option<PathBuf>,
    /// Build again whenever something that the build read changes, until Ctrl-C
    #[arg(long, conflicts_with_all = ["check", "call", "on_error"])]
    pub(crate) watch: bool,
    /// What to do when a step fails, on a terminal: open a shell in its state, as `kiln shell` does
    #[arg(long, value_enum, default_value_t = OnError::Fail, value_name = "WHAT")]
    pub(crate) on_error: OnError,
    /// Where the files to copy are: a directory, a git repository, the URL of an archive, or - for
    /// an archive or a Dockerfile on standard input
    #[arg(value_name = "CONTEXT", default_value = ".")]
    pub(crate) context: String,
}

/// What becomes of the lock file.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LockWhat {
    /// What it lacks is added
    Add,
    /// All that this build stands on is looked up anew
    Update,
    /// It does not count
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnError {
    /// Nothing
    Fail,
    /// A shell in the step's state
    Shell,
}

#[derive(Args)]
pub(crate) struct ShellArgs {
    /// In the state before the step, not in the one it left
    #[arg(long)]
    pub(crate) before: bool,
    /// At another step of the last build, by its number in [STAGE N/M] [default: the one that failed in
    /// the last build that did]
    #[arg(long, value_name = "[STAGE:]N")]
    pub(crate) step: Option<StepNumber>,
    /// Command and arguments instead of a shell
    #[arg(value_name = "COMMAND", trailing_var_arg = true)]
    pub(crate) command: Vec<String>,
}

/// What `kiln build` does with a Dockerfile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Build,
    Check,
    Outline,
    Targets,
}

/// `--no-cache[=WHAT]`; docker's own spelling has a truth value there.
#[derive(Debug, Clone)]
pub(crate) enum NoCacheOf {
    All,
    Nothing,
    Step(StepChoice),
}

impl std::str::FromStr for NoCacheOf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "true" => Ok(Self::All),
            "false" => Ok(Self::Nothing),
            _ => text.parse().map(Self::Step),
        }
    }
}

impl std::str::FromStr for Call {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let method = match parts.next().unwrap_or_default() {
            "build" => Method::Build,
            "check" | "lint" => Method::Check,
            "outline" => Method::Outline,
            "targets" => Method::Targets,
            other => return Err(format!("{other:?} is none of build, check, outline, targets")),
        };
        let mut json = false;
        for part in parts {
            match part {
                "format=json" => json = true,
                "format=text" => json = false,
                other => return Err(format!("{other:?} is none of format=text, format=json")),
            }
        }
        Ok(Self { method, json })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressMode {
    /// A live display on a terminal, lines otherwise
    Auto,
    /// Lines with all output
    Plain,
    /// Nothing
    Quiet,
}

#[derive(Args)]
pub(crate) struct ImportArgs {
    /// A tar (plain, gzip, zstd, bzip2 or xz), a directory, or - for standard input
    #[arg(value_name = "ROOTFS")]
    pub(crate) source: PathBuf,
    /// Name for the image
    #[arg(value_name = "NAME[:TAG]")]
    pub(crate) name: Reference,
    /// Instruction for the image config, such as 'CMD ["bash"]'; may be given several times
    #[arg(short, long = "change", value_name = "INSTRUCTION")]
    pub(crate) change: Vec<String>,
    #[command(flatten)]
    pub(crate) limits: store::LimitArgs,
}

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct HistoryOrBuildsArgs {
    #[command(subcommand)]
    pub(crate) builds: Option<builds::HistoryCommand>,
    #[command(flatten)]
    pub(crate) image: Option<HistoryArgs>,
}

#[derive(Args)]
pub(crate) struct HistoryArgs {
    /// Image name or ID
    #[arg(value_name = "IMAGE")]
    pub(crate) name: String,
    /// Show whole instructions, however long
    #[arg(long)]
    pub(crate) no_trunc: bool,
}

#[derive(Args)]
pub(crate) struct NamesArgs {
    /// Image names or IDs
    #[arg(value_name = "IMAGE", required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Args)]
pub(crate) struct RmiArgs {
    /// Missing images are no error, and an ID with several names loses all of them
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Image names or IDs
    #[arg(value_name = "IMAGE", required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Args)]
pub(crate) struct TagArgs {
    /// Image name or ID
    #[arg(value_name = "IMAGE")]
    pub(crate) source: String,
    /// The other name
    #[arg(value_name = "NAME[:TAG]")]
    pub(crate) target: Reference,
}

#[derive(Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) life: containers::LifeArgs,
    /// Remove the container when it ends
    #[arg(long)]
    pub(crate) rm: bool,
    /// Pass standard input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Environment variable; without a value, the one of the environment
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Host file or directory, or a named volume, to show inside
    #[arg(short, long, value_name = "[HOST|VOLUME:]INSIDE[:ro]")]
    pub(crate) volume: Vec<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// User name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Program to run instead of the image's entrypoint
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    #[command(flatten)]
    pub(crate) network: network::JoinArgs,
    /// OCI runtime that runs the container instead of kiln: crun or runc, by name or path
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) runtime: Option<PathBuf>,
    /// File with certificates in PEM form that the container shall trust, too; nothing of them is kept
    #[arg(long, value_name = "FILE")]
    pub(crate) ca_cert: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) pull: registry::RunPullArgs,
    #[command(flatten)]
    pub(crate) confinement: confinement::ConfinementArgs,
    /// Image name or ID, then command and arguments instead of the image's
    // One value for both: what follows the image's name is the command's, options of kiln's own
    // names too.
    #[arg(value_name = "IMAGE [COMMAND]", required = true, trailing_var_arg = true)]
    pub(crate) image_and_command: Vec<String>,
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// How to show it
    #[arg(long, value_enum, default_value_t = DoctorFormat::Table, value_name = "FORMAT")]
    pub(crate) format: DoctorFormat,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DoctorFormat {
    Table,
    Json,
}

#[derive(Args)]
pub(crate) struct SelftestArgs {
    /// Start a container, try to get out of it, and show what it was refused; exit code 0: all of it
    #[arg(long)]
    pub(crate) security: bool,
    /// The container's part: what this program does inside
    #[arg(long, hide = true, value_enum, conflicts_with = "security")]
    pub(crate) inside: Option<Inside>,
    /// Runs a container that does it
    #[arg(long, hide = true, value_enum, conflicts_with_all = ["security", "inside"])]
    pub(crate) container: Option<Inside>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Inside {
    Nothing,
    Probe,
    Wait,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum NetworkMode {
    /// Its own, with address translation to the outside
    Default,
    /// Loopback only
    None,
    /// The host's
    Host,
}
