//! Another runtime (`--runtime`): the same spec as an OCI bundle, run by crun or runc.
//!
//! The helper stays what it is to its caller. Instead of process 1 it makes a mount namespace with
//! everything at hand that the bundle names, has the runtime create the container there, adopts its
//! process 1 (as a child subreaper), has it started, and waits for it as for its own. The network is
//! the helper's own: the runtime makes none.
//!
//! A caller that dies closes the socket: then the helper ends the container. Only the helper's own
//! death would leave it behind.

mod config;
mod seccomp;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use kiln_oci::Mount;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, FileType, statat};
use rustix::mount::{MountAttrFlags, MountPropagationFlags, MoveMountFlags, mount_change, move_mount};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(super) use self::seccomp::to_json as seccomp_json;

use self::config::{Bundle, Shown};
use super::cgroup::{self, Counted};
use super::channel::{Report, Task, receive, report};
use super::inputs::{check_mount_target, open_sources};
use super::mounts::{SAFE, attach_aside, new_mount};
use super::user::{add_groups, resolve_user};
use super::userns::{self, Ids};
use super::{etc, sys};
use crate::{ExecError, ProcessSpec, Security, Unfit, Usage};

/// Which runtime runs a task.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Runtime {
    /// Absolute path of its program.
    pub(super) program: PathBuf,
    /// `linux.seccomp`; `None`: no filter.
    pub(super) seccomp: Option<Value>,
}

impl Runtime {
    /// Whether it takes crun's own options. They all read a bundle the same way.
    fn is_crun(&self) -> bool {
        self.program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("crun"))
    }
}

/// A container that a runtime has created.
pub(super) struct Container<'a> {
    runtime: &'a Runtime,
    id: String,
    /// Where everything of it is, in the helper's mount namespace.
    place: PathBuf,
    pub(super) process: Pid,
    /// Where the kernel counts what it uses.
    groups: Counted,
}

/// How long a runtime may take for anything but the container's own life.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// Whether a spec can be said in a bundle.
///
/// # Errors
/// [`ExecError::BadSetting`] for what has no counterpart there.
pub(super) fn check(spec: &ProcessSpec) -> Result<(), ExecError> {
    let refuse = |setting: &str, reason: &str| {
        Err(ExecError::BadSetting { setting: setting.to_owned(), reason: reason.to_owned() })
    };
    if spec.reaper {
        return refuse("--init", "kiln's init is not part of a container that another runtime runs");
    }
    match userns::ids() {
        Ids::Host => {}
        Ids::Range if spec.resources.is_none() => {}
        Ids::Range => return refuse("--runtime", "a user's runtime has no control group for limits"),
        Ids::Single => {
            return refuse(
                "--runtime",
                "with one id only kiln itself lets processes have users and files have owners; `kiln doctor` \
                 tells how to get a range of ids",
            );
        }
    }
    for (name, _) in &spec.sysctls {
        super::check_sysctl(name, spec.network)?;
    }
    Ok(())
}

/// In the helper, which has left the host's network where that is asked for: creates the container and
/// starts its program.
///
/// # Errors
/// [`ExecError::NotFound`], [`ExecError::NotExecutable`]; [`ExecError::Runtime`] with what the runtime
/// says otherwise. Nothing is left then.
pub(super) fn start<'a>(
    task: &'a Task,
    runtime: &'a Runtime,
    root: BorrowedFd<'_>,
    inputs: &[OwnedFd],
    socket: BorrowedFd<'_>,
    streams: [OwnedFd; 3],
) -> Result<Container<'a>, ExecError> {
    // What the runtime leaves behind becomes this process's child, the container's process 1 above all.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(ExecError::start("child subreaper"))?;
    // Runtimes refuse a root that links lead to.
    let place = std::fs::canonicalize(&task.attach_at)
        .map_err(|source| ExecError::Start { step: task.attach_at.clone(), source })?;
    let bundle = lay_out(task, root, inputs, &place)?;
    let failed = |source| ExecError::Start { step: "bundle".to_owned(), source };
    // No other's on this machine, whatever process namespace it is in.
    let id = cgroup::own_name().map_err(failed)?;
    let text = bundle.config(task, runtime, &id).to_string();
    fs::write(place.join("config.json"), text).map_err(failed)?;

    // Sockets have short names: this one is found from here.
    std::env::set_current_dir(&place).map_err(failed)?;
    let console = match task.terminal {
        true => Some(UnixListener::bind("console").map_err(failed)?),
        false => None,
    };
    if runtime.is_crun() {
        hide_second_version();
    }
    let mut create = command(runtime, &place);
    create.arg("create").arg("--bundle").arg(&place).args(["--pid-file", "pid"]);
    if console.is_some() {
        create.args(["--console-socket", "console"]);
    }
    let [stdin, stdout, stderr] = streams;
    let child = create.arg(&id).stdin(stdin).stdout(stdout).stderr(stderr).spawn();
    // The command holds the streams, whose ends somebody waits for.
    drop(create);
    let child = child.map_err(|source| ExecError::Start {
        step: format!("start of {}", runtime.program.display()),
        source,
    })?;
    // Whatever comes of it, there is something to delete from here on.
    let (process, groups) = (rustix::process::getpid(), Counted::default());
    let mut container = Container { runtime, id, place, process, groups };
    let created = created(child, console.as_ref(), socket);
    let started = created.and_then(|()| container.start());
    match started {
        Ok(()) => Ok(container),
        Err(error) => {
            let error = container.explain(task, error);
            container.delete();
            Err(error)
        }
    }
}

