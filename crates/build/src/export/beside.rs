//! What is said of files that leave without an image: a file beside them for each statement.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;

use kiln_layer::{EntryKind, ScanOptions, beneath};
use kiln_oci::Sha256Writer;
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, futimens, open, openat, unlinkat};
use rustix::io::Errno;

use super::output::TreeOutput;
use super::run::Delivery;
use crate::BuildError;
use crate::attest::{Predicate, Subject, statement};
use crate::platforms::Product;

/// A file with a statement.
pub(super) struct BesideFile {
    /// A directory of the output in which it stands.
    below: Option<String>,
    name: String,
    json: Vec<u8>,
    /// Seconds since 1970.
    mtime: i64,
}

/// Something in a tree.
struct Standing {
    path: Vec<u8>,
    /// `None`: of directories and links nothing is said.
    subject: Option<Subject>,
}

impl Delivery<'_> {
    /// The files to be put beside those of `product`, in the output at `path`. Reads all of its files, for their
    /// digests, if there are any.
    ///
    /// # Errors
    /// [`BuildError::Output`] when one of its files has the name already.
    pub(super) fn beside(
        &self,
        output: &TreeOutput,
        product: &Product,
        path: &Path,
    ) -> Result<Vec<BesideFile>, BuildError> {
        let said = product.predicates.iter().filter(|predicate| !predicate.place.is_inline_only);
        let said: Vec<&Predicate> = said.collect();
        if said.is_empty() {
            return Ok(Vec::new());
        }
        let failed = |source| BuildError::Output { path: path.to_owned(), source };
        let standing = self.standing(product, path)?;
        let style = self.tree_style(output, product);
        let mtime = style.epoch.unwrap_or_else(|| product.created_unix());
        let mut files = Vec::with_capacity(said.len());
        for predicate in said {
            let file = predicate.place.file.as_deref().unwrap_or("attestation.json");
            let name = format!("{}{file}", output.attestation_prefix);
            let name = match (&style.below, self.products.len()) {
                (None, 2..) => for_platform(&name, &product.platform.to_string().replace('/', "_")),
                _ => name,
            };
            if standing.iter().any(|it| it.path == name.as_bytes()) {
                let what = format!("the image has a file {name:?}; attestation-prefix gives another name");
                return Err(failed(io::Error::new(io::ErrorKind::AlreadyExists, what)));
            }
            let subjects: Vec<Subject> = standing.iter().filter_map(|it| it.subject.clone()).collect();
            let json = statement(predicate, &subjects);
            files.push(BesideFile { below: style.below.clone(), name, json, mtime });
        }
        Ok(files)
    }

    /// All that stands in the tree.
    fn standing(&self, product: &Product, path: &Path) -> Result<Vec<Standing>, BuildError> {
        let Some(top) = &product.top else { return Ok(Vec::new()) };
        let (engine, cancel) = (self.engine, self.cancel.flag());
        let failed = |source| BuildError::Output { path: path.to_owned(), source };
        let view: OwnedFd = engine.snapshots.open_view(top)?;
        let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel };
        let entries =
            kiln_layer::scan(view.as_fd(), b"", &options).map_err(|error| failed(io::Error::other(error)))?;
        let mut standing = Vec::with_capacity(entries.len());
        for entry in entries {
            if cancel.load(Ordering::Relaxed) {
                return Err(BuildError::Cancelled);
            }
            let subject = match entry.kind {
                EntryKind::File { .. } => {
                    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
                    let opened = beneath::open_file(view.as_fd(), &entry.path, flags);
                    let mut file = File::from(opened.map_err(|error| failed(io::Error::other(error)))?);
                    let mut hash = Sha256Writer::new(io::sink());
                    io::copy(&mut file, &mut hash).map_err(failed)?;
                    Some(Subject::file(&entry.path, &hash.finish().1))
                }
                _ => None,
            };
            standing.push(Standing { path: entry.path, subject });
        }
        Ok(standing)
    }
}

/// `provenance.linux_amd64.json`
fn for_platform(name: &str, platform: &str) -> String {
    match name.rsplit_once('.') {
        Some((stem, extension)) => format!("{stem}.{platform}.{extension}"),
        None => format!("{name}.{platform}"),
    }
}

impl BesideFile {
    /// Appends it to a tar without an end.
    pub(super) fn append_to(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut header = tar::Header::new_ustar();
        let below = self.below.as_deref().map_or(String::new(), |below| format!("{below}/"));
        header.set_path(format!("{below}{}", self.name))?;
        header.set_size(self.json.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(u64::try_from(self.mtime).unwrap_or(0));
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        out.write_all(header.as_bytes())?;
        out.write_all(&self.json)?;
        let used = self.json.len() % header.as_bytes().len();
        let rest = if used == 0 { 0 } else { header.as_bytes().len() - used };
        out.write_all(&vec![0; rest])
    }

    /// Puts it into `dir`, which is there. A link of this name is replaced, not followed.
    ///
    /// # Errors
    /// [`BuildError::Output`].
    pub(super) fn put_into(&self, dir: &Path) -> Result<(), BuildError> {
        let dir = self.below.as_ref().map_or(dir.to_owned(), |below| dir.join(below));
        let put = || -> io::Result<()> {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let parent = open(&dir, flags, Mode::empty())?;
            match unlinkat(&parent, self.name.as_str(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut file =
                File::from(openat(&parent, self.name.as_str(), flags, Mode::from_raw_mode(0o644))?);
            file.write_all(&self.json)?;
            let at = Timespec { tv_sec: self.mtime, tv_nsec: 0 };
            Ok(futimens(&file, &Timestamps { last_access: at, last_modification: at })?)
        };
        put().map_err(|source| BuildError::Output { path: dir.join(&self.name), source })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    fn file(json: &str) -> BesideFile {
        let below = Some("linux_amd64".to_owned());
        BesideFile { below, name: "provenance.json".to_owned(), json: json.into(), mtime: 7 }
    }

    #[test]
    fn a_tar_gets_it_as_a_file_of_its_own() {
        for size in [0, 1, 511, 512, 513] {
            let mut out = Vec::new();
            file(&"x".repeat(size)).append_to(&mut out).unwrap();
            assert_eq!(out.len() % 512, 0);
            out.extend([0; 1024]);
            let mut archive = tar::Archive::new(&out[..]);
            let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
            assert_eq!(entry.path().unwrap().to_str(), Some("linux_amd64/provenance.json"));
            assert_eq!(entry.header().mtime().unwrap(), 7);
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            assert_eq!(text.len(), size);
        }
    }

    #[test]
    fn a_link_in_its_place_is_replaced() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (below, victim) = (dir.path().join("linux_amd64"), outside.path().join("victim"));
        fs::create_dir(&below).unwrap();
        fs::write(&victim, "mine").unwrap();
        symlink(&victim, below.join("provenance.json")).unwrap();
        file("said").put_into(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "mine");
        assert_eq!(fs::read_to_string(below.join("provenance.json")).unwrap(), "said");
        fs::remove_file(below.join("provenance.json")).unwrap();
        fs::create_dir(below.join("provenance.json")).unwrap();
        assert!(file("said").put_into(dir.path()).is_err());
    }

    #[test]
    fn platforms_that_share_a_directory_have_files_of_their_own() {
        assert_eq!(for_platform("sbom.spdx.json", "linux_amd64"), "sbom.spdx.linux_amd64.json");
        assert_eq!(for_platform("said", "linux_arm_v7"), "said.linux_arm_v7");
    }
}
