//! The helper: makes the namespaces, starts process 1, watches both sides.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::unistd::ForkResult;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, waitpid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::channel::{Report, Task, receive, report};
use super::init::{self, Inside};
use super::memory::Looks;
use super::paths::Created;
use super::start::{HELPER_NAME, read_task};
use super::user_net::Served;
use super::{join, net, nursery, oci, sys, used_net};
use crate::{ExecError, Exit, Network, Usage};

/// How long a process may take to end after `SIGTERM`, before `SIGKILL`.
const GRACE: Duration = Duration::from_millis(300);

/// First line of `main`: where this process was started as a container's helper, does that job and
/// never returns; otherwise does nothing.
pub fn init_if_asked() {
    let asked = std::env::args_os().next().is_some_and(|name| name == HELPER_NAME);
    if asked {
        // A user who types this name has no socket there; then there is nobody to report to.
        std::process::exit(help());
    }
}

/// What the helper holds while the container runs.
struct Helper {
    socket: OwnedFd,
    root: OwnedFd,
    inputs: Vec<OwnedFd>,
    /// The network namespace to be in, where it was made before.
    network: Option<OwnedFd>,
    task: Task,
}

fn help() -> i32 {
    // What the caller ignores is nothing to the container; an ignored SIGCHLD would hide its end, too.
    sys::default_signals();
    // Executed by way of a descriptor, it would be called by that one's number.
    let _ = rustix::thread::set_name(c"kiln-init");
    let _ = std::env::set_current_dir("/");
    let socket = sys::take_stdin();
    // Off the standard streams, which process 1 gets anew.
    let Some(socket) = moved_up(socket) else { return 1 };
    match receive(socket.as_fd()) {
        Ok(Some((asked, fds))) if asked == nursery::FORK => nursery::serve(socket, fds),
        Ok(Some((_, fds))) => work(socket, fds, None),
        Ok(None) | Err(_) => 1,
    }
}

/// The same file under a number that is no standard stream's.
fn moved_up(socket: OwnedFd) -> Option<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(&socket, 10).ok()
}

/// The helper's job, in a process that `parent` forked for it; `socket` is the caller's. The exit code.
pub(super) fn help_over(socket: OwnedFd, parent: i32) -> i32 {
    let Some(socket) = moved_up(socket) else { return 1 };
    let Ok(Some((_, fds))) = receive(socket.as_fd()) else { return 1 };
    work(socket, fds, Some(parent))
}

/// Does the task that came with the first message. `parent` is this process's, if not the caller.
fn work(socket: OwnedFd, mut fds: Vec<OwnedFd>, parent: Option<i32>) -> i32 {
    let network = if fds.len() > 5 { fds.pop() } else { None };
    let Ok([memory, root, stdin, stdout, stderr]) = <[OwnedFd; 5]>::try_from(fds) else { return 1 };
    let Some(mut task) = read_task(memory) else { return 1 };
    task.parent_pid = parent.unwrap_or(task.parent_pid);
    let mut inputs = Vec::with_capacity(task.inputs);
    while inputs.len() < task.inputs {
        let Ok(Some((_, fds))) = receive(socket.as_fd()) else { return 1 };
        if fds.is_empty() {
            return 1;
        }
        inputs.extend(fds);
    }
    let helper = Helper { socket, root, inputs, network, task };
    match helper.run([stdin, stdout, stderr]) {
        Ok((exit, usage)) => {
            let network = helper.task.network_back.then(used_net::give_back).flatten();
            let fds: Vec<_> = network.iter().map(AsFd::as_fd).collect();
            report(&helper.socket, &Report::Ended(exit, usage), &fds);
        }
        Err(error) => report(&helper.socket, &Report::Failed(error.into()), &[]),
    }
    0
}

