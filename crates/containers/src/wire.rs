//! What a container's monitor and its clients say to each other: messages over `socket`, each a letter
//! and bytes.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use kiln_executor::{ProcessSpec, Unfit};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, memfd_create, openat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recvmsg,
    sendmsg, socket_with,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A [`Request`] or a [`Reply`].
pub(crate) const CONTROL: u8 = b'c';
/// Bytes for standard input; none: its end.
pub(crate) const STDIN: u8 = b'i';
/// Bytes of standard output, or of the terminal.
pub(crate) const STDOUT: u8 = b'o';
/// Bytes of standard error.
pub(crate) const STDERR: u8 = b'e';

/// At most so many bytes of a stream travel with one message.
pub(crate) const CHUNK: usize = 32 << 10;
/// The kernel's limit for a message is about 200 KiB.
const MAX_MESSAGE_BYTES: usize = 192 << 10;

/// Text as JSON may be six times as long.
const MAX_PROCESS_BYTES: u64 = 32 << 20;

/// What clients ask for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Start the process: [`Reply::Started`].
    Start,
    /// Send its output from now on, and take its input. The answer is output, and in the end
    /// [`Reply::Exited`].
    Attach { stdin: bool, output: bool },
    /// The client's terminal has this size.
    Resize { rows: u16, columns: u16 },
    /// Send a signal to process 1.
    Kill { signal: i32 },
    /// Ask it to end; [`Reply::Done`] when it has.
    Stop { signal: Option<i32>, seconds: Option<i64> },
    /// Ask it to end, and start it again; [`Reply::Started`].
    Restart { signal: Option<i32>, seconds: Option<i64> },
    /// Hold all processes.
    Pause,
    /// Let them go on.
    Unpause,
    /// [`Reply::Exited`] when it has ended.
    Wait,
    /// Run another process beside it. Four descriptors come with this: its standard streams, and a file
    /// with its [`ProcessSpec`], which may be larger than any message. With a terminal the streams count for
    /// nothing, and the terminal's master comes with [`Reply::Started`].
    Exec { terminal: bool },
    /// What it was asked to be has changed.
    Reload,
}

/// What the monitor answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// It is done.
    Done,
    /// The process runs.
    Started { pid: i32 },
    /// The process ended so, as a shell shows it.
    Exited {
        code: i32,
        /// The kernel killed processes of the container for want of memory.
        #[serde(default)]
        oom_killed: bool,
    },
    /// Its process has just ended, and the monitor is about to go.
    JustEnded,
    /// It could not be done.
    Failed {
        message: String,
        code: u8,
        /// What is wrong with a program that is there and cannot be executed.
        #[serde(default)]
        unfit: Option<Box<Unfit>>,
    },
    /// Done, and there is something to say.
    Warning { message: String },
}

/// Puts a process into a file in memory.
pub(crate) fn to_file(process: &ProcessSpec) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("kiln-exec", MemfdFlags::CLOEXEC)?);
    serde_json::to_writer(&mut file, process)?;
    file.rewind()?;
    Ok(file.into())
}

/// Reads what [`to_file`] wrote. At most a few megabytes: as much as `execve` takes.
pub(crate) fn from_file(file: OwnedFd) -> io::Result<ProcessSpec> {
    let mut bytes = Vec::new();
    File::from(file).take(MAX_PROCESS_BYTES).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// A message that was received.
pub(crate) struct Message {
    pub(crate) tag: u8,
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// This process may not open as many files as were sent.
    pub(crate) lacks_fds: bool,
}

impl Message {
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Option<T> {
        if self.tag == CONTROL { serde_json::from_slice(&self.bytes).ok() } else { None }
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Connection(pub(crate) OwnedFd);

/// A socket's path may have 107 bytes: it is named by its directory's descriptor.
fn address(dir: &Path) -> io::Result<(OwnedFd, SocketAddrUnix)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(CWD, dir, flags, Mode::empty())?;
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/socket", dir.as_raw_fd()))?;
    Ok((dir, address))
}

fn new_socket(flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags | SocketFlags::CLOEXEC, None)
}

/// Listens at `socket` in a container's directory.
pub(crate) fn listen_at(dir: &Path) -> io::Result<OwnedFd> {
    let _ = std::fs::remove_file(dir.join("socket"));
    let socket = new_socket(SocketFlags::NONBLOCK)?;
    let (_dir, address) = address(dir)?;
    bind(&socket, &address)?;
    listen(&socket, 64)?;
    Ok(socket)
}

/// Takes the next client; `None`: there is none.
pub(crate) fn accept(socket: &OwnedFd) -> Option<Connection> {
    rustix::net::accept_with(socket, SocketFlags::CLOEXEC).ok().map(Connection)
}

impl Connection {
    /// Connects to the monitor of the container at `dir`; `None`: there is none.
    pub(crate) fn open(dir: &Path) -> io::Result<Option<Self>> {
        let (_dir, address) = match address(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let socket = new_socket(SocketFlags::empty())?;
        match connect(&socket, &address) {
            Ok(()) => Ok(Some(Self(socket))),
            Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    pub(crate) fn send(&self, tag: u8, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.send_with(tag, bytes, fds, SendFlags::NOSIGNAL)
    }

    /// As [`Connection::send`]; EAGAIN when the other side has not read what was sent before.
    pub(crate) fn try_send(&self, tag: u8, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        self.send_with(tag, bytes, fds, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_with(
        &self,
        tag: u8,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOBIG);
        }
        loop {
            match sendmsg(&self.0, &[IoSlice::new(&[tag]), IoSlice::new(bytes)], &mut control, flags) {
                Err(Errno::INTR) => {}
                other => return other.map(drop),
            }
        }
    }

    pub(crate) fn say(&self, what: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        Ok(self.send(CONTROL, &serde_json::to_vec(what)?, fds)?)
    }

    /// The next message; `None` when the other side is gone.
    pub(crate) fn receive(&self) -> Result<Option<Message>, Errno> {
        let mut bytes = vec![0; MAX_MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
                // The other side closed without reading all that it was sent. It says so once, in front of
                // what it sent itself; then comes that, and the end.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                other => break other?,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        bytes.truncate(received.bytes);
        let tag = bytes.remove(0);
        let lacks_fds = received.flags.contains(ReturnFlags::CTRUNC);
        Ok(Some(Message { tag, bytes, fds, lacks_fds }))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
