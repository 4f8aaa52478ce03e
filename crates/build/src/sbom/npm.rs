//! Packages of npm and its kin: `package.json` right below a directory in `node_modules`.

use serde::Deserialize;
use serde_json::Value;

use super::{Finder, word};
use crate::purl::Purl;

const MAX_BYTES: u64 = 1 << 20;

/// Whether `path` is what npm leaves of a package.
pub(super) fn is_manifest(path: &[u8]) -> bool {
    let mut parts = path.rsplit(|&b| b == b'/');
    if parts.next() != Some(b"package.json") {
        return false;
    }
    let (Some(_name), Some(above)) = (parts.next(), parts.next()) else { return false };
    above == b"node_modules" || (above.starts_with(b"@") && parts.next() == Some(b"node_modules"))
}

#[derive(Deserialize)]
struct PackageJson {
    #[serde(default)]
    name: Value,
    #[serde(default)]
    version: Value,
    #[serde(default)]
    license: Value,
}

pub(super) fn find(finder: &mut Finder<'_>, path: &[u8]) {
    let Some(bytes) = finder.bytes(path, MAX_BYTES) else { return };
    // Some packages bring files of this name for tests of their own.
    let Ok(json) = serde_json::from_slice::<PackageJson>(&bytes) else { return };
    let (Some(name), Some(version)) = (text(&json.name), text(&json.version)) else { return };
    // Earlier forms: an object, a list of them.
    let license = text(&json.license).or_else(|| text(json.license.get("type")?));
    let (namespace, name) = match name.split_once('/') {
        Some((scope, name)) => (scope.to_owned(), name.to_owned()),
        None => (String::new(), name),
    };
    let purl = Purl { kind: "npm", namespace: &namespace, name: &name, version: &version, qualifiers: &[] };
    finder.add(purl, license, None, path);
}

fn text(value: &Value) -> Option<String> {
    value.as_str().and_then(word)
}
