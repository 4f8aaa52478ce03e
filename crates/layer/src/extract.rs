//! An archive of the user's becomes files below a root, as `ADD` has it.

use std::error::Error;
use std::fmt;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicBool;

use crate::apply::{Applied, ApplyError, Limits, unpack};
use crate::unpack::{Meaning, Owner, Rules, Unpacker};

/// How to unpack an archive that is no layer.
pub struct ExtractOptions<'a> {
    /// Owner of everything in the archive; `None`: as it says itself.
    pub owner: Option<(u32, u32)>,
    /// How much the archive may ask for.
    pub limits: Limits,
    /// Set by somebody else to stop.
    pub cancel: &'a AtomicBool,
}

/// Why an archive was not unpacked: for the reasons a layer is not, told without the word.
#[derive(Debug)]
pub struct ExtractError(pub ApplyError);

/// Unpacks the uncompressed `tar` below `root` as `ADD` does.
///
/// Like [`apply`](crate::apply) for the lower files that are there, but no name is a whiteout; `..`
/// stops at the root; a directory's entry goes where a link at its place leads, inside the root; an
/// entry for the root itself changes nothing.
///
/// # Errors
/// Those of [`apply`](crate::apply); what was unpacked before stays.
pub fn extract(
    tar: impl Read,
    root: BorrowedFd<'_>,
    options: &ExtractOptions<'_>,
) -> Result<Applied, ExtractError> {
    let owner = options.owner.map_or(Owner::Tar, |(uid, gid)| Owner::Fixed(uid, gid));
    let rules = Rules { meaning: Meaning::Archive, owner, cancel: options.cancel };
    unpack(tar, Unpacker::new(root, rules), options.limits).map_err(ExtractError)
}

impl fmt::Display for ExtractError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ApplyError::Cancelled => f.write_str("cancelled"),
            ApplyError::Refused { entry, refusal } => {
                write!(f, "archive entry {entry} is refused: it {refusal}")
            }
            ApplyError::Broken { entry, defect } => write!(f, "archive entry {entry} is broken: it {defect}"),
            ApplyError::Limit { what, limit, actual } => {
                write!(f, "the archive has {actual} {what}, {limit} are allowed")
            }
            ApplyError::Density(_) => f.write_str("the archive is not decompressed"),
            ApplyError::Input(_) => f.write_str("cannot read the archive"),
            ApplyError::Host { call, entry, .. } => write!(f, "{call} failed for archive entry {entry}"),
        }
    }
}

impl Error for ExtractError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}
