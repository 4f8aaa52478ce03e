//! Packages of Alpine and its kin: apk's `installed`.

use super::{Finder, texts};
use crate::BuildError;

const PLACES: [&[u8]; 2] = [b"lib/apk/db/installed", b"usr/lib/apk/db/installed"];
const MAX_BYTES: u64 = 64 << 20;

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), BuildError> {
    // One may be a link to the other.
    let found = PLACES.into_iter().find_map(|path| Some((path, finder.bytes(path, MAX_BYTES)?)));
    let Some((path, bytes)) = found else { return Ok(()) };
    for found in texts::apk(&bytes) {
        finder.check_cancelled()?;
        found.into_iter().for_each(|found| finder.add_of_system(("apk", "alpine"), found, path));
    }
    Ok(())
}
