//! The caller's side: starts the helper, carries output, waits.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, memfd_create, open};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{PipeFlags, pipe_with};

use super::channel::{MAX_FDS, Report, Task, receive, send};
use super::emulator::explain;
use super::net::{self, Lease};
use super::nursery::{self, Nursery, sockets};
use super::pty::Terminal;
use super::seccomp::{Compiled, Program, Seccomp};
use super::used_net::{self, UsedNetwork, UsedNetworks};
use super::user_net::UserNetwork;
use super::userns::{self, Ids};
use super::{cgroup, chown, mounts, oci, seccomp, sys};
use crate::{
    Cancel, ExecError, Executor, Exit, Finished, Handles, Managed, Network, ProcessSpec, Started, Stdio,
    Stream,
};

/// The name under which this binary is executed again as the helper.
pub(super) const HELPER_NAME: &str = "kiln-init";

/// Runs processes in Linux namespaces.
pub struct Linux {
    stubs: PathBuf,
    attach_at: PathBuf,
    program: PathBuf,
    /// The helper's program as a read-only mount; see [`read_only_copy`].
    guarded: OnceLock<Option<OwnedFd>>,
    pub(super) groups: cgroup::Groups,
    /// Bridge and address translation, looked after once.
    bridge: OnceLock<net::Bridge>,
    filters: Compiled,
    /// Network namespaces for the next processes.
    networks: UsedNetworks,
    /// A process was started before.
    launched: AtomicBool,
    /// Forks the helpers of the processes that follow.
    nursery: Mutex<Option<Nursery>>,
    /// Another program that runs the processes; `None`: kiln itself does.
    runtime: Option<PathBuf>,
}

impl Linux {
    /// Keeps its few directories below `state`, which must be on the store's file system.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn open(state: &Path) -> Result<Self, ExecError> {
        Self::open_with(state, PathBuf::from("/proc/self/exe"))
    }

    /// Like [`Linux::open`], for a program whose `main` does not call
    /// [`init_if_asked`](crate::init_if_asked): `program` is executed as the helper instead.
    ///
    /// # Errors
    /// When the directories cannot be made.
    pub fn open_with(state: &Path, program: PathBuf) -> Result<Self, ExecError> {
        let failed =
            |source| ExecError::Start { step: format!("directories below {}", state.display()), source };
        let single = userns::ids() == Ids::Single;
        let [stubs, attach_at] = match single {
            true => ["stubs-one-id", "root-one-id"],
            false => ["stubs", "root"],
        }
        .map(|name| state.join(name));
        // The last thing made says that all is there: two system calls on every later start.
        if !attach_at.is_dir() {
            make_stubs(&stubs).map_err(failed)?;
            if single {
                userns::make_stubs(&stubs).map_err(failed)?;
            }
            // After a power cut, too, it is the last.
            for dir in [&stubs.join("etc"), &stubs, state] {
                File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
            }
            std::fs::create_dir_all(&attach_at).map_err(failed)?;
        }
        let groups = cgroup::Groups::new(state);
        let guarded = OnceLock::new();
        Ok(Self {
            stubs,
            attach_at,
            program,
            guarded,
            groups,
            bridge: OnceLock::new(),
            filters: Compiled::default(),
            networks: UsedNetworks::default(),
            launched: AtomicBool::new(false),
            nursery: Mutex::default(),
            runtime: None,
        })
    }

    /// Has an OCI runtime, crun or runc, run what [`Executor::run`] is asked for; `program` is its
    /// absolute path. Processes that [`Linux::join`] a container are kiln's own all the same.
    pub fn with_runtime(self, program: PathBuf) -> Self {
        Self { runtime: Some(program), ..self }
    }

    /// What to execute as the helper.
    fn helper(&self) -> PathBuf {
        match self.guarded.get_or_init(|| read_only_copy(&self.program)) {
            Some(fd) => format!("/proc/self/fd/{}", fd.as_raw_fd()).into(),
            None => self.program.clone(),
        }
    }

    fn network(&self, spec: &ProcessSpec) -> Result<Option<(Lease, net::Address)>, ExecError> {
        if spec.network != Network::Default || userns::ids() != Ids::Host {
            return Ok(None);
        }
        let bridge = match self.bridge.get() {
            Some(bridge) => bridge,
            None => {
                let made = net::ensure_bridge()?;
                self.bridge.get_or_init(|| made)
            }
        };
        bridge.lease().map(Some)
    }

    /// The network of a container whose bridge a user may not make.
    fn user_network(&self, spec: &ProcessSpec) -> Option<UserNetwork> {
        let asked = spec.network == Network::Default && userns::ids() != Ids::Host;
        asked.then(|| UserNetwork::find().ok()).flatten()
    }
}