/// crun refuses a machine with both versions of control groups when the second has controllers. In this
/// mount namespace there is only the first from here on; elsewhere nothing changes.
fn hide_second_version() {
    const SECOND: &str = "/sys/fs/cgroup/unified";
    const TMPFS: i128 = 0x0102_1994;
    let is_tmpfs = rustix::fs::statfs("/sys/fs/cgroup").is_ok_and(|found| i128::from(found.f_type) == TMPFS);
    if is_tmpfs {
        let unmounted = rustix::mount::unmount(SECOND, rustix::mount::UnmountFlags::DETACH);
        // A user may not look at what is below a mount, but cover it. Where it is none, nothing is to be
        // hidden.
        if unmounted.is_err() && userns::ids() != Ids::Host {
            let empty = new_mount("tmpfs", &[("mode", "755")], SAFE);
            let _ = empty.and_then(|empty| put(empty.as_fd(), Path::new(SECOND)));
        }
    }
}

/// Waits for `create`, and passes the terminal's master on, which comes meanwhile.
fn created(
    mut child: Child,
    console: Option<&UnixListener>,
    socket: BorrowedFd<'_>,
) -> Result<(), io::Error> {
    let pid = Pid::from_child(&child);
    if let Some(listener) = console {
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&PATIENCE))?;
        if !fds[0].revents().is_empty() {
            let (connection, _) = listener.accept()?;
            if let Some((_, masters)) = receive(connection.as_fd())?
                && let Some(master) = masters.first()
            {
                report(socket, &Report::Terminal, &[master.as_fd()]);
            }
        }
    }
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(io::Error::other("it failed")) }
}

/// Mounts everything that the bundle names below `place`.
fn lay_out(task: &Task, root: BorrowedFd<'_>, inputs: &[OwnedFd], place: &Path) -> Result<Bundle, ExecError> {
    let spec = &task.spec;
    sys::unshare(rustix::thread::UnshareFlags::NEWNS).map_err(ExecError::start("mount namespace"))?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(ExecError::start("private mounts"))?;
    let files = etc::own_files(task)?;
    let sources = open_sources(task, inputs)?;
    let no_devices = match spec.security {
        Security::Sandbox => MountAttrFlags::MOUNT_ATTR_NODEV,
        Security::Insecure => MountAttrFlags::empty(),
    };
    sys::restrict_mount(root, no_devices).map_err(ExecError::start("attributes of the root"))?;
    let mut ids = resolve_user(root, spec.user.as_deref().unwrap_or("0"))?;
    add_groups(root, &spec.more_groups, &mut ids)?;
    attach_aside(new_mount("tmpfs", &[("mode", "700")], SAFE)?, task, "the bundle")?;
    let failed = |source| ExecError::Start { step: "bundle".to_owned(), source };
    let rootfs = place.join("rootfs");
    fs::create_dir(&rootfs).map_err(failed)?;
    put(root, &rootfs)?;
    let mut shown = Vec::new();
    for (name, file) in &files {
        let source = place.join(name);
        fs::write(&source, "").map_err(failed)?;
        put(file.as_fd(), &source)?;
        shown.push(Shown::Bind { source, target: format!("/etc/{name}"), read_only: true });
    }
    for (position, (mount, source)) in spec.mounts.iter().zip(sources).enumerate() {
        if !matches!(mount, Mount::Bind(_)) {
            check_mount_target(mount.target())?;
        }
        let Some(tree) = source else {
            if let Mount::Tmpfs(tmpfs) = mount {
                shown.push(Shown::Tmpfs(tmpfs.clone()));
            }
            continue;
        };
        let at = place.join(format!("mount{position}"));
        let stat = statat(&tree, "", AtFlags::EMPTY_PATH).map_err(ExecError::start("mount source"))?;
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if is_dir { fs::create_dir(&at) } else { fs::write(&at, "") }.map_err(failed)?;
        put(tree.as_fd(), &at)?;
        let read_only = match mount {
            Mount::Bind(bind) => bind.read_only,
            Mount::Tree(tree) => tree.read_only,
            Mount::File(_) => true,
            Mount::Tmpfs(_) => false,
        };
        shown.push(Shown::Bind { source: at, target: mount.target().to_owned(), read_only });
    }
    Ok(Bundle { root: rootfs, shown, ids })
}

