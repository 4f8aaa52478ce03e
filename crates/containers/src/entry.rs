//! The monitor as a process of its own: this program, executed again under another name.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use kiln_executor::{Cancel, Linux};
use kiln_snapshotter::{Backend, Snapshotter};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::monitor::{Monitor, Streams, Tools};
use crate::{Container, Containers, Error};

/// The name under which this binary is executed again as a container's monitor.
const MONITOR_NAME: &str = "kiln-monitor";
/// The files with certificates that its container is to trust.
const CERTIFICATES: &str = "KILN_CERTIFICATES";
/// What it says once it listens.
const READY: &str = "ready";

/// Early in `main`: where this process was started as a container's monitor, does that job and never
/// returns; otherwise does nothing.
pub fn monitor_if_asked() {
    if std::env::args_os().next().is_some_and(|name| name == MONITOR_NAME) {
        std::process::exit(i32::from(monitor().is_err()));
    }
}

/// Starts a monitor for a container that has none; returns once it listens. It has its own session, and
/// goes on when this process ends.
///
/// # Errors
/// [`Error::Told`] with what the monitor says.
pub(crate) fn start_monitor(
    containers: &Containers,
    container: &Container,
    backend: Backend,
) -> Result<(), Error> {
    let failed = |call| {
        let path = container.dir().to_owned();
        move |source| Error::Host { call, path, source }
    };
    let certificates = std::env::join_paths(containers.certificates())
        .map_err(|error| failed("tell the certificates to a monitor for")(io::Error::other(error)))?;
    let mut child = Command::new("/proc/self/exe")
        .arg0(MONITOR_NAME)
        .arg(containers.root())
        .arg(backend.to_string())
        .arg(container.id().as_str())
        .env_clear()
        .env(CERTIFICATES, certificates)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed("start a monitor for"))?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(64 << 10).read_to_string(&mut said).map_err(failed("hear the monitor of"))?;
    }
    match said.trim_end() {
        READY => Ok(()),
        "" => Err(Error::MonitorDied { name: container.id().short().to_owned() }),
        message => Err(Error::told(message, 125)),
    }
}

fn monitor() -> Result<(), Error> {
    // Whoever started it may have a terminal whose signals are none of the container's.
    let _ = rustix::process::setsid();
    forget_signals();
    let signals = take_signals();
    raise_limit_of_files();
    let opened = open();
    let word = match &opened {
        Ok(_) => READY.to_owned(),
        Err(error) => error.to_string(),
    };
    let mut stdout = io::stdout();
    let _ = writeln!(stdout, "{word}").and_then(|()| stdout.flush());
    // Nobody waits any longer; and nobody must wait for a stream of a process that lives on.
    if let Ok(null) = std::fs::File::options().read(true).write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
    opened?.watch(signals).map(drop)
}

/// Drops what was sent to the caller's whole group before this process had one of its own, and waits here
/// because the caller blocks it: a Ctrl-C is the caller's, which lets its monitor go if it ends of that.
fn forget_signals() {
    let mut keys = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        keys.add(signal);
    }
    let Ok(sent) = SignalFd::with_flags(&keys, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK) else {
        return;
    };
    while let Ok(Some(_)) = sent.read_signal() {}
}

/// The signals that ask a process to end, as a descriptor; all others as they are for who has been started
/// by nobody in particular. Called before the first thread: all have what this says.
fn take_signals() -> Option<SignalFd> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        mask.add(signal);
    }
    let mut blocked = mask;
    // A log beyond the limit on sizes of files is an error like any other, EFBIG.
    blocked.add(Signal::SIGXFSZ);
    blocked.thread_set_mask().ok()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok()
}

/// However few files the caller may open: each process in the container takes some of this one's. The
/// container's own limit is the executor's affair.
fn raise_limit_of_files() {
    let now = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum });
}

fn open() -> Result<Monitor, Error> {
    let mut args = std::env::args_os().skip(1);
    let (Some(root), Some(backend), Some(id)) = (args.next(), args.next(), args.next()) else {
        return Err(Error::told("no container is named", 125));
    };
    let told = |message: String| Error::told(message, 125);
    let root = PathBuf::from(root);
    let backend: Backend = backend.to_string_lossy().parse().map_err(told)?;
    let container = Container::at(root.join("containers").join(id)).map_err(told)?;
    let snapshots: Arc<dyn Snapshotter> = kiln_snapshotter::open(&root.join("snapshots"), backend)?;
    let mut linux = Linux::open(&root.join("state/executor"))?;
    if let Some(runtime) = container.config()?.runtime {
        linux = linux.with_runtime(runtime);
    }
    let linux = Arc::new(linux);
    let certificates = std::env::var_os(CERTIFICATES).unwrap_or_default();
    let files: Vec<PathBuf> =
        std::env::split_paths(&certificates).filter(|path| !path.as_os_str().is_empty()).collect();
    let containers = Containers::open(&root).trust(&files);
    let containers = containers.map_err(|(path, error)| told(format!("{}: {error}", path.display())))?;
    let tools = Tools { containers, snapshots, linux };
    Monitor::open(tools, container, Streams::Own, Cancel::new()?)
}