/// The program as a detached mount of its own that nobody can write through.
///
/// A process executed from it shows this mount as `/proc/PID/exe`, and so does whatever an image
/// makes a container's process execute by way of `/proc/self/exe`: opening that for writing is
/// EROFS, whoever asks and however long it waits (CVE-2019-5736). It costs three system calls in the
/// life of this process, where a sealed copy in memory would cost megabytes a step. `None` where no
/// mounts can be made, as by a user: there no container's process has the rights to write either.
fn read_only_copy(program: &Path) -> Option<OwnedFd> {
    let copy = mounts::clone_tree(CWD, program.to_str()?, false).ok()?;
    sys::restrict_mount(copy.as_fd(), MountAttrFlags::MOUNT_ATTR_RDONLY).ok()?;
    Some(copy)
}

/// Mount targets that every container needs.
fn make_stubs(stubs: &Path) -> io::Result<()> {
    for dir in ["proc", "sys", "dev", "etc"] {
        std::fs::create_dir_all(stubs.join(dir))?;
    }
    for file in ["etc/resolv.conf", "etc/hosts", "etc/hostname"] {
        File::create(stubs.join(file))?;
    }
    Ok(())
}

/// The calling side's ends of the container's streams.
struct Streams {
    /// Passed to the helper: standard input, output, error.
    theirs: [OwnedFd; 3],
    /// Read here.
    ours: Vec<(Stream, OwnedFd)>,
}

fn null(flags: OFlags) -> Result<OwnedFd, ExecError> {
    open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty()).map_err(ExecError::start("open /dev/null"))
}

fn dup(fd: impl AsFd) -> Result<OwnedFd, ExecError> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(ExecError::start("dup"))
}

impl Streams {
    fn for_stdio(stdio: &mut Stdio<'_>) -> Result<Self, ExecError> {
        let (stdout, stderr) = (io::stdout(), io::stderr());
        let (theirs, ours) = match stdio {
            Stdio::Captured(_) => {
                let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(ExecError::start("pipe"));
                let ((out_read, out_write), (err_read, err_write)) = (pipe()?, pipe()?);
                let ours = vec![(Stream::Stdout, out_read), (Stream::Stderr, err_read)];
                ([null(OFlags::RDONLY)?, out_write, err_write], ours)
            }
            Stdio::Output => ([null(OFlags::RDONLY)?, dup(stdout)?, dup(stderr)?], Vec::new()),
            // Taken: the caller's copy of a pipe's end would keep it open.
            Stdio::Managed(Managed { streams, .. }) if streams.is_some() => {
                (streams.take().expect("just looked"), Vec::new())
            }
            Stdio::Terminal | Stdio::Managed(_) => {
                ([null(OFlags::RDONLY)?, null(OFlags::WRONLY)?, null(OFlags::WRONLY)?], Vec::new())
            }
        };
        Ok(Self { theirs, ours })
    }
}

