//! Packages of Debian and its kin: `/var/lib/dpkg/status`, and `status.d` in images without dpkg.

use super::stanza::{Stanza, stanzas};
use super::{Finder, word};
use crate::BuildError;

const STATUS: &[u8] = b"var/lib/dpkg/status";
const STATUS_DIR: &[u8] = b"var/lib/dpkg/status.d";
/// Debian's largest have some MiB.
const MAX_BYTES: u64 = 64 << 20;
/// One package's.
const MAX_ONE_BYTES: u64 = 1 << 20;
const MAX_FILES: usize = 20_000;
const FIELDS: [&str; 5] = ["Package", "Version", "Architecture", "Status", "Maintainer"];

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
    for stanza in stanzas(bytes, &FIELDS) {
        finder.check_cancelled()?;
        add(finder, &stanza, path);
    }
    Ok(())
}

fn add(finder: &mut Finder<'_>, stanza: &Stanza, path: &[u8]) {
    // What was removed leaves its configuration; images without dpkg do not say.
    let is_installed =
        stanza.get("Status").is_none_or(|status| status.split_ascii_whitespace().nth(2) == Some("installed"));
    let value = |name| stanza.get(name).and_then(word);
    let (Some(name), Some(version), true) = (value("Package"), value("Version"), is_installed) else {
        return;
    };
    let arch = value("Architecture").unwrap_or_default();
    let named = (name.as_str(), version.as_str(), arch.as_str());
    finder.add_of_system(("deb", "debian"), named, None, value("Maintainer"), path);
}
