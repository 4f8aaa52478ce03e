//! The command line: containers and volumes.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use kiln_containers::{DetachKeys, RestartPolicy};
use kiln_oci::Reference;

use super::RunArgs;

// What `run` and `create` say of a container's life.
#[derive(Args)]
pub(crate) struct LifeArgs {
    /// Run in the background and print the container's ID
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Name for the container
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// When to start it again: no, on-failure[:TIMES], always, unless-stopped
    #[arg(long, value_name = "POLICY", default_value = "no")]
    pub(crate) restart: RestartPolicy,
    /// Port of the host that leads inside
    #[arg(short, long, value_name = "[[ADDRESS:]PORT:]INSIDE[/PROTOCOL]")]
    pub(crate) publish: Vec<String>,
    /// What to mount: type=bind|volume|tmpfs,source=…,target=…[,readonly]
    #[arg(long, value_name = "SETTINGS")]
    pub(crate) mount: Vec<String>,
    /// Read environment variables from a file, a line each
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Label
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) label: Vec<String>,
    /// Seconds that it may take then
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub(crate) stop_timeout: Option<i64>,
    /// Command that tells whether the container does its work
    #[arg(long, value_name = "COMMAND")]
    pub(crate) health_cmd: Option<String>,
    /// Time between checks [default: 30s]
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_interval: Option<String>,
    /// Time that a check may take [default: 30s]
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_timeout: Option<String>,
    /// Time at the start in which failures do not count
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_start_period: Option<String>,
    /// Time between checks at the start [default: 5s]
    #[arg(long, value_name = "DURATION")]
    pub(crate) health_start_interval: Option<String>,
    /// Failures in a row that make it unhealthy [default: 3]
    #[arg(long, value_name = "TIMES")]
    pub(crate) health_retries: Option<u32>,
    /// Check nothing, whatever the image says
    #[arg(long)]
    pub(crate) no_healthcheck: bool,
    /// Keys that leave the container [default: ctrl-p,ctrl-q]
    #[arg(long, value_name = "KEYS")]
    pub(crate) detach_keys: Option<DetachKeys>,
    /// Write the container's ID to this file, which must not be there
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// Where output goes: json-file or none
    #[arg(long, value_name = "DRIVER", default_value = "json-file")]
    pub(crate) log_driver: String,
    /// max-size=SIZE, max-file=COUNT
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) log_opt: Vec<String>,
    /// Do not pass signals on to the process
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_value_t = true,
          default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub(crate) sig_proxy: bool,
}

// Commands on containers, as they stand both alone and behind `kiln container`.
#[derive(Subcommand)]
#[command(defer = true)]
pub(crate) enum ContainerCommand {
    /// List containers
    #[command(name = "ls", visible_aliases = ["list", "ps"])]
    List(PsArgs),
    /// Show containers as JSON
    Inspect(InspectArgs),
    /// Run a command in a new container
    Run(Box<RunArgs>),
    /// Make a container without starting it
    Create(Box<RunArgs>),
    /// Write the files of a container as a tar
    Export(super::images::ExportArgs),
    /// Show what a container has changed
    Diff(super::toolkit::DiffArgs),
    /// Copy files out of a container, or into it
    Cp(super::toolkit::CpArgs),
    /// Remove containers that do not run
    Prune(PruneContainersArgs),
    #[command(flatten)]
    Other(LifeCommand),
}

// The commands whose names only containers have.
#[derive(Subcommand)]
#[command(defer = true)]
pub(crate) enum LifeCommand {
    /// Start containers that do not run
    Start(StartArgs),
    /// Ask containers to end, and end them when they do not
    Stop(StopArgs),
    /// Stop containers and start them again
    Restart(StopArgs),
    /// Send a signal to containers
    Kill(KillArgs),
    /// Hold all processes of containers
    Pause(ContainersArgs),
    /// Let held containers go on
    Unpause(ContainersArgs),
    /// Wait until containers have ended, and print their exit codes
    Wait(ContainersArgs),
    /// Remove containers
    Rm(RmArgs),
    /// Give a container another name
    Rename(RenameArgs),
    /// Change the settings of containers
    Update(UpdateArgs),
    /// Show what a container has printed
    Logs(LogsArgs),
    /// Run a command in a running container
    Exec(ExecArgs),
    /// Join this terminal to a running container
    Attach(AttachArgs),
    /// Show the processes of a container
    Top(TopArgs),
    /// Show what containers use
    Stats(StatsArgs),
    /// Show ports of the host that lead into a container
    Port(PortArgs),
    /// Make an image of a container
    Commit(CommitArgs),
}