impl Executor for Linux {
    fn run(
        &self,
        mut handles: Handles,
        spec: &ProcessSpec,
        stdio: Stdio<'_>,
        cancel: &Cancel,
    ) -> Result<Finished, ExecError> {
        if cancel.is_cancelled() {
            return Err(ExecError::Cancelled);
        }
        let runtime = match &self.runtime {
            Some(program) => {
                oci::check(spec)?;
                let seccomp = seccomp::decided(spec).map(|profile| oci::seccomp_json(&profile));
                Some(oci::Runtime { program: program.clone(), seccomp })
            }
            None => None,
        };
        let managed = matches!(stdio, Stdio::Managed(_));
        let user_network = self.user_network(spec);
        // A container's network is its own for as long as there is the container.
        let network_back =
            !managed && runtime.is_none() && user_network.is_none() && used_net::leaves_unchanged(spec);
        let used = if network_back { self.networks.take(spec.network) } else { None };
        let network_is_up = used.is_some();
        let leased = match used {
            Some(UsedNetwork { namespace, leased }) => {
                handles.network = Some(namespace);
                leased
            }
            None => self.network(spec)?,
        };
        // The address is somebody else's only after the helper is gone.
        let (lease, address) = leased.unzip();
        // A runtime makes its own group.
        let resources = spec.resources.as_ref().filter(|_| runtime.is_none());
        let group = resources.map(|wanted| self.groups.make(wanted, managed)).transpose()?;
        let task = Task {
            inputs: handles.inputs.len(),
            groups: group.as_ref().map(cgroup::Group::doors).unwrap_or_default(),
            lease,
            runtime,
            network_is_up,
            network_back,
            user_network,
            ..self.task(spec, &stdio, false)?
        };
        let (mut finished, namespace) = self.launch(&task, handles, stdio, cancel)?;
        if let Some(namespace) = namespace {
            self.networks.put(UsedNetwork { namespace, leased: lease.zip(address) });
        }
        if let Some(group) = group {
            finished.usage = group.usage(finished.usage);
        }
        Ok(finished)
    }

    fn stub_dir(&self) -> &Path {
        &self.stubs
    }
}

impl Linux {
    pub(super) fn task(&self, spec: &ProcessSpec, stdio: &Stdio<'_>, join: bool) -> Result<Task, ExecError> {
        Ok(Task {
            // Compiled here: the helper only ever sees the program.
            spec: ProcessSpec { seccomp: Seccomp::Default, ..spec.clone() },
            parent_pid: i32::try_from(std::process::id()).unwrap_or(0),
            attach_at: self.attach_at.display().to_string(),
            terminal: stdio.has_terminal(),
            managed: matches!(stdio, Stdio::Managed(_)),
            join,
            inputs: 0,
            groups: Vec::new(),
            filter: self.filters.program(spec)?.map(|program| (*program).clone()),
            runtime: None,
            lease: None,
            network_is_up: false,
            network_back: false,
            user_network: None,
        })
    }

    /// Starts the helper with its task and waits for the end; with the network namespace that it gives
    /// back.
    pub(super) fn launch(
        &self,
        task: &Task,
        handles: Handles,
        mut stdio: Stdio<'_>,
        cancel: &Cancel,
    ) -> Result<(Finished, Option<OwnedFd>), ExecError> {
        let Streams { theirs, ours } = Streams::for_stdio(&mut stdio)?;
        let (here, there) = sockets()?;
        let mut helper = self.start_helper(there)?;
        let sent = send_task(&here, task, &handles, &theirs);
        // Only the container may hold the writing ends, or the reading ones never see the end.
        drop((theirs, handles));
        let streams = Followed { streams: ours, abandoned: task.join };
        let address = task.lease.as_ref().map(Lease::address);
        let outcome = sent.and_then(|()| follow(&here, streams, stdio, address, cancel));
        helper.finish(here);
        match outcome {
            Err(_) | Ok((Finished { exit: Exit::Signal(_), .. }, _)) if cancel.is_cancelled() => {
                Err(ExecError::Cancelled)
            }
            other => other.map_err(|error| explain(error, task.spec.platform.as_ref())),
        }
    }
}

/// Who runs the process.
enum Helper {
    /// Executed by this process.
    Own(Child),
    /// Forked by the nursery.
    Nursed,
}

