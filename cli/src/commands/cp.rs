//! `kiln cp`

use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kiln_build::streams::OutStream;
use kiln_build::toolkit::{CopyOut, CopySource, copy_out, copy_out_tar};

use crate::args::toolkit::CpArgs;
use crate::errors::{Failure, say};
use crate::escape;
use crate::session::Session;

pub(crate) fn run(session: &Session, args: &CpArgs) -> Result<u8, Failure> {
    if let Some(done) = super::containers::copy::run(session, args)? {
        return Ok(done);
    }
    let (name, path) = split(args.source.as_bytes())?;
    let image = session.find(name)?;
    let what = CopyOut { from: CopySource::Image(&image), path, follow: args.follow_link };
    write(session, args, &what)
}

/// Writes what was asked for to its destination.
pub(super) fn write(session: &Session, args: &CpArgs, what: &CopyOut<'_>) -> Result<u8, Failure> {
    if args.destination == Path::new("-") {
        if std::io::stdout().is_terminal() {
            return Err(Failure::usage("a tar does not go to a terminal; name a directory or use a pipe"));
        }
        let path = Path::new("standard output");
        let failed = |error| Failure::output(&error);
        OutStream::written(&session.cancel, failed, |out| {
            Ok(copy_out_tar(&session.engine, what, path, out, &session.cancel)?)
        })?;
        return Ok(0);
    }
    let copied = copy_out(&session.engine, what, &args.destination, args.archive, &session.cancel)?;
    for path in &copied.left_out {
        say(&format!("warning: the device /{} is left out; --archive copies it\n", escape::path(path)));
    }
    Ok(0)
}

/// The image's name and the path in it.
pub(super) fn split(source: &[u8]) -> Result<(&str, &[u8]), Failure> {
    let wrong = || {
        Failure::usage(format!("{:?} is not an image and a path in it", escape::path(source)))
            .hint("write IMAGE:/PATH, such as app:1:/etc/passwd")
    };
    // Neither tags nor ports begin with a slash, so the first one behind a colon begins the path.
    let at = source.windows(2).position(|pair| pair == b":/").ok_or_else(wrong)?;
    let name = std::str::from_utf8(&source[..at]).map_err(|_| wrong())?;
    Ok((name, &source[at + 1..]))
}
