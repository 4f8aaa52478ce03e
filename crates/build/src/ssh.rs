//! `--ssh`: steps may have things signed by an agent and can do nothing else with it.
//!
//! A step never gets the agent's own socket. It gets one that lives as long as the step and passes
//! on two requests, to list keys and to sign; adding, removing, locking and extensions are answered
//! with a failure (draft-miller-ssh-agent).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use kiln_llb::SecretMount;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid, chownat, openat, unlinkat};

use crate::OpError;
use crate::secrets::SpecError;

const REQUEST_IDENTITIES: u8 = 11;
const SIGN_REQUEST: u8 = 13;
const FAILURE: u8 = 5;
/// OpenSSH's own limit.
const MAX_MESSAGE_BYTES: usize = 256 << 10;
/// More at once than any step needs.
const MAX_CONNECTIONS: usize = 64;
/// The socket's name in its directory.
const NAME: &str = "agent";

/// One `--ssh`: an ID and the agent behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshSpec {
    id: String,
    /// `None`: the agent in `SSH_AUTH_SOCK`.
    socket: Option<PathBuf>,
}

impl SshSpec {
    /// Reads `default`, `ID` or `ID=SOCKET`.
    ///
    /// # Errors
    /// [`SpecError`] for an empty ID, or several paths: those would be key files.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        let (id, path) = match text.split_once('=') {
            Some((id, path)) => (id, Some(path)),
            None => (text, None),
        };
        if id.is_empty() {
            return Err(SpecError::new(text, "the id is missing (default or ID=SOCKET)"));
        }
        match path {
            Some("") => Err(SpecError::new(text, "the path of the agent's socket is missing")),
            Some(path) if path.contains(',') => Err(SpecError::new(text, NO_KEY_FILES)),
            path => Ok(Self { id: id.to_owned(), socket: path.map(PathBuf::from) }),
        }
    }
}

const NO_KEY_FILES: &str =
    "key files are not supported yet: start an agent (`eval $(ssh-agent); ssh-add KEY`) and name its socket";

impl FromStr for SshSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        Self::parse(text)
    }
}

/// The ssh agents of one build.
#[derive(Debug, Clone, Default)]
pub struct SshAgents {
    sockets: BTreeMap<String, PathBuf>,
}

impl SshAgents {
    /// The agents of `specs`; of two with the same ID the later one counts.
    ///
    /// # Errors
    /// [`SpecError`] when a path is no socket, or `SSH_AUTH_SOCK` is not set.
    pub fn new(specs: impl IntoIterator<Item = SshSpec>) -> Result<Self, SpecError> {
        Self::with_default(specs, std::env::var_os("SSH_AUTH_SOCK"))
    }

    fn with_default(
        specs: impl IntoIterator<Item = SshSpec>,
        default: Option<OsString>,
    ) -> Result<Self, SpecError> {
        let default = default.filter(|path| !path.is_empty()).map(PathBuf::from);
        let mut sockets = BTreeMap::new();
        for SshSpec { id, socket } in specs {
            let wrong = |reason: String| SpecError::new(&id, reason);
            let path = socket
                .or_else(|| default.clone())
                .ok_or_else(|| wrong("SSH_AUTH_SOCK is not set: no agent to use".to_owned()))?;
            let kind = fs::metadata(&path).map_err(|error| wrong(format!("{}: {error}", path.display())))?;
            if kind.file_type().is_file() {
                return Err(wrong(NO_KEY_FILES.to_owned()));
            }
            if !kind.file_type().is_socket() {
                return Err(wrong(format!("{} is no socket", path.display())));
            }
            sockets.insert(id, path);
        }
        Ok(Self { sockets })
    }

    /// The agent's own socket, for git over ssh; never for a step.
    pub(crate) fn socket(&self, id: &str) -> Option<&Path> {
        self.sockets.get(id).map(PathBuf::as_path)
    }

    /// A socket for one step, in `dir`, which nobody else uses; `None`: the step goes on without.
    ///
    /// # Errors
    /// [`OpError::NoAgent`] when it is required and not there, [`OpError::Agent`].
    pub(crate) fn for_step(&self, wanted: &SecretMount, dir: OwnedFd) -> Result<Option<AgentProxy>, OpError> {
        let Some(agent) = self.sockets.get(&wanted.id) else {
            return match wanted.required {
                true => Err(OpError::NoAgent { id: wanted.id.clone() }),
                false => Ok(None),
            };
        };
        let proxy = AgentProxy::start(agent, wanted, dir);
        proxy.map(Some).map_err(|source| OpError::Agent { id: wanted.id.clone(), source })
    }
}