fn put(mount: BorrowedFd<'_>, at: &Path) -> Result<(), ExecError> {
    move_mount(mount, "", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(ExecError::start(format!("mount on {}", at.display())))
}

/// A command line of the runtime: state and log of its own, and no more environment than it needs.
fn command(runtime: &Runtime, place: &Path) -> Command {
    let mut command = Command::new(&runtime.program);
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("XDG_RUNTIME_DIR", place);
    if runtime.is_crun() && userns::ids() != Ids::Host {
        command.arg("--cgroup-manager=disabled");
    }
    command.arg("--root").arg(place.join("state")).arg("--log").arg(place.join("log"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // runc's container would have them blocked as well.
    sys::unblock_in(&mut command);
    command
}

impl Container<'_> {
    /// Starts the program of the created container.
    fn start(&mut self) -> Result<(), io::Error> {
        let text = fs::read_to_string(self.place.join("pid"))?;
        let pid = text.trim().parse().ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("its pid file holds no number"))?;
        // Now: of a process that has ended the kernel does not tell.
        self.groups = Counted::of_process(pid.as_raw_nonzero().get());
        let status = command(self.runtime, &self.place).args(["start", &self.id]).status()?;
        if !status.success() {
            let _ = kill_process(pid, Signal::KILL);
            return Err(io::Error::other("it failed to start the program"));
        }
        self.process = pid;
        Ok(())
    }

    /// What it used, as its control groups count it; `otherwise` for the rest. Before it is deleted.
    pub(super) fn usage(&self, otherwise: Usage) -> Usage {
        self.groups.usage(otherwise)
    }

    /// What the runtime wrote down, in the terms of an [`ExecError`] where it can be told.
    fn explain(&self, task: &Task, error: io::Error) -> ExecError {
        let log = fs::read_to_string(self.place.join("log")).unwrap_or_default();
        let last = log.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        let said = message(last);
        let program = task.spec.args.first().cloned().unwrap_or_default();
        let lower = said.to_ascii_lowercase();
        if lower.contains("executable file") && lower.contains("not found")
            || lower.contains("exec") && lower.contains("no such file or directory")
        {
            return ExecError::NotFound { program };
        }
        if lower.contains("exec") && lower.contains("permission denied") {
            return ExecError::NotExecutable { program, why: Unfit::Refused { errno: libc::EACCES } };
        }
        if lower.contains("exec format error") {
            return ExecError::NotExecutable { program, why: Unfit::Refused { errno: libc::ENOEXEC } };
        }
        let reason = if said.is_empty() { error.to_string() } else { said };
        ExecError::Runtime { program: self.runtime.program.display().to_string(), reason }
    }

    /// Has the runtime forget the container, and its control group go.
    pub(super) fn delete(&self) {
        let _ = command(self.runtime, &self.place).args(["delete", "--force", &self.id]).status();
    }
}

/// The text of a log line: crun's are plain, runc's have `level=… msg="…"`.
fn message(line: &str) -> String {
    let quoted = line.split_once("msg=\"").and_then(|(_, rest)| rest.rsplit_once('"'));
    match quoted {
        Some((text, _)) => text.replace("\\\"", "\"").replace("\\\\", "\\"),
        None => line.trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runtimes_say_is_found_in_their_logs() {
        let runc = r#"time="2026-01-01T00:00:00Z" level=error msg="runc create failed: exec: \"x\": executable file not found in $PATH""#;
        assert_eq!(message(runc), "runc create failed: exec: \"x\": executable file not found in $PATH");
        assert_eq!(
            message("2026-01-01T00:00:00Z: open executable: No such file"),
            "2026-01-01T00:00:00Z: open executable: No such file"
        );
    }

    #[test]
    fn what_has_no_counterpart_is_refused() {
        assert!(check(&ProcessSpec::default()).is_ok());
        let with_init = ProcessSpec { reaper: true, ..ProcessSpec::default() };
        assert!(
            matches!(check(&with_init), Err(ExecError::BadSetting { setting, .. }) if setting == "--init")
        );
        let sysctls = vec![("kernel.core_pattern".to_owned(), "x".to_owned())];
        assert!(check(&ProcessSpec { sysctls, ..ProcessSpec::default() }).is_err());
    }
}
