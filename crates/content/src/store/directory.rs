//! The directory that a store is in: what has to be there, and who may have power over it.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use kiln_oci::IdMap;

use crate::Error;

pub(super) const DIRS: [&str; 6] = ["blobs/sha256", "ingest", "locks", "state", "db", "snapshots"];

/// Makes the directories; returns the boot id.
pub(super) fn prepare(root: &Path) -> Result<String, Error> {
    let failed = |source| Error::NotWritable { path: root.to_owned(), source };
    check_place(root)?;
    let mut made = false;
    // After a power cut some may be there and others not.
    for dir in DIRS {
        if !root.join(dir).is_dir() {
            DirBuilder::new().recursive(true).mode(0o700).create(root.join(dir)).map_err(failed)?;
            made = true;
        }
    }
    if made {
        // Somebody may have been faster.
        check_place(root)?;
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(failed)?;
    Ok(boot.trim().to_owned())
}

/// Whoever can put another directory in the store's place, or write to it, owns every image in it.
///
/// A link on the way through a directory that anybody may write to counts as the kernel's
/// `fs.protected_symlinks` has it: one's own or root's is safe where nobody else can replace it. The
/// store itself is no link there, whoever made it. In a user's namespace the kernel shows root's and all
/// strangers' files as the same owner's: whoever enters one has to ask before, too.
///
/// # Errors
/// [`Error::Unsafe`].
pub fn check_place(root: &Path) -> Result<(), Error> {
    const STICKY: u32 = 0o1000;
    let refused = |what: String| Error::Unsafe { path: root.to_owned(), what };
    let me = rustix::process::geteuid().as_raw();
    let mut parent_mode = 0;
    let mut at = PathBuf::new();
    for component in root.components() {
        at.push(component);
        let Ok(stat) = fs::symlink_metadata(&at) else { break };
        if stat.is_symlink() && parent_mode & 0o002 != 0 {
            let is_store = at == root;
            let is_trusted = [me, 0].contains(&stat.uid()) || is_hidden(stat.uid());
            if is_store || !is_trusted || parent_mode & STICKY == 0 {
                return Err(refused(format!(
                    "{} is a link in a directory that anybody may write to",
                    at.display()
                )));
            }
        }
        parent_mode = fs::metadata(&at).map_or(0, |stat| stat.mode());
    }
    match fs::metadata(root).map(|stat| stat.uid()) {
        Ok(owner) if owner != me => Err(refused(format!("it belongs to user {owner}"))),
        _ => Ok(()),
    }
}

/// Whether `uid` stands for users that this process's namespace has no numbers for
/// (user_namespaces(7), "Unmapped user and group IDs").
fn is_hidden(uid: u32) -> bool {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let has_all = IdMap::parse(&read("/proc/self/uid_map")).is_whole();
    !has_all && read("/proc/sys/kernel/overflowuid").trim() == uid.to_string()
}
