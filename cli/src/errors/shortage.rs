//! Errors that mean: the machine, or this process, has too little of something.

use std::error::Error;
use std::io;

use kiln_build::{BuildError, OpError, SourceError};
use rustix::io::Errno;

use super::{Failure, exit};

/// What there is too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shortage {
    /// The disk is full, or a quota used up.
    Space,
    /// A file may not become as large as it has to.
    FileSize,
    /// Not so many files may be open.
    Files,
}

impl Failure {
    /// The same, for want of something.
    pub(super) fn for_want_of(self, shortage: Option<Shortage>) -> Self {
        let Some(shortage) = shortage else { return self };
        let failure = Self { code: exit::LIMIT, ..self };
        failure.hint(match shortage {
            Shortage::Space => {
                "make room on that file system, or put the store on another one with `--root DIR`"
            }
            Shortage::FileSize => "raise the limit on the size of files: `ulimit -f unlimited`",
            Shortage::Files => "raise the limit on open files: `ulimit -n 1024`",
        })
    }
}

fn of_io(error: &io::Error) -> Option<Shortage> {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    match error.kind() {
        StorageFull | QuotaExceeded => Some(Shortage::Space),
        FileTooLarge => Some(Shortage::FileSize),
        _ => match Errno::from_io_error(error) {
            Some(Errno::MFILE | Errno::NFILE) => Some(Shortage::Files),
            _ => None,
        },
    }
}

fn of_store(error: &kiln_content::Error) -> Option<Shortage> {
    if error.is_file_size() {
        return Some(Shortage::FileSize);
    }
    error.is_no_space().then_some(Shortage::Space)
}

/// What there was too little of somewhere below.
pub(super) fn shortage(error: &(dyn Error + 'static)) -> Option<Shortage> {
    // The kernel says EMFILE of watches, too, which have a limit and a hint of their own.
    if let Some(BuildError::Watch(_)) = error.downcast_ref() {
        return None;
    }
    let here = error
        .downcast_ref()
        .and_then(of_io)
        .or_else(|| error.downcast_ref().and_then(|errno: &Errno| of_io(&(*errno).into())))
        .or_else(|| error.downcast_ref().and_then(of_store));
    // An error that speaks as the one in it does not name that one as its source, and one in a box
    // names the box.
    let within = || match (error.downcast_ref(), error.downcast_ref(), error.downcast_ref()) {
        (Some(BuildError::Store(inner)), _, _) => shortage(inner),
        (Some(BuildError::Snapshots(inner)), _, _) => shortage(inner),
        (Some(BuildError::Step { source, .. }), _, _) => shortage(source.as_ref()),
        (Some(BuildError::Layer { source, .. } | BuildError::Pull { source, .. }), _, _) => {
            shortage(source.as_ref())
        }
        (_, Some(OpError::Build(inner)), _) => shortage(inner.as_ref()),
        (_, _, Some(SourceError::Build(inner))) => shortage(inner.as_ref()),
        _ => None,
    };
    here.or_else(within).or_else(|| error.source().and_then(shortage))
}
