//! Debian's `status`: a block for each package.

use super::stanza::{Stanza, stanzas};
use super::{Described, word};

const FIELDS: [&str; 5] = ["Package", "Version", "Architecture", "Status", "Maintainer"];

/// The blocks one by one; `None` for one that is no package which is there.
pub(crate) fn dpkg(bytes: &[u8]) -> impl Iterator<Item = Option<Described>> + '_ {
    stanzas(bytes, &FIELDS).map(|stanza| described(&stanza))
}

fn described(stanza: &Stanza) -> Option<Described> {
    // What was removed leaves its configuration; images without dpkg do not say.
    let is_installed =
        stanza.get("Status").is_none_or(|status| status.split_ascii_whitespace().nth(2) == Some("installed"));
    let value = |name| stanza.get(name).and_then(word);
    let (name, version) = (value("Package")?, value("Version")?);
    let arch = value("Architecture").unwrap_or_default();
    let found = Described { name, version, arch, maintainer: value("Maintainer"), ..Described::default() };
    is_installed.then_some(found)
}
