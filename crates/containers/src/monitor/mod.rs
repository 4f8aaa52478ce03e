//! The process that looks after one container while it runs: its output, its clients, its end.
//!
//! One thread waits for everything (`poll`); others only wait for one process each and report to it.

mod clients;
mod datagrams;
mod health;
mod network;
mod output;
mod pause;
mod ports;
mod proxy;
mod requests;
mod resolver;
mod run;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use kiln_executor::{Cancel, ExecError, Exit, Finished, Linux, Started};
use kiln_snapshotter::Snapshotter;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::log::LogWriter;
use crate::wire::{self, Reply};
use crate::{Config, Container, Containers, Ended, Error, State};

use clients::{Client, ClientId};
use health::Checking;
use run::Run;

/// Whose streams the container has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streams {
    /// Its own: what it says goes to the log and to whoever is attached.
    Own,
    /// Those of this process.
    Ours,
}

/// What other threads report.
enum Event {
    Started(Started),
    Ended(Result<Finished, ExecError>),
    ExecStarted(u64, Started),
    ExecEnded(u64, Result<Exit, ExecError>),
    Checked(Result<Exit, ExecError>, Vec<u8>),
}

/// Reports, and wakes the thread that waits.
#[derive(Clone)]
struct Reporter {
    sender: Sender<Event>,
    waker: Arc<OwnedFd>,
}

impl Reporter {
    fn report(&self, event: Event) {
        if self.sender.send(event).is_ok() {
            let _ = rustix::io::write(&*self.waker, &1u64.to_ne_bytes());
        }
    }
}

/// A process beside the container's own.
struct Exec {
    client: ClientId,
    started: bool,
    master: Option<OwnedFd>,
}

/// What the monitor works with; it belongs to this process.
pub(crate) struct Tools {
    pub(crate) containers: Containers,
    pub(crate) snapshots: Arc<dyn Snapshotter>,
    pub(crate) linux: Arc<Linux>,
}

/// How the container's life under this monitor goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nobody has asked to start it yet.
    Waiting,
    /// It runs, or is about to.
    Running,
    /// It ended and starts again at that moment.
    Pausing(Instant),
    /// It ended for good, so.
    Over(i32),
}

pub(crate) struct Monitor {
    tools: Tools,
    container: Container,
    config: Config,
    state: State,
    streams: Streams,
    phase: Phase,
    listener: OwnedFd,
    clients: Vec<Client>,
    next_client: ClientId,
    run: Option<Run>,
    log: Option<LogWriter>,
    execs: HashMap<u64, Exec>,
    next_exec: u64,
    checking: Checking,
    /// The process gets SIGKILL then.
    kill_at: Option<Instant>,
    last_pause: Duration,
    /// Whoever stopped it wants it to start again.
    again: bool,
    /// The last state could only be written into the room that was kept for it.
    is_full: bool,
    /// Asks this process to end.
    signals: Option<SignalFd>,
    events: Receiver<Event>,
    reporter: Reporter,
    cancel: Cancel,
    /// Why the process did not start.
    failure: Option<Error>,
    /// Until it has ended.
    lock: Option<File>,
}

/// Whoever starts a monitor has this long to talk to it.
const FIRST_WORD: Duration = Duration::from_secs(10);