#[derive(Args)]
pub(crate) struct PsArgs {
    /// Those that do not run as well
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only IDs
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Whole IDs and commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// The youngest so many, running or not
    #[arg(short = 'n', long, value_name = "COUNT")]
    pub(crate) last: Option<usize>,
    /// The youngest, running or not
    #[arg(short, long)]
    pub(crate) latest: bool,
    /// With sizes
    #[arg(short, long)]
    pub(crate) size: bool,
    /// WHAT=VALUE: id, name, label, status, exited, ancestor, volume, network, publish, expose, health,
    /// before, since
    #[arg(short, long, value_name = "WHAT=VALUE")]
    pub(crate) filter: Vec<String>,
    /// table, json, or a Go template such as {{.ID}}
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
}

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// json, or a Go template such as {{.State.Pid}}
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// container, image, volume or network [default: the first that has the name]
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) kind: Option<String>,
    /// With what containers have written, and their sizes with the image
    #[arg(short, long)]
    pub(crate) size: bool,
    /// Names or IDs
    #[arg(value_name = "NAME", required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Args)]
pub(crate) struct ContainersArgs {
    /// Container names or IDs
    #[arg(value_name = "CONTAINER", required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct StartArgs {
    /// Show its output, and pass signals on
    #[arg(short, long)]
    pub(crate) attach: bool,
    /// Pass standard input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Keys that leave the container [default: ctrl-p,ctrl-q]
    #[arg(long, value_name = "KEYS")]
    pub(crate) detach_keys: Option<DetachKeys>,
    /// Container names or IDs
    #[arg(value_name = "CONTAINER", required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct StopArgs {
    /// Seconds that it may take; below 0: as long as it wants
    #[arg(
        short = 't',
        long = "timeout",
        visible_alias = "time",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    pub(crate) timeout: Option<i64>,
    /// Signal that asks it to end
    #[arg(short, long, value_name = "SIGNAL")]
    pub(crate) signal: Option<String>,
    /// Container names or IDs
    #[arg(value_name = "CONTAINER", required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct KillArgs {
    /// Which signal
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL")]
    pub(crate) signal: String,
    /// Container names or IDs
    #[arg(value_name = "CONTAINER", required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct RmArgs {
    /// Kill those that run; missing ones are no error
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Remove the volumes that were made for them as well
    #[arg(short, long)]
    pub(crate) volumes: bool,
    /// Container names or IDs
    #[arg(value_name = "CONTAINER", required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct PruneContainersArgs {
    /// Do not ask
    #[arg(short, long)]
    pub(crate) force: bool,
}

#[derive(Args)]
pub(crate) struct RenameArgs {
    /// Container name or ID
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
    /// Its new name
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
}

