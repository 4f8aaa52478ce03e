//! This process's streams, joined to a container's.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use crate::wire::{CHUNK, CONTROL, Reply, Request, STDERR, STDIN, STDOUT};
use crate::{Client, DetachKeys, Error};

/// What is joined.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// Pass standard input on.
    pub stdin: bool,
    /// The container has a terminal: ours is put into raw mode.
    pub terminal: bool,
    /// What ends the attachment, and nothing else.
    pub detach_keys: DetachKeys,
    /// Start the process once everything is joined.
    pub start: bool,
}

/// How an attachment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// The process ended so, as a shell shows it.
    Exited(i32),
    /// The user has left it.
    Detached,
}

/// Where input goes, and where the terminal's size is told.
enum Sink<'a> {
    Monitor(&'a Client),
    Master(&'a OwnedFd),
}

impl Sink<'_> {
    fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        match self {
            Sink::Monitor(client) => {
                let died = |_| Error::MonitorDied { name: client.name().to_owned() };
                bytes
                    .chunks(CHUNK)
                    .try_for_each(|chunk| client.connection().send(STDIN, chunk, &[]).map_err(died))
            }
            Sink::Master(master) => {
                write_all(master, bytes);
                Ok(())
            }
        }
    }

    fn resize(&self) {
        let Ok(size) = tcgetwinsize(io::stdout()) else { return };
        match self {
            Sink::Monitor(client) => {
                let request = Request::Resize { rows: size.ws_row, columns: size.ws_col };
                let _ = client.connection().say(&request, &[]);
            }
            Sink::Master(master) => drop(tcsetwinsize(master, size)),
        }
    }
}

/// Joins this process's standard streams to the container's until it ends or the user leaves.
///
/// # Errors
/// [`Error::Told`] when it does not start; [`Error::MonitorDied`].
pub fn attach(client: &Client, options: &AttachOptions) -> Result<Attached, Error> {
    client.request(&Request::Attach { stdin: options.stdin, output: true })?;
    let sink = Sink::Monitor(client);
    let mut local = Local::new(options);
    if options.start {
        client.request(&Request::Start)?;
    }
    local.resize(&sink);
    loop {
        let ready = local.wait(client, None)?;
        if ready.monitor {
            let died = || Error::MonitorDied { name: client.name().to_owned() };
            let message = client.connection().receive().map_err(|_| died())?.ok_or_else(died)?;
            match message.tag {
                STDOUT => write_all(io::stdout(), &message.bytes),
                STDERR => write_all(io::stderr(), &message.bytes),
                CONTROL => match message.parse() {
                    Some(Reply::Exited { code }) => return Ok(Attached::Exited(code)),
                    Some(Reply::Failed { message, code }) => return Err(Error::Told { message, code }),
                    Some(Reply::Started { .. }) => local.resize(&sink),
                    _ => {}
                },
                _ => {}
            }
        }
        if local.carry(&ready, &sink) {
            return Ok(Attached::Detached);
        }
    }
}

/// Joins this process's terminal to that of a process in a container, whose `master` came with its
/// start over `client`.
///
/// # Errors
/// [`Error::MonitorDied`].
pub fn attach_terminal(
    client: &Client,
    master: &OwnedFd,
    options: &AttachOptions,
) -> Result<Attached, Error> {
    let sink = Sink::Master(master);
    let mut local = Local::new(options);
    local.resize(&sink);
    let mut open = true;
    loop {
        let ready = local.wait(client, open.then_some(master))?;
        if ready.master {
            open = pass_output(master);
        }
        if ready.monitor {
            let code = client.exit_code()?;
            // What it printed last is there by now.
            let _ = rustix::io::ioctl_fionbio(master, true);
            while pass_output(master) {}
            return Ok(Attached::Exited(code));
        }
        if local.carry(&ready, &sink) {
            return Ok(Attached::Detached);
        }
    }
}

