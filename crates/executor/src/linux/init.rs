//! Process 1 inside: from the fork to `execve`.
//!
//! The phases, each needing what the one before left: mounts, new root, identity, program.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::unistd::{Gid, Uid};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, UnmountFlags};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::channel::{Report, Task, report};
use super::paths::{Created, make_dirs, open_inside};
use super::user::{UserIds, add_groups, resolve_user};
use super::userns::{self, Ids};
use super::{cgroup, chown, limits, mounts, outer, program_file, pty, reaper, sys};
use crate::{ExecError, ProcessSpec, Security};

/// What process 1 works with.
pub(super) struct Inside<'a> {
    pub(super) task: &'a Task,
    pub(super) root: BorrowedFd<'a>,
    pub(super) inputs: &'a [OwnedFd],
    pub(super) socket: BorrowedFd<'a>,
    pub(super) streams: [OwnedFd; 3],
    pub(super) created: OwnedFd,
}

/// Becomes the container's program. Reports what went wrong and ends the process otherwise.
pub(super) fn enter(inside: Inside<'_>) -> ! {
    let (socket, reaper) = (inside.socket, inside.task.spec.reaper);
    let error = match prepare(inside) {
        Ok(program) if reaper => reaper::start_below(|| program.exec()),
        Ok(program) => program.exec(),
        Err(error) => error,
    };
    report(socket, &Report::Failed(error.into()), &[]);
    std::process::exit(1)
}

fn prepare(inside: Inside<'_>) -> Result<Program, ExecError> {
    let Inside { task, root, inputs, socket, streams, created: created_pipe } = inside;
    let spec = &task.spec;
    // The helper is outside this process namespace: getppid(2) shows it as 0.
    outer::die_with_parent(0)?;
    cgroup::join(&task.groups)?;

    let mut created = Created::default();
    let devpts = mounts::mount_all(task, root, inputs, &mut created)?;
    let streams = if task.terminal {
        rustix::process::setsid().map_err(ExecError::start("setsid"))?;
        pty::give(&devpts, socket)?
    } else {
        streams
    };
    enter_root(root)?;
    rustix::system::sethostname(spec.hostname.as_bytes()).map_err(ExecError::start("sethostname"))?;

    let mut ids = resolve_user(root, spec.user.as_deref().unwrap_or("0"))?;
    add_groups(root, &spec.more_groups, &mut ids)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    // Before anybody else can change the tree: what was made there is known.
    created.write(created_pipe);
    enter_cwd(spec, root)?;
    if spec.read_only {
        // Last of all that may have to be made in it.
        sys::restrict_one_mount(root, MountAttrFlags::MOUNT_ATTR_RDONLY)
            .map_err(ExecError::start("read-only root"))?;
    }
    become_user(task, &ids, &streams, socket)
}

/// The last part, the same for every process of a container: limits, identity, streams, program.
pub(super) fn become_user(
    task: &Task,
    ids: &UserIds,
    streams: &[OwnedFd; 3],
    socket: BorrowedFd<'_>,
) -> Result<Program, ExecError> {
    let spec = &task.spec;
    limits::set_limits(spec)?;
    new_keyring()?;
    if userns::ids() == Ids::Single {
        // Before anything is given up: a new namespace comes with all of it.
        userns::become_other(ids.uid, ids.gid)?;
        let listener = chown::listen()?;
        report(socket, &Report::Owners(ids.uid, ids.gid), &[listener.as_fd()]);
    }
    take_identity(task, ids)?;
    // Changing the user cleared the death signal (prctl(2)).
    outer::die_with_parent(0)?;
    reset_signals()?;

    let program = Program::new(spec, ids)?;
    for (stream, fd) in streams.iter().zip(0..) {
        sys::dup_onto(stream.as_fd(), fd).map_err(ExecError::start("standard streams"))?;
    }
    sys::mark_cloexec_from(3).map_err(ExecError::start("close_range"))?;
    if spec.no_new_privileges {
        filter(task)?;
    }
    Ok(program)
}

