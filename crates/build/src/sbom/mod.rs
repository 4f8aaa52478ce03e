//! What is in an image: packages, out of what package managers leave in its files.
//!
//! Read [`contents`] first, then `dpkg.rs`, `apk.rs`, `npm.rs` and `python.rs` (one kind of package each), `texts/` (what
//! their files say), `files.rs` (how a file of the image is read), and `spdx.rs` (the document). Decided in `docs/adr/0039-attestations.md`.
//!
//! # Invariants
//! - The files are hostile: no path leaves the image, each file and all together are bounded, and what is no package
//!   is passed over.
//! - What is found depends on the files alone: sorted, each package once.
//! - What is there and not read is told.

mod apk;
mod dpkg;
mod files;
mod kept;
mod npm;
mod python;
mod spdx;
mod texts;

pub(crate) use spdx::{Document, KIND, document};

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_layer::{Entry, EntryKind, ScanError, ScanOptions, Visit};
use kiln_oci::SnapshotId;
use serde::{Deserialize, Serialize};

use self::files::{Files, Read};
use self::texts::{Described, System};
use crate::purl::Purl;
use crate::{BuildCancel, BuildError, Engine};

/// Packages beyond these are not listed.
const MAX_PACKAGES: usize = 100_000;

/// A package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Package {
    /// Tells it from all others.
    purl: String,
    name: String,
    version: String,
    /// As its maker wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    license: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    maintainer: Option<String>,
    /// The file that says so.
    found_in: String,
}

/// What was found in an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Contents {
    /// Sorted by package URL.
    packages: Vec<Package>,
    /// What is there and was not read.
    pub(crate) notes: Vec<String>,
}

/// What the tree `top` holds; `None`: nothing. Costs a walk over the tree and reading what package managers keep, and
/// a small file for a tree that was looked at before.
///
/// # Errors
/// [`BuildError::Unreadable`], [`BuildError::Cancelled`].
pub(crate) fn contents(
    engine: &Engine,
    top: Option<&SnapshotId>,
    cancel: &BuildCancel,
) -> Result<Contents, BuildError> {
    let Some(top) = top else { return Ok(Contents::default()) };
    if let Some(known) = kept::find(engine, top) {
        return Ok(known);
    }
    let root = engine.snapshots.open_view(top)?;
    let found = read(root.as_fd(), cancel.flag())?;
    kept::keep(engine, top, &found);
    Ok(found)
}

/// Reads the tree at `root`.
fn read(root: BorrowedFd<'_>, cancel: &AtomicBool) -> Result<Contents, BuildError> {
    let mut finder = Finder::new(root, cancel);
    finder.system = system(&mut finder.files);
    dpkg::find(&mut finder)?;
    apk::find(&mut finder)?;
    finder.tell_of_rpm();
    for entry in walk(root, cancel)? {
        finder.check_cancelled()?;
        if texts::is_npm(&entry.path) {
            npm::find(&mut finder, &entry.path);
        } else {
            python::find(&mut finder, &entry.path);
        }
    }
    Ok(finder.finish())
}

/// The files that a library's package manager leaves, wherever they are.
fn walk(root: BorrowedFd<'_>, cancel: &AtomicBool) -> Result<Vec<Entry>, BuildError> {
    let filter = |path: &[u8], is_dir: bool| match is_dir {
        // What is asked of a directory's parents stays out of the list.
        true => Visit::Descend,
        false if texts::is_npm(path) || texts::is_python(path) => Visit::Take,
        false => Visit::Skip,
    };
    let options = ScanOptions { hash: false, filter: Some(&filter), stat_cache: None, cancel };
    let mut entries = kiln_layer::scan(root, b"", &options).map_err(|error| match error {
        ScanError::Cancelled => BuildError::Cancelled,
        error => BuildError::Unreadable {
            path: PathBuf::from("the files of the image"),
            source: io::Error::other(error),
        },
    })?;
    entries.retain(|entry| matches!(entry.kind, EntryKind::File { .. }));
    Ok(entries)
}

