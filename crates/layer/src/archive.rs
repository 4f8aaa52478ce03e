//! Chosen entries of a tree become a tar that is no layer: any names, no whiteouts.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::diff::DiffError;
use crate::index::{Entry, EntryKind, open_to_read};
use crate::node::{Xattrs, is_private_xattr};
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
    let mut out = BufWriter::with_capacity(BUFFER, out);
    let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut buffer = vec![0; BUFFER];
    for entry in entries {
        if cancel.load(Ordering::Relaxed) {
            return Err(DiffError::Cancelled);
        }
        let name = name(&entry.path);
        if name.is_empty() {
            continue;
        }
        let (mut path, mut size, mut device, mut link) = (name.clone(), 0, (0, 0), Vec::new());
        let flag = match &entry.kind {
            EntryKind::File { inode, nlink, .. } if *nlink > 1 && links.contains_key(inode) => {
                link.clone_from(&links[inode]);
                b'1'
            }
            EntryKind::File { size: bytes, inode, nlink, .. } => {
                if *nlink > 1 {
                    links.insert(*inode, name);
                }
                size = *bytes;
                b'0'
            }
            EntryKind::Dir => {
                path.push(b'/');
                b'5'
            }
            EntryKind::Symlink { target } => {
                link.clone_from(target);
                b'2'
            }
            EntryKind::Char { major, minor } => {
                device = (*major, *minor);
                b'3'
            }
            EntryKind::Block { major, minor } => {
                device = (*major, *minor);
                b'4'
            }
            EntryKind::Fifo => b'6',
            EntryKind::Socket => continue,
        };
        let shown = entry.xattrs.iter().filter(|(name, _)| !is_private_xattr(name) && flag != b'1');
        let xattrs: Xattrs = shown.map(|(name, value)| (name.clone(), value.clone())).collect();
        let header = Header {
            path: &path,
            flag,
            link: &link,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            size,
            mtime: entry.mtime,
            device,
            xattrs: &xattrs,
        };
        write_header(&mut out, &header).map_err(DiffError::Output)?;
        if size > 0 {
            let file = open_to_read(root, &entry.path).map_err(|error| DiffError::Scan(error.into()))?;
            content(&mut out, &mut buffer, &entry.path, File::from(file), size, cancel)?;
        }
    }
    out.write_all(&[0; 2 * BLOCK]).and_then(|()| out.flush()).map_err(DiffError::Output)
}

/// Exactly `size` bytes: the header has promised them already.
fn content(
    out: &mut impl Write,
    buffer: &mut [u8],
    path: &[u8],
    mut file: File,
    size: u64,
    cancel: &AtomicBool,
) -> Result<(), DiffError> {
    let mut left = size;
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(DiffError::Cancelled);
        }
        let length = match file.read(buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(DiffError::Host { call: "read", path: path.into(), source }),
        };
        if length as u64 > left || (length == 0 && left > 0) {
            return Err(DiffError::ChangedWhileReading { path: path.into() });
        }
        if length == 0 {
            return write_padding(out, size).map_err(DiffError::Output);
        }
        out.write_all(&buffer[..length]).map_err(DiffError::Output)?;
        left -= length as u64;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, create_dir, hard_link, write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::index::{ScanOptions, scan};

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
