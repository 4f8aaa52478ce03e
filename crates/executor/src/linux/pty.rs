//! The container's terminal, joined to the user's.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::pty::unlockpt;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use super::channel::{Report, report};
use super::sys;
use crate::ExecError;

/// A new terminal on the container's own devpts: its master, and the terminal itself.
fn allocate(devpts: impl AsFd) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = openat(devpts, "ptmx", flags, Mode::empty())?;
    unlockpt(&master)?;
    let terminal = sys::open_pty_peer(master.as_fd())?;
    Ok((master, terminal))
}

/// A new terminal as the controlling one of this process, which leads its session; its master goes to
/// the caller. Returns it three times, for the standard streams.
pub(super) fn give(devpts: impl AsFd, socket: BorrowedFd<'_>) -> Result<[OwnedFd; 3], ExecError> {
    let (master, terminal) = allocate(devpts).map_err(ExecError::start("terminal"))?;
    report(socket, &Report::Terminal, &[master.as_fd()]);
    rustix::process::ioctl_tiocsctty(&terminal).map_err(ExecError::start("controlling terminal"))?;
    let again = || rustix::io::fcntl_dupfd_cloexec(&terminal, 10).map_err(ExecError::start("dup"));
    Ok([again()?, again()?, again()?])
}

/// The user's terminal in raw mode with the container's behind it; dropping restores it.
pub(super) struct Terminal {
    master: OwnedFd,
    /// The user's settings; `None` when standard input is no terminal.
    saved: Option<Termios>,
    resized: Option<tokens::Resize>,
    input_open: bool,
}

impl Terminal {
    /// Joins `master` to this process's standard streams.
    pub(super) fn join(master: OwnedFd) -> Self {
        let stdin = io::stdin();
        let saved = if stdin.is_terminal() { tcgetattr(&stdin).ok() } else { None };
        if let Some(saved) = &saved {
            let mut raw = saved.clone();
            raw.make_raw();
            let _ = tcsetattr(&stdin, OptionalActions::Now, &raw);
        }
        let terminal = Self { master, saved, resized: tokens::Resize::watch(), input_open: true };
        terminal.copy_size();
        terminal
    }

    fn copy_size(&self) {
        if let Ok(size) = tcgetwinsize(io::stdout()) {
            let _ = tcsetwinsize(&self.master, size);
        }
    }

    /// What to wait for: output, the user's input, a new window size; in this order.
    pub(super) fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let input = if self.input_open { PollFlags::IN } else { PollFlags::empty() };
        let stdin = tokens::stdin();
        let mut fds = vec![PollFd::new(&self.master, PollFlags::IN), PollFd::from_borrowed_fd(stdin, input)];
        fds.extend(self.resized.iter().map(|resize| PollFd::new(resize, PollFlags::IN)));
        fds
    }

    /// Carries what is ready.
    pub(super) fn carry(&mut self, ready: &[PollFlags]) {
        let is_ready = |at: usize| ready.get(at).is_some_and(|flags| !flags.is_empty());
        if is_ready(0) {
            self.output();
        }
        if is_ready(1) && self.input_open {
            let mut buffer = [0; 4096];
            match rustix::io::read(io::stdin(), &mut buffer) {
                Ok(0) => self.input_open = false,
                Ok(count) => write_all(&self.master, &buffer[..count]),
                Err(_) => {}
            }
        }
        if is_ready(2) {
            if let Some(resize) = &self.resized {
                resize.clear();
            }
            self.copy_size();
        }
    }

    /// One read from the container; false when its side is closed (EIO on Linux) and empty.
    fn output(&self) -> bool {
        let mut buffer = [0; 16 << 10];
        match rustix::io::read(&self.master, &mut buffer) {
            Ok(count) if count > 0 => {
                write_all(io::stdout(), &buffer[..count]);
                true
            }
            Err(Errno::INTR) => true,
            _ => false,
        }
    }

    /// Shows what the process printed last, then gives the terminal back.
    pub(super) fn drain(self) {
        while self.output() {}
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, saved);
        }
    }
}

fn write_all(to: impl AsFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}

/// Descriptors the terminal waits on.
mod tokens {
    use std::os::fd::{AsFd, BorrowedFd};

    use nix::sys::signal::{SigSet, Signal};
    use nix::sys::signalfd::{SfdFlags, SignalFd};

    /// Readable after the user's window changed its size.
    pub(super) struct Resize(SignalFd);

    impl Resize {
        /// Takes `SIGWINCH` over as a descriptor; `None` when the kernel refuses, and then the
        /// size stays as it was at the start.
        pub(super) fn watch() -> Option<Self> {
            let mut mask = SigSet::empty();
            mask.add(Signal::SIGWINCH);
            mask.thread_block().ok()?;
            SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok().map(Self)
        }

        pub(super) fn clear(&self) {
            while let Ok(Some(_)) = self.0.read_signal() {}
        }
    }

    impl AsFd for Resize {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    /// Standard input for the whole life of the process.
    pub(super) fn stdin() -> BorrowedFd<'static> {
        rustix::stdio::stdin()
    }
}