/// The container's tree becomes `/`, and the host's is gone from this namespace.
fn enter_root(root: BorrowedFd<'_>) -> Result<(), ExecError> {
    rustix::process::fchdir(root).map_err(ExecError::start("fchdir"))?;
    // pivot_root(2), "pivot_root(".", ".")": the old root ends up on top and is detached.
    rustix::process::pivot_root(".", ".").map_err(ExecError::start("pivot_root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(ExecError::start("umount of the old root"))?;
    rustix::process::chdir("/").map_err(ExecError::start("chdir"))
}

/// Goes to the working directory, which has to lie inside.
pub(super) fn enter_cwd(spec: &ProcessSpec, root: BorrowedFd<'_>) -> Result<(), ExecError> {
    let failed = |errno: Errno| ExecError::BadCwd { cwd: spec.cwd.clone(), source: errno.into() };
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let cwd = match open_inside(root, &spec.cwd, flags) {
        Err(Errno::NOENT) if spec.create_cwd => {
            // What a user asks for stays: it is no mount target to be taken out again.
            make_dirs(root, &spec.cwd, &mut Created::default()).map_err(failed)?
        }
        other => other.map_err(failed)?,
    };
    rustix::process::fchdir(&cwd).map_err(failed)?;
    // A directory outside the root shows as "(unreachable)…" (CVE-2024-21626).
    let path = rustix::process::getcwd(Vec::new()).map_err(failed)?;
    if path.as_bytes().starts_with(b"/") { Ok(()) } else { Err(failed(Errno::NOENT)) }
}

fn new_keyring() -> Result<(), ExecError> {
    // Keys of the host's session stay outside; a kernel without keyrings has none to leak.
    match sys::new_session_keyring() {
        Ok(()) | Err(Errno::NOSYS | Errno::PERM | Errno::DQUOT) => Ok(()),
        Err(errno) => Err(ExecError::start("session keyring")(errno)),
    }
}

/// Loads the system calls' filter, if there is one.
///
/// The kernel takes a filter from who has CAP_SYS_ADMIN or can gain no privileges any more. So
/// where setuid programs are to work, as docker and BuildKit let them, it is loaded before that
/// capability goes, and has to allow the few calls from there to `execve`: a profile that forbids
/// `capset` or `setresuid` keeps the process from starting. With no_new_privs it is the very last
/// thing. Either way everything that the default forbids, mounts above all, is done by then.
fn filter(task: &Task) -> Result<(), ExecError> {
    match &task.filter {
        Some(program) => sys::load_filter(program).map_err(ExecError::start("seccomp")),
        None => Ok(()),
    }
}

/// Capabilities and user. Order: the bounding set needs CAP_SETPCAP, groups need CAP_SETGID, and
/// the user goes last because it takes both away.
fn take_identity(task: &Task, ids: &UserIds) -> Result<(), ExecError> {
    let spec = &task.spec;
    // Nobody can give what he does not have: kiln as root in a container has fewer.
    let own = rustix::thread::capabilities(None).map_err(ExecError::start("capget"))?.permitted;
    let allowed = match spec.security {
        Security::Sandbox => spec.capabilities.set() & own,
        Security::Insecure => own,
    };
    for capability in CapabilitySet::all().iter().filter(|capability| !allowed.contains(*capability)) {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // EINVAL: a capability newer than this kernel.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(errno) => return Err(ExecError::start("bounding set")(errno)),
        }
    }
    if !spec.no_new_privileges {
        filter(task)?;
    }
    let nix_failed = |step: &'static str| {
        move |errno: nix::errno::Errno| ExecError::start(step)(Errno::from_raw_os_error(errno as i32))
    };
    let groups: Vec<Gid> = ids.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
    match nix::unistd::setgroups(&groups) {
        // With one id there are no groups to have, nor to leave.
        Err(nix::errno::Errno::EPERM) if userns::ids() == Ids::Single => {}
        other => other.map_err(nix_failed("setgroups"))?,
    }
    let (uid, gid) = (Uid::from_raw(ids.uid), Gid::from_raw(ids.gid));
    let unmapped = |kind: &str, id: u32| ExecError::BadUser {
        user: spec.user.clone().unwrap_or_default(),
        reason: format!("{kind} {id} is beyond the range of ids that this user was given"),
    };
    nix::unistd::setresgid(gid, gid, gid).map_err(|errno| match errno {
        nix::errno::Errno::EINVAL => unmapped("group", ids.gid),
        errno => nix_failed("setresgid")(errno),
    })?;
    nix::unistd::setresuid(uid, uid, uid).map_err(|errno| match errno {
        nix::errno::Errno::EINVAL => unmapped("user", ids.uid),
        errno => nix_failed("setresuid")(errno),
    })?;
    let kept = if ids.uid == 0 { allowed } else { CapabilitySet::empty() };
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(ExecError::start("capset"))?;
    if spec.no_new_privileges {
        rustix::thread::set_no_new_privs(true).map_err(ExecError::start("no_new_privs"))?;
    }
    Ok(())
}

