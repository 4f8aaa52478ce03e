//! `package.json`, as npm and its kin leave it.

use serde::Deserialize;
use serde_json::Value;

use super::{Described, word};

/// Whether `path` is what npm leaves of a package: right below a directory in `node_modules`.
pub(crate) fn is_npm(path: &[u8]) -> bool {
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

/// `None`: some packages bring files of this name for tests of their own.
pub(crate) fn npm(bytes: &[u8]) -> Option<Described> {
    let json: PackageJson = serde_json::from_slice(bytes).ok()?;
    let (name, version) = (text(&json.name)?, text(&json.version)?);
    // Earlier forms: an object, a list of them.
    let license = text(&json.license).or_else(|| text(json.license.get("type")?));
    let (namespace, name) = match name.split_once('/') {
        Some((scope, name)) => (scope.to_owned(), name.to_owned()),
        None => (String::new(), name),
    };
    if name.is_empty() {
        return None;
    }
    Some(Described { namespace, name, version, license, ..Described::default() })
}

fn text(value: &Value) -> Option<String> {
    value.as_str().and_then(word)
}