/// A socket that passes on what a step may ask; gone, with all its connections, when dropped.
pub(crate) struct AgentProxy {
    dir: OwnedFd,
    socket: OwnedFd,
    shared: Arc<Proxy>,
    stop: UnixStream,
    accepting: Option<JoinHandle<()>>,
}

struct Proxy {
    agent: PathBuf,
    ended: AtomicBool,
    /// Both ends of every connection, to be shut at the end.
    open: Mutex<BTreeMap<u64, [UnixStream; 2]>>,
}

impl AgentProxy {
    fn start(agent: &Path, wanted: &SecretMount, dir: OwnedFd) -> io::Result<Self> {
        // A socket's path has at most 107 bytes; the store's may be longer.
        let path = PathBuf::from(format!("/proc/self/fd/{}/{NAME}", dir.as_raw_fd()));
        let listener = UnixListener::bind(&path)?;
        // Owner before mode: chown(2) clears setuid bits.
        let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
        if !kiln_layer::has_single_id() {
            chownat(&dir, NAME, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        fs::set_permissions(&path, Permissions::from_mode(wanted.mode & 0o777))?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = openat(&dir, NAME, flags, Mode::empty())?;
        let (stop, stopped) = UnixStream::pair()?;
        let shared = Arc::new(Proxy {
            agent: agent.to_owned(),
            ended: AtomicBool::new(false),
            open: Mutex::default(),
        });
        let theirs = shared.clone();
        let accepting = std::thread::spawn(move || theirs.accept(&listener, &stopped));
        Ok(Self { dir, socket, shared, stop, accepting: Some(accepting) })
    }
}

/// The socket's file, to be mounted.
impl AsFd for AgentProxy {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for AgentProxy {
    fn drop(&mut self) {
        let _ = self.stop.shutdown(Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        self.shared.close();
        let _ = unlinkat(&self.dir, NAME, AtFlags::empty());
    }
}

impl Proxy {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, [UnixStream; 2]>> {
        // Plain data: a panic elsewhere leaves nothing half-done in it.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.ended.store(true, Ordering::SeqCst);
        for stream in self.lock().values().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Takes connections until `stopped` is shut; no thread of theirs is waited for.
    fn accept(self: Arc<Self>, listener: &UnixListener, stopped: &UnixStream) {
        for number in 0.. {
            let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
                Ok(_) if !fds[1].revents().is_empty() => return,
                Ok(_) => {}
            }
            let Ok((client, _)) = listener.accept() else { return };
            if self.lock().len() >= MAX_CONNECTIONS {
                continue;
            }
            let proxy = self.clone();
            std::thread::spawn(move || {
                // What goes wrong on one connection is that client's to notice.
                let _ = proxy.serve(number, client);
                proxy.lock().remove(&number);
            });
        }
    }

    fn serve(&self, number: u64, mut client: UnixStream) -> io::Result<()> {
        let mut agent = UnixStream::connect(&self.agent)?;
        self.lock().insert(number, [client.try_clone()?, agent.try_clone()?]);
        if self.ended.load(Ordering::SeqCst) {
            return Ok(());
        }
        while let Some(request) = read_message(&mut client)? {
            let answer = match request.first() {
                Some(&REQUEST_IDENTITIES | &SIGN_REQUEST) => {
                    write_message(&mut agent, &request)?;
                    let Some(answer) = read_message(&mut agent)? else { return Ok(()) };
                    answer
                }
                _ => vec![FAILURE],
            };
            write_message(&mut client, &answer)?;
        }
        Ok(())
    }
}

/// One message without its length; `None` at the end of the stream.
fn read_message(from: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = u32::from_be_bytes(length) as usize;
    if length == 0 || length > MAX_MESSAGE_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    from.read_exact(&mut message)?;
    Ok(Some(message))
}

fn write_message(to: &mut impl Write, message: &[u8]) -> io::Result<()> {
    let length = u32::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    to.write_all(&[&length.to_be_bytes(), message].concat())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// An agent that answers each request with its own bytes, and remembers their kinds.
    fn echo_agent(dir: &Path) -> (PathBuf, Arc<Mutex<Vec<u8>>>) {
        let path = dir.join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let kinds = seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut stream = stream;
                while let Ok(Some(message)) = read_message(&mut stream) {
                    kinds.lock().unwrap().push(message[0]);
                    if write_message(&mut stream, &message).is_err() {
                        break;
                    }
                }
            }
        });
        (path, seen)
    }

    fn wanted(required: bool) -> SecretMount {
        SecretMount { id: "default".to_owned(), mode: 0o600, uid: 0, gid: 0, required }
    }

    fn proxy(dir: &Path) -> (AgentProxy, Arc<Mutex<Vec<u8>>>) {
        let (path, seen) = echo_agent(dir);
        let spec = SshSpec { id: "default".to_owned(), socket: Some(path) };
        let agents = SshAgents::with_default([spec], None).unwrap();
        (agents.for_step(&wanted(true), scratch(dir)).unwrap().unwrap(), seen)
    }

    fn scratch(dir: &Path) -> OwnedFd {
        fs::create_dir_all(dir.join("scratch")).unwrap();
        fs::File::open(dir.join("scratch")).unwrap().into()
    }

    fn connect(dir: &tempfile::TempDir) -> UnixStream {
        UnixStream::connect(dir.path().join("scratch").join(NAME)).unwrap()
    }

    #[test]
    fn only_listing_and_signing_reach_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let (_proxy, seen) = proxy(dir.path());
        let mut client = connect(&dir);
        for kind in 0..=u8::MAX {
            write_message(&mut client, &[kind, 1, 2]).unwrap();
            let answer = read_message(&mut client).unwrap().unwrap();
            let passed = kind == REQUEST_IDENTITIES || kind == SIGN_REQUEST;
            assert_eq!(answer, if passed { vec![kind, 1, 2] } else { vec![FAILURE] });
        }
        assert_eq!(*seen.lock().unwrap(), [REQUEST_IDENTITIES, SIGN_REQUEST]);
    }

