//! `kiln cp` out of containers and into them.

use std::os::unix::ffi::OsStrExt;

use kiln_containers::{Container, Error};

use crate::args::toolkit::CpArgs;
use crate::commands::cp::split;
use crate::errors::Failure;
use crate::session::Session;

/// Copies where a container is named; `None`: it is an image's files that are meant.
pub(crate) fn run(session: &Session, args: &CpArgs) -> Result<Option<u8>, Failure> {
    let named = |text: &[u8]| -> Result<Option<(Container, Vec<u8>)>, Failure> {
        // docker: paths in containers begin at the root, with a slash or without. A path of the host with a
        // colon in it is written with `/` or `./` in front.
        let (name, path) = match split(text) {
            Ok((name, path)) => (name, path.to_vec()),
            Err(_) => {
                let Some(at) = text.iter().position(|&b| b == b':') else { return Ok(None) };
                let Ok(name) = std::str::from_utf8(&text[..at]) else { return Ok(None) };
                (name, [b"/", &text[at + 1..]].concat())
            }
        };
        if name.starts_with(['/', '.']) || name.is_empty() {
            return Ok(None);
        }
        match session.containers.find(name) {
            Ok(container) => Ok(Some((container, path))),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    };
    let (from, to) = (named(args.source.as_bytes())?, named(args.destination.as_os_str().as_bytes())?);
    match (from, to) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(Failure::usage("one of the two must be a path here")),
        (Some((container, path)), None) => super::copy_out::run(session, args, &container, &path).map(Some),
        (None, Some((container, path))) => super::copy_in::run(session, args, &container, &path).map(Some),
    }
}
