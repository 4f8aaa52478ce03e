//! This process's streams, joined to a container's.

use std::collections::VecDeque;
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

/// How a container's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// As a shell shows it.
    pub code: i32,
    /// The kernel killed processes of the container for want of memory.
    pub oom_killed: bool,
}

/// How an attachment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// The process ended.
    Exited(Ended),
    /// The user has left it.
    Detached,
    /// Nobody reads our standard output any more.
    Unheard,
}

/// Where input goes, and where the terminal's size is told. What cannot be taken yet waits here, and the
/// rest with whoever sends it: blocking would stop output, and whoever waits for that takes no input.
struct Sink<'a> {
    to: To<'a>,
    pending: VecDeque<(u8, Vec<u8>)>,
    /// Nobody takes input any more: how the process ended, the monitor has said before it went.
    closed: bool,
}

enum To<'a> {
    Monitor(&'a Client),
    Master(&'a OwnedFd),
}

impl<'a> Sink<'a> {
    fn new(to: To<'a>) -> Self {
        if let To::Master(master) = to {
            let _ = rustix::io::ioctl_fionbio(master, true);
        }
        Self { to, pending: VecDeque::new(), closed: false }
    }

    fn is_blocked(&self) -> bool {
        !self.pending.is_empty()
    }

    fn input(&mut self, bytes: &[u8]) {
        self.pending.extend(bytes.chunks(CHUNK).map(|chunk| (STDIN, chunk.to_vec())));
        self.flush();
    }

    fn end(&mut self) {
        if let To::Monitor(_) = self.to {
            self.pending.push_back((STDIN, Vec::new()));
        }
        self.flush();
    }

    fn resize(&mut self) {
        let Ok(size) = tcgetwinsize(io::stdout()) else { return };
        match self.to {
            To::Monitor(_) => {
                let request = Request::Resize { rows: size.ws_row, columns: size.ws_col };
                self.pending.extend(serde_json::to_vec(&request).ok().map(|bytes| (CONTROL, bytes)));
                self.flush();
            }
            To::Master(master) => drop(tcsetwinsize(master, size)),
        }
    }

    /// Passes on what is taken without waiting.
    fn flush(&mut self) {
        while let Some((tag, bytes)) = self.pending.front_mut() {
            let result = match self.to {
                To::Monitor(client) => client.connection().try_send(*tag, bytes, &[]).map(|()| bytes.len()),
                To::Master(master) => rustix::io::write(master, bytes),
            };
            match result {
                Ok(count) if count < bytes.len() => drop(bytes.drain(..count)),
                Ok(_) => drop(self.pending.pop_front()),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => {
                    self.closed = true;
                    self.pending.clear();
                }
            }
        }
    }
}

/// Joins this process's standard streams to the container's until it ends or the user leaves.
///
/// # Errors
/// [`Error::Told`] when it does not start; [`Error::MonitorDied`].
pub fn attach(client: &Client, options: &AttachOptions) -> Result<Attached, Error> {
    client.request(&Request::Attach { stdin: options.stdin, output: true })?;
    let mut sink = Sink::new(To::Monitor(client));
    let mut local = Local::new(options);
    if options.start {
        client.request(&Request::Start)?;
    }
    local.resize(&mut sink);
    loop {
        let ready = local.wait(client, None, sink.is_blocked())?;
        if ready.monitor {
            let died = || Error::MonitorDied { name: client.name().to_owned() };
            let message = client.connection().receive().map_err(|_| died())?.ok_or_else(died)?;
            match message.tag {
                STDOUT if !write_all(io::stdout(), &message.bytes) => return Ok(Attached::Unheard),
                STDERR => drop(write_all(io::stderr(), &message.bytes)),
                CONTROL => match message.parse() {
                    Some(Reply::Exited { code, oom_killed }) => {
                        return Ok(Attached::Exited(Ended { code, oom_killed }));
                    }
                    Some(Reply::JustEnded) => return Err(Error::JustEnded),
                    Some(Reply::Failed { message, code, unfit }) => {
                        return Err(Error::Told { message, code, unfit });
                    }
                    Some(Reply::Started { .. }) => local.resize(&mut sink),
                    _ => {}
                },
                _ => {}
            }
        }
        if local.carry(&ready, &mut sink) {
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
    let mut sink = Sink::new(To::Master(master));
    let mut local = Local::new(options);
    local.resize(&mut sink);
    let mut open = true;
    loop {
        let ready = local.wait(client, open.then_some(master), sink.is_blocked())?;
        if ready.master {
            open = pass_output(master) != Output::Ended;
        }
        if ready.monitor {
            let code = client.exit_code()?;
            // What it printed last is there by now.
            while pass_output(master) == Output::Passed {}
            return Ok(Attached::Exited(Ended { code, oom_killed: false }));
        }
        if local.carry(&ready, &mut sink) {
            return Ok(Attached::Detached);
        }
    }
}

#[derive(PartialEq, Eq)]
enum Output {
    Passed,
    NoneYet,
    Ended,
}

/// One read of the terminal.
fn pass_output(master: &OwnedFd) -> Output {
    let mut buffer = [0; 16 << 10];
    match rustix::io::read(master, &mut buffer) {
        Ok(count) if count > 0 => {
            if write_all(io::stdout(), &buffer[..count]) {
                Output::Passed
            } else {
                Output::Ended
            }
        }
        Err(Errno::INTR) => Output::Passed,
        Err(Errno::AGAIN) => Output::NoneYet,
        _ => Output::Ended,
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

    fn resize(&self, sink: &mut Sink<'_>) {
        if self.resized.is_some() {
            sink.resize();
        }
    }

    /// Waits for one thing at least. With `blocked`, for the other side to take what it was sent, and not
    /// for more input.
    fn wait(&self, client: &Client, master: Option<&OwnedFd>, blocked: bool) -> Result<Ready, Error> {
        let stdin = rustix::stdio::stdin();
        let flags = |waits| if waits { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let to_monitor = flags(blocked && master.is_none());
        let mut fds = vec![PollFd::from_borrowed_fd(client.connection().as_fd(), to_monitor)];
        let mut places: Vec<fn(&mut Ready) -> &mut bool> = vec![|ready| &mut ready.monitor];
        if let Some(master) = master {
            fds.push(PollFd::new(master, flags(blocked)));
            places.push(|ready| &mut ready.master);
        }
        if self.input_open && !blocked {
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
            *place(&mut ready) = !(fd.revents() - PollFlags::OUT).is_empty();
        }
        Ok(ready)
    }

    /// Carries input and size; true when the user leaves.
    fn carry(&mut self, ready: &Ready, sink: &mut Sink<'_>) -> bool {
        if ready.resized {
            while let Some(Ok(Some(_))) = self.resized.as_ref().map(SignalFd::read_signal) {}
            sink.resize();
        }
        sink.flush();
        self.input_open &= !sink.closed;
        if !ready.input {
            return false;
        }
        let mut buffer = [0; CHUNK];
        match rustix::io::read(io::stdin(), &mut buffer) {
            Ok(0) => {
                self.input_open = false;
                if self.tell_end {
                    sink.end();
                }
            }
            Ok(count) => {
                let (passed, leaves) = match &mut self.keys {
                    Some(keys) => keys.filter(&buffer[..count]),
                    None => (buffer[..count].to_vec(), false),
                };
                sink.input(&passed);
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

/// False when nobody reads it.
fn write_all(to: impl AsFd, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(Errno::PIPE) => return false,
            // A disk that is full, a terminal that is gone: the rest is lost, and the process goes on.
            Err(_) => return true,
        }
    }
    true
}