/// What the image says that it is.
fn system(files: &mut Files<'_>) -> System {
    let places = ["etc/os-release", "usr/lib/os-release"];
    let found = places.iter().find_map(|path| match files.read(path.as_bytes(), 64 << 10) {
        Read::Bytes(bytes) => Some(bytes),
        Read::Absent | Read::TooLarge | Read::Refused => None,
    });
    System::of_text(&found.unwrap_or_default())
}

/// Gathers packages.
struct Finder<'a> {
    files: Files<'a>,
    cancel: &'a AtomicBool,
    system: System,
    /// By package URL.
    packages: BTreeMap<String, Package>,
    is_full: bool,
    notes: Vec<String>,
}

impl<'a> Finder<'a> {
    fn new(root: BorrowedFd<'a>, cancel: &'a AtomicBool) -> Self {
        let (system, packages, notes) = Default::default();
        Self { files: Files::new(root), cancel, system, packages, is_full: false, notes }
    }

    fn check_cancelled(&self) -> Result<(), BuildError> {
        if self.cancel.load(Ordering::Relaxed) { Err(BuildError::Cancelled) } else { Ok(()) }
    }

    /// A file that says what is in the image. What there is and cannot be read is told.
    fn bytes(&mut self, path: &[u8], limit_bytes: u64) -> Option<Vec<u8>> {
        let why = match self.files.read(path, limit_bytes) {
            Read::Bytes(bytes) => return Some(bytes),
            Read::Absent => return None,
            Read::TooLarge => "it is too large",
            Read::Refused => "it cannot be read",
        };
        let shown = kiln_layer::EntryPath(path.to_vec());
        self.note(format!("the SBOM lacks what {shown} of the image says: {why}"));
        None
    }

    fn note(&mut self, text: String) {
        const TOLD: usize = 10;
        if self.notes.len() < TOLD {
            self.notes.push(text);
        }
    }

    /// Adds a package, unless it is known: the first file to say so counts.
    fn add(&mut self, purl: Purl<'_>, license: Option<String>, maintainer: Option<String>, found_in: &[u8]) {
        if self.packages.len() >= MAX_PACKAGES {
            self.is_full = true;
            return;
        }
        let name = match purl.kind {
            "npm" if !purl.namespace.is_empty() => format!("{}/{}", purl.namespace, purl.name),
            _ => purl.name.to_owned(),
        };
        let version = purl.version.to_owned();
        let purl = purl.to_text();
        let found_in = format!("/{}", String::from_utf8_lossy(found_in));
        let package = Package { purl: purl.clone(), name, version, license, maintainer, found_in };
        self.packages.entry(purl).or_insert(package);
    }

    /// Adds a package of the system's own manager: its kind, and whose it is where the image does not say.
    fn add_of_system(&mut self, (kind, usual): (&'static str, &str), found: Described, found_in: &[u8]) {
        let Described { name, version, arch, license, maintainer, .. } = &found;
        let (namespace, distro) = (self.system.id_or(usual), self.system.distro.clone());
        let qualifiers = &[("arch", arch.as_str()), ("distro", distro.as_str())];
        let purl = Purl { kind, namespace: &namespace, name, version, qualifiers };
        self.add(purl, license.clone(), maintainer.clone(), found_in);
    }

    fn tell_of_rpm(&mut self) {
        let places = ["var/lib/rpm", "usr/lib/sysimage/rpm"];
        let names = ["rpmdb.sqlite", "Packages.db", "Packages"];
        let is_there = |files: &Files<'_>| {
            places
                .iter()
                .any(|place| names.iter().any(|name| files.is_file(format!("{place}/{name}").as_bytes())))
        };
        if is_there(&self.files) {
            self.note(
                "the SBOM lacks the RPM packages of the image: kiln does not read their database".into(),
            );
        }
    }

    fn finish(mut self) -> Contents {
        if self.is_full {
            self.notes.push(format!("the SBOM lists {MAX_PACKAGES} packages, and the image has more"));
        }
        Contents { packages: self.packages.into_values().collect(), notes: self.notes }
    }
}

#[cfg(test)]
mod tests;
