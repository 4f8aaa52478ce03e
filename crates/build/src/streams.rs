//! Pipes that nobody fills or empties: waited for until the command is stopped, and no longer.

use std::fmt;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_executor::Cancel;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::BuildCancel;

/// Some stream was given up.
static GIVEN_UP: AtomicBool = AtomicBool::new(false);

/// So many bytes a pipe takes without waiting once poll says that it is writable (POSIX's `PIPE_BUF`; pipe(7)), unless
/// somebody else writes to it, too.
const PIPE_BUF: usize = 4096;

/// Whether a command that was stopped has left a stream where it was: what it says of that stream is then no
/// fault of it.
pub fn given_up() -> bool {
    GIVEN_UP.load(Ordering::Relaxed)
}

/// What a stream that is given up answers.
#[derive(Debug)]
struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the command was stopped")
    }
}

impl std::error::Error for Stopped {}

/// Waits until `fd` is ready.
///
/// # Errors
/// Once `cancel` fires. No `Interrupted`, after which callers would try again.
fn wait(fd: BorrowedFd<'_>, ready: PollFlags, cancel: &Cancel) -> io::Result<()> {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(fd, ready), PollFd::new(cancel, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => {
                GIVEN_UP.store(true, Ordering::Relaxed);
                return Err(io::Error::other(Stopped));
            }
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A file, pipe or socket to read from.
pub struct InStream {
    fd: OwnedFd,
    cancel: Cancel,
}

impl InStream {
    pub(crate) fn of(fd: OwnedFd, cancel: &BuildCancel) -> Self {
        Self { fd, cancel: cancel.processes().clone() }
    }

    /// Standard input.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn standard(cancel: &BuildCancel) -> io::Result<Self> {
        Ok(Self::of(io::stdin().as_fd().try_clone_to_owned()?, cancel))
    }
}

impl Read for InStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            wait(self.fd.as_fd(), PollFlags::IN, &self.cancel)?;
            match rustix::io::read(&self.fd, &mut *buffer) {
                // Somebody else has made it non-blocking, and has read what there was.
                Err(Errno::AGAIN) => {}
                other => return Ok(other?),
            }
        }
    }
}

/// Lets `write` write to `out` in large pieces: who makes them has little at a time. `failed` says what it is when the
/// last one cannot be written.
///
/// # Errors
/// Those of `write` and of `out`. Nothing that is still held back is written then.
pub(crate) fn in_large_pieces<T, E>(
    out: impl Write,
    failed: impl Fn(io::Error) -> E,
    write: impl FnOnce(&mut dyn Write) -> Result<T, E>,
) -> Result<T, E> {
    let mut out = BufWriter::with_capacity(256 << 10, out);
    let written = write(&mut out).and_then(|made| out.flush().map(|()| made).map_err(failed));
    let (_, _) = out.into_parts();
    written
}

/// Standard output.
pub struct OutStream {
    fd: OwnedFd,
    kind: Kind,
    cancel: Cancel,
}

/// How something is written without waiting for who reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Files and terminals: nobody can be waited for.
    Plain,
    /// A pipe, opened anew for us alone: the flag belongs to the open file, which others share.
    NonBlocking,
    /// One that cannot be opened anew.
    Pipe,
    Socket,
}

impl OutStream {
    fn standard(cancel: &BuildCancel) -> io::Result<Self> {
        Self::of(io::stdout().as_fd(), cancel)
    }

    /// Lets `write` write to standard output, in large pieces; `failed` says what it is when that cannot be done.
    ///
    /// # Errors
    /// Those of `write` and of standard output. Nothing more is written then: what is still held back would keep the
    /// error waiting for who reads.
    pub fn written<E>(
        cancel: &BuildCancel,
        failed: impl Fn(io::Error) -> E,
        write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
    ) -> Result<(), E> {
        let out = Self::standard(cancel).map_err(&failed)?;
        in_large_pieces(out, failed, write)
    }

    fn of(fd: BorrowedFd<'_>, cancel: &BuildCancel) -> io::Result<Self> {
        let cancel = cancel.processes().clone();
        let own = |kind| Ok(Self { fd: fd.try_clone_to_owned()?, kind, cancel: cancel.clone() });
        match fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Ok(FileType::Fifo) => {
                let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
                let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
                match open(path, flags, Mode::empty()) {
                    Ok(fd) => Ok(Self { fd, kind: Kind::NonBlocking, cancel }),
                    // Somebody else's, as behind su, or without a reader.
                    Err(_) => own(Kind::Pipe),
                }
            }
            Ok(FileType::Socket) => own(Kind::Socket),
            _ => own(Kind::Plain),
        }
    }

    fn wait(&self) -> io::Result<()> {
        wait(self.fd.as_fd(), PollFlags::OUT, &self.cancel)
    }
}

