//! `METADATA` and `PKG-INFO`, as Python's installers leave them.

use super::stanza::stanzas;
use super::{Described, word};

const FIELDS: [&str; 6] =
    ["Name", "Version", "License", "License-Expression", "Author-email", "Maintainer-email"];

/// Whether `path` is what an installer leaves of a package.
pub(crate) fn is_python(path: &[u8]) -> bool {
    let mut parts = path.rsplit(|&b| b == b'/');
    let (name, above) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    match name {
        b"METADATA" => above.ends_with(b".dist-info"),
        b"PKG-INFO" => above.ends_with(b".egg-info") || above == b"EGG-INFO",
        name => name.ends_with(b".egg-info"),
    }
}

/// `None`: it is none.
pub(crate) fn python(bytes: &[u8]) -> Option<Described> {
    // Behind the first empty line stands the description.
    let stanza = stanzas(bytes, &FIELDS).next()?;
    let value = |name| stanza.get(name).and_then(word);
    let (name, version) = (value("Name")?, value("Version")?);
    let license = value("License-Expression").or_else(|| value("License"));
    let license = license.filter(|license| license != "UNKNOWN");
    let maintainer = value("Maintainer-email").or_else(|| value("Author-email"));
    Some(Described { name, version, license, maintainer, ..Described::default() })
}
