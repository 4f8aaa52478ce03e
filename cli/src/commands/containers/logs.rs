//! `kiln logs`

use std::collections::VecDeque;
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
    let mut reader = LogReader::open(container.dir()).map_err(unreadable)?;
    let wanted = |line: &LogLine| {
        args.since.is_none_or(|since| line.time >= since) && args.until.is_none_or(|until| line.time <= until)
    };
    let mut kept: VecDeque<LogLine> = VecDeque::new();
    while let Some(line) = reader.next_line().map_err(unreadable)? {
        if !wanted(&line) {
            continue;
        }
        match tail {
            None => {
                if !show(&line, args.timestamps)? {
                    return Ok(0);
                }
            }
            Some(count) => {
                kept.push_back(line);
                if kept.len() > count {
                    kept.pop_front();
                }
            }
        }
    }
    for line in &kept {
        if !show(line, args.timestamps)? {
            return Ok(0);
        }
    }
    let Some(watch) = watch else { return Ok(0) };
    loop {
        // Looked at first: what was printed before the end is there then.
        let ended = container.state().map_or(true, |state| !state.status.is_active());
        while let Some(line) = reader.next_line().map_err(unreadable)? {
            if wanted(&line) && !show(&line, args.timestamps)? {
                return Ok(0);
            }
        }
        if ended || args.until.is_some_and(|until| Time::now() > until) {
            return Ok(0);
        }
        watch.wait();
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

/// Prints a line where it was printed; false when nobody reads it.
fn show(line: &LogLine, timestamps: bool) -> Result<bool, Failure> {
    let text = if timestamps { format!("{} {}", line.time, line.text) } else { line.text.clone() };
    let written = match line.stream {
        Stream::Stderr => std::io::stderr().write_all(text.as_bytes()),
        Stream::Stdout => {
            let mut out = std::io::stdout();
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        }
    };
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::output(&error)),
    }
}
