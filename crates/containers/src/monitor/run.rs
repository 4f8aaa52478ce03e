//! One run of the container's process: from its start to its end, and whether it starts again.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use kiln_executor::{
    ExecError, Executor, Finished, Handles, Ids, Managed, MoreGroups, Relay, Started, Stdio, Stream,
};
use kiln_oci::{BindMount, Mount, TmpfsMount};
use kiln_snapshotter::OpenOptions;
use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags, open};
use rustix::pipe::{PipeFlags, pipe_with};

use super::network::{Joined, introduce};
use super::ports::Ports;
use super::{Event, Monitor, Phase, Streams, failure, with_causes};
use crate::config::MountKind;
use crate::process::{open_process, send_signal, start_ticks};
use crate::wire::Reply;
use crate::{Error, Status, Time, Volumes};

/// Where bytes come from or go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Output(Stream),
    Terminal,
    Input,
}

/// A process from its start to its end.
pub(super) struct Run {
    pub(super) process: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    pub(super) stdin: Option<OwnedFd>,
    pub(super) master: Option<OwnedFd>,
    /// To be sent when there is a process.
    pub(super) due: Option<i32>,
    /// Carries the streams that are this process's.
    relay: Option<Relay>,
    /// What clients have sent and the process has not read.
    pub(super) input: VecDeque<u8>,
    /// Nothing will follow `input`.
    pub(super) input_ends: bool,
    /// Its networks, where it has others than its helper makes.
    pub(super) network: Option<Joined>,
    /// The host's ports that lead inside.
    pub(super) ports: Ports,
    /// Control groups for limits that it was given later.
    pub(super) more_groups: Vec<MoreGroups>,
    began: Instant,
}

/// More input than this waits with whoever sends it.
const INPUT_BYTES: usize = 256 << 10;

impl Run {
    pub(super) fn is_input_full(&self) -> bool {
        self.input.len() >= INPUT_BYTES
    }

    /// What to wait for; with `full`, output stays where it is.
    pub(super) fn poll_fds(&self, full: bool) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let mut fds = Vec::new();
        let output = [(Stream::Stdout, &self.stdout), (Stream::Stderr, &self.stderr)];
        for (stream, fd) in output {
            if let Some(fd) = fd
                && !full
            {
                fds.push((Source::Output(stream), fd.as_fd(), PollFlags::IN));
            }
        }
        let has_input = !self.input.is_empty();
        if let Some(master) = &self.master {
            let mut flags = if full { PollFlags::empty() } else { PollFlags::IN };
            flags.set(PollFlags::OUT, has_input);
            if !flags.is_empty() {
                fds.push((Source::Terminal, master.as_fd(), flags));
            }
        }
        if let Some(stdin) = &self.stdin
            && (has_input || self.input_ends)
        {
            fds.push((Source::Input, stdin.as_fd(), PollFlags::OUT));
        }
        fds
    }
}

fn null(flags: OFlags) -> Result<OwnedFd, Error> {
    Ok(open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty()).map_err(ExecError::from)?)
}

impl Monitor {
    /// Starts the process, for the first time or again.
    pub(super) fn begin(&mut self) {
        self.phase = Phase::Running;
        if !self.state.begun {
            // One that shall go with its end goes although its monitor is killed from here on.
            self.state.begun = true;
            self.note();
        }
        if let Err(error) = self.try_begin() {
            self.run = None;
            self.did_not_start(error);
        }
    }

