//! Packages of Debian and its kin: `/var/lib/dpkg/status`, and `status.d` in images without dpkg.

use super::{Finder, texts};
use crate::BuildError;

const STATUS: &[u8] = b"var/lib/dpkg/status";
const STATUS_DIR: &[u8] = b"var/lib/dpkg/status.d";
/// Debian's largest have some MiB.
const MAX_BYTES: u64 = 64 << 20;
/// One package's.
const MAX_ONE_BYTES: u64 = 1 << 20;
const MAX_FILES: usize = 20_000;

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), BuildError> {
    if let Some(bytes) = finder.bytes(STATUS, MAX_BYTES) {
        add_all(finder, &bytes, STATUS)?;
    }
    for name in finder.files.names(STATUS_DIR, MAX_FILES) {
        finder.check_cancelled()?;
        if name.ends_with(b".md5sums") {
            continue;
        }
        let path = [STATUS_DIR, b"/", &name].concat();
        if let Some(bytes) = finder.bytes(&path, MAX_ONE_BYTES) {
            add_all(finder, &bytes, &path)?;
        }
    }
    Ok(())
}

fn add_all(finder: &mut Finder<'_>, bytes: &[u8], path: &[u8]) -> Result<(), BuildError> {
    for found in texts::dpkg(bytes) {
        finder.check_cancelled()?;
        found.into_iter().for_each(|found| finder.add_of_system(("deb", "debian"), found, path));
    }
    Ok(())
}
