//! Why a file that is there does not run here, in words that help.

use std::fmt;
use std::io;

use kiln_oci::Platform;
use serde::{Deserialize, Serialize};

/// Why a file that is there does not run here.
///
/// The kernel has two words for nearly all of it, ENOEXEC and ENOENT. What they mean is in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum Unfit {
    /// The kernel refuses it, and the file does not tell why.
    #[error("{}", io::Error::from_raw_os_error(*errno))]
    Refused {
        /// The kernel's reason.
        errno: i32,
    },
    /// It is for another machine.
    #[error(transparent)]
    Foreign(Box<Foreign>),
    /// It is no program of anything.
    #[error("{file:?} is neither a program nor a script: {problem}")]
    NoProgram {
        /// The program, or what its first line names.
        file: String,
        /// What is wrong with it.
        problem: NoProgram,
    },
    /// What is to run it is missing.
    #[error("{file:?} is run by {interpreter:?}, which is not in the image")]
    NoInterpreter {
        /// The program, or what its first line names.
        file: String,
        /// What its first line names, or the loader of a program that is linked with libraries.
        interpreter: String,
        /// It is a script.
        script: bool,
    },
}

/// What a file is that is neither a program nor a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum NoProgram {
    /// It has no bytes.
    Empty,
    /// Windows editors write one in front of `#!`.
    ByteOrderMark,
    /// Nothing stands behind `#!`.
    NoInterpreter,
    /// A text.
    NoFirstLine,
    /// No text.
    Data,
}

impl fmt::Display for NoProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "it is empty",
            Self::ByteOrderMark => "a byte order mark stands in front of its `#!`",
            Self::NoInterpreter => "nothing stands behind its `#!`",
            Self::NoFirstLine => "it does not begin with `#!`",
            Self::Data => "it is data",
        })
    }
}

/// Programs that this machine does not run, nor an emulator on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub struct Foreign {
    /// What they are for.
    pub platform: Platform,
    /// What the image says that it is for; `None`: nobody says.
    pub image: Option<Platform>,
    /// Why no emulator runs them.
    pub reason: String,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { platform, image, reason } = self;
        let host = Platform::host();
        match image {
            Some(image) if host.runs(image) => {
                write!(f, "it is for {platform}, though the image is for {image}, and ")?;
            }
            Some(image) => write!(f, "the image is for {image}, and ")?,
            None => {}
        }
        write!(f, "this machine ({host}) cannot run {platform} programs: {reason}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn other() -> Platform {
        let architecture = if Platform::host().architecture == "s390x" { "arm64" } else { "s390x" };
        Platform::new("linux", architecture)
    }

    #[track_caller]
    fn check(image: Option<Platform>, begins: &str) {
        let (host, other) = (Platform::host(), other());
        let foreign = Foreign { platform: other.clone(), image, reason: "why".to_owned() };
        let expected = format!("{begins}this machine ({host}) cannot run {other} programs: why");
        assert_eq!(Unfit::Foreign(Box::new(foreign)).to_string(), expected);
    }

    #[test]
    fn platforms_are_named_that_do_not_fit() {
        let (host, other) = (Platform::host(), other());
        check(None, "");
        check(Some(other.clone()), &format!("the image is for {other}, and "));
        check(Some(host.clone()), &format!("it is for {other}, though the image is for {host}, and "));
    }

    #[test]
    fn what_is_not_there_is_quoted() {
        let (file, interpreter) = ("/x".to_owned(), "/bin/sh\r".to_owned());
        let missing = Unfit::NoInterpreter { file, interpreter, script: true };
        assert_eq!(missing.to_string(), r#""/x" is run by "/bin/sh\r", which is not in the image"#);
    }
}