impl Helper {
    fn run(&self, streams: [OwnedFd; 3]) -> Result<(Exit, Usage), ExecError> {
        // Inherited by process 1 until it executes the container's program: nobody inside, root
        // without CAP_SYS_PTRACE included, may look at what it has open (CVE-2019-5736).
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(ExecError::start("prctl"))?;
        if self.task.runtime.is_none() {
            die_with_parent(self.task.parent_pid)?;
        }
        rustix::process::setsid().map_err(ExecError::start("setsid"))?;
        let (started_read, started_write) = match self.task.managed {
            true => {
                let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                    .map_err(ExecError::start("pipe"))?;
                (Some(read), Some(write))
            }
            false => (None, None),
        };
        if self.task.join {
            let child = join::start(&self.task, self.root.as_fd(), self.socket.as_fd(), streams)?;
            drop(started_write);
            return Ok((self.watch(child, started_read, &mut None)?, Usage::default()));
        }
        // Mounts are process 1's own affair: its mount namespace goes when it does, and the tree
        // is bare again for the clean-up here.
        if let Some(runtime) = &self.task.runtime {
            return self.run_by(runtime, streams);
        }
        let mut namespaces = UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWPID;
        if self.task.groups.is_empty() {
            // Else process 1 does so itself, once it is where its root is to be.
            namespaces |= UnshareFlags::NEWCGROUP;
        }
        let user_network = self.enter(namespaces)?;
        let (created_read, created_write) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(ExecError::start("pipe"))?;

        match sys::fork().map_err(ExecError::start("fork"))? {
            ForkResult::Child => {
                drop(created_read);
                let inside = Inside {
                    task: &self.task,
                    root: self.root.as_fd(),
                    inputs: &self.inputs,
                    socket: self.socket.as_fd(),
                    streams,
                    created: created_write,
                };
                init::enter(inside)
            }
            ForkResult::Parent { child } => {
                drop((streams, created_write, started_write));
                let child = Pid::from_raw(child.as_raw()).ok_or(ExecError::HelperDied)?;
                let mut looks = self.looks(child);
                let exit = self.watch(child, started_read, &mut looks);
                // No process lives in the container any more: nobody can race with the clean-up.
                Created::read(created_read).remove(self.root.as_fd());
                drop(user_network);
                Ok((exit?, used(looks.as_ref())))
            }
        }
    }

    /// Has another runtime run the container.
    fn run_by(&self, runtime: &oci::Runtime, streams: [OwnedFd; 3]) -> Result<(Exit, Usage), ExecError> {
        let user_network = self.enter(UnshareFlags::empty())?;
        let (root, socket) = (self.root.as_fd(), self.socket.as_fd());
        let container = oci::start(&self.task, runtime, root, &self.inputs, socket, streams)?;
        if self.task.managed {
            report(&self.socket, &Report::Started(container.process.as_raw_nonzero().get()), &[]);
        }
        let mut looks = self.looks(container.process);
        let exit = self.watch(container.process, None, &mut looks);
        let usage = container.usage(used(looks.as_ref()));
        container.delete();
        drop(user_network);
        Ok((exit?, usage))
    }

    /// Moves this process into these namespaces and into the network that its task says, which is up
    /// then. What is returned serves that network for as long as it is held.
    fn enter(&self, mut namespaces: UnshareFlags) -> Result<Option<Served>, ExecError> {
        if let Some(user_network) = &self.task.user_network {
            // It serves the namespace from outside, and so makes it.
            let served = user_network.start()?;
            if !namespaces.is_empty() {
                sys::unshare(namespaces).map_err(ExecError::start("unshare"))?;
            }
            return Ok(Some(served));
        }
        // A socket stays in the network namespace it was opened in: this one is the host's.
        let unconnected = self.task.lease.as_ref().filter(|_| !self.task.network_is_up);
        let host_network = unconnected.map(|_| net::HostSide::open()).transpose()?;
        namespaces |= self.network_namespace()?;
        if !namespaces.is_empty() {
            sys::unshare(namespaces).map_err(ExecError::start("unshare"))?;
        }
        match (&host_network, &self.task.lease) {
            (Some(host), Some(lease)) => host.connect(lease)?,
            _ if self.task.network_is_up => {}
            _ if matches!(self.task.spec.network, Network::Host | Network::Given) => {}
            _ => net::loopback_up()?,
        }
        Ok(None)
    }

    /// Enters the network namespace that was given; else says whether there is to be a new one.
    fn network_namespace(&self) -> Result<UnshareFlags, ExecError> {
        match (self.task.spec.network, &self.network) {
            (Network::Host, _) => Ok(UnshareFlags::empty()),
            (_, Some(network)) => {
                move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
                    .map_err(ExecError::start("enter the network namespace"))?;
                Ok(UnshareFlags::empty())
            }
            _ => Ok(UnshareFlags::NEWNET),
        }
    }

