//! The network of a user's container: slirp4netns, a process beside it that speaks for it with sockets
//! of its own.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::unistd::ForkResult;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, getpid, waitpid};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use super::{net, sys, userns};
use crate::ExecError;

/// What the program has a container be, and itself as the server of names (slirp4netns(1)).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 100);
const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const TUN: &str = "/dev/net/tun";
/// How long the program may take until the network is there.
const PATIENCE: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Who gives a container its network where kiln may not make interfaces on the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UserNetwork {
    program: PathBuf,
}

/// A container's network; it ends with this value.
pub(super) struct Served {
    process: Pid,
    /// The program ends when nobody holds this any more, so with the helper as well.
    alive: Option<OwnedFd>,
}

impl UserNetwork {
    /// What there is here.
    ///
    /// # Errors
    /// What is in the way, and what helps.
    pub fn find() -> Result<Self, String> {
        let program = userns::program("slirp4netns")
            .ok_or("slirp4netns is not installed: apt-get install slirp4netns, or its like")?;
        match openat(CWD, TUN, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(_) => Ok(Self { program }),
            Err(Errno::NOENT | Errno::NODEV) => Err(format!("there is no {TUN}: modprobe tun")),
            Err(errno) => Err(format!("{TUN} cannot be opened ({errno}): chmod 666 {TUN}")),
        }
    }

    /// The program.
    pub fn program(&self) -> &std::path::Path {
        &self.program
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

    /// Moves this process, the helper, into a new network namespace and has it served.
    ///
    /// The program has to run outside of it, where nobody of this namespace can go back to: so it is
    /// forked before and started after.
    pub(super) fn start(&self) -> Result<Served, ExecError> {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(ExecError::network("pipe"));
        let ((wait, go), (ready, is_ready), (ended, alive)) = (pipe()?, pipe()?, pipe()?);
        let command = self.command(getpid(), &is_ready, &ended);
        let process = match sys::fork().map_err(ExecError::network("fork"))? {
            ForkResult::Child => {
                drop((go, ready, alive));
                serve(command, &wait, [&is_ready, &ended])
            }
            ForkResult::Parent { child } => Pid::from_raw(child.as_raw()).ok_or(ExecError::HelperDied)?,
        };
        drop((wait, is_ready, ended));
        let served = Served { process, alive: Some(alive) };
        sys::unshare(UnshareFlags::NEWNET).map_err(ExecError::network("network namespace"))?;
        net::loopback_up()?;
        rustix::io::write(&go, b"!").map_err(ExecError::network("slirp4netns"))?;
        // One byte when it is there; the end when the program gave up.
        let mut events = [PollFd::new(&ready, PollFlags::IN)];
        let in_time = poll(&mut events, Some(&PATIENCE)).map_err(ExecError::network("slirp4netns"))? > 0;
        match in_time.then(|| rustix::io::read(&ready, &mut [0; 1])) {
            Some(Ok(1)) => Ok(served),
            Some(_) => Err(ExecError::network("slirp4netns could not make it")(Errno::IO)),
            None => Err(ExecError::network("slirp4netns")(Errno::TIMEDOUT)),
        }
    }

    fn command(&self, helper: Pid, is_ready: &OwnedFd, ended: &OwnedFd) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["--configure", "--mtu=65520", "--disable-host-loopback", "--netns-type=path"])
            .arg(format!("--ready-fd={}", is_ready.as_raw_fd()))
            .arg(format!("--exit-fd={}", ended.as_raw_fd()))
            .args([format!("/proc/{}/ns/net", helper.as_raw_nonzero()), "tap0".to_owned()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }
}

/// Becomes the program when the helper says so; its exit ends what reads `passed`.
fn serve(mut command: Command, wait: &OwnedFd, passed: [&OwnedFd; 2]) -> ! {
    let asked = rustix::io::read(wait, &mut [0; 1]).is_ok_and(|count| count == 1);
    let kept = passed.iter().all(|fd| fcntl_setfd(fd, FdFlags::empty()).is_ok());
    if asked && kept {
        let _ = command.exec();
    }
    sys::end_now(1)
}

impl Drop for Served {
    fn drop(&mut self) {
        self.alive.take();
        while let Err(Errno::INTR) = waitpid(Some(self.process), WaitOptions::empty()) {}
    }
}