/// One read of the terminal; false when it is empty and will stay so.
fn pass_output(master: &OwnedFd) -> bool {
    let mut buffer = [0; 16 << 10];
    match rustix::io::read(master, &mut buffer) {
        Ok(count) if count > 0 => {
            write_all(io::stdout(), &buffer[..count]);
            true
        }
        Err(Errno::INTR) => true,
        _ => false,
    }
}

/// What can be done without waiting.
#[derive(Default)]
struct Ready {
    monitor: bool,
    master: bool,
    input: bool,
    resized: bool,
}

/// This side: standard input, the terminal and its size.
struct Local {
    input_open: bool,
    tell_end: bool,
    keys: Option<DetachKeys>,
    /// The terminal's own settings, put back at the end.
    saved: Option<Termios>,
    resized: Option<SignalFd>,
}

impl Local {
    fn new(options: &AttachOptions) -> Self {
        let stdin = io::stdin();
        let on_terminal = options.terminal && stdin.is_terminal();
        let saved = if on_terminal && options.stdin { tcgetattr(&stdin).ok() } else { None };
        if let Some(saved) = &saved {
            let mut raw = saved.clone();
            raw.make_raw();
            let _ = tcsetattr(&stdin, OptionalActions::Now, &raw);
        }
        let resized = if options.terminal { watch_size() } else { None };
        let keys = options.terminal.then(|| options.detach_keys.clone());
        Self { input_open: options.stdin, tell_end: !options.terminal, keys, saved, resized }
    }

    fn resize(&self, sink: &Sink<'_>) {
        if self.resized.is_some() {
            sink.resize();
        }
    }

    fn wait(&self, client: &Client, master: Option<&OwnedFd>) -> Result<Ready, Error> {
        let stdin = rustix::stdio::stdin();
        let mut fds = vec![PollFd::from_borrowed_fd(client.connection().as_fd(), PollFlags::IN)];
        let mut places: Vec<fn(&mut Ready) -> &mut bool> = vec![|ready| &mut ready.monitor];
        if let Some(master) = master {
            fds.push(PollFd::new(master, PollFlags::IN));
            places.push(|ready| &mut ready.master);
        }
        if self.input_open {
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
            places.push(|ready| &mut ready.input);
        }
        if let Some(resized) = &self.resized {
            fds.push(PollFd::new(resized, PollFlags::IN));
            places.push(|ready| &mut ready.resized);
        }
        loop {
            match poll(&mut fds, None) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(kiln_executor::ExecError::from(errno).into()),
                Ok(_) => break,
            }
        }
        let mut ready = Ready::default();
        for (fd, place) in fds.iter().zip(places) {
            *place(&mut ready) = !fd.revents().is_empty();
        }
        Ok(ready)
    }

    /// Carries input and size; true when the user leaves.
    fn carry(&mut self, ready: &Ready, sink: &Sink<'_>) -> bool {
        if ready.resized {
            while let Some(Ok(Some(_))) = self.resized.as_ref().map(SignalFd::read_signal) {}
            sink.resize();
        }
        if !ready.input {
            return false;
        }
        let mut buffer = [0; 4096];
        match rustix::io::read(io::stdin(), &mut buffer) {
            Ok(0) => {
                self.input_open = false;
                if self.tell_end
                    && let Sink::Monitor(client) = sink
                {
                    let _ = client.connection().send(STDIN, &[], &[]);
                }
            }
            Ok(count) => {
                let (passed, leaves) = match &mut self.keys {
                    Some(keys) => keys.filter(&buffer[..count]),
                    None => (buffer[..count].to_vec(), false),
                };
                // Nobody takes it any more: how the process ended, the monitor has said before it went.
                self.input_open = sink.write(&passed).is_ok();
                return leaves;
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.input_open = false,
        }
        false
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, saved);
        }
    }
}

/// `SIGWINCH` as a descriptor; the size stays as it is where that cannot be.
fn watch_size() -> Option<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGWINCH);
    mask.thread_block().ok()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok()
}

fn write_all(to: impl AsFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR | Errno::AGAIN) => {}
            // A reader that went away misses the rest.
            Err(_) => return,
        }
    }
}
