//! What clients ask for.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::Instant;

use kiln_executor::{ExecError, Exit, Managed, Resources, Started, Stdio};

use super::clients::ClientId;
use super::{Event, Exec, Monitor, Phase, Streams, failure};
use crate::process::send_signal;
use crate::wire::{CONTROL, Message, Reply, Request, STDIN, from_file};
use crate::{Error, Status};

impl Monitor {
    pub(super) fn obey(&mut self, id: ClientId, message: Message) {
        match message.tag {
            STDIN => self.take_input(id, &message.bytes),
            CONTROL if message.lacks_fds => self.refuse(id, "the monitor has no more files to open", 126),
            CONTROL => match message.parse() {
                Some(request) => self.grant(id, request, message.fds),
                None => self.refuse(id, "this monitor is of another kiln", 125),
            },
            _ => {}
        }
    }

    fn answer(&mut self, id: ClientId, reply: &Reply) {
        if let Some(client) = self.client(id) {
            client.reply(reply);
        }
    }

    fn refuse(&mut self, id: ClientId, message: &str, code: u8) {
        self.answer(id, &Reply::Failed { message: message.to_owned(), code, unfit: None });
    }

    fn grant(&mut self, id: ClientId, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Start => self.start(id),
            Request::Attach { .. } if self.streams == Streams::Ours => {
                self.refuse(id, "its streams are those of the command that runs it", 125);
            }
            Request::Attach { stdin, output } => {
                let stdin = stdin && self.config.open_stdin;
                if let Some(client) = self.client(id) {
                    (client.stdin, client.output) = (stdin, output);
                }
            }
            Request::Resize { rows, columns } => self.resize(rows, columns),
            Request::Kill { signal } => match self.kill(signal) {
                Ok(()) => self.answer(id, &Reply::Done),
                Err(error) => self.answer(id, &failure(&error)),
            },
            Request::Stop { signal, seconds } => self.stop(id, signal, seconds),
            Request::Restart { signal, seconds } => self.restart(id, signal, seconds),
            Request::Pause => match self.pause() {
                Ok(None) => self.answer(id, &Reply::Done),
                Ok(Some(message)) => self.answer(id, &Reply::Warning { message }),
                Err(error) => self.answer(id, &failure(&error)),
            },
            Request::Unpause => match self.unpause() {
                Ok(()) => self.answer(id, &Reply::Done),
                Err(error) => self.answer(id, &failure(&error)),
            },
            Request::Wait => {
                if let Some(client) = self.client(id) {
                    client.waiter = true;
                }
            }
            Request::Exec { terminal } => self.exec(id, terminal, fds),
            Request::Reload => match self.reload() {
                Ok(()) => self.answer(id, &Reply::Done),
                Err(error) => self.answer(id, &failure(&error)),
            },
        }
    }

    /// Sees what has changed in the config. Where the kernel refuses other limits, nothing has.
    fn reload(&mut self) -> Result<(), Error> {
        let Ok(config) = self.container.config() else { return Ok(()) };
        let none = Resources::default();
        let before = self.config.process.resources.as_ref().unwrap_or(&none);
        let wanted = config.process.resources.as_ref().unwrap_or(&none);
        if before != wanted
            && let Ok(process) = self.process_fd()
        {
            let more = self.tools.linux.change_limits(process.as_fd(), before, wanted)?;
            if let Some(run) = &mut self.run {
                run.more_groups.extend(more);
            }
        }
        self.config = config;
        self.adjust_networks()
    }

    fn start(&mut self, id: ClientId) {
        match self.phase {
            Phase::Waiting => {
                let state = &mut self.state;
                (state.stopped, state.restarts, state.pid) = (false, 0, 0);
                state.error.clear();
                if let Some(client) = self.client(id) {
                    client.starter = true;
                }
                self.begin();
            }
            Phase::Running if self.state.status == Status::Paused => {
                let name = self.config.name.clone();
                self.answer(id, &failure(&Error::WrongState { name, problem: "is paused" }));
            }
            // It was somebody else who started it, just now.
            Phase::Running | Phase::Pausing(_) => self.answer(id, &Reply::Done),
            Phase::Over(_) => self.answer(id, &Reply::JustEnded),
        }
    }

    fn take_input(&mut self, id: ClientId, bytes: &[u8]) {
        let allowed = self.client(id).is_some_and(|client| client.stdin);
        let Some(run) = self.run.as_mut().filter(|_| allowed) else { return };
        if bytes.is_empty() {
            // A terminal's input has no end.
            run.input_ends = run.master.is_none();
        } else {
            run.input.extend(bytes);
        }
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        if let Some(master) = self.run.as_ref().and_then(|run| run.master.as_ref()) {
            let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            let _ = rustix::termios::tcsetwinsize(master, size);
        }
    }

    fn not_running(&self) -> Error {
        Error::NotRunning { name: self.config.name.clone() }
    }

    /// Process 1; an error when there is none.
    pub(super) fn process_fd(&self) -> Result<&OwnedFd, Error> {
        self.run.as_ref().and_then(|run| run.process.as_ref()).ok_or_else(|| self.not_running())
    }

    /// Sends a signal; to a process that is about to start, once it has.
    pub(super) fn signal(&mut self, signal: i32) {
        let Some(run) = &mut self.run else { return };
        match &run.process {
            Some(process) => drop(send_signal(process, signal)),
            None => run.due = Some(signal),
        }
    }

    fn kill(&mut self, signal: i32) -> Result<(), Error> {
        let process = self.process_fd()?;
        send_signal(process, signal).map_err(ExecError::from)?;
        if signal == 9 || signal == self.config.process.stop_signal {
            // Who kills it does not want it to start again.
            self.state.stopped = true;
            self.note();
        }
        if signal == 9 && self.state.status == Status::Paused {
            self.unpause()?;
        }
        Ok(())
    }

    /// Ends the container as `kiln stop` does, because this process was asked to end.
    pub(super) fn shut_down(&mut self) {
        match self.phase {
            // Nobody has started anything.
            Phase::Waiting => self.phase = Phase::Over(0),
            _ => self.stop(ClientId::MAX, None, None),
        }
    }

    fn stop(&mut self, id: ClientId, signal: Option<i32>, seconds: Option<i64>) {
        self.state.stopped = true;
        if std::mem::take(&mut self.again) {
            // It was restarted, and is stopped now: one after the other.
            self.reply_to(|client| &mut client.starter, &Reply::Done);
        }
        self.note();
        if let Some(client) = self.client(id) {
            client.stopper = true;
        }
        match self.phase {
            Phase::Running => {
                if self.state.status == Status::Paused {
                    let _ = self.unpause();
                }
                let grace = self.config.stop_grace(seconds);
                self.signal(signal.unwrap_or(self.config.process.stop_signal));
                if let Some(grace) = grace {
                    let at = Instant::now() + grace;
                    self.kill_at = Some(self.kill_at.map_or(at, |before| before.min(at)));
                }
            }
            Phase::Pausing(_) => {
                self.state.status = Status::Exited;
                self.note();
                self.phase = Phase::Over(self.state.exit_code);
            }
            Phase::Waiting | Phase::Over(_) => {
                self.answer(id, &Reply::Done);
                if let Some(client) = self.client(id) {
                    client.stopper = false;
                }
            }
        }
    }

    fn restart(&mut self, id: ClientId, signal: Option<i32>, seconds: Option<i64>) {
        match self.phase {
            Phase::Over(_) | Phase::Waiting => return self.answer(id, &Reply::JustEnded),
            Phase::Pausing(_) => self.phase = Phase::Pausing(Instant::now()),
            Phase::Running => {
                self.stop(id, signal, seconds);
                if let Some(client) = self.client(id) {
                    client.stopper = false;
                }
                self.again = true;
            }
        }
        if let Some(client) = self.client(id) {
            client.starter = true;
        }
    }

    fn exec(&mut self, client: ClientId, terminal: bool, mut fds: Vec<OwnedFd>) {
        let Some(Ok(process)) = fds.pop().map(from_file) else {
            return self.refuse(client, "it is not said what to run", 126);
        };
        // docker: what is wrong with the container is 1, what is wrong with the process 126 or 127.
        let container = match self.process_fd() {
            Ok(container) if self.state.status == Status::Running => dup(container),
            Ok(_) => Err(Error::WrongState { name: self.config.name.clone(), problem: "is paused" }),
            Err(error) => Err(error),
        };
        let streams = match <[OwnedFd; 3]>::try_from(fds) {
            Ok(_) if terminal => None,
            Ok(streams) => Some(streams),
            Err(_) => return self.refuse(client, "three streams are needed", 126),
        };
        let container = match container {
            Ok(container) => container,
            Err(error) => return self.answer(client, &with_code(&error, 1)),
        };
        let id = self.next_exec;
        self.next_exec += 1;
        let (linux, cancel, reporter) =
            (self.tools.linux.clone(), self.cancel.clone(), self.reporter.clone());
        let work = move || {
            let told = reporter.clone();
            let mut started = move |started: Started| told.report(Event::ExecStarted(id, started));
            let stdio = Stdio::Managed(Managed { streams, started: &mut started });
            let ended = linux.join(container, &process, stdio, &cancel);
            drop(linux);
            reporter.report(Event::ExecEnded(id, ended));
        };
        match thread::Builder::new().name("exec".to_owned()).spawn(work) {
            Ok(_) => drop(self.execs.insert(id, Exec { client, started: false, master: None })),
            Err(_) => self.refuse(client, "no thread could be started", 126),
        }
    }

    pub(super) fn exec_started(&mut self, id: u64, started: Started) {
        let Some(exec) = self.execs.get_mut(&id) else { return };
        exec.started = true;
        let client = exec.client;
        if let Some(run) = &self.run
            && let Some(process) = &run.process
        {
            for groups in &run.more_groups {
                // It goes on outside, as a process that was started a moment before.
                let _ = groups.gather(process.as_fd());
            }
        }
        exec.master = started.terminal;
        let master = exec.master.as_ref().and_then(|master| dup(master).ok());
        if let Some(client) = self.client(client) {
            let fds: Vec<_> = master.iter().map(AsFd::as_fd).collect();
            client.reply_with(&Reply::Started { pid: started.pid }, &fds);
        }
    }

    pub(super) fn exec_ended(&mut self, id: u64, result: Result<Exit, ExecError>) {
        let Some(exec) = self.execs.remove(&id) else { return };
        let reply = match result {
            Ok(exit) => Reply::Exited { code: exit.shell_code(), oom_killed: false },
            // The container went, and the helper with it.
            Err(_) if exec.started => Reply::Exited { code: 137, oom_killed: false },
            Err(error) => {
                let error = Error::from(error);
                with_code(&error, error.exit_code().max(126))
            }
        };
        self.answer(exec.client, &reply);
    }
}

/// The failure as a client is told of it, with another exit code.
fn with_code(error: &Error, code: u8) -> Reply {
    match failure(error) {
        Reply::Failed { message, unfit, .. } => Reply::Failed { message, code, unfit },
        other => other,
    }
}

fn dup(fd: &OwnedFd) -> Result<OwnedFd, Error> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(ExecError::from)?)
}
