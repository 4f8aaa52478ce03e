//! Packages of Python: `METADATA` in `*.dist-info`, `PKG-INFO` in `*.egg-info`, or that itself as a file.

use super::stanza::stanzas;
use super::{Finder, word};
use crate::purl::Purl;

const MAX_BYTES: u64 = 4 << 20;
const FIELDS: [&str; 6] =
    ["Name", "Version", "License", "License-Expression", "Author-email", "Maintainer-email"];

/// Whether `path` is what an installer leaves of a package.
pub(super) fn is_manifest(path: &[u8]) -> bool {
    let mut parts = path.rsplit(|&b| b == b'/');
    let (name, above) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    match name {
        b"METADATA" => above.ends_with(b".dist-info"),
        b"PKG-INFO" => above.ends_with(b".egg-info") || above == b"EGG-INFO",
        name => name.ends_with(b".egg-info"),
    }
}

pub(super) fn find(finder: &mut Finder<'_>, path: &[u8]) {
    let Some(bytes) = finder.bytes(path, MAX_BYTES) else { return };
    // Behind the first empty line stands the description.
    let Some(stanza) = stanzas(&bytes, &FIELDS).next() else { return };
    let value = |name| stanza.get(name).and_then(word);
    let (Some(name), Some(version)) = (value("Name"), value("Version")) else { return };
    // What installers write and what is asked for differ in this (purl-spec).
    let normal = name.to_ascii_lowercase().replace('_', "-");
    let purl = Purl { kind: "pypi", name: &normal, version: &version, ..Purl::default() };
    let license = value("License-Expression").or_else(|| value("License"));
    let maintainer = value("Maintainer-email").or_else(|| value("Author-email"));
    finder.add(purl, license.filter(|license| license != "UNKNOWN"), maintainer, path);
}
