//! The other side of a monitor: what commands do with containers.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_executor::{Cancel, Linux, ProcessSpec};
use kiln_snapshotter::{Backend, Snapshotter};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};

use crate::entry::start_monitor;
use crate::monitor::{Monitor, Streams, Tools};
use crate::store::PATIENCE;
use crate::wire::{Connection, Message, Reply, Request, to_file};
use crate::{Container, Containers, Ended, Error, Status};

/// A connection to a container's monitor, for one matter.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    name: String,
}

/// A monitor as a process, to be waited for after all that it has to say.
#[derive(Debug)]
pub struct MonitorProcess(OwnedFd);

impl MonitorProcess {
    /// Waits until the process is gone, and with it all that it started; for a few seconds at most, which
    /// pass while it has something to send to a client that does not read.
    pub fn wait_for_end(&self) {
        let patience = Timespec { tv_sec: PATIENCE.as_secs().try_into().unwrap_or(5), tv_nsec: 0 };
        let mut ended = [PollFd::new(&self.0, PollFlags::IN)];
        while poll(&mut ended, Some(&patience)) == Err(Errno::INTR) {}
    }
}

/// What a started process answers with.
#[derive(Debug)]
pub struct StartedExec {
    /// The process as the host sees it.
    pub pid: i32,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
}

impl Container {
    /// The name of a container, or its ID when nobody can tell.
    fn called(&self) -> String {
        self.config().map_or_else(|_| self.id().short().to_owned(), |config| config.name)
    }

    /// Connects to the monitor.
    ///
    /// # Errors
    /// [`Error::NotRunning`] when there is none.
    pub fn connect(&self) -> Result<Client, Error> {
        let failed = |source| Error::Host { call: "connect to", path: self.dir().join("socket"), source };
        // Only the lock tells whether somebody listens: a socket stays behind, and records may be damaged.
        let connection = match self.try_monitor()? {
            None => Connection::open(self.dir()).map_err(failed)?,
            Some(lock) => {
                drop(lock);
                // Notes the end of one whose monitor was killed.
                let _ = self.state();
                None
            }
        };
        let name = self.called();
        match connection {
            Some(connection) => Ok(Client { connection, name }),
            None => Err(Error::NotRunning { name }),
        }
    }

    /// Has a monitor: one that has not started anything yet, or the one that somebody else has just
    /// started; a connection to it. Whoever has no connection left before [`Client::start`] lets it go
    /// again.
    ///
    /// # Errors
    /// [`Error::AlreadyRuns`]; [`Error::WrongState`] when it cannot.
    pub fn prepare(&self, containers: &Containers, backend: Backend) -> Result<Client, Error> {
        // Until the new monitor listens: who comes later meets that one.
        let _lock = self.lock()?;
        let name = self.called();
        match self.state()?.status {
            Status::Created | Status::Exited => {}
            Status::Dead => return Err(Error::WrongState { name, problem: "is dead" }),
            Status::Paused => return Err(Error::WrongState { name, problem: "is paused" }),
            _ => return Err(Error::AlreadyRuns { name }),
        }
        let failed = |source| Error::Host { call: "connect to", path: self.dir().join("socket"), source };
        let begun = Instant::now();
        loop {
            if let Some(free) = self.try_monitor()? {
                drop(free);
                start_monitor(containers, self, backend)?;
            }
            match Connection::open(self.dir()).map_err(failed)? {
                Some(connection) => return Ok(Client { connection, name }),
                // Its end is near, or somebody only looks.
                None if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(1)),
                None => return Err(Error::MonitorDied { name }),
            }
        }
    }

    /// Another connection to the monitor that [`Container::prepare`] started.
    ///
    /// # Errors
    /// [`Error::MonitorDied`].
    pub fn connect_again(&self) -> Result<Client, Error> {
        let failed = |source| Error::Host { call: "connect to", path: self.dir().join("socket"), source };
        let name = self.called();
        match Connection::open(self.dir()).map_err(failed)? {
            Some(connection) => Ok(Client { connection, name }),
            None => Err(Error::MonitorDied { name }),
        }
    }

    /// Runs the container under this process, with its standard streams, until it ends; how it
    /// did. Nobody can attach to it then, and it dies with this process.
    ///
    /// # Errors
    /// As [`Client::start`].
    pub fn run_here(
        &self,
        containers: &Containers,
        snapshots: Arc<dyn Snapshotter>,
        linux: Arc<Linux>,
        cancel: &Cancel,
    ) -> Result<Ended, Error> {
        let tools = Tools { containers: containers.clone(), snapshots, linux };
        Monitor::open(tools, self.clone(), Streams::Ours, cancel.clone())?.run_at_once()
    }
}

