//! Files of an image, read so that nothing hostile in them is of use: bounded, and never outside of its root.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::BorrowedFd;

use kiln_layer::{BeneathError, beneath};
use rustix::fs::{FileType, OFlags, fstat};
use rustix::io::Errno;

/// What all files together may have.
const MAX_BYTES: u64 = 1 << 30;

/// What came of reading a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    Bytes(Vec<u8>),
    /// There is no file of this name.
    Absent,
    /// It alone, or all that were read.
    TooLarge,
    /// The system does not let us.
    Refused,
}

/// The files below a root.
pub(super) struct Files<'a> {
    root: BorrowedFd<'a>,
    left_bytes: u64,
}

impl<'a> Files<'a> {
    pub(super) fn new(root: BorrowedFd<'a>) -> Self {
        Self { root, left_bytes: MAX_BYTES }
    }

    /// Whether there is a file at `path`, or a link to one.
    pub(super) fn is_file(&self, path: &[u8]) -> bool {
        self.size_bytes(path).is_ok()
    }

    fn size_bytes(&self, path: &[u8]) -> Result<u64, Read> {
        // Devices and pipes are looked at, not opened.
        let found = beneath::open_file(self.root, path, OFlags::PATH).map_err(|error| match error {
            BeneathError::Host { source, .. } => match Errno::from_io_error(&source) {
                Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Read::Absent,
                _ => Read::Refused,
            },
            _ => Read::Absent,
        })?;
        let stat = fstat(&found).map_err(|_| Read::Refused)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Read::Absent);
        }
        u64::try_from(stat.st_size).map_err(|_| Read::Refused)
    }

    /// Reads the file at `path`, links followed inside the root, if it has no more than `limit_bytes`.
    pub(super) fn read(&mut self, path: &[u8], limit_bytes: u64) -> Read {
        let size_bytes = match self.size_bytes(path) {
            Ok(size_bytes) => size_bytes,
            Err(read) => return read,
        };
        let limit_bytes = limit_bytes.min(self.left_bytes);
        if size_bytes > limit_bytes {
            return Read::TooLarge;
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let Ok(file) = beneath::open_file(self.root, path, flags) else { return Read::Refused };
        let mut bytes = Vec::new();
        match File::from(file).take(limit_bytes).read_to_end(&mut bytes) {
            Ok(count) => self.left_bytes -= count as u64,
            Err(_) => return Read::Refused,
        }
        Read::Bytes(bytes)
    }

    /// The names in the directory at `path`, sorted; none where there is no such directory, no more than `limit`.
    pub(super) fn names(&self, path: &[u8], limit: usize) -> Vec<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let Ok(dir) = beneath::open_file(self.root, path, flags) else { return Vec::new() };
        let Ok(entries) = rustix::fs::Dir::new(dir) else { return Vec::new() };
        let names = entries.filter_map(|entry| Some(entry.ok()?.file_name().to_bytes().to_vec()));
        let mut names: Vec<Vec<u8>> =
            names.filter(|name| !matches!(name.as_slice(), b"." | b"..")).take(limit).collect();
        names.sort();
        names
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, create_dir, write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_small_regular_files_inside_the_root_are_read() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(outside.path().join("x"), "outside").unwrap();
        create_dir(dir.path().join("d")).unwrap();
        write(dir.path().join("d/x"), "inside").unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        symlink("/d/x", dir.path().join("in")).unwrap();
        symlink("loop", dir.path().join("loop")).unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o644),
            0,
        )
        .unwrap();
        let root = File::open(dir.path()).unwrap();
        let mut files = Files::new(root.as_fd());
        let inside = || Read::Bytes(b"inside".to_vec());
        assert_eq!(files.read(b"d/x", 6), inside());
        assert_eq!(files.read(b"in", 6), inside());
        assert_eq!(files.read(b"../../d/x", 6), inside());
        assert_eq!(files.read(b"d/x", 5), Read::TooLarge);
        for path in [&b"out/x"[..], b"d", b"pipe", b"loop", b"d/x/y", b"nothing"] {
            assert_eq!(files.read(path, 100), Read::Absent, "{}", path.escape_ascii());
            assert!(!files.is_file(path));
        }
        assert_eq!(files.names(b"d", 9), [b"x".to_vec()]);
        assert!(files.names(b"out", 9).is_empty() && files.names(b"d", 0).is_empty());
        files.left_bytes = 5;
        assert_eq!(files.read(b"d/x", 6), Read::TooLarge);
    }
}
