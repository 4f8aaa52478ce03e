//! Packages of Python: `METADATA` in `*.dist-info`, `PKG-INFO` in `*.egg-info`, or that itself as a file.

use super::texts::Described;
use super::{Finder, texts};
use crate::purl::Purl;

const MAX_BYTES: u64 = 4 << 20;

pub(super) fn find(finder: &mut Finder<'_>, path: &[u8]) {
    let Some(bytes) = finder.bytes(path, MAX_BYTES) else { return };
    let Some(Described { name, version, license, maintainer, .. }) = texts::python(&bytes) else { return };
    // What installers write and what is asked for differ in this (purl-spec).
    let normal = name.to_ascii_lowercase().replace('_', "-");
    let purl = Purl { kind: "pypi", name: &normal, version: &version, ..Purl::default() };
    finder.add(purl, license, maintainer, path);
}