impl Client {
    fn ask(&self, request: &Request, fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<(), Error> {
        self.connection.say(request, fds).map_err(|_| Error::MonitorDied { name: self.name.clone() })
    }

    fn next(&self) -> Result<Message, Error> {
        let died = || Error::MonitorDied { name: self.name.clone() };
        self.connection.receive().map_err(|_| died())?.ok_or_else(died)
    }

    fn reply(&self) -> Result<(Reply, Vec<OwnedFd>), Error> {
        let message = self.next()?;
        match message.parse() {
            Some(Reply::Failed { message, code, unfit }) => Err(Error::Told { message, code, unfit }),
            Some(Reply::JustEnded) => Err(Error::JustEnded),
            Some(reply) => Ok((reply, message.fds)),
            None => Err(Error::told("the monitor is of another kiln", 125)),
        }
    }

    /// The monitor's process; `None` where it cannot be seen from here.
    pub fn process(&self) -> Option<MonitorProcess> {
        let number = socket_peercred(&self.connection).ok()?.pid;
        pidfd_open(number, PidfdFlags::empty()).ok().map(MonitorProcess)
    }

    /// Starts the process; returns once it runs.
    ///
    /// # Errors
    /// [`Error::Told`] with docker's exit code when it does not.
    pub fn start(&self) -> Result<(), Error> {
        self.ask(&Request::Start, &[])?;
        self.reply().map(drop)
    }

    /// Sends a signal to process 1.
    ///
    /// # Errors
    /// [`Error::Told`] when it does not run.
    pub fn kill(&self, signal: i32) -> Result<(), Error> {
        self.ask(&Request::Kill { signal }, &[])?;
        self.reply().map(drop)
    }

    /// Asks the process to end, and ends it after `seconds` (`None`: what the container says; below 0:
    /// never); returns when it has ended.
    ///
    /// # Errors
    /// [`Error::MonitorDied`].
    pub fn stop(&self, signal: Option<i32>, seconds: Option<i64>) -> Result<(), Error> {
        self.ask(&Request::Stop { signal, seconds }, &[])?;
        self.reply().map(drop)
    }

    /// Stops the process and starts it again, without anybody else coming between; returns once it runs.
    ///
    /// # Errors
    /// [`Error::Told`] when it does not start; [`Error::MonitorDied`].
    pub fn restart(&self, signal: Option<i32>, seconds: Option<i64>) -> Result<(), Error> {
        self.ask(&Request::Restart { signal, seconds }, &[])?;
        self.reply().map(drop)
    }

    /// Holds all processes; what is to be said of how.
    ///
    /// # Errors
    /// [`Error::Told`].
    pub fn pause(&self) -> Result<Option<String>, Error> {
        self.ask(&Request::Pause, &[])?;
        Ok(match self.reply()?.0 {
            Reply::Warning { message } => Some(message),
            _ => None,
        })
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// [`Error::Told`].
    pub fn unpause(&self) -> Result<(), Error> {
        self.ask(&Request::Unpause, &[])?;
        self.reply().map(drop)
    }

    /// Has the monitor read `config.json` again.
    ///
    /// # Errors
    /// [`Error::MonitorDied`].
    pub fn reload(&self) -> Result<(), Error> {
        self.ask(&Request::Reload, &[])?;
        self.reply().map(drop)
    }

    /// Waits for the process to end; its exit code.
    ///
    /// # Errors
    /// [`Error::MonitorDied`].
    pub fn wait(&self) -> Result<i32, Error> {
        self.ask(&Request::Wait, &[])?;
        self.exit_code()
    }

    /// Waits for the end of what runs over this connection.
    ///
    /// # Errors
    /// [`Error::MonitorDied`].
    pub fn exit_code(&self) -> Result<i32, Error> {
        loop {
            if let (Reply::Exited { code, .. }, _) = self.reply()? {
                return Ok(code);
            }
        }
    }

    /// Starts a process in the container on these streams, or on a terminal; returns once it runs.
    ///
    /// # Errors
    /// [`Error::Told`] with docker's exit code when it does not.
    pub fn exec(
        &self,
        process: &ProcessSpec,
        streams: &[OwnedFd; 3],
        terminal: bool,
    ) -> Result<StartedExec, Error> {
        let file = to_file(process)
            .map_err(|source| kiln_executor::ExecError::Start { step: "task".to_owned(), source })?;
        let fds: Vec<_> = streams.iter().chain([&file]).map(AsFd::as_fd).collect();
        self.ask(&Request::Exec { terminal }, &fds)?;
        match self.reply()? {
            (Reply::Started { pid }, fds) => Ok(StartedExec { pid, terminal: fds.into_iter().next() }),
            (Reply::Exited { code, .. }, _) => Err(Error::told("the process ended at once", code as u8)),
            _ => Err(Error::MonitorDied { name: self.name.clone() }),
        }
    }

    /// The connection, for [`crate::attach`].
    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) fn request(&self, request: &Request) -> Result<(), Error> {
        self.ask(request, &[])
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}