    #[test]
    fn a_message_that_is_too_long_ends_the_connection() {
        let dir = tempfile::tempdir().unwrap();
        let (_proxy, seen) = proxy(dir.path());
        let mut client = connect(&dir);
        client.write_all(&u32::MAX.to_be_bytes()).unwrap();
        assert_eq!(client.read(&mut [0; 8]).unwrap_or(0), 0);
        assert!(seen.lock().unwrap().is_empty());
    }

    #[test]
    fn nothing_is_left_when_the_step_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (proxy, _) = proxy(dir.path());
        let mut client = connect(&dir);
        write_message(&mut client, &[REQUEST_IDENTITIES]).unwrap();
        read_message(&mut client).unwrap().unwrap();
        let mode = fs::metadata(dir.path().join("scratch").join(NAME)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(proxy);
        assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
        assert_eq!(fs::read_dir(dir.path().join("scratch")).unwrap().count(), 0);
    }

    #[test]
    fn an_agent_that_was_not_given_is_an_error_only_where_it_is_required() {
        let dir = tempfile::tempdir().unwrap();
        let none = SshAgents::default();
        assert!(none.for_step(&wanted(false), scratch(dir.path())).unwrap().is_none());
        assert!(matches!(none.for_step(&wanted(true), scratch(dir.path())), Err(OpError::NoAgent { .. })));
    }

    #[test]
    fn specs_name_sockets_and_key_files_are_refused_with_a_way_out() {
        let spec = |id: &str, socket: Option<&str>| {
            Ok(SshSpec { id: id.to_owned(), socket: socket.map(PathBuf::from) })
        };
        assert_eq!(SshSpec::parse("default"), spec("default", None));
        assert_eq!(SshSpec::parse("git=/run/agent"), spec("git", Some("/run/agent")));
        for (text, part) in
            [("", "id is missing"), ("=x", "id is missing"), ("a=", "path"), ("a=k1,k2", "agent")]
        {
            let error = SshSpec::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("id_ed25519");
        fs::write(&key, "").unwrap();
        let fails = |path: &Path| {
            let spec = SshSpec { id: "default".to_owned(), socket: Some(path.to_owned()) };
            SshAgents::with_default([spec], None).unwrap_err().to_string()
        };
        assert!(fails(&key).contains("start an agent"));
        assert!(fails(&dir.path().join("missing")).contains("No such file"));
        assert!(fails(dir.path()).contains("no socket"));
        let default = SshSpec::parse("default").unwrap();
        let unset = SshAgents::with_default([default], None).unwrap_err().to_string();
        assert!(unset.contains("SSH_AUTH_SOCK"), "{unset}");
    }
}