impl Write for OutStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let written = match self.kind {
                Kind::Plain | Kind::NonBlocking => rustix::io::write(&self.fd, bytes),
                Kind::Pipe => {
                    self.wait()?;
                    rustix::io::write(&self.fd, &bytes[..bytes.len().min(PIPE_BUF)])
                }
                Kind::Socket => rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            };
            match written {
                Err(Errno::AGAIN) => self.wait()?,
                other => return Ok(other?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use kiln_solver::Cancellation;

    use super::*;

    fn is_given_up(error: &io::Error) -> bool {
        error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<Stopped>)
    }

    /// Stops while somebody waits in `wait`.
    fn stopped<T: Send>(cancel: &BuildCancel, wait: impl FnOnce() -> io::Result<T> + Send) -> io::Error {
        thread::scope(|scope| {
            let waits = scope.spawn(wait);
            // It would be as right before it waits.
            thread::sleep(Duration::from_millis(20));
            assert!(!waits.is_finished(), "it does not wait");
            cancel.cancel();
            waits.join().unwrap().err().expect("it is given up")
        })
    }

    /// Writes until nothing goes in any more; how much went in.
    fn fill(stream: &mut OutStream, cancel: &BuildCancel) -> usize {
        let mut written = 0;
        let error = stopped(cancel, || -> io::Result<()> {
            loop {
                written += stream.write(&[7; 100_000])?;
            }
        });
        assert!(is_given_up(&error) && given_up(), "{error:?}");
        written
    }

    #[test]
    fn who_reads_waits_for_bytes_the_end_or_the_stop() {
        let cancel = BuildCancel::new().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        let mut stream = InStream::of(reader.try_clone().unwrap().into(), &cancel);
        let mut buffer = [0; 10];
        writer.write_all(b"abc").unwrap();
        assert_eq!(stream.read(&mut buffer).unwrap(), 3);
        let error = stopped(&cancel, || stream.read(&mut buffer));
        assert!(is_given_up(&error), "{error:?}");

        let other = BuildCancel::new().unwrap();
        drop(writer);
        assert_eq!(InStream::of(reader.into(), &other).read(&mut buffer).unwrap(), 0);
    }

    #[test]
    fn pipes_and_sockets_take_what_fits_and_do_not_hold_who_is_stopped() {
        let cancel = BuildCancel::new().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let mut stream = OutStream::of(writer.as_fd(), &cancel).unwrap();
        assert_eq!(stream.kind, Kind::NonBlocking);
        let written = fill(&mut stream, &cancel);
        // Whoever shares the pipe waits as before.
        assert!(!rustix::fs::fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK));
        drop((stream, writer));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(read, vec![7; written]);

        let cancel = BuildCancel::new().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let mut stream = OutStream { kind: Kind::Pipe, ..OutStream::of(writer.as_fd(), &cancel).unwrap() };
        rustix::fs::fcntl_setfl(&stream.fd, OFlags::WRONLY).unwrap();
        let written = fill(&mut stream, &cancel);
        drop((stream, writer));
        read.clear();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(read, vec![7; written]);

        let cancel = BuildCancel::new().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut stream = OutStream::of(ours.as_fd(), &cancel).unwrap();
        assert_eq!(stream.kind, Kind::Socket);
        assert!(fill(&mut stream, &cancel) > 0);
    }

    #[test]
    fn after_an_error_nothing_more_is_written() {
        let cancel = BuildCancel::new().unwrap();
        for (end, expected) in [(Ok(()), "as one piece"), (Err("damaged".to_owned()), "")] {
            let (mut reader, writer) = io::pipe().unwrap();
            let stream = OutStream::of(writer.as_fd(), &cancel).unwrap();
            drop(writer);
            let written = in_large_pieces(
                stream,
                |error| error.to_string(),
                |out| {
                    out.write_all(b"as one ").and_then(|()| out.write_all(b"piece")).unwrap();
                    end.clone()
                },
            );
            assert_eq!(written, end);
            let mut read = String::new();
            reader.read_to_string(&mut read).unwrap();
            assert_eq!(read, expected);
        }
    }

    #[test]
    fn who_is_gone_is_a_broken_pipe() {
        let cancel = BuildCancel::new().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let mut stream = OutStream::of(writer.as_fd(), &cancel).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut socket = OutStream::of(ours.as_fd(), &cancel).unwrap();
        drop((reader, theirs));
        for stream in [&mut stream, &mut socket] {
            assert_eq!(stream.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        }
    }
}
