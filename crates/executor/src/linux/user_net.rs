//! The network of a user's container: pasta or slirp4netns, a process beside it that speaks for it with
//! sockets of its own.
//!
//! Both are told the same addresses, and that the host's loopback is out of reach.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::ForkResult;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, set_parent_process_death_signal, waitpid,
};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use super::{net, sys, userns};
use crate::ExecError;

/// What a container is, and whom it asks for names and for the way out (slirp4netns(1)).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 100);
const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The programs that can do it, the best first.
const PROGRAMS: [&str; 2] = ["pasta", "slirp4netns"];
const TUN: &str = "/dev/net/tun";
/// How long the program may take until the network is there.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Who gives a container its network where kiln may not make interfaces on the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UserNetwork {
    /// Those that are here, the best first; never empty.
    programs: Vec<PathBuf>,
}

/// A container's network; it ends with this value.
pub(super) struct Served {
    process: Pid,
    /// slirp4netns ends when nobody holds this any more, so with the helper as well.
    alive: Option<OwnedFd>,
}

impl UserNetwork {
    /// What there is here.
    ///
    /// # Errors
    /// What is in the way, and what helps.
    pub fn find() -> Result<Self, String> {
        let programs: Vec<PathBuf> = PROGRAMS.into_iter().filter_map(userns::program).collect();
        if programs.is_empty() {
            return Err(
                "neither pasta nor slirp4netns is installed: apt-get install passt, or its like".into()
            );
        }
        match openat(CWD, TUN, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(_) => Ok(Self { programs }),
            Err(Errno::NOENT | Errno::NODEV) => Err(format!("there is no {TUN}: modprobe tun")),
            Err(errno) => Err(format!("{TUN} cannot be opened ({errno}): chmod 666 {TUN}")),
        }
    }

    /// The program that is tried first.
    pub fn program(&self) -> &Path {
        self.programs.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// A user's container as its own processes know it, whether it has such a network or only loopback.
    pub fn address_inside() -> Ipv4Addr {
        if Self::find().is_ok() { ADDRESS } else { Ipv4Addr::LOCALHOST }
    }

    pub(super) fn address(&self) -> Ipv4Addr {
        ADDRESS
    }

    /// `/etc/resolv.conf`: the program asks the host's servers, those on loopback too.
    pub(super) fn resolver(&self) -> String {
        let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let kept = host.lines().filter(|line| !line.trim_start().starts_with("nameserver"));
        kept.map(|line| format!("{line}\n")).collect::<String>() + &format!("nameserver {RESOLVER}\n")
    }

    /// Moves this process, the helper, into a new network namespace and has it served by the first
    /// program that can.
    ///
    /// The program has to run outside of it, where nobody of this namespace can go back to: so all are
    /// forked before and started after.
    pub(super) fn start(&self) -> Result<Served, ExecError> {
        let waiting = self.programs.iter().map(|program| Waiting::fork(program));
        let waiting = waiting.collect::<Result<Vec<_>, _>>()?;
        sys::unshare(UnshareFlags::NEWNET).map_err(ExecError::network("network namespace"))?;
        net::loopback_up()?;
        let mut outcome = Err(ExecError::HelperDied);
        for program in waiting {
            // Who is not needed ends when nobody can tell him to go on.
            if outcome.is_err() {
                outcome = program.start();
            }
        }
        outcome
    }
}

/// A process in the host's network that becomes the program when it is told to.
struct Waiting {
    name: String,
    go: OwnedFd,
    ready: OwnedFd,
    served: Served,
}

impl Waiting {
    fn fork(program: &Path) -> Result<Self, ExecError> {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(ExecError::network("pipe"));
        let ((wait, go), (ready, is_ready), (ended, alive)) = (pipe()?, pipe()?, pipe()?);
        let command = command(program, getpid(), &is_ready, &ended);
        let process = match sys::fork().map_err(ExecError::network("fork"))? {
            ForkResult::Child => {
                drop((go, ready, alive));
                serve(command, &wait, [&is_ready, &ended])
            }
            ForkResult::Parent { child } => Pid::from_raw(child.as_raw()).ok_or(ExecError::HelperDied)?,
        };
        Ok(Self { name, go, ready, served: Served { process, alive: Some(alive) } })
    }

    fn start(self) -> Result<Served, ExecError> {
        let failed = |what: &str| ExecError::network(format!("{}{what}", self.name));
        rustix::io::write(&self.go, b"!").map_err(failed(""))?;
        // A word when it is there; the end when the program gave up.
        let mut events = [PollFd::new(&self.ready, PollFlags::IN)];
        let in_time = poll(&mut events, Some(&PATIENCE)).map_err(failed(""))? > 0;
        match in_time.then(|| rustix::io::read(&self.ready, &mut [0; 16])) {
            Some(Ok(1..)) => Ok(self.served),
            Some(_) => Err(failed(" could not make it")(Errno::IO)),
            None => Err(failed("")(Errno::TIMEDOUT)),
        }
    }
}

fn command(program: &Path, helper: Pid, is_ready: &OwnedFd, ended: &OwnedFd) -> Command {
    let network = format!("/proc/{}/ns/net", helper.as_raw_nonzero());
    let mut command = Command::new(program);
    if is_pasta(program) {
        // Its number is written when all is there; a pipe does for a file.
        command.arg(format!("--pid=/proc/self/fd/{}", is_ready.as_raw_fd()));
        command.args(["--foreground", "--quiet", "--config-net", "--ipv4-only", "--ns-ifname=tap0"]);
        command.arg(format!("--address={ADDRESS}")).args(["--netmask=24", "--mtu=65520", "--no-map-gw"]);
        command.arg(format!("--gateway={GATEWAY}")).arg(format!("--dns-forward={RESOLVER}"));
        command.args(["--tcp-ports=none", "--udp-ports=none", "--tcp-ns=none", "--udp-ns=none"]);
        command.args(["--netns-only".to_owned(), format!("--netns={network}")]);
    } else {
        command.args(["--configure", "--mtu=65520", "--disable-host-loopback", "--netns-type=path"]);
        command.arg(format!("--ready-fd={}", is_ready.as_raw_fd()));
        command.arg(format!("--exit-fd={}", ended.as_raw_fd())).args([network, "tap0".to_owned()]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn is_pasta(program: &Path) -> bool {
    program.file_name().is_some_and(|name| name == PROGRAMS[0])
}

/// Becomes the program when the helper says so; its exit ends what reads `passed`.
fn serve(mut command: Command, wait: &OwnedFd, passed: [&OwnedFd; 2]) -> ! {
    // pasta has nothing like an exit descriptor; the helper, which has one thread, takes it along.
    let mortal = set_parent_process_death_signal(Some(Signal::KILL)).is_ok();
    let asked = rustix::io::read(wait, &mut [0; 1]).is_ok_and(|count| count == 1);
    let kept = passed.iter().all(|fd| fcntl_setfd(fd, FdFlags::empty()).is_ok());
    if mortal && asked && kept {
        let _ = command.exec();
    }
    sys::end_now(1)
}

impl Drop for Served {
    fn drop(&mut self) {
        self.alive.take();
        let _ = kill_process(self.process, Signal::TERM);
        while let Err(Errno::INTR) = waitpid(Some(self.process), WaitOptions::empty()) {}
    }
}
