//! Chosen entries of a tree become a tar that is no layer: any names, no whiteouts.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::beneath::open_to_read;
use crate::diff::DiffError;
use crate::index::Entry;
use crate::member::{Links, Spare, copy_content};
use crate::tar_write::{BLOCK, Header, write_header, write_padding};

const BUFFER: usize = 256 << 10;

/// Writes `entries` of the tree at `root`, in the order of a scan, as a tar; `name` says what each
/// path is called there, and an empty name leaves the entry out.
///
/// Of hard links among the entries the first is the file. Sockets are left out, as are the attributes
/// of overlayfs and SELinux. Memory does not grow with the content.
///
/// # Errors
/// [`DiffError`], for the reasons a layer cannot be written.
pub fn archive(
    root: BorrowedFd<'_>,
    entries: &[Entry],
    name: &dyn Fn(&[u8]) -> Vec<u8>,
    out: impl Write,
    cancel: &AtomicBool,
) -> Result<(), DiffError> {
    let mut out = Buffered { out, buffer: vec![0; BUFFER], filled: 0 };
    let mut links = Links::default();
    for entry in entries {
        if cancel.load(Ordering::Relaxed) {
            return Err(DiffError::Cancelled);
        }
        let name = name(&entry.path);
        if name.is_empty() {
            continue;
        }
        let write = |header: &Header<'_>| write_header(&mut out, header);
        let size = links.write_header(entry, &name, write).map_err(DiffError::Output)?;
        if let Some(size) = size.filter(|&size| size > 0) {
            let file = open_to_read(root, &entry.path).map_err(|error| DiffError::Scan(error.into()))?;
            copy_content(&mut out, &entry.path, File::from(file), size, cancel)?;
            write_padding(&mut out, size).map_err(DiffError::Output)?;
        }
    }
    out.write_all(&[0; 2 * BLOCK]).and_then(|()| out.flush()).map_err(DiffError::Output)
}

/// A buffered writer that one can read into.
struct Buffered<W> {
    out: W,
    buffer: Vec<u8>,
    filled: usize,
}

impl<W: Write> Buffered<W> {
    fn pass_on(&mut self) -> io::Result<()> {
        let filled = std::mem::take(&mut self.filled);
        self.out.write_all(&self.buffer[..filled])
    }
}

impl<W: Write> Spare for Buffered<W> {
    fn spare(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.buffer.len() {
            self.pass_on()?;
        }
        Ok(&mut self.buffer[self.filled..])
    }

    fn advance(&mut self, length: usize) {
        self.filled += length;
    }
}

impl<W: Write> Write for Buffered<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.fill(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.pass_on()?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, create_dir, hard_link, write};
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::scan::{ScanOptions, scan};

    /// Names, kinds and links of what `archive` writes of the tree at `start`, called `base`.
    fn check(start: &str, base: &str, expected: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        create_dir(dir.path().join("d")).unwrap();
        create_dir(dir.path().join("d/empty")).unwrap();
        write(dir.path().join("d/file"), "text").unwrap();
        write(dir.path().join("d/.wh.odd"), "no whiteout").unwrap();
        hard_link(dir.path().join("d/file"), dir.path().join("d/linked")).unwrap();
        symlink("/etc/passwd", dir.path().join("d/symbolic")).unwrap();
        let (root, cancel) = (fs::File::open(dir.path()).unwrap(), AtomicBool::new(false));
        let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: &cancel };
        let entries = scan(root.as_fd(), start.as_bytes(), &options).unwrap();
        let name = |path: &[u8]| {
            let rest = String::from_utf8(path.to_vec()).unwrap();
            let rest = rest.strip_prefix(start).unwrap();
            format!("{base}{rest}").trim_matches('/').as_bytes().to_vec()
        };
        let mut bytes = Vec::new();
        archive(root.as_fd(), &entries, &name, &mut bytes, &cancel).unwrap();
        let mut found = Vec::new();
        for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut text = entry.path().unwrap().display().to_string();
            if let Some(link) = entry.link_name().unwrap() {
                text = format!("{text} -> {}", link.display());
            }
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            found.push(if content.is_empty() { text } else { format!("{text}: {content}") });
        }
        assert_eq!(found, expected);
    }

    #[test]
    fn entries_are_named_anew_links_among_them_too() {
        check(
            "d",
            "out",
            &[
                "out/",
                "out/.wh.odd: no whiteout",
                "out/empty/",
                "out/file: text",
                "out/linked -> out/file",
                "out/symbolic -> /etc/passwd",
            ],
        );
        check("d/file", "one", &["one: text"]);
        check("d/empty", "", &[]);
    }

    #[test]
    fn a_cancelled_archive_stops() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::File::open(dir.path()).unwrap();
        let never = AtomicBool::new(false);
        let options = ScanOptions { hash: false, filter: None, stat_cache: None, cancel: &never };
        let entries = scan(root.as_fd(), b"", &options).unwrap();
        let stop = AtomicBool::new(true);
        let stopped = archive(root.as_fd(), &entries, &|path| path.to_vec(), io::sink(), &stop);
        assert!(matches!(stopped, Err(DiffError::Cancelled)));
    }
}
