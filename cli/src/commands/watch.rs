//! `kiln build --watch`: builds again whenever something that was read changes.
//!
//! One thread listens to the kernel. It gives up the build that is under way with the first news, and asks for the
//! next one once nothing was written for a moment.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_build::export::{ArchiveOutput, Dest, Output, TreeOutput};
use kiln_build::{BuildCancel, BuildError, BuildRequest, News, Reads, WatchError, Watcher, reads};
use kiln_executor::ExecError;
use kiln_solver::Cancellation;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::build::once;
use crate::args::BuildArgs;
use crate::config::Config;
use crate::errors::{Failure, say};
use crate::session::Session;

/// How long nothing must be written: editors and version control write many files at once.
const QUIET: Duration = Duration::from_millis(30);

/// What the main thread waits for.
enum Message {
    /// Something changed, and it is quiet.
    Build(Wish),
    /// The command was interrupted.
    Stop,
    /// Nothing can be watched any more.
    Failed(WatchError),
}

/// A build to begin.
struct Wish {
    news: News,
    /// The last change.
    at: Instant,
    turn: Turn,
}

/// One build, for both threads.
#[derive(Clone)]
struct Turn {
    cancel: BuildCancel,
    /// There is news since; a build that failed by itself is cancelled as well.
    overtaken: Arc<AtomicBool>,
}

impl Turn {
    fn new() -> Result<Self, ExecError> {
        Ok(Self { cancel: BuildCancel::new()?, overtaken: Arc::default() })
    }

    fn overtake(&self) {
        self.overtaken.store(true, Ordering::SeqCst);
        self.cancel.cancel();
    }
}

/// What both threads see.
struct Watched {
    watcher: Mutex<Watcher>,
    /// The build that is under way or about to begin.
    current: Mutex<Turn>,
}

impl Watched {
    fn watcher(&self) -> MutexGuard<'_, Watcher> {
        // What a panic left behind is still what the kernel watches.
        self.watcher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> MutexGuard<'_, Turn> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Builds until it is interrupted.
pub(super) fn run(
    session: &Session,
    args: &BuildArgs,
    request: &BuildRequest,
    config: &Config,
) -> Result<u8, Failure> {
    let written = written(args, request);
    let look = || reads(&session.engine, request, &written, &session.cancel);
    let mut turn = Turn::new().map_err(BuildError::from)?;
    let watched =
        Arc::new(Watched { watcher: Mutex::new(Watcher::new()?), current: Mutex::new(turn.clone()) });
    // What changes from here on is news.
    watch(&watched, look()?)?;
    let (sender, messages) = channel();
    listen(watched.clone(), session.cancel.clone(), sender);
    for number in 2_u64.. {
        let outcome = once(session, args, request, config, &turn.cancel);
        if session.cancel.is_cancelled() {
            break;
        }
        match outcome {
            Err(_) if turn.overtaken.load(Ordering::SeqCst) => {}
            Ok(_) => waiting(&watched),
            Err(failure) => {
                say(&failure.render());
                waiting(&watched);
            }
        }
        let Some(wish) = next(&messages)? else { break };
        // Other files may be read now. Whatever is wrong, the build says it.
        if let Ok(reads) = look() {
            watch(&watched, reads)?;
        }
        let what = match wish.news {
            News::Changed(path) => format!("{} changed", path.display()),
            News::Lost => "much changed".to_owned(),
        };
        say(&format!("watch: build {number}, {} ms after {what}\n", wish.at.elapsed().as_millis()));
        turn = wish.turn;
    }
    Err(BuildError::Cancelled.into())
}

fn watch(watched: &Watched, reads: Reads) -> Result<(), Failure> {
    watched.watcher().watch(reads).map_err(Failure::from)
}

fn waiting(watched: &Watched) {
    let count = watched.watcher().directories();
    say(&format!("watch: waiting for changes in {count} director{}\n", if count == 1 { "y" } else { "ies" }));
}

/// The build to begin; `None`: interrupted.
fn next(messages: &Receiver<Message>) -> Result<Option<Wish>, Failure> {
    match messages.recv() {
        Ok(Message::Build(wish)) => Ok(Some(wish)),
        Ok(Message::Failed(error)) => Err(error.into()),
        Ok(Message::Stop) | Err(_) => Ok(None),
    }
}

/// Files and directories that the build writes: no reason to build again.
fn written(args: &BuildArgs, request: &BuildRequest) -> Vec<PathBuf> {
    let dest = |output: &Output| match output {
        Output::Archive(ArchiveOutput { dest, .. })
        | Output::Tar(TreeOutput { dest, .. })
        | Output::Local(TreeOutput { dest, .. }) => match dest {
            Dest::Path(path) => Some(path.clone()),
            Dest::Stdout => None,
        },
        Output::Image(_) | Output::CacheOnly => None,
    };
    let files = args.iidfile.iter().chain(&args.metadata_file).cloned();
    request.outputs.iter().filter_map(dest).chain(files).collect()
}

fn listen(watched: Arc<Watched>, session: BuildCancel, messages: Sender<Message>) {
    std::thread::spawn(move || {
        let last = match listen_on(&watched, &session, &messages) {
            Ok(()) => Message::Stop,
            Err(error) => Message::Failed(error),
        };
        watched.current().overtake();
        // Nobody listens once the command is over.
        let _ = messages.send(last);
    });
}

/// Until the session is cancelled.
fn listen_on(watched: &Watched, session: &BuildCancel, messages: &Sender<Message>) -> Result<(), WatchError> {
    let failed = |errno: rustix::io::Errno| WatchError::Failed { path: "files".into(), source: errno.into() };
    let events = watched.watcher().as_fd().try_clone_to_owned();
    let events = events.map_err(|source| WatchError::Failed { path: "files".into(), source })?;
    let mut pending: Option<(News, Instant)> = None;
    loop {
        let left = pending.as_ref().map(|(_, at)| QUIET.saturating_sub(at.elapsed()));
        let timeout =
            left.map(|left| Timespec { tv_sec: 0, tv_nsec: left.as_nanos().min(999_999_999) as i64 });
        let stop = session.processes();
        let mut fds = [PollFd::new(stop, PollFlags::IN), PollFd::new(&events, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        if session.is_cancelled() {
            return Ok(());
        }
        if let Some(news) = watched.watcher().read()? {
            let first = pending.take().map(|(first, _)| first);
            pending = Some((first.unwrap_or(news), Instant::now()));
            watched.current().overtake();
        }
        if pending.as_ref().is_some_and(|(_, at)| at.elapsed() >= QUIET)
            && let Some((news, at)) = pending.take()
        {
            // From here on it can be overtaken itself.
            let turn = Turn::new().map_err(|error| WatchError::Failed {
                path: "files".into(),
                source: std::io::Error::other(error),
            })?;
            *watched.current() = turn.clone();
            if messages.send(Message::Build(Wish { news, at, turn })).is_err() {
                return Ok(());
            }
        }
    }
}