#[derive(Args)]
pub(crate) struct UpdateArgs {
    #[command(flatten)]
    pub(crate) limits: super::limits::LimitArgs,
    /// When to start it again: no, on-failure[:TIMES], always, unless-stopped
    #[arg(long, value_name = "POLICY")]
    pub(crate) restart: Option<RestartPolicy>,
    /// Container names or IDs
    #[arg(value_name = "CONTAINER", required = true)]
    pub(crate) containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct LogsArgs {
    /// Go on as it prints
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// From this time on: a time, or how long ago
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<kiln_containers::Time>,
    /// Up to this time
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<kiln_containers::Time>,
    /// The last so many lines, or all
    #[arg(short = 'n', long, value_name = "COUNT", default_value = "all")]
    pub(crate) tail: String,
    /// With times
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// With what log drivers add: there is nothing of the kind
    #[arg(long, hide = true)]
    pub(crate) details: bool,
    /// Container name or ID
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
}

#[derive(Args)]
pub(crate) struct ExecArgs {
    /// Do not wait for it
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Pass standard input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Give it all capabilities and system calls, whatever the container has
    #[arg(long)]
    pub(crate) privileged: bool,
    /// User name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Working directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Environment variable; without a value, the one of the environment
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Read environment variables from a file, a line each
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Keys that leave the command [default: ctrl-p,ctrl-q]
    #[arg(long, value_name = "KEYS")]
    pub(crate) detach_keys: Option<DetachKeys>,
    /// Container name or ID
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
    /// Command and arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Args)]
pub(crate) struct AttachArgs {
    /// Keys that leave the container [default: ctrl-p,ctrl-q]
    #[arg(long, value_name = "KEYS")]
    pub(crate) detach_keys: Option<DetachKeys>,
    /// Do not pass standard input on
    #[arg(long)]
    pub(crate) no_stdin: bool,
    /// Do not pass signals on to the process
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_value_t = true,
          default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub(crate) sig_proxy: bool,
    /// Container name or ID
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
}

#[derive(Args)]
pub(crate) struct TopArgs {
    /// Container name or ID
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
}

#[derive(Args)]
pub(crate) struct StatsArgs {
    /// Show it once
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Those that do not run as well
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Whole IDs
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// table, json, or a Go template
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// Container names or IDs [default: all that run]
    #[arg(value_name = "CONTAINER")]
    pub(crate) containers: Vec<String>,
}

#[derive(Args)]
pub(crate) struct PortArgs {
    /// Container name or ID
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
    /// Only this port inside
    #[arg(value_name = "PORT[/PROTOCOL]")]
    pub(crate) port: Option<String>,
}

#[derive(Args)]
pub(crate) struct CommitArgs {
    /// What the change is
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) message: Option<String>,
    /// Who made it
    #[arg(short, long, value_name = "NAME")]
    pub(crate) author: Option<String>,
    /// Instruction for the image config, such as 'CMD ["bash"]'; may be given several times
    #[arg(short, long = "change", value_name = "INSTRUCTION")]
    pub(crate) change: Vec<String>,
    /// Do not hold the container meanwhile
    #[arg(long)]
    pub(crate) no_pause: bool,
    /// Hold the container meanwhile, as is done anyway
    #[arg(short, long, hide = true, action = clap::ArgAction::Set, num_args = 0..=1, default_value_t = true,
          default_missing_value = "true", require_equals = true)]
    pub(crate) pause: bool,
    /// Container name or ID
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
    /// Name for the image
    #[arg(value_name = "NAME[:TAG]")]
    pub(crate) image: Option<Reference>,
}

#[derive(Args)]
pub(crate) struct VolumeArgs {
    #[command(subcommand)]
    pub(crate) command: VolumeCommand,
}

#[derive(Subcommand)]
#[command(defer = true)]
pub(crate) enum VolumeCommand {
    /// Make a volume
    Create {
        /// Who keeps it: local
        #[arg(short, long, value_name = "DRIVER", default_value = "local")]
        driver: String,
        /// Option of the driver; local takes none
        #[arg(short, long, value_name = "NAME=VALUE")]
        opt: Vec<String>,
        /// Label
        #[arg(long, value_name = "NAME[=VALUE]")]
        label: Vec<String>,
        /// Its name [default: a random one]
        #[arg(value_name = "NAME")]
        name: Option<String>,
    },
    /// List volumes
    #[command(name = "ls", visible_alias = "list")]
    List {
        /// Only names
        #[arg(short, long)]
        quiet: bool,
        /// WHAT=VALUE: name, label, dangling
        #[arg(short, long, value_name = "WHAT=VALUE")]
        filter: Vec<String>,
        /// table, json, or a Go template
        #[arg(long, value_name = "FORMAT")]
        format: Option<String>,
    },
    /// Show volumes as JSON
    Inspect {
        /// json, or a Go template
        #[arg(short, long, value_name = "FORMAT")]
        format: Option<String>,
        /// Volume names
        #[arg(value_name = "VOLUME", required = true)]
        names: Vec<String>,
    },
    /// Remove volumes that no container has
    Rm {
        /// Missing ones are no error
        #[arg(short, long)]
        force: bool,
        /// Volume names
        #[arg(value_name = "VOLUME", required = true)]
        names: Vec<String>,
    },
    /// Remove the volumes without a name that no container has
    Prune {
        /// Do not ask
        #[arg(short, long)]
        force: bool,
        /// Those with a name as well
        #[arg(short, long)]
        all: bool,
    },
}
