//! Packages of Alpine and its kin: apk's `installed`.

use super::{Finder, word};
use crate::BuildError;

const PLACES: [&[u8]; 2] = [b"lib/apk/db/installed", b"usr/lib/apk/db/installed"];
const MAX_BYTES: u64 = 64 << 20;

pub(super) fn find(finder: &mut Finder<'_>) -> Result<(), BuildError> {
    // One may be a link to the other.
    let found = PLACES.into_iter().find_map(|path| Some((path, finder.bytes(path, MAX_BYTES)?)));
    let Some((path, bytes)) = found else { return Ok(()) };
    let mut record = Record::default();
    for line in bytes.split(|&b| b == b'\n') {
        if line.is_empty() {
            finder.check_cancelled()?;
            std::mem::take(&mut record).add(finder, path);
        } else {
            record.take(line);
        }
    }
    record.add(finder, path);
    Ok(())
}

#[derive(Default)]
struct Record {
    name: Option<String>,
    version: Option<String>,
    arch: Option<String>,
    license: Option<String>,
    maintainer: Option<String>,
}

impl Record {
    fn take(&mut self, line: &[u8]) {
        let [letter, b':', value @ ..] = line else { return };
        let place = match letter {
            b'P' => &mut self.name,
            b'V' => &mut self.version,
            b'A' => &mut self.arch,
            b'L' => &mut self.license,
            b'm' => &mut self.maintainer,
            _ => return,
        };
        *place = word(&String::from_utf8_lossy(value));
    }

    fn add(self, finder: &mut Finder<'_>, path: &[u8]) {
        let (Some(name), Some(version)) = (self.name, self.version) else { return };
        let arch = self.arch.unwrap_or_default();
        let named = (name.as_str(), version.as_str(), arch.as_str());
        finder.add_of_system(("apk", "alpine"), named, self.license, self.maintainer, path);
    }
}
