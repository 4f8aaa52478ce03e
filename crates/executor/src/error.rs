//! Why a process did not run to its end.

use std::io;

use crate::Unfit;

/// Why a process did not run to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecError {
    /// It was stopped by [`Cancel`](crate::Cancel).
    #[error("the process was cancelled")]
    Cancelled,
    /// The program does not exist inside.
    #[error("{program:?}: not found in the image")]
    NotFound {
        /// As it was asked for.
        program: String,
    },
    /// The program exists and cannot be executed.
    #[error("{program:?} cannot be executed")]
    NotExecutable {
        /// As it was asked for.
        program: String,
        /// What is wrong with it.
        #[source]
        why: Unfit,
    },
    /// The user is not known inside, or is no user.
    #[error("user {user:?}: {reason}")]
    BadUser {
        /// As it was asked for.
        user: String,
        /// What is wrong.
        reason: String,
    },
    /// The working directory cannot be entered.
    #[error("working directory {cwd:?} cannot be entered")]
    BadCwd {
        /// As it was asked for.
        cwd: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A mount where none may be.
    #[error("a mount on {target:?} is refused: {reason}")]
    Refused {
        /// Where it was asked for.
        target: String,
        /// Why not there.
        reason: String,
    },
    /// Another runtime did not run the container.
    #[error("{program} did not run the container: {reason}")]
    Runtime {
        /// The runtime's program.
        program: String,
        /// What it said.
        reason: String,
    },
    /// A setting that the container cannot have.
    #[error("{setting} cannot be set: {reason}")]
    BadSetting {
        /// As it was asked for.
        setting: String,
        /// Why not.
        reason: String,
    },
    /// The network could not be set up.
    #[error("the container's network could not be set up ({step})")]
    Network {
        /// Which part.
        step: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A part of the sandbox could not be set up.
    #[error("the sandbox could not be set up ({step})")]
    Start {
        /// Which part.
        step: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The helper ended without a word: killed from outside.
    #[error("the container's helper process was killed")]
    HelperDied,
}

impl ExecError {
    /// Wraps an errno of the sandbox's set-up.
    pub(crate) fn start(step: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let step = step.into();
        move |errno| ExecError::Start { step, source: errno.into() }
    }

    /// Wraps an errno of the network's set-up.
    pub(crate) fn network(step: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let step = step.into();
        move |errno| ExecError::Network { step, source: errno.into() }
    }
}
