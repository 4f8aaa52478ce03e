//! What a running container's processes are and use, read below `/proc`.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, open};

use crate::process::{open_process, processes_of, send_signal, stat_fields};
use crate::{Container, Error, State};

/// A process of a container, as the host sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its parent's.
    pub ppid: i32,
    /// Its user's.
    pub uid: u32,
    /// Processor time in hundredths of seconds.
    pub ticks: u64,
    /// When it started: hundredths of seconds after boot.
    pub start_ticks: u64,
    /// Its terminal's device number; 0: none.
    pub terminal: u32,
    /// Program and arguments.
    pub command: String,
}

/// What a container's processes use together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Processor time in hundredths of seconds.
    pub ticks: u64,
    /// Memory in use, pages that several share counted for each.
    pub memory_bytes: u64,
    /// Received and sent over its network.
    pub network_bytes: (u64, u64),
    /// Read from and written to disks.
    pub disk_bytes: (u64, u64),
    /// Processes and threads.
    pub pids: u64,
}

fn running(container: &Container) -> Result<State, Error> {
    let state = container.state()?;
    if state.pid != 0 {
        return Ok(state);
    }
    let name = container.config().map_or_else(|_| container.id().short().to_owned(), |config| config.name);
    Err(Error::NotRunning { name })
}

fn unreadable(source: std::io::Error) -> Error {
    Error::Host { call: "read", path: "/proc".into(), source }
}

/// The processes of a running container, the first one first.
///
/// # Errors
/// [`Error::NotRunning`].
pub fn processes(container: &Container) -> Result<Vec<Process>, Error> {
    let state = running(container)?;
    let mut found = Vec::new();
    for pid in processes_of(state.pid).map_err(unreadable)? {
        let (Some(stat), Some(uid)) = (stat_fields(pid), uid_of(pid)) else { continue };
        let field = |at: usize| stat.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " ");
        let name = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        found.push(Process {
            pid,
            ppid: i32::try_from(field(1)).unwrap_or(0),
            uid,
            ticks: field(11) + field(12),
            start_ticks: field(19),
            terminal: u32::try_from(field(4)).unwrap_or(0),
            command: if line.is_empty() { format!("[{}]", name()) } else { line },
        });
    }
    Ok(found)
}

fn uid_of(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What a running container uses now.
///
/// # Errors
/// [`Error::NotRunning`].
pub fn usage(container: &Container) -> Result<Usage, Error> {
    let state = running(container)?;
    let page = rustix::param::page_size() as u64;
    let mut usage = Usage::default();
    for pid in processes_of(state.pid).map_err(unreadable)? {
        let Some(stat) = stat_fields(pid) else { continue };
        let field = |at: usize| stat.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        usage.ticks += field(11) + field(12);
        usage.pids += field(17);
        usage.memory_bytes += field(21) * page;
        let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        let bytes = |name: &str| {
            let line = io.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        usage.disk_bytes.0 += bytes("read_bytes:");
        usage.disk_bytes.1 += bytes("write_bytes:");
    }
    let network = fs::read_to_string(format!("/proc/{}/net/dev", state.pid)).unwrap_or_default();
    for line in network.lines().skip(2) {
        let Some((name, counters)) = line.split_once(':') else { continue };
        let counters: Vec<u64> = counters.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        if name.trim() != "lo" && counters.len() > 8 {
            usage.network_bytes.0 += counters[0];
            usage.network_bytes.1 += counters[8];
        }
    }
    Ok(usage)
}

impl Container {
    /// The tree as the running container's process 1 sees it, everything mounted in it included;
    /// `None`: it does not run.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open_root(&self) -> Result<Option<OwnedFd>, Error> {
        let state = self.state()?;
        if state.pid == 0 {
            return Ok(None);
        }
        let path = format!("/proc/{}/root", state.pid);
        let opened = open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        // Looked at last: it was that process whose root was opened.
        if open_process(state.pid, state.pid_start).is_none() {
            return Ok(None);
        }
        opened.map(Some).map_err(|errno| Error::Host {
            call: "open",
            path: path.into(),
            source: errno.into(),
        })
    }

    /// Sends a signal to process 1 without asking the monitor; false when there is none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn send_signal(&self, signal: i32) -> Result<bool, Error> {
        let state = self.state()?;
        let Some(process) = open_process(state.pid, state.pid_start).filter(|_| state.pid != 0) else {
            return Ok(false);
        };
        send_signal(&process, signal).map_err(kiln_executor::ExecError::from)?;
        Ok(true)
    }
}
