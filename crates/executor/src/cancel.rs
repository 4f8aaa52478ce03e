//! Stops processes from another thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::ExecError;

/// An event that stays once it fired; clones share it.
#[derive(Debug, Clone)]
pub struct Cancel(Arc<OwnedFd>);

impl Cancel {
    /// An event nobody fired yet.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> Result<Self, ExecError> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| ExecError::Start { step: "eventfd".to_owned(), source: errno.into() })?;
        Ok(Self(Arc::new(fd)))
    }

    /// Fires. Safe to call from a signal's thread, any number of times.
    pub fn cancel(&self) {
        // The counter overflows only after 2^64 calls; then it has fired all the same.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Whether it fired.
    pub fn is_cancelled(&self) -> bool {
        let mut fds = [PollFd::new(&*self.0, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Cancel {
    /// Readable once it fired.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<rustix::io::Errno> for ExecError {
    fn from(errno: rustix::io::Errno) -> Self {
        ExecError::Start { step: "system call".to_owned(), source: io::Error::from(errno) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_see_the_event_and_it_stays() {
        let cancel = Cancel::new().unwrap();
        let other = cancel.clone();
        assert!(!other.is_cancelled());
        cancel.cancel();
        cancel.cancel();
        assert!(other.is_cancelled() && other.is_cancelled());
    }
}
