//! An entry of a tree as a member of a tar: its header, and its content.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::diff::DiffError;
use crate::index::{Entry, EntryKind};
use crate::node::{Xattrs, is_private_xattr};
use crate::tar_write::Header;

/// The first name of every inode that has several: of hard links the first is the file.
#[derive(Default)]
pub(crate) struct Links(HashMap<(u64, u64), Vec<u8>>);

impl Links {
    pub(crate) fn contains(&self, inode: (u64, u64)) -> bool {
        self.0.contains_key(&inode)
    }

    /// Writes by `write` the header of `entry`, called `name` in the tar, where the root is the empty
    /// name. Returns the size of the content that has to follow; `None` for a socket, which no tar has.
    ///
    /// The attributes of overlayfs and SELinux are left out.
    pub(crate) fn write_header(
        &mut self,
        entry: &Entry,
        name: &[u8],
        write: impl FnOnce(&Header<'_>) -> io::Result<()>,
    ) -> io::Result<Option<u64>> {
        let mut path = name.to_vec();
        let (mut size, mut device, mut link) = (0, (0, 0), Vec::new());
        let flag = match &entry.kind {
            EntryKind::File { inode, nlink, .. } if *nlink > 1 && self.contains(*inode) => {
                link.clone_from(&self.0[inode]);
                b'1'
            }
            EntryKind::File { size: bytes, inode, nlink, .. } => {
                if *nlink > 1 {
                    self.0.insert(*inode, path.clone());
                }
                size = *bytes;
                b'0'
            }
            EntryKind::Dir => {
                path.extend_from_slice(if path.is_empty() { b"./" } else { b"/" });
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
            EntryKind::Socket => return Ok(None),
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
        write(&header)?;
        Ok(Some(size))
    }
}

/// An output with a buffer of its own to read into.
pub(crate) trait Spare {
    /// Free room, never none.
    fn spare(&mut self) -> io::Result<&mut [u8]>;
    /// The first `length` bytes of the room are written.
    fn advance(&mut self, length: usize);

    /// Takes as many of `bytes` as there is room for, as [`Write::write`] does.
    fn fill(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let spare = self.spare()?;
        let length = spare.len().min(bytes.len());
        spare[..length].copy_from_slice(&bytes[..length]);
        self.advance(length);
        Ok(length)
    }
}

/// Copies exactly `size_bytes`, which the header has promised already; padding is the caller's.
///
/// # Errors
/// [`DiffError::ChangedWhileReading`] when there is more or less.
pub(crate) fn copy_content(
    out: &mut impl Spare,
    path: &[u8],
    mut file: File,
    size_bytes: u64,
    cancel: &AtomicBool,
) -> Result<(), DiffError> {
    let mut left = size_bytes;
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(DiffError::Cancelled);
        }
        // One byte more than there should be shows that the file grew.
        let spare = out.spare().map_err(DiffError::Output)?;
        let length = match file.read(spare) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(DiffError::Host { call: "read", path: path.into(), source }),
        };
        if length as u64 > left || (length == 0 && left > 0) {
            return Err(DiffError::ChangedWhileReading { path: path.into() });
        }
        if length == 0 {
            return Ok(());
        }
        out.advance(length);
        left -= length as u64;
    }
}
