//! Images as package managers leave them, and as somebody hostile would.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

use tempfile::TempDir;

use super::*;

const DPKG: &str = "Package: bash\nStatus: install ok installed\nVersion: 5.2-1+b1\nArchitecture: amd64\n\
                    Maintainer: Somebody <a@b>\nDescription: a shell\n it is: one\n\n\
                    Package: gone\nStatus: deinstall ok config-files\nVersion: 1\nArchitecture: amd64\n\n\
                    Package: half\nStatus: install ok installed\n\n";
const APK: &str =
    "C:Q1x\nP:musl\nV:1.2.5-r0\nA:x86_64\nL:MIT\nm:Somebody <a@b>\n\nP:busybox\nV:1.36\nF:bin\n";

fn image(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in files {
        put(dir.path(), path, text.as_bytes());
    }
    dir
}

fn put(root: &Path, path: &str, bytes: &[u8]) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn found(dir: &TempDir) -> Contents {
    let root = File::open(dir.path()).unwrap();
    read(root.as_fd(), &AtomicBool::new(false)).unwrap()
}

#[track_caller]
fn check(dir: &TempDir, expected: &[&str]) {
    let found = found(dir);
    let purls: Vec<&str> = found.packages.iter().map(|package| package.purl.as_str()).collect();
    assert_eq!(purls, expected);
    assert_eq!(found.notes, [""; 0]);
}

#[test]
fn debian_is_read_out_of_dpkgs_status() {
    let dir = image(&[
        ("etc/os-release", "NAME=x\nID=debian\nVERSION_ID=\"12\"\n"),
        ("var/lib/dpkg/status", DPKG),
        ("var/lib/dpkg/status.d/base", "Package: base-files\nVersion: 12.4\nArchitecture: all\n"),
        ("var/lib/dpkg/status.d/base.md5sums", "Package: no\nVersion: 1\n"),
    ]);
    let debian = "pkg:deb/debian";
    let base = format!("{debian}/base-files@12.4?arch=all&distro=debian-12");
    let bash = format!("{debian}/bash@5.2-1%2Bb1?arch=amd64&distro=debian-12");
    check(&dir, &[&base, &bash]);
    let bash = &found(&dir).packages[1];
    assert_eq!((bash.name.as_str(), bash.version.as_str()), ("bash", "5.2-1+b1"));
    assert_eq!(bash.maintainer.as_deref(), Some("Somebody <a@b>"));
    assert_eq!(bash.found_in, "/var/lib/dpkg/status");
}

#[test]
fn alpine_is_read_out_of_apks_installed_wherever_it_is() {
    let expected = ["pkg:apk/alpine/busybox@1.36", "pkg:apk/alpine/musl@1.2.5-r0?arch=x86_64"];
    check(&image(&[("lib/apk/db/installed", APK)]), &expected);
    let merged = image(&[("usr/lib/apk/db/installed", APK)]);
    check(&merged, &expected);
    symlink("usr/lib", merged.path().join("lib")).unwrap();
    check(&merged, &expected);
    assert_eq!(found(&merged).packages[1].license.as_deref(), Some("MIT"));
    // A fork says what it is.
    let fork = image(&[
        ("lib/apk/db/installed", "P:a\nV:1\n"),
        ("usr/lib/os-release", "ID=wolfi\nVERSION_ID=20230201\n"),
    ]);
    symlink("../usr/lib/os-release", {
        fs::create_dir(fork.path().join("etc")).unwrap();
        fork.path().join("etc/os-release")
    })
    .unwrap();
    check(&fork, &["pkg:apk/wolfi/a@1?distro=wolfi-20230201"]);
}