    /// Looks at process 1 and its children, if somebody asks what they have together.
    fn looks(&self, process: Pid) -> Option<Looks> {
        self.task.spec.adds_up_memory.then(|| Looks::at(process))
    }

    /// Waits for process 1. Ends it when the caller asks, and at once when the caller is gone.
    /// `started` ends when the program runs: process 1's copy of the other end closes with `execve`.
    fn watch(
        &self,
        child: Pid,
        mut started: Option<OwnedFd>,
        looks: &mut Option<Looks>,
    ) -> Result<Exit, ExecError> {
        let pidfd = pidfd_open(child, PidfdFlags::empty()).map_err(ExecError::start("pidfd_open"))?;
        // When the grace period is over.
        let mut deadline: Option<Instant> = None;
        let (mut listening, mut unwanted) = (true, false);
        // What was asked to end takes along what it has started: a container's processes go with process 1,
        // those of a joined process with its group, of which it was made the leader.
        let send = |signal| {
            if !self.task.join || sys::signal_group(child, signal).is_err() {
                let _ = sys::signal_by_fd(pidfd.as_fd(), signal);
            }
        };
        loop {
            let socket_flags = if listening { PollFlags::IN } else { PollFlags::empty() };
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN), PollFd::new(&self.socket, socket_flags)];
            fds.extend(started.iter().map(|started| PollFd::new(started, PollFlags::IN)));
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = left.into_iter().chain(looks.as_ref().map(Looks::wait)).min();
            match poll(&mut fds, timeout.map(timespec).as_ref()) {
                Err(Errno::INTR) => continue,
                other => other.map_err(ExecError::start("poll"))?,
            };
            let ready_at = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            let (ended, told, has_started) = (ready_at(0), ready_at(1), ready_at(2));
            drop(fds);
            if has_started {
                // Where `execve` failed, that was reported before, and nobody listens any more.
                started = None;
                report(&self.socket, &Report::Started(child.as_raw_nonzero().get()), &[]);
            }
            if ended {
                if unwanted {
                    // Before the leader is waited for: until then the group's number is nobody else's.
                    send(libc::SIGKILL);
                }
                return wait(child);
            }
            looks.iter_mut().for_each(Looks::look_if_due);
            if deadline.is_some_and(|at| at <= Instant::now()) {
                send(libc::SIGKILL);
                deadline = None;
            } else if listening && told {
                unwanted = true;
                match receive(self.socket.as_fd()) {
                    Ok(Some(_)) => {
                        send(self.task.spec.stop_signal);
                        deadline = Some(Instant::now() + GRACE);
                    }
                    Ok(None) | Err(_) => {
                        send(libc::SIGKILL);
                        listening = false;
                    }
                }
            }
        }
    }
}

/// What the children have used that were waited for.
fn used(looks: Option<&Looks>) -> Usage {
    let (cpu, largest_bytes) = sys::children_usage();
    let peak_memory_bytes = largest_bytes.max(looks.map_or(0, Looks::peak_bytes));
    Usage { cpu, peak_memory_bytes, oom_kills: 0 }
}

/// Waits are shorter than a century.
fn timespec(wait: Duration) -> Timespec {
    let tv_sec = i64::try_from(wait.as_secs()).unwrap_or(i64::MAX);
    Timespec { tv_sec, tv_nsec: wait.subsec_nanos().into() }
}

fn wait(child: Pid) -> Result<Exit, ExecError> {
    loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Err(Errno::INTR) | Ok(None) => {}
            Err(errno) => return Err(ExecError::start("waitpid")(errno)),
            Ok(Some((_, status))) => {
                if let Some(code) = status.exit_status() {
                    return Ok(Exit::Code(code));
                }
                if let Some(signal) = status.terminating_signal() {
                    return Ok(Exit::Signal(signal));
                }
            }
        }
    }
}

/// Has the kernel kill this process when its parent dies, and checks that it is not too late.
pub(super) fn die_with_parent(parent: i32) -> Result<(), ExecError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(ExecError::start("prctl"))?;
    let now = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    if now == parent { Ok(()) } else { Err(ExecError::HelperDied) }
}
