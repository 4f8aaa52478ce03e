//! `kiln logs`

use std::io::{ErrorKind, Write};

use kiln_containers::{Container, LogLine, LogReader, Time};
use kiln_executor::Stream;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

use crate::args::containers::LogsArgs;
use crate::errors::Failure;
use crate::session::Session;

pub(super) fn run(session: &Session, args: &LogsArgs) -> Result<u8, Failure> {
    let container = session.containers.find(&args.container)?;
    let config = container.config()?;
    if config.log.none {
        return Err(Failure::usage("the container was told to keep no log (--log-driver none)"));
    }
    if !container.dir().join("log").exists() && container.state()?.begun {
        return Err(Failure::usage(
            "the container has no log: what it prints goes to the command that runs it",
        ));
    }
    let tail = match args.tail.as_str() {
        "all" => None,
        count => match count.parse::<i64>() {
            Ok(count) => usize::try_from(count).ok(),
            Err(_) => return Err(Failure::usage(format!("--tail {count:?} is no number of lines"))),
        },
    };
    let unreadable = |error: std::io::Error| Failure::store(format!("the container's log: {error}"));
    // Before the first look: what comes in between is told then.
    let watch = if args.follow { Some(Watch::new(&container).map_err(unreadable)?) } else { None };
    let reader = match tail {
        Some(count) => LogReader::open_tail(container.dir(), count),
        None => LogReader::open(container.dir()),
    };
    let mut reader = reader.map_err(unreadable)?;
    let mut output = Output::new(args.timestamps);
    let (since, until) = (args.since.map(|time| time.to_string()), args.until.map(|time| time.to_string()));
    loop {
        // Looked at first: what was printed before the end is there then.
        let ended = !args.follow || container.state().map_or(true, |state| !state.status.is_active());
        while let Some(line) = reader.next_line().map_err(unreadable)? {
            let wanted = since.as_ref().is_none_or(|since| line.time >= *since)
                && until.as_ref().is_none_or(|until| line.time <= *until);
            if wanted && !output.show(&line)? {
                return Ok(0);
            }
        }
        if !output.flush()? || ended || args.until.is_some_and(|until| Time::now() > until) {
            return Ok(0);
        }
        watch.iter().for_each(Watch::wait);
    }
}

/// Waits for changes in a container's directory.
struct Watch(std::os::fd::OwnedFd);

impl Watch {
    fn new(container: &Container) -> std::io::Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let flags = inotify::WatchFlags::MODIFY | inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::CREATE;
        inotify::add_watch(&fd, container.dir(), flags)?;
        Ok(Self(fd))
    }

    /// A monitor that was killed changes nothing: now and then one has to look.
    fn wait(&self) {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let _ = poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 }));
        let mut events = [0; 4096];
        while rustix::io::read(&self.0, &mut events).is_ok_and(|count| count > 0) {}
    }
}

/// Prints lines where they were printed, many at once: those of the two streams stay in order, because one
/// is written before the other begins.
struct Output {
    timestamps: bool,
    stream: Stream,
    text: String,
}

/// So much is written at once.
const CHUNK: usize = 64 << 10;

impl Output {
    fn new(timestamps: bool) -> Self {
        Self { timestamps, stream: Stream::Stdout, text: String::with_capacity(CHUNK) }
    }

    /// False when nobody reads it.
    fn show(&mut self, line: &LogLine) -> Result<bool, Failure> {
        if (line.stream != self.stream || self.text.len() >= CHUNK) && !self.flush()? {
            return Ok(false);
        }
        self.stream = line.stream;
        if self.timestamps {
            self.text.push_str(&line.time);
            self.text.push(' ');
        }
        self.text.push_str(&line.text);
        Ok(true)
    }

    /// False when nobody reads it.
    fn flush(&mut self) -> Result<bool, Failure> {
        let text = std::mem::take(&mut self.text);
        let written = match self.stream {
            _ if text.is_empty() => Ok(()),
            Stream::Stderr => std::io::stderr().write_all(text.as_bytes()),
            Stream::Stdout => {
                let mut out = std::io::stdout().lock();
                out.write_all(text.as_bytes()).and_then(|()| out.flush())
            }
        };
        self.text = text;
        self.text.clear();
        match written {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(Failure::output(&error)),
        }
    }
}