impl Helper {
    /// Waits for its end; it ends by itself once `socket` is closed on this side. Nothing outlives it.
    fn finish(&mut self, socket: OwnedFd) {
        match self {
            Self::Own(child) => {
                drop(socket);
                let _ = child.wait();
            }
            Self::Nursed => {
                let _ = shutdown(&socket, Shutdown::Write);
                // Its own end closes with it.
                while let Ok(Some(_)) = receive(socket.as_fd()) {}
            }
        }
    }
}

impl Linux {
    /// A helper that listens on `socket`. The first one is executed; whoever starts a second may start
    /// many, which are forked.
    fn start_helper(&self, socket: OwnedFd) -> Result<Helper, ExecError> {
        if self.launched.swap(true, Ordering::Relaxed) {
            let mut nursery = self.nursery.lock().unwrap_or_else(PoisonError::into_inner);
            if nursery.is_none() {
                *nursery = Some(Nursery::start(&self.helper())?);
            }
            if nursery.as_ref().is_some_and(|nursery| nursery.fork(&socket).is_ok()) {
                return Ok(Helper::Nursed);
            }
            // Somebody has killed it. The next step finds a new one.
            *nursery = None;
        }
        Ok(Helper::Own(nursery::execute(&self.helper(), socket)?))
    }
}