/// Rust ignores SIGPIPE in its own programs; the container's must not inherit that.
fn reset_signals() -> Result<(), ExecError> {
    sys::unblock_signals().map_err(ExecError::start("signals"))?;
    sys::default_sigpipe().map_err(ExecError::start("signals"))
}

/// The program with everything `execve` needs, made before the last privileges are gone.
pub(super) struct Program {
    name: String,
    candidates: Vec<CString>,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    fn new(spec: &ProcessSpec, ids: &UserIds) -> Result<Self, ExecError> {
        let text = |text: &str| {
            CString::new(text).map_err(|_| ExecError::Start {
                step: format!("{text:?} holds a NUL byte"),
                source: std::io::ErrorKind::InvalidInput.into(),
            })
        };
        let name = spec.args.first().cloned().unwrap_or_default();
        let find = |name: &str| {
            spec.env.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
        };
        let candidates = if name.contains('/') {
            vec![text(&name)?]
        } else {
            let path = find("PATH").unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
            let dirs = path.split(':').map(|dir| if dir.is_empty() { "." } else { dir });
            dirs.map(|dir| text(&format!("{dir}/{name}"))).collect::<Result<_, _>>()?
        };
        let mut env: Vec<CString> = spec
            .env
            .iter()
            .map(|(name, value)| text(&format!("{name}={value}")))
            .collect::<Result<_, _>>()?;
        if find("HOME").is_none() {
            env.push(text(&format!("HOME={}", ids.home))?);
        }
        let args = spec.args.iter().map(|arg| text(arg)).collect::<Result<_, _>>()?;
        Ok(Self { name, candidates, args, env })
    }

    /// Tries the candidates in order, as execvp(3) does: what is missing is passed over, what is
    /// there and cannot be executed is remembered.
    pub(super) fn exec(self) -> ExecError {
        let args: Vec<_> = self.args.iter().map(CString::as_c_str).collect();
        let env: Vec<_> = self.env.iter().map(CString::as_c_str).collect();
        let mut denied = None;
        for candidate in &self.candidates {
            match sys::execve(candidate, &args, &env) {
                Errno::NOENT | Errno::NOTDIR if !exists(candidate) => {}
                errno => {
                    denied.get_or_insert((candidate, errno));
                }
            }
        }
        match denied {
            None => ExecError::NotFound { program: self.name },
            Some((file, errno)) => {
                let why = program_file::why_not(OsStr::from_bytes(file.as_bytes()).as_ref(), errno);
                ExecError::NotExecutable { program: self.name, why }
            }
        }
    }
}

/// ENOENT for a file that exists means that its interpreter or loader does not.
fn exists(path: &CString) -> bool {
    rustix::fs::access(path.as_c_str(), rustix::fs::Access::EXISTS).is_ok()
}
