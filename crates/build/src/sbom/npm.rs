//! Packages of npm and its kin: `package.json` right below a directory in `node_modules`.

use super::texts::Described;
use super::{Finder, texts};
use crate::purl::Purl;

const MAX_BYTES: u64 = 1 << 20;

pub(super) fn find(finder: &mut Finder<'_>, path: &[u8]) {
    let Some(bytes) = finder.bytes(path, MAX_BYTES) else { return };
    let Some(Described { namespace, name, version, license, .. }) = texts::npm(&bytes) else { return };
    let purl = Purl { kind: "npm", namespace: &namespace, name: &name, version: &version, qualifiers: &[] };
    finder.add(purl, license, None, path);
}
