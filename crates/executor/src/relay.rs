//! Standard streams for a process in a container: pipes and nothing else.
//!
//! Whoever gets a descriptor can open it anew (`/proc/self/fd/N`): a file of the host with other rights
//! than it was given with, a directory as a way out, a terminal to read what its user types next. Pipes have
//! none of that. So what is a pipe already is passed on as it is, and for all else stands a pipe that a
//! thread of ours empties or fills.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

/// This process's standard streams for a process in a container.
pub struct Relay {
    /// Output that threads of ours carry.
    carriers: Vec<JoinHandle<()>>,
    over: Arc<OwnedFd>,
}

impl Relay {
    /// Standard input, output and error to give away. Without `input`, the first is empty.
    ///
    /// # Errors
    /// When there are no descriptors or threads left.
    pub fn of_standard_streams(input: bool) -> io::Result<([OwnedFd; 3], Self)> {
        let over = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let mut relay = Self { carriers: Vec::new(), over };
        let stdin = if input { relay.input()? } else { null(OFlags::RDONLY)? };
        let stdout = relay.output(rustix::stdio::stdout())?;
        let stderr = relay.output(rustix::stdio::stderr())?;
        Ok(([stdin, stdout, stderr], relay))
    }

    fn input(&mut self) -> io::Result<OwnedFd> {
        let own = rustix::stdio::stdin();
        if is_pipe(own)? {
            return dup(own);
        }
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
        // Nobody waits for it: a read of the terminal ends with this process.
        spawn(move || {
            let mut buffer = vec![0; CHUNK];
            while let Ok(count @ 1..) = read(rustix::stdio::stdin(), &mut buffer) {
                if write_all(ours.as_fd(), &buffer[..count]).is_err() {
                    break;
                }
            }
        })?;
        Ok(theirs)
    }

    fn output(&mut self, own: BorrowedFd<'static>) -> io::Result<OwnedFd> {
        if is_pipe(own)? {
            return dup(own);
        }
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        let over = self.over.clone();
        self.carriers.push(spawn(move || carry(&ours, own, &over))?);
        Ok(theirs)
    }

    /// Carries what is still in the pipes. Does not wait for processes that hold them and live on.
    pub fn finish(self) {
        let _ = rustix::io::write(&*self.over, &1_u64.to_ne_bytes());
        for carrier in self.carriers {
            let _ = carrier.join();
        }
    }
}

const CHUNK: usize = 64 << 10;

/// Until nobody can write any more, or `over` says that nobody will and the pipe is empty.
fn carry(from: &OwnedFd, to: BorrowedFd<'_>, over: &OwnedFd) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut fds = [PollFd::new(from, PollFlags::IN), PollFd::new(over, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => return,
        }
        if fds[0].revents().is_empty() {
            return;
        }
        match read(from.as_fd(), &mut buffer) {
            // A reader of ours that went away: so does theirs.
            Ok(count @ 1..) if write_all(to, &buffer[..count]).is_ok() => {}
            _ => return,
        }
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name("streams".to_owned()).spawn(work)
}

fn is_pipe(fd: BorrowedFd<'_>) -> io::Result<bool> {
    match fstat(fd) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Fifo),
        // It is closed: reading and writing will say so.
        Err(Errno::BADF) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn null(flags: OFlags) -> io::Result<OwnedFd> {
    Ok(open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty())?)
}

fn dup(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}

fn read(from: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    rustix::io::retry_on_intr(|| rustix::io::read(from, &mut *buffer))
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            // Somebody made it non-blocking.
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::from_borrowed_fd(to, PollFlags::OUT)], None);
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
