//! Files that users ask for: whole under their name, or not there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, OFlags, linkat};

use crate::BuildError;

/// Where an output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dest {
    /// `-`
    Stdout,
    /// A file or directory.
    Path(PathBuf),
}

impl Dest {
    /// `-` or a path.
    pub fn parse(text: &str) -> Self {
        if text == "-" { Self::Stdout } else { Self::Path(text.into()) }
    }
}

/// What an output is written to.
pub struct Target<'a> {
    /// For messages.
    pub path: &'a Path,
    /// Takes the bytes.
    pub out: &'a mut dyn Write,
    /// What `out` writes to, where nobody else sees it yet: bytes written earlier can be written again.
    pub file: Option<&'a File>,
}

/// A file that gets its name with [`NewFile::finish`]; dropped before that, nothing is left of it.
pub struct NewFile {
    file: File,
    /// What the user said, for messages.
    named: PathBuf,
    state: State,
}

enum State {
    /// A device, a pipe: written as it is.
    Direct,
    /// Without a name; it gets this one.
    Nameless(PathBuf),
    /// Under a name of its own, where the file system knows no other way.
    Temporary {
        path: PathBuf,
        target: PathBuf,
    },
    Done,
}

impl NewFile {
    /// Begins the file at `path`. What is there stays until [`NewFile::finish`], and is followed when
    /// it is a symbolic link.
    ///
    /// # Errors
    /// [`BuildError::Output`].
    pub fn create(path: &Path) -> Result<Self, BuildError> {
        let begun = Self::begin(path);
        let (file, state) = begun.map_err(|source| BuildError::Output { path: path.to_owned(), source })?;
        Ok(Self { file, named: path.to_owned(), state })
    }

    fn begin(path: &Path) -> io::Result<(File, State)> {
        if let Some(file) = descriptor(path) {
            return Ok((file?, State::Direct));
        }
        let target = match fs::metadata(path) {
            Ok(found) if found.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
            Ok(found) if !found.is_file() => {
                return Ok((OpenOptions::new().write(true).open(path)?, State::Direct));
            }
            Ok(_) => fs::canonicalize(path)?,
            Err(_) => path.to_owned(),
        };
        let parent = directory(&target);
        let flags = (OFlags::TMPFILE).bits().cast_signed();
        match OpenOptions::new().write(true).mode(0o666).custom_flags(flags).open(parent) {
            Ok(file) => Ok((file, State::Nameless(target))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(error),
            // Not every file system has files without a name.
            Err(_) => {
                let path = beside(&target);
                let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
                Ok((file, State::Temporary { path, target }))
            }
        }
    }

    /// Where to write.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What the user called it.
    pub fn path(&self) -> &Path {
        &self.named
    }

    /// Lets `write` write all of it.
    ///
    /// # Errors
    /// Those of `write`, and [`BuildError::Output`].
    pub fn write_by(
        &self,
        write: &mut dyn FnMut(&mut Target<'_>) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        let mut out = BufWriter::with_capacity(256 << 10, &self.file);
        let own = !matches!(self.state, State::Direct);
        write(&mut Target { path: &self.named, out: &mut out, file: own.then_some(&self.file) })?;
        out.into_inner().map_err(|error| self.failed(error.into_error())).map(drop)
    }

    /// The error of writing to it.
    pub fn failed(&self, source: io::Error) -> BuildError {
        BuildError::Output { path: self.named.clone(), source }
    }

    /// Gives the file its name, in the place of what had it. When it reaches the disk is left to the
    /// system, as after `cp`: syncing a gigabyte takes longer than making it.
    ///
    /// # Errors
    /// [`BuildError::Output`]; what had the name has it still.
    pub fn finish(mut self) -> Result<(), BuildError> {
        let done = match &self.state {
            State::Direct | State::Done => Ok(()),
            State::Temporary { path, target } => fs::rename(path, target),
            State::Nameless(target) => name(&self.file, target),
        };
        done.map_err(|source| self.failed(source))?;
        self.state = State::Done;
        Ok(())
    }
}

/// What a path like `/dev/stdout` stands for: written where it stands, whatever kind of file it is,
/// for others write to it, too.
fn descriptor(path: &Path) -> Option<io::Result<File>> {
    let own = |path: &Path| path.starts_with("/dev/fd") || path.starts_with("/proc/self/fd");
    if [Path::new("/dev/stdout"), Path::new("/dev/fd/1"), Path::new("/proc/self/fd/1")].contains(&path) {
        return Some(io::stdout().as_fd().try_clone_to_owned().map(File::from));
    }
    (own(path) || path == Path::new("/dev/stderr")).then(|| OpenOptions::new().append(true).open(path))
}

fn directory(target: &Path) -> &Path {
    target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let State::Temporary { path, .. } = &self.state {
            let _ = fs::remove_file(path);
        }
    }
}

fn beside(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    PathBuf::from(name)
}

fn name(file: &File, target: &Path) -> io::Result<()> {
    let nameless = format!("/proc/self/fd/{}", file.as_raw_fd());
    let link = |path: &Path| linkat(CWD, &*nameless, CWD, path, AtFlags::SYMLINK_FOLLOW);
    match link(target) {
        // Only a rename replaces what is there.
        Err(rustix::io::Errno::EXIST) => {
            let path = beside(target);
            link(&path)?;
            fs::rename(&path, target).inspect_err(|_| drop(fs::remove_file(&path)))
        }
        other => Ok(other?),
    }
}

/// Writes a small file as a whole.
///
/// # Errors
/// [`BuildError::Output`].
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let new = NewFile::create(path)?;
    new.file().write_all(bytes).map_err(|source| new.failed(source))?;
    new.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_name_comes_last_and_nothing_is_left_without_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let dropped = NewFile::create(&path).unwrap();
        dropped.file().write_all(b"half").unwrap();
        drop(dropped);
        assert!(names(dir.path()).is_empty());
        write_whole(&path, b"first").unwrap();
        let new = NewFile::create(&path).unwrap();
        new.file().write_all(b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
        new.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        std::os::unix::fs::symlink("out", dir.path().join("link")).unwrap();
        write_whole(&dir.path().join("link"), b"third").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(names(dir.path()), ["link", "out"]);
    }

    #[test]
    fn a_descriptor_is_written_where_it_stands() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "before ").unwrap();
        let open = OpenOptions::new().append(true).open(&path).unwrap();
        let inode = std::os::unix::fs::MetadataExt::ino(&open.metadata().unwrap());
        write_whole(Path::new(&format!("/proc/self/fd/{}", open.as_raw_fd())), b"after").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"before after");
        assert_eq!(std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap()), inode);
    }

    #[test]
    fn a_pipe_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let made = rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0);
        made.unwrap();
        let reader = std::thread::spawn({
            let path = path.clone();
            move || fs::read(path).unwrap()
        });
        write_whole(&path, b"through").unwrap();
        assert_eq!(reader.join().unwrap(), b"through");
        assert_eq!(names(dir.path()), ["pipe"]);
    }

    #[test]
    fn devices_are_written_as_they_are_and_directories_refused() {
        let dir = tempfile::tempdir().unwrap();
        write_whole(Path::new("/dev/null"), b"x").unwrap();
        assert!(Path::new("/dev/null").metadata().is_ok_and(|null| !null.is_file()));
        assert!(NewFile::create(dir.path()).is_err());
        assert!(NewFile::create(&dir.path().join("absent/out")).is_err());
        assert!(names(dir.path()).is_empty());
    }
}
