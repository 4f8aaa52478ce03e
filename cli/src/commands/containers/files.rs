//! commit, and what `kiln diff` and `kiln export` do with containers.

use kiln_build::container::{self, ChangeKind, CommitRequest, ContainerFiles};
use kiln_containers::{Container, Error};

use super::life::is_running;
use crate::args::containers::CommitArgs;
use crate::commands::print;
use crate::errors::{Failure, say};
use crate::escape;
use crate::session::Session;

pub(super) fn commit(session: &Session, args: &CommitArgs) -> Result<u8, Failure> {
    let container = session.containers.find(&args.container)?;
    let config = container.config()?;
    let key = config.id.key();
    // Nobody removes or starts it meanwhile.
    let _lock = container.lock()?;
    let request = CommitRequest {
        settings: config.settings,
        command: config.process.args.join(" "),
        author: args.author.clone(),
        message: args.message.clone(),
        changes: args.change.clone(),
        name: args.image.clone(),
    };
    let _held = if args.pause && !args.no_pause { Held::hold(&container) } else { None };
    let files = ContainerFiles { key: &key, snapshot: config.snapshot.as_ref() };
    let image = container::commit(&session.engine, files, &config.image, &request, &session.cancel)?;
    print(&format!("{}\n", image.config))?;
    Ok(0)
}

/// A container whose processes are held until this goes.
struct Held<'a>(&'a Container);

impl<'a> Held<'a> {
    /// `None`: it does not run, or cannot be held; then its files may be of several moments.
    fn hold(container: &'a Container) -> Option<Self> {
        if !is_running(container) {
            return None;
        }
        match container.connect().and_then(|client| client.pause()) {
            Ok(_) => Some(Self(container)),
            Err(error) => {
                say(&format!("warning: the container runs on while it is read: {error}\n"));
                None
            }
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let _ = self.0.connect().and_then(|client| client.unpause());
    }
}

/// `kiln diff CONTAINER`
pub(crate) fn changes(session: &Session, name: &str) -> Result<u8, Failure> {
    let container = match session.containers.find(name) {
        Err(Error::NotFound { .. }) => {
            return Err(Failure::usage(format!("there is no container {name:?}; of images, name two")));
        }
        other => other?,
    };
    let config = container.config()?;
    let key = config.id.key();
    let files = ContainerFiles { key: &key, snapshot: config.snapshot.as_ref() };
    let mut text = String::new();
    for (kind, path) in container::changes(&session.engine, files, &session.cancel)? {
        let mark = match kind {
            ChangeKind::Added => 'A',
            ChangeKind::Changed => 'C',
            ChangeKind::Deleted => 'D',
        };
        text.push_str(&format!("{mark} {}\n", escape::path(&path)));
    }
    print(&text)?;
    Ok(0)
}