fn send_task(
    socket: &OwnedFd,
    task: &Task,
    handles: &Handles,
    streams: &[OwnedFd; 3],
) -> Result<(), ExecError> {
    let memory = write_task(task)?;
    let [stdin, stdout, stderr] = streams;
    let mut fds = vec![memory.as_fd(), handles.root.as_fd(), stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    fds.extend(handles.network.as_ref().map(AsFd::as_fd));
    send(socket.as_fd(), b"task", &fds).map_err(ExecError::start("task"))?;
    for inputs in handles.inputs.chunks(MAX_FDS) {
        let fds: Vec<BorrowedFd<'_>> = inputs.iter().map(AsFd::as_fd).collect();
        send(socket.as_fd(), b"inputs", &fds).map_err(ExecError::start("inputs"))?;
    }
    Ok(())
}

fn write_task(task: &Task) -> Result<OwnedFd, ExecError> {
    let failed = |source| ExecError::Start { step: "task".to_owned(), source };
    let memory = memfd_create("kiln-task", MemfdFlags::CLOEXEC).map_err(ExecError::start("memfd_create"))?;
    let mut file = File::from(memory);
    let mut bytes = task.filter.as_ref().map(Program::to_bytes).unwrap_or_default();
    let length = u32::try_from(bytes.len()).unwrap_or(0).to_le_bytes();
    bytes.splice(0..0, length);
    serde_json::to_writer(&mut bytes, task).map_err(|error| failed(error.into()))?;
    file.write_all(&bytes).and_then(|()| file.rewind()).map_err(failed)?;
    Ok(file.into())
}

const NO_TIME: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Output to read.
struct Followed {
    streams: Vec<(Stream, OwnedFd)>,
    /// Processes that hold the writing ends may live on after the one that was started: then what there is
    /// at its end is all.
    abandoned: bool,
}

/// At most so much is read after the end: as much as pipes hold, and no more from whoever goes on writing.
const LAST_BYTES: usize = 1 << 20;

/// Carries output and waits for the helper's last word.
fn follow(
    socket: &OwnedFd,
    Followed { mut streams, abandoned }: Followed,
    mut stdio: Stdio<'_>,
    address: Option<Ipv4Addr>,
    cancel: &Cancel,
) -> Result<(Finished, Option<OwnedFd>), ExecError> {
    let mut outcome = None;
    let mut asked_to_stop = false;
    let (mut terminal, mut master) = (None::<Terminal>, None);
    let mut buffer = vec![0; 64 << 10];
    let mut left = LAST_BYTES;
    while outcome.is_none() || !streams.is_empty() {
        let last = abandoned && outcome.is_some();
        let mut fds: Vec<PollFd<'_>> = vec![];
        let cancel_flags = if asked_to_stop { PollFlags::empty() } else { PollFlags::IN };
        fds.push(PollFd::from_borrowed_fd(cancel.as_fd(), cancel_flags));
        let socket_flags = if outcome.is_some() { PollFlags::empty() } else { PollFlags::IN };
        fds.push(PollFd::new(socket, socket_flags));
        fds.extend(streams.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)));
        let first_terminal = fds.len();
        if let Some(terminal) = &terminal {
            fds.extend(terminal.poll_fds());
        }
        let count = match poll(&mut fds, last.then_some(&NO_TIME)) {
            Err(Errno::INTR) => continue,
            other => other.map_err(ExecError::start("poll"))?,
        };
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        if last && (count == 0 || left < buffer.len()) {
            break;
        }
        left -= if last { buffer.len() } else { 0 };

        if !ready[0].is_empty() && !asked_to_stop {
            asked_to_stop = true;
            let _ = send(socket.as_fd(), b"stop", &[]);
        }
        let readable = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        let mut open = Vec::with_capacity(streams.len());
        for ((stream, fd), events) in streams.into_iter().zip(&ready[2..]) {
            if !events.intersects(readable) || pass_on(stream, fd.as_fd(), &mut stdio, &mut buffer) {
                open.push((stream, fd));
            }
        }
        streams = open;
        if let Some(terminal) = &mut terminal {
            terminal.carry(&ready[first_terminal..]);
        }
        if ready[1].intersects(readable) && outcome.is_none() {
            match receive(socket.as_fd()).map_err(ExecError::start("report"))? {
                None => outcome = Some(Err(ExecError::HelperDied)),
                Some((bytes, fds)) => match serde_json::from_slice(&bytes) {
                    Ok(Report::Terminal) if matches!(stdio, Stdio::Managed(_)) => {
                        master = fds.into_iter().next();
                    }
                    Ok(Report::Owners(uid, gid)) => {
                        if let Some(listener) = fds.into_iter().next() {
                            chown::answer(listener, (uid, gid));
                        }
                    }
                    Ok(Report::Started(pid)) => {
                        if let Stdio::Managed(managed) = &mut stdio {
                            (managed.started)(Started { pid, terminal: master.take(), address });
                        }
                    }
                    Ok(Report::Terminal) => terminal = fds.into_iter().next().map(Terminal::join),
                    Ok(Report::Ended(exit, usage)) => {
                        outcome = Some(Ok((Finished { exit, usage }, fds.into_iter().next())));
                    }
                    Ok(Report::Failed(failure)) => outcome = Some(Err(failure.into())),
                    Err(_) => outcome = Some(Err(ExecError::HelperDied)),
                },
            }
        }
    }
    if let Some(terminal) = terminal {
        terminal.drain();
    }
    outcome.unwrap_or(Err(ExecError::HelperDied))
}

/// Reads once; false at the end of the stream.
fn pass_on(stream: Stream, fd: BorrowedFd<'_>, stdio: &mut Stdio<'_>, buffer: &mut [u8]) -> bool {
    match rustix::io::read(fd, &mut *buffer) {
        Ok(0) => false,
        Ok(count) => {
            if let Stdio::Captured(callback) = stdio {
                callback(stream, &buffer[..count]);
            }
            true
        }
        Err(Errno::INTR | Errno::AGAIN) => true,
        Err(_) => false,
    }
}

/// Reads the task out of its memory file, in the helper.
pub(super) fn read_task(memory: OwnedFd) -> Option<Task> {
    let mut bytes = Vec::new();
    File::from(memory).read_to_end(&mut bytes).ok()?;
    let (length, rest) = bytes.split_first_chunk()?;
    let (filter, text) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    let mut task: Task = serde_json::from_slice(text).ok()?;
    task.filter = (!filter.is_empty()).then(|| Program::from_bytes(filter));
    Some(task)
}
