//! The content of one file, by the cheapest way that works.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Copier, CopyError, host, make};
use crate::beneath;
use crate::index::{Entry, EntryKind};
use crate::node::{self, Attributes, CallError, Named};
use crate::path;
use crate::walk::Found;

/// Between two looks at the cancellation flag.
const RANGE: usize = 64 << 20;
/// Smaller files are not looked for in the layers: sharing their blocks saves less than finding them costs.
pub const LARGE_FILE_BYTES: u64 = 128 << 10;
/// How often a file is read that changes meanwhile.
const ATTEMPTS: usize = 3;
/// Larger files are copied within the kernel. To read and to write these is no more work, and who follows has
/// their content then.
const SMALL_BYTES: u64 = 64 << 10;
/// What is read at once.
const PIECE: usize = 256 << 10;

impl Copier<'_> {
    pub(super) fn file(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        entry: &Entry,
        attributes: &Attributes<'_>,
    ) -> Result<(), CopyError> {
        // Read too: the copy is what gets hashed when the source has changed.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // With the mask of most processes that is what it has to have in the end.
        let mode = Mode::from_raw_mode(attributes.mode & 0o777);
        let made = make(parent, name, path, "openat", || fs::openat(parent, name, flags, mode))?;
        let mut made = File::from(made);
        for _ in 0..ATTEMPTS {
            if let Some(bytes) = self.attempt(&mut made, entry, path)? {
                self.copied.bytes += bytes;
                node::set_on_new(made.as_fd(), attributes).map_err(host(path))?;
                return self.look_at(made.as_fd(), parent, name, path, entry);
            }
            // Somebody is writing: with luck the same content again, which is the one to wait for.
            let fault = |call| move |source| CopyError::Host { call, path: path.into(), source };
            made.set_len(0).map_err(fault("ftruncate"))?;
            made.seek(SeekFrom::Start(0)).map_err(fault("lseek"))?;
        }
        Err(CopyError::ChangedWhileReading { path: entry.path.as_slice().into() })
    }

    /// Finds out for who follows what a file has become whose content is at hand: all else that opening it once
    /// more would say.
    fn look_at(
        &mut self,
        made: BorrowedFd<'_>,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        entry: &Entry,
    ) -> Result<(), CopyError> {
        self.written = None;
        if self.request.follower.is_some() && self.held.is_some() {
            let stat = fs::fstat(made).named("fstat").map_err(host(path))?;
            let xattrs = node::xattrs_of(made).map_err(host(path))?;
            let found = Found { parent, name, path, stat };
            // An error would be that of a link's target.
            self.written = Entry::new(&found, entry.content().copied(), xattrs).ok();
        }
        Ok(())
    }

    /// Copies the file once; `None`: it is not what the scan saw.
    fn attempt(&mut self, made: &mut File, entry: &Entry, path: &[u8]) -> Result<Option<u64>, CopyError> {
        let EntryKind::File { size, content, .. } = &entry.kind else { return Ok(None) };
        let source = match self.open_in_layers(&entry.path, *size) {
            Some(source) => source,
            None => self.opener.open(self.request.from, &entry.path)?,
        };
        let stat = |fd: BorrowedFd<'_>| fs::fstat(fd).named("fstat").map_err(host(&entry.path));
        if node::kind(&stat(source.as_fd())?) != FileType::RegularFile {
            return Ok(None);
        }
        let mut source = File::from(source);
        let bytes = self.content(&mut source, made, *size, entry, path)?;
        let (Some(expected), Some(looked_at)) = (content, self.request.looked_at) else {
            return Ok(Some(bytes));
        };
        // Looked at after the copy: equal to the scan's means the same content at every moment between,
        // unless the file was so young then that it may have changed within the same tick.
        let is_known = looked_at.is_settled(entry.mtime.unix_ns(), entry.ctime.unix_ns())
            && entry.is_as(&stat(source.as_fd())?);
        if !is_known && self.hash(made, path)? != *expected {
            return Ok(None);
        }
        Ok(Some(bytes))
    }

    /// Opens a large file in the layer that it is of; `None`: what is not worth it, or is not found.
    fn open_in_layers(&self, path: &[u8], size: u64) -> Option<OwnedFd> {
        let layers = if size >= LARGE_FILE_BYTES { self.request.from_layers } else { &[] };
        let (above, name) = path::split(path);
        // The highest one that has it is the one that shows it: it is there to be seen.
        let dir = |layer: &OwnedFd| beneath::open_dir_without_links(layer.as_fd(), above).ok();
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = |dir: OwnedFd| fs::openat(dir, name, flags, Mode::empty()).ok();
        layers.iter().filter_map(dir).find_map(file)
    }

    /// Copies everything, by the cheapest way that works.
    fn content(
        &mut self,
        source: &mut File,
        made: &mut File,
        size: u64,
        entry: &Entry,
        path: &[u8],
    ) -> Result<u64, CopyError> {
        self.held = None;
        if self.clones && size > 0 {
            match fs::ioctl_ficlone(&*made, &*source) {
                Ok(()) => return Ok(size),
                // Another file system, or one that cannot: so it stays for this copy.
                Err(_) => self.clones = false,
            }
        }
        let mut bytes = 0;
        while self.ranges && size > SMALL_BYTES && bytes < size {
            self.check_cancel()?;
            match fs::copy_file_range(&*source, None, &*made, None, RANGE) {
                Ok(0) => break,
                Ok(length) => bytes += length as u64,
                Err(Errno::INTR) => {}
                Err(Errno::NOSPC) => {
                    return Err(host(path)(CallError { call: "copy_file_range", errno: Errno::NOSPC }));
                }
                // Reading and writing says what is really wrong, if anything is.
                Err(_) => self.ranges = false,
            }
        }
        // That it has more by now shows when it is looked at or hashed afterwards, or it cannot have.
        let is_checked = self.request.looked_at.is_none() || entry.content().is_some();
        let is_whole = |bytes: u64| is_checked && size > 0 && bytes == size;
        self.buffer.resize(PIECE, 0);
        while !is_whole(bytes) {
            self.check_cancel()?;
            let fault = |call, path: &[u8], source| CopyError::Host { call, path: path.into(), source };
            let length = match source.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(fault("read", &entry.path, error)),
            };
            made.write_all(&self.buffer[..length]).map_err(|error| fault("write", path, error))?;
            self.held = (bytes == 0).then_some(length);
            bytes += length as u64;
        }
        if bytes == 0 {
            self.held = Some(0);
        }
        Ok(bytes)
    }

    /// What was made is hashed: all of it was written by this copy.
    fn hash(&mut self, made: &mut File, path: &[u8]) -> Result<[u8; 32], CopyError> {
        if let Some(length) = self.held {
            return Ok(blake3::hash(&self.buffer[..length]).into());
        }
        let fault = |call| move |source| CopyError::Host { call, path: path.into(), source };
        made.seek(SeekFrom::Start(0)).map_err(fault("lseek"))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(made).map_err(fault("read"))?;
        Ok(hasher.finalize().into())
    }

    fn check_cancel(&self) -> Result<(), CopyError> {
        if self.request.cancel.load(Ordering::Relaxed) { Err(CopyError::Cancelled) } else { Ok(()) }
    }
}
