//! Holding all processes of a container: by the freezer, or else one by one.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::Monitor;
use crate::process::{open_process, processes_of, send_signal, start_ticks};
use crate::{Error, Status};

/// How long the freezer may take.
const PATIENCE: Duration = Duration::from_secs(10);

const SIGCONT: i32 = 18;
const SIGSTOP: i32 = 19;

/// The freezer of a process's control group.
enum Freezer {
    V1(PathBuf),
    V2(PathBuf),
}

impl Freezer {
    /// That of the group that `pid` is in, if it is not this process's own as well.
    fn of(pid: i32) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let theirs = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = |text: &str, controller: &str| {
            text.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let (names, path) = (parts.next()?, parts.next()?);
                names.split(',').any(|name| name == controller).then(|| path.to_owned())
            })
        };
        let at = |mount: &str, path: String| PathBuf::from(mount).join(path.trim_start_matches('/'));
        match (path(&own, "freezer"), path(&theirs, "freezer")) {
            (Some(own), Some(theirs)) if own != theirs => {
                let dir = at("/sys/fs/cgroup/freezer", theirs);
                return dir.join("freezer.state").exists().then_some(Self::V1(dir));
            }
            _ => {}
        }
        let (own, theirs) = (path(&own, "")?, path(&theirs, "")?);
        let dir = at("/sys/fs/cgroup", theirs.clone());
        (own != theirs && dir.join("cgroup.freeze").exists()).then_some(Self::V2(dir))
    }

    fn set(&self, frozen: bool) -> io::Result<()> {
        match self {
            Self::V1(dir) => fs::write(dir.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" }),
            Self::V2(dir) => fs::write(dir.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
        }
    }

    fn is_frozen(&self) -> bool {
        match self {
            Self::V1(dir) => {
                fs::read_to_string(dir.join("freezer.state")).is_ok_and(|s| s.trim() == "FROZEN")
            }
            Self::V2(dir) => {
                fs::read_to_string(dir.join("cgroup.events")).is_ok_and(|text| text.contains("frozen 1"))
            }
        }
    }
}

/// Sends a signal to all processes beside `pid`, until no new ones appear, and to `pid`.
fn signal_all(pid: i32, signal: i32) -> io::Result<()> {
    let mut reached: Vec<(i32, u64)> = Vec::new();
    loop {
        let mut new = false;
        for other in processes_of(pid)? {
            let Some(ticks) = start_ticks(other) else { continue };
            if reached.contains(&(other, ticks)) {
                continue;
            }
            if let Some(process) = open_process(other, ticks) {
                send_signal(&process, signal)?;
            }
            reached.push((other, ticks));
            new = true;
        }
        if !new {
            return Ok(());
        }
    }
}

impl Monitor {
    /// Holds the container; what is to be said of how.
    pub(super) fn pause(&mut self) -> Result<Option<String>, Error> {
        self.process_fd()?;
        let (pid, name) = (self.state.pid, self.config.name.clone());
        if self.state.status == Status::Paused {
            return Err(Error::WrongState { name, problem: "is paused already" });
        }
        let failed = |source| Error::Host { call: "pause", path: self.container.dir().to_owned(), source };
        let freezer = Freezer::of(pid);
        let by_signals = match &freezer {
            Some(freezer) => {
                freezer.set(true).map_err(failed)?;
                let since = Instant::now();
                while !freezer.is_frozen() {
                    if since.elapsed() > PATIENCE {
                        let _ = freezer.set(false);
                        return Err(Error::WrongState { name, problem: "does not freeze" });
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                false
            }
            None => {
                signal_all(pid, SIGSTOP).map_err(failed)?;
                true
            }
        };
        (self.state.status, self.state.paused_by_signals) = (Status::Paused, by_signals);
        self.note();
        Ok(by_signals.then(|| {
            "the container has no freezer: its processes were stopped one by one, and can notice".to_owned()
        }))
    }

    pub(super) fn unpause(&mut self) -> Result<(), Error> {
        let name = self.config.name.clone();
        if self.state.status != Status::Paused {
            return Err(Error::WrongState { name, problem: "is not paused" });
        }
        let failed = |source| Error::Host { call: "unpause", path: self.container.dir().to_owned(), source };
        if self.state.paused_by_signals {
            signal_all(self.state.pid, SIGCONT).map_err(failed)?;
        } else if let Some(freezer) = Freezer::of(self.state.pid) {
            freezer.set(false).map_err(failed)?;
        }
        (self.state.status, self.state.paused_by_signals) = (Status::Running, false);
        self.note();
        Ok(())
    }
}