    fn try_begin(&mut self) -> Result<(), Error> {
        let mut process = self.process()?;
        let ports = Ports::take(&self.config.ports)?;
        let network = Joined::make(&self.tools.containers, &self.container, &self.config)?;
        let mut handle = None;
        self.state.endpoints = Vec::new();
        if let Some(joined) = &network {
            self.state.endpoints = joined.endpoints();
            introduce(&self.tools.containers, &self.config, &self.state.endpoints, &mut process)?;
            handle = Some(joined.handle()?);
            // The process may ask for itself at once.
            self.note();
        }
        let root = self.tools.snapshots.open_active(
            &self.config.id.key(),
            &OpenOptions {
                extra_lower: vec![self.tools.linux.stub_dir().to_owned()],
                durable: !self.config.auto_remove,
                ..OpenOptions::default()
            },
        )?;
        let mut handles = Handles { root, inputs: Vec::new(), network: handle };
        self.tools.containers.authorities().give(&mut process, &mut handles)?;
        let mut run = Run {
            process: None,
            stdout: None,
            stderr: None,
            stdin: None,
            master: None,
            due: None,
            relay: None,
            input: VecDeque::new(),
            input_ends: false,
            network,
            ports,
            more_groups: Vec::new(),
            began: Instant::now(),
        };
        let streams = match self.streams {
            _ if self.config.tty => None,
            Streams::Ours => {
                let (streams, relay) = Relay::of_standard_streams(self.config.open_stdin)
                    .map_err(|source| ExecError::Start { step: "standard streams".to_owned(), source })?;
                run.relay = Some(relay);
                Some(streams)
            }
            Streams::Own => {
                let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(ExecError::from);
                let stdin = if self.config.open_stdin {
                    let (read, write) = pipe()?;
                    rustix::io::ioctl_fionbio(&write, true).map_err(ExecError::from)?;
                    run.stdin = Some(write);
                    read
                } else {
                    null(OFlags::RDONLY)?
                };
                let ((out, out_end), (err, err_end)) = (pipe()?, pipe()?);
                (run.stdout, run.stderr) = (Some(out), Some(err));
                Some([stdin, out_end, err_end])
            }
        };
        let (linux, cancel, reporter) =
            (self.tools.linux.clone(), self.cancel.clone(), self.reporter.clone());
        let work = move || {
            let told = reporter.clone();
            let mut started = move |started: Started| told.report(Event::Started(started));
            let stdio = Stdio::Managed(Managed { streams, started: &mut started });
            let ended = linux.run(handles, &process, stdio, &cancel);
            // What the monitor has is the last then: its helpers are gone before it is.
            drop(linux);
            reporter.report(Event::Ended(ended));
        };
        // The kernel ends the container with this thread, not only with the process.
        thread::Builder::new().name("container".to_owned()).spawn(work).map_err(|source| Error::Host {
            call: "start a thread for",
            path: self.container.dir().to_owned(),
            source,
        })?;
        self.run = Some(run);
        Ok(())
    }

    /// The process with what is mounted.
    fn process(&self) -> Result<kiln_executor::ProcessSpec, Error> {
        let volumes = Volumes::open(self.tools.containers.root());
        let mut process = self.config.process.clone();
        for mount in &self.config.mounts {
            let (target, read_only) = (mount.target.clone(), mount.read_only);
            process.mounts.push(match &mount.kind {
                MountKind::Bind(source) => {
                    Mount::Bind(BindMount { source: source.clone(), target, read_only })
                }
                MountKind::Volume { name, .. } => {
                    Mount::Bind(BindMount { source: volumes.data(name)?, target, read_only })
                }
                &MountKind::Tmpfs { size_bytes, mode, executable } => {
                    Mount::Tmpfs(TmpfsMount { target, size_bytes, mode, executable })
                }
            });
        }
        Ok(process)
    }