#[test]
fn libraries_are_found_where_their_managers_put_them() {
    let dir = image(&[
        (
            "app/node_modules/left-pad/package.json",
            r#"{"name":"left-pad","version":"1.3.0","license":"WTFPL"}"#,
        ),
        (
            "app/node_modules/@a/b/package.json",
            r#"{"name":"@a/b","version":"2.0.0","license":{"type":"MIT"}}"#,
        ),
        (
            "app/node_modules/@a/b/node_modules/left-pad/package.json",
            r#"{"name":"left-pad","version":"1.3.0"}"#,
        ),
        ("app/node_modules/left-pad/test/package.json", r#"{"name":"fixture","version":"0"}"#),
        ("app/package.json", r#"{"name":"app","version":"0"}"#),
        (
            "usr/lib/python3/dist-packages/Typing_Ext-4.1.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: Typing_Ext\nVersion: 4.1\nLicense: PSF\n\nName: not-this\n",
        ),
        ("usr/lib/python3/dist-packages/old.egg-info", "Name: old\nVersion: 1\nLicense: UNKNOWN\n"),
        ("usr/lib/python3/dist-packages/older.egg-info/PKG-INFO", "Name: older\nVersion: 2\n"),
        ("usr/lib/python3/dist-packages/METADATA", "Name: nobody\nVersion: 2\n"),
    ]);
    check(
        &dir,
        &[
            "pkg:npm/%40a/b@2.0.0",
            "pkg:npm/left-pad@1.3.0",
            "pkg:pypi/old@1",
            "pkg:pypi/older@2",
            "pkg:pypi/typing-ext@4.1",
        ],
    );
    let found = found(&dir);
    let by_name = |name: &str| found.packages.iter().find(|package| package.name == name).unwrap();
    assert_eq!(by_name("@a/b").license.as_deref(), Some("MIT"));
    assert_eq!(by_name("old").license, None);
    // Of several the first counts.
    assert!(by_name("left-pad").found_in.starts_with("/app/node_modules/@a/b/"));
}

#[test]
fn what_is_not_read_is_told() {
    let rpm = image(&[("usr/lib/sysimage/rpm/rpmdb.sqlite", "SQLite format 3\0")]);
    let notes = found(&rpm).notes;
    assert!(notes.len() == 1 && notes[0].contains("RPM packages"), "{notes:?}");
    let large = image(&[]);
    let path = large.path().join("var/lib/dpkg");
    fs::create_dir_all(&path).unwrap();
    File::create(path.join("status")).unwrap().set_len(65 << 20).unwrap();
    let notes = found(&large).notes;
    assert!(notes.len() == 1 && notes[0].contains("\"var/lib/dpkg/status\""), "{notes:?}");
    assert!(notes[0].ends_with("it is too large"), "{notes:?}");
}

#[test]
fn nothing_outside_of_the_image_is_read() {
    let outside = image(&[("status", DPKG), ("package.json", r#"{"name":"x","version":"1"}"#)]);
    let dir = image(&[("var/lib/dpkg/x", ""), ("node_modules/x/x", "")]);
    symlink(outside.path().join("status"), dir.path().join("var/lib/dpkg/status")).unwrap();
    let up = format!("../../../../../../../..{}", outside.path().join("status").display());
    fs::create_dir_all(dir.path().join("lib/apk/db")).unwrap();
    symlink(up, dir.path().join("lib/apk/db/installed")).unwrap();
    // Not even a link that stays inside is a manifest.
    symlink(outside.path().join("package.json"), dir.path().join("node_modules/x/package.json")).unwrap();
    check(&dir, &[]);
}

#[test]
fn words_that_are_none_make_no_package() {
    let long = "x".repeat(texts::MAX_WORD_BYTES + 1);
    let text = format!(
        "P:{long}\nV:1\n\nP:a\nV:{long}\n\nP:\nV:1\n\nP:b\x1b[31m\nV:1\n\nP:c\nV:\u{7f}\n\n\
                        V:1\n\nP:d\n\nP:ok\nV:1\n"
    );
    check(&image(&[("lib/apk/db/installed", &text)]), &["pkg:apk/alpine/ok@1"]);
    let odd = image(&[]);
    put(odd.path(), "lib/apk/db/installed", b"P:\xff\nV:1\n\nP\n:\n\nQ:1");
    check(&odd, &["pkg:apk/alpine/%EF%BF%BD@1"]);
    let json = [
        "[]",
        "{",
        "null",
        r#"{"name":1,"version":"1"}"#,
        r#"{"name":"a"}"#,
        r#"{"name":"@a/","version":"1"}"#,
        "\u{feff}{}",
    ];
    for text in json {
        check(&image(&[("node_modules/a/package.json", text)]), &[]);
    }
    let deep = "[".repeat(100_000);
    check(&image(&[("node_modules/a/package.json", &deep)]), &[]);
}

#[test]
fn any_piece_of_a_file_and_any_byte_in_it_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let samples = [
        ("var/lib/dpkg/status", DPKG),
        ("lib/apk/db/installed", APK),
        ("a.dist-info/METADATA", "Name: a\nVersion: 1\n\nb"),
        ("node_modules/a/package.json", r#"{"name":"@a/b","version":"1"}"#),
        ("etc/os-release", "ID=\"a\"\nVERSION_ID='1'\n"),
    ];
    for (path, text) in samples {
        for at in 0..text.len() {
            put(dir.path(), path, &text.as_bytes()[..at]);
            found(&dir);
            for byte in [0, b'\n', b':', 0xff] {
                let mut changed = text.as_bytes().to_vec();
                changed[at] = byte;
                put(dir.path(), path, &changed);
                let words = found(&dir).packages.into_iter().flat_map(|it| [it.name, it.version]);
                assert!(words.into_iter().all(|word| !word.is_empty() && !word.contains(['\n', '\0'])));
            }
        }
        fs::remove_file(dir.path().join(path)).unwrap();
    }
}

#[test]
fn packages_beyond_the_limit_are_counted_out_aloud() {
    let mut text = String::new();
    for nth in 0..=MAX_PACKAGES {
        text.push_str(&format!("P:p{nth}\nV:1\n\n"));
    }
    let found = found(&image(&[("lib/apk/db/installed", &text)]));
    assert_eq!(found.packages.len(), MAX_PACKAGES);
    assert_eq!(found.notes, [format!("the SBOM lists {MAX_PACKAGES} packages, and the image has more")]);
}
