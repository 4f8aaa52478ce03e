//! What an earlier copy to the same place made, to be linked to where it is the same.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags};
use rustix::io::Errno;

use super::{Copier, CopyError, Identity, host};
use crate::beneath;
use crate::node::CallError;
use crate::path;

/// The files of an earlier copy, in a committed layer: nobody writes to them any more.
///
/// A file is known by the digest of all that it is ([`Identity::Known`]). Files that were hard links of one
/// another are not among them: two names in one layer that lead to one file are hard links there, and
/// nothing else may look like them.
pub struct Earlier {
    /// The layer's directory.
    dir: OwnedFd,
    known: HashSet<[u8; 32]>,
}

impl Earlier {
    /// The files in `dir` whose digests these were when they were made; others may be among them.
    pub fn new(dir: OwnedFd, known: impl IntoIterator<Item = [u8; 32]>) -> Self {
        Self { dir, known: known.into_iter().collect() }
    }
}

impl Copier<'_> {
    /// Links the file to that of the earlier copy if it is the same; whether it was.
    pub(super) fn link_earlier(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        identity: Identity,
    ) -> Result<bool, CopyError> {
        let is_known = |earlier: &&Earlier| identity.known().is_some_and(|one| earlier.known.contains(&one));
        let Some(earlier) = self.request.earlier.filter(is_known) else { return Ok(false) };
        let (above, last) = path::split(path);
        if self.earlier_dir.as_ref().is_none_or(|(known, _)| known != above) {
            let Ok(dir) = beneath::open_dir_without_links(earlier.dir.as_fd(), above) else {
                return Ok(false);
            };
            self.earlier_dir = Some((above.to_vec(), dir));
        }
        let Some((_, dir)) = &self.earlier_dir else { return Ok(false) };
        let link = || fs::linkat(dir, last, parent, name, AtFlags::empty());
        let linked = match link() {
            Err(Errno::EXIST) => match fs::unlinkat(parent, name, AtFlags::empty()) {
                Ok(()) => link(),
                // A directory is there, say: whoever makes the file says so.
                Err(_) => return Ok(false),
            },
            other => other,
        };
        match linked {
            Ok(()) => {
                self.copied.linked += 1;
                Ok(true)
            }
            Err(errno @ (Errno::NOSPC | Errno::DQUOT)) => {
                Err(host(path)(CallError { call: "linkat", errno }))
            }
            // The layer was removed meanwhile, or the file has as many names as it can have.
            Err(_) => Ok(false),
        }
    }
}
