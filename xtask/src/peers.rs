//! buildah and podman beside kiln: same Dockerfile, same base tree, a store of their own; and docker, with its
//! BuildKit, where a daemon is named that is there for this.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bases::Bases;
use crate::demo::PATH;
use crate::packages;
use crate::step::{self, Failure};

/// The builders that kiln is measured beside, where they are installed.
const NAMES: [&str; 2] = ["buildah", "podman"];

/// Names docker's daemon, as `DOCKER_HOST` does. It gets images and keeps what it builds: it should be one
/// that nobody else uses.
const DOCKER: &str = "KILN_BENCH_DOCKER";

/// One builder.
pub(crate) struct Peer {
    /// Its program.
    pub(crate) name: &'static str,
    place: Place,
}

/// Where a builder keeps what it makes.
enum Place {
    /// In a store and a few files below a directory.
    Dir(PathBuf),
    /// With the daemon at an address.
    Daemon(String),
}

/// Prepares those that are installed, with both base images in a fresh store below `dir`.
pub(crate) fn prepare(dir: &Path, bases: &Bases) -> Result<Vec<Peer>, Failure> {
    let there: Vec<&'static str> =
        NAMES.into_iter().filter(|name| packages::find_program(name).is_some()).collect();
    if packages::find_program("podman").is_none() || packages::find_program("runc").is_none() {
        step::note("podman or runc is missing: kiln is measured alone (`cargo xtask test` installs them)");
        return Ok(Vec::new());
    }
    fs::create_dir_all(dir).map_err(Failure::io("create", dir))?;
    let conf = dir.join("containers.conf");
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    fs::write(&conf, containers_conf(&limits)).map_err(Failure::io("write", &conf))?;

    // They share the store.
    let podman = Peer { name: "podman", place: Place::Dir(dir.to_owned()) };
    podman.import(&bases.debian, "debian:bookworm")?;
    podman.import(&bases.busybox, "busybox:latest")?;
    Ok(there.into_iter().map(|name| Peer { name, place: Place::Dir(dir.to_owned()) }).collect())
}

/// docker, with the small base image; `None`: no daemon is named.
pub(crate) fn docker(bases: &Bases) -> Result<Option<Peer>, Failure> {
    let Ok(address) = std::env::var(DOCKER) else {
        step::note(&format!("docker is left out: {DOCKER} names no daemon, as unix:///run/other.sock"));
        return Ok(None);
    };
    let docker = Peer { name: "docker", place: Place::Daemon(address) };
    docker.import(&bases.busybox, "busybox:latest")?;
    Ok(Some(docker))
}

impl Peer {
    /// The command that builds `context`. RUN gets the host's network, the cheapest there is.
    pub(crate) fn build(&self, context: &Path, tag: &str, no_cache: bool) -> Command {
        self.build_with(context, tag, if no_cache { &["--no-cache"] } else { &[] })
    }

    /// The same with more flags.
    pub(crate) fn build_with(&self, context: &Path, tag: &str, flags: &[&str]) -> Command {
        let mut command = self.program(self.name);
        match self.name {
            "buildah" => command.args(["bud", "-q", "--layers", "--runtime", "runc", "--pull-never"]),
            "docker" => command.args(["build", "-q"]).env("DOCKER_BUILDKIT", "1"),
            _ => command.args(["build", "-q", "--layers", "--pull=never"]),
        };
        command.args(["--network", "host", "-t", tag]);
        command.args(flags).arg(context);
        command
    }

    /// Any command line of it on its store.
    pub(crate) fn command(&self, args: &[String]) -> Command {
        let mut command = self.program(self.name);
        command.args(args);
        command
    }

    /// Gives it the small base image again.
    pub(crate) fn import_busybox(&self, bases: &Bases) -> Result<(), Failure> {
        self.import(&bases.busybox, "busybox:latest")
    }

    fn import(&self, tar: &Path, name: &str) -> Result<(), Failure> {
        let (mut import, name) = match self.place {
            // buildah has no such command.
            Place::Dir(_) => (self.program("podman"), format!("docker.io/library/{name}")),
            Place::Daemon(_) => (self.program(self.name), name.to_owned()),
        };
        step::read(import.args(["import", "--change", PATH]).arg(tar).arg(name)).map(drop)
    }

    /// The beginning of a command line on its store.
    fn program(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        match &self.place {
            Place::Daemon(address) => {
                command.args(["-H", address]);
            }
            Place::Dir(dir) => {
                if program == "podman" {
                    command.args(["--runtime", "runc"]);
                }
                command.arg("--root").arg(dir.join("store")).arg("--runroot").arg(dir.join("run"));
                command.args(["--storage-driver", "overlay"]);
                command.env("CONTAINERS_CONF", dir.join("containers.conf"));
            }
        }
        command
    }

    /// Its version, as it prints it.
    pub(crate) fn version(&self) -> Result<String, Failure> {
        Ok(step::read(Command::new(self.name).arg("--version"))?.trim().to_owned())
    }
}

// Both raise limits to figures of their own by default, which a root without CAP_SYS_RESOURCE may
// not. The hard limits that hold already are always allowed.
fn containers_conf(limits: &str) -> String {
    let hard = |name: &str, most: u64| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("");
        let hard: u64 = line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(most);
        hard.min(most)
    };
    let files = hard("Max open files", 1 << 20);
    let processes = hard("Max processes", 32768);
    format!(
        "[containers]\ndefault_ulimits = [\"nofile={files}:{files}\", \"nproc={processes}:{processes}\"]\n\
         [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_given_to_containers_are_within_our_own() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
                      Max processes             1000                 2000                 processes\n\
                      Max open files            1024                 unlimited            files\n";
        let conf = containers_conf(limits);
        assert!(conf.contains("\"nofile=1048576:1048576\""), "{conf}");
        assert!(conf.contains("\"nproc=2000:2000\""), "{conf}");
    }
}
