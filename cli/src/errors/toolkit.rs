//! Errors of the layer toolkit.

use kiln_build::toolkit::ToolkitError;

use super::shortage::shortage;
use super::{Failure, chain, exit};

impl From<ToolkitError> for Failure {
    fn from(error: ToolkitError) -> Self {
        let plain = |code| Failure { code, text: format!("error: {}", chain(&error)), hint: None };
        let failure = match &error {
            ToolkitError::Cancelled => plain(exit::INTERRUPTED),
            ToolkitError::NoPath { .. } => plain(exit::SOURCE)
                .hint("`kiln cp IMAGE:/ - | tar -t` lists all files, `kiln layer show IMAGE` the layers"),
            ToolkitError::NotDirectory { .. } => plain(exit::SOURCE).hint("leave away the slash behind it"),
            ToolkitError::OntoFile { .. } => {
                plain(exit::SOURCE).hint("name a directory, or a path where nothing is yet")
            }
            ToolkitError::NoBase => plain(exit::USAGE)
                .hint("name the base with `--base IMAGE`, or squash all layers with `--squash=all`"),
            ToolkitError::NotBase => {
                plain(exit::USAGE).hint("the lowest layers of both have to be the same: see `kiln layer ls`")
            }
            ToolkitError::Setting { .. } => plain(exit::USAGE),
            ToolkitError::Build(_) => match error {
                ToolkitError::Build(error) => return error.into(),
                _ => plain(exit::STORE),
            },
            ToolkitError::Follow { .. }
            | ToolkitError::Destination { .. }
            | ToolkitError::Output { .. }
            | ToolkitError::Copy(_) => plain(exit::SOURCE),
            _ => plain(exit::STORE),
        };
        failure.for_want_of(shortage(&error))
    }
}
