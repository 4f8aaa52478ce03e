//! One more process in the namespaces of a container that runs already.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::unistd::ForkResult;
use rustix::fs::{Mode, OFlags, open};
use rustix::process::Pid;
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::channel::{Report, Task, report};
use super::init::Program;
use super::paths::open_inside;
use super::user::{add_groups, resolve_user};
use super::{cgroup, init, outer, pty, sys};
use crate::{Cancel, ExecError, Exit, Handles, Linux, ProcessSpec, Stdio};

impl Linux {
    /// Runs a process beside process 1 of a container, which `container`, a pidfd, stands for: in its
    /// namespaces and on its tree, with the identity that `spec` says. Of `spec`, what a container
    /// is made of (mounts, network, host name) counts for nothing. Blocks until the process ended; it
    /// ends with the container, too.
    ///
    /// # Errors
    /// As [`Executor::run`](crate::Executor::run).
    pub fn join(
        &self,
        container: OwnedFd,
        spec: &ProcessSpec,
        stdio: Stdio<'_>,
        cancel: &Cancel,
    ) -> Result<Exit, ExecError> {
        if cancel.is_cancelled() {
            return Err(ExecError::Cancelled);
        }
        let groups = match process_of(container.as_fd()) {
            Some(pid) => cgroup::doors_of(pid).map_err(|source| ExecError::Start {
                step: "the container's control groups".to_owned(),
                source,
            })?,
            // It has ended: entering it says so.
            None => Vec::new(),
        };
        let task = Task { groups, ..self.task(spec, &stdio, true)? };
        Ok(self.launch(&task, Handles::from(container), stdio, cancel)?.0.exit)
    }
}

/// The process that a pidfd stands for (proc_pid_fdinfo(5)); `None`: it has ended.
pub(super) fn process_of(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
    (pid > 0).then_some(pid)
}

/// In the helper: enters the container's namespaces, its process namespace with the next child.
pub(super) fn enter(container: BorrowedFd<'_>) -> Result<(), ExecError> {
    let all = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::PROCESS_ID
        | ThreadNameSpaceType::NETWORK
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::CONTROL_GROUP;
    // The root and working directory become those of the container's mount namespace with it.
    move_into_thread_name_spaces(container, all).map_err(ExecError::start("setns"))
}

/// In the helper's child: becomes the program, or reports why not.
fn become_program(task: &Task, doors: Vec<File>, socket: BorrowedFd<'_>, streams: [OwnedFd; 3]) -> ! {
    let error = match prepare(task, doors, socket, streams) {
        Ok(program) => program.exec(),
        Err(error) => error,
    };
    report(socket, &Report::Failed(error.into()), &[]);
    std::process::exit(1)
}

fn prepare(
    task: &Task,
    doors: Vec<File>,
    socket: BorrowedFd<'_>,
    streams: [OwnedFd; 3],
) -> Result<Program, ExecError> {
    let spec = &task.spec;
    outer::die_with_parent(0)?;
    for mut door in doors {
        door.write_all(b"0").map_err(|source| ExecError::Start {
            step: "the container's control group".to_owned(),
            source,
        })?;
    }
    rustix::process::setsid().map_err(ExecError::start("setsid"))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open("/", flags, Mode::empty()).map_err(ExecError::start("the container's root"))?;
    let streams = if task.terminal {
        let devpts = open_inside(root.as_fd(), "/dev/pts", OFlags::PATH | OFlags::DIRECTORY)
            .map_err(ExecError::start("/dev/pts"))?;
        pty::give(&devpts, socket)?
    } else {
        streams
    };
    let mut ids = resolve_user(root.as_fd(), spec.user.as_deref().unwrap_or("0"))?;
    add_groups(root.as_fd(), &spec.more_groups, &mut ids)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    init::enter_cwd(spec, root.as_fd())?;
    init::become_user(task, &ids, &streams, socket)
}

/// In the helper: starts the program in the container.
pub(super) fn start(
    task: &Task,
    container: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
    streams: [OwnedFd; 3],
) -> Result<Pid, ExecError> {
    // Only from outside can they be seen; the program alone goes in, so that nothing of kiln's counts.
    let open = |door: &String| {
        File::options()
            .write(true)
            .open(door)
            .map_err(|source| ExecError::Start { step: door.clone(), source })
    };
    let doors = task.groups.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    if let Some(score) = task.spec.oom_score_adj {
        // Inherited by the program.
        fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|source| ExecError::Start { step: "oom_score_adj".to_owned(), source })?;
    }
    enter(container)?;
    match sys::fork().map_err(ExecError::start("fork"))? {
        ForkResult::Child => become_program(task, doors, socket, streams),
        ForkResult::Parent { child } => Pid::from_raw(child.as_raw()).ok_or(ExecError::HelperDied),
    }
}
