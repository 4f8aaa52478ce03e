//! Any bytes as what package managers leave in an image: words that can stand for something come out of it, in a
//! package URL that holds no more than it may, and what is written again is read as the same.
//!
//! The input is a path, a line feed, a file.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code, unreachable_pub, reason = "as builds have it")]
#[path = "../../crates/build/src/purl.rs"]
mod purl;
#[allow(dead_code, unreachable_pub, reason = "as builds have it")]
#[path = "../../crates/build/src/sbom/texts/mod.rs"]
mod texts;

use purl::Purl;
use texts::{Described, MAX_WORD_BYTES, System, apk, dpkg, is_npm, is_python, npm, python};

fuzz_target!(|bytes: &[u8]| {
    let line = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (path, file) = (&bytes[..line], bytes.get(line + 1..).unwrap_or_default());
    assert!(!(is_npm(path) && is_python(path)), "it is one of them at most");
    let system = System::of_text(file);
    [&system.id, &system.distro]
        .into_iter()
        .filter(|word| !word.is_empty())
        .for_each(|word| check_line(word));
    assert!(system.distro.starts_with(&system.id));

    let blocks = 1 + file.iter().filter(|byte| **byte == b'\n').count();
    for (of_system, found) in [("deb", dpkg(file).collect::<Vec<_>>()), ("apk", apk(file).collect())] {
        assert!(found.len() <= blocks);
        for found in found.into_iter().flatten() {
            check(&found, of_system, &system);
            let written = match of_system {
                "deb" => format!(
                    "Package: {}\nVersion: {}\nArchitecture: {}\n\n",
                    found.name, found.version, found.arch
                ),
                _ => format!("P:{}\nV:{}\nA:{}\n\n", found.name, found.version, found.arch),
            };
            let mut again = match of_system {
                "deb" => dpkg(written.as_bytes()).collect::<Vec<_>>(),
                _ => apk(written.as_bytes()).collect(),
            };
            let again = again.swap_remove(0).expect("what was a package is one");
            assert_eq!(again, Described { license: None, maintainer: None, ..found });
        }
    }
    if let Some(found) = npm(file) {
        check(&found, "npm", &system);
        assert!(!found.namespace.contains('/'));
    }
    if let Some(found) = python(file) {
        check(&found, "pypi", &system);
        let written = format!("Name: {}\nVersion: {}\n\nLicense: no\n", found.name, found.version);
        let again = python(written.as_bytes()).expect("what was a package is one");
        assert_eq!(again, Described { license: None, maintainer: None, ..found });
    }
});

/// A word that can stand in a document.
fn check_line(word: &str) {
    assert!(word.len() <= 2 * MAX_WORD_BYTES + 1 && !word.contains(char::is_control), "{word:?}");
}

fn check(found: &Described, kind: &str, system: &System) {
    let Described { namespace, name, version, arch, license, maintainer } = found;
    assert!(!name.is_empty() && !version.is_empty(), "{found:?}");
    let words = [namespace, name, version, arch].into_iter().chain(license).chain(maintainer);
    words.for_each(|word| check_line(word));
    let qualifiers = [("arch", arch.as_str()), ("distro", system.distro.as_str())];
    let text = Purl { kind, namespace, name, version, qualifiers: &qualifiers }.to_text();
    assert!(text.starts_with(&format!("pkg:{kind}/")), "{text}");
    assert!(text.bytes().all(|byte| byte.is_ascii_graphic()), "{text:?}");
    // One version, one beginning of qualifiers: the rest is escaped.
    assert_eq!(text.matches('@').count(), 1, "{text}");
    assert!(text.matches('?').count() <= 1 && !text.contains('#'), "{text}");
}