impl Monitor {
    /// Takes the container's lock and listens.
    pub(crate) fn open(
        tools: Tools,
        container: Container,
        streams: Streams,
        cancel: Cancel,
    ) -> Result<Self, Error> {
        let lock = container.lock_monitor()?;
        let failed = |call| {
            let path = container.dir().to_owned();
            move |source: std::io::Error| Error::Host { call, path, source }
        };
        let config = container.config()?;
        let state = container.state_under_lock()?;
        let listener = wire::listen_at(container.dir()).map_err(failed("listen in"))?;
        if !config.auto_remove {
            container.keep_room();
        }
        let log = match streams {
            Streams::Own if !config.log.none => {
                Some(LogWriter::open(container.dir(), config.log).map_err(failed("open the log in"))?)
            }
            _ => None,
        };
        let waker = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed("wait in")(errno.into()))?;
        let (sender, events) = channel();
        Ok(Self {
            checking: Checking::new(config.health.as_ref()),
            tools,
            container,
            config,
            state,
            streams,
            phase: Phase::Waiting,
            listener,
            clients: Vec::new(),
            next_client: 0,
            run: None,
            log,
            execs: HashMap::new(),
            next_exec: 0,
            kill_at: None,
            last_pause: Duration::ZERO,
            again: false,
            is_full: false,
            signals: None,
            events,
            reporter: Reporter { sender, waker: Arc::new(waker) },
            cancel,
            failure: None,
            lock: Some(lock),
        })
    }

    /// Looks after the container until it has ended for good; its exit code. When nobody asks to
    /// start it and all clients are gone, that is the end as well. What comes over `signals` asks for the
    /// container's end as `kiln stop` does.
    pub(crate) fn watch(mut self, signals: Option<SignalFd>) -> Result<i32, Error> {
        self.signals = signals;
        self.look_after()
    }

    fn look_after(&mut self) -> Result<i32, Error> {
        let begun = Instant::now();
        loop {
            match self.phase {
                Phase::Over(code)
                    if self.run.is_none() && self.execs.is_empty() && self.checking.is_idle() =>
                {
                    self.finish(code);
                    return Ok(code);
                }
                Phase::Waiting if self.clients.is_empty() && self.is_abandoned(begun) => return Ok(0),
                _ => {}
            }
            self.wait_once()?;
            self.handle_events();
            self.keep_time();
            self.flush_clients();
        }
    }

    /// Starts the process without being asked, and looks after it.
    pub(crate) fn run_at_once(mut self) -> Result<Ended, Error> {
        (self.state.stopped, self.state.pid) = (false, 0);
        self.begin();
        let code = self.look_after()?;
        let ended = Ended { code, oom_killed: self.state.oom_killed };
        self.failure.map_or(Ok(ended), Err)
    }

    /// Whoever starts a monitor talks to it at once, or is dead.
    fn is_abandoned(&self, begun: Instant) -> bool {
        self.next_client > 0 || begun.elapsed() > FIRST_WORD
    }

    /// Writes the state down. A disk that is full must neither end a container nor hide how it ended.
    fn note(&mut self) {
        // One that goes with its end leaves nothing to look up.
        if self.config.auto_remove {
            let _ = self.container.write_state(&self.state);
            return;
        }
        let was_full = std::mem::take(&mut self.is_full);
        self.is_full = self.container.write_state_somehow(&self.state).unwrap_or(true);
        if was_full && !self.is_full {
            // For the next time.
            self.container.keep_room();
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let pausing = if let Phase::Pausing(until) = self.phase { Some(until) } else { None };
        let waiting = (self.phase == Phase::Waiting).then(|| Instant::now() + FIRST_WORD);
        [pausing, waiting, self.kill_at, self.checking.deadline()].into_iter().flatten().min()
    }

    /// Waits for one thing at least, and carries what can be carried.
    fn wait_once(&mut self) -> Result<(), Error> {
        let timeout = self.next_deadline().map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(3600),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let full = self.clients.iter().any(Client::is_full);
        let mut fds = vec![
            PollFd::new(&*self.reporter.waker, PollFlags::IN),
            PollFd::new(&self.listener, PollFlags::IN),
        ];
        let mut owners = vec![Owner::Waker, Owner::Listener];
        if let Some(signals) = &self.signals {
            fds.push(PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN));
            owners.push(Owner::Signals);
        }
        for client in &self.clients {
            // Input that the process does not read waits with whoever sends it.
            let waits = client.stdin && self.run.as_ref().is_some_and(Run::is_input_full);
            let mut flags = if waits { PollFlags::empty() } else { PollFlags::IN };
            if client.has_pending() {
                flags |= PollFlags::OUT;
            }
            fds.push(PollFd::from_borrowed_fd(client.connection.as_fd(), flags));
            owners.push(Owner::Client(client.id));
        }
        if let Some(run) = &self.run {
            for (source, fd, flags) in run.poll_fds(full) {
                fds.push(PollFd::from_borrowed_fd(fd, flags));
                owners.push(Owner::Source(source));
            }
        }
        for (id, exec) in &self.execs {
            // A terminal whose client has gone must not fill up; one whose client is there is its.
            if let Some(master) = &exec.master
                && !self.clients.iter().any(|client| client.id == exec.client)
            {
                fds.push(PollFd::new(master, PollFlags::IN));
                owners.push(Owner::Forgotten(*id));
            }
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(ExecError::from(errno).into()),
        }
        let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        drop(fds);
        for (owner, ready) in owners.into_iter().zip(ready) {
            if !ready.is_empty() {
                self.serve(owner, ready);
            }
        }
        Ok(())
    }

    fn serve(&mut self, owner: Owner, ready: PollFlags) {
        match owner {
            Owner::Waker => {
                let mut count = [0; 8];
                let _ = rustix::io::read(&*self.reporter.waker, &mut count);
            }
            Owner::Listener => self.welcome(),
            Owner::Signals => self.hear_signal(),
            Owner::Client(id) => self.hear(id, ready),
            Owner::Source(source) => self.carry(source),
            Owner::Forgotten(id) => self.discard_output(id),
        }
    }

    fn hear_signal(&mut self) {
        while let Some(Ok(Some(info))) = self.signals.as_ref().map(SignalFd::read_signal) {
            // A terminal that is gone is none of a container's in the background.
            if i32::try_from(info.ssi_signo) != Ok(Signal::SIGHUP as i32) {
                self.shut_down();
            }
        }
    }

    fn handle_events(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            match event {
                Event::Started(started) => self.has_started(started),
                Event::Ended(result) => self.has_ended(result),
                Event::ExecStarted(id, started) => self.exec_started(id, started),
                Event::ExecEnded(id, result) => self.exec_ended(id, result),
                Event::Checked(result, output) => self.has_checked(&result, &output),
            }
        }
    }

    /// Does what is due.
    fn keep_time(&mut self) {
        let now = Instant::now();
        if self.kill_at.is_some_and(|at| at <= now) {
            self.kill_at = None;
            self.signal(9);
        }
        if let Phase::Pausing(until) = self.phase
            && until <= now
        {
            self.begin();
        }
        self.check_health(now);
    }

    /// Says goodbye: the state is written, the container gone if it shall be, and clients know.
    fn finish(&mut self, code: i32) {
        if self.config.auto_remove {
            crate::remove::remove_ended(&self.tools, &self.container, &self.config);
        }
        let _ = std::fs::remove_file(self.container.dir().join("socket"));
        self.tell_end(code);
        // From here on it is over for everybody else: it can be removed, or started by another monitor.
        // Clients that are there get all that is for them, however slowly they read.
        (self.log, self.lock) = (None, None);
        while self.clients.iter().any(Client::has_pending) {
            let mut fds: Vec<PollFd<'_>> = self
                .clients
                .iter()
                .filter(|client| client.has_pending())
                .map(|client| PollFd::from_borrowed_fd(client.connection.as_fd(), PollFlags::OUT))
                .collect();
            let _ = poll(&mut fds, None);
            drop(fds);
            self.flush_clients();
        }
    }
}

/// What a descriptor stands for.
#[derive(Clone, Copy)]
enum Owner {
    Waker,
    Listener,
    Signals,
    Client(ClientId),
    Source(run::Source),
    Forgotten(u64),
}

/// An error as a client is told of it.
fn failure(error: &Error) -> Reply {
    let unfit = error.unfit().cloned().map(Box::new);
    Reply::Failed { message: with_causes(error, "\ncaused by: "), code: error.exit_code(), unfit }
}

/// An error and its causes, with `between` in between.
fn with_causes(error: &Error, between: &str) -> String {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        message.push_str(between);
        message.push_str(&error.to_string());
        cause = error.source();
    }
    message
}