    pub(super) fn has_started(&mut self, started: Started) {
        let Some(run) = &mut self.run else { return };
        let ticks = start_ticks(started.pid).unwrap_or(0);
        run.process = open_process(started.pid, ticks);
        if let (Some(process), Some(signal)) = (&run.process, run.due.take()) {
            let _ = send_signal(process, signal);
        }
        if let Some(master) = &started.terminal {
            let _ = rustix::io::ioctl_fionbio(master, true);
        }
        run.master = started.terminal;
        let state = &mut self.state;
        (state.status, state.pid, state.pid_start) = (Status::Running, started.pid, ticks);
        (state.started, state.finished, state.exit_code) = (Time::now(), Time::NEVER, 0);
        (state.error, state.oom_killed) = (String::new(), false);
        state.endpoints.extend(started.address.map(Self::usual_endpoint));
        state.address = state.endpoints.first().map(|endpoint| endpoint.address);
        state.ports = run.ports.bound();
        let internal = run.network.as_ref().is_some_and(Joined::is_internal);
        let led = match state.address {
            Some(address) => run.ports.lead_to(address, internal, &self.config.id).map_err(|e| e.to_string()),
            None if kiln_executor::ids() != Ids::Host => {
                run.ports.lead_into(started.pid).map_err(|e| e.to_string())
            }
            None => Ok(()),
        };
        if let Err(error) = led {
            state.error = format!("published ports: {error}");
        }
        state.paused_by_signals = false;
        self.checking.begin(state);
        self.note();
        self.reply_to(|client| &mut client.starter, &Reply::Started { pid: started.pid });
    }

    pub(super) fn has_ended(&mut self, result: Result<Finished, ExecError>) {
        // All writers are gone: what is left in the pipes is all there will be.
        self.drain();
        let Some(mut run) = self.run.take() else { return };
        run.relay.take().into_iter().for_each(Relay::finish);
        (self.kill_at, self.checking.next) = (None, None);
        let code = match result {
            Ok(finished) => {
                let later: u64 = run.more_groups.iter().map(MoreGroups::oom_kills).sum();
                self.state.oom_killed = finished.usage.oom_kills + later > 0;
                finished.exit.shell_code()
            }
            Err(ExecError::Cancelled) => 130,
            Err(error) if self.state.pid == 0 => return self.did_not_start(error.into()),
            // Somebody killed the helper, and the kernel the container with it.
            Err(_) => 137,
        };
        self.ended_with(code, run.began.elapsed());
    }

    fn did_not_start(&mut self, error: Error) {
        self.state.error = with_causes(&error, ": ");
        let reply = failure(&error);
        self.reply_to(|client| &mut client.starter, &reply);
        let code = i32::from(error.exit_code());
        self.failure = Some(error);
        if self.state.started == Time::NEVER {
            // docker: it has not run, so it is as it was made.
            self.state.exit_code = code;
            (self.state.status, self.state.pid) = (Status::Created, 0);
            self.state.endpoints = Vec::new();
            self.note();
            self.phase = Phase::Over(code);
            return;
        }
        self.ended_with(code, Duration::ZERO);
    }

    fn ended_with(&mut self, code: i32, ran: Duration) {
        let state = &mut self.state;
        (state.pid, state.pid_start, state.exit_code, state.address) = (0, 0, code, None);
        (state.endpoints, state.ports) = (Vec::new(), Vec::new());
        state.finished = Time::now();
        let (restarts, last) = (state.restarts, self.last_pause);
        if std::mem::take(&mut self.again) && !self.cancel.is_cancelled() {
            // docker: this is no restart that counts.
            (state.stopped, state.restarts, state.status) = (false, 0, Status::Restarting);
            self.last_pause = Duration::ZERO;
            self.note();
            self.phase = Phase::Pausing(Instant::now());
            // Who asked for its end before has it.
            let ended = Reply::Exited { code, oom_killed: self.state.oom_killed };
            self.reply_to(|client| &mut client.waiter, &ended);
            self.reply_to(|client| &mut client.stopper, &Reply::Done);
            return;
        }
        let pause = match state.stopped || self.cancel.is_cancelled() {
            true => None,
            false => self.config.restart.pause(code, restarts, ran, last),
        };
        let Some(pause) = pause else {
            state.status = Status::Exited;
            self.note();
            self.phase = Phase::Over(code);
            return;
        };
        (state.status, state.restarts) = (Status::Restarting, restarts + 1);
        self.last_pause = pause;
        self.note();
        self.phase = Phase::Pausing(Instant::now() + pause);
        self.tell_end(code);
    }
}
