//! What a registry has, below one directory.
//!
//! ```text
//! lock                                    who serves it holds it
//! format                                  "kiln-registry 1"
//! grace                                   seconds: who served it last lets things wait so long
//! blobs/sha256/ab/HEX                     bytes, once for all repositories
//! uploads/ID, uploads/ID.for              what came of a blob, and whose it is
//! uploads/new-…                           a small file before it has its name
//! repositories/NAME/_blobs/HEX            the repository has this blob
//! repositories/NAME/_manifests/HEX        media type, a line feed, the manifest
//! repositories/NAME/_referrers/HEX/HEX    the second names the first as its subject
//! repositories/NAME/_tags/TAG             a digest
//! ```
//!
//! No component of a repository's name begins with `_`, so none is taken for one of the four.

mod blobs;
mod collect;
mod lists;
mod manifests;
mod uploads;
mod waiting;

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use kiln_oci::Digest;
use rustix::fs::FlockOperation;

use crate::route::Name;
use crate::settings::Limits;
use crate::verified::Verified;
pub use collect::{Collected, Judged, Kind, collect_offline};
pub(crate) use lists::Page;
pub(crate) use manifests::{Manifest, NotPut, Reads};
pub(crate) use uploads::{NotEnded, Uploads, Writing};
pub(crate) use waiting::Waiting;

/// What this file says is what there is.
const FORMAT: &str = "kiln-registry 1\n";

/// Why a directory cannot be used, or what is in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// Another process serves it.
    #[error("another process serves {}", path.display())]
    Taken { path: PathBuf },
    /// A newer kiln wrote it, or it is something else.
    #[error("{} is not the directory of a registry that this kiln knows ({found:?})", path.display())]
    Format { path: PathBuf, found: String },
    /// There is no registry.
    #[error("{} is not the directory of a registry", path.display())]
    Missing { path: PathBuf },
    /// What is under a digest is something else.
    #[error("{} is damaged", path.display())]
    Damaged { path: PathBuf },
    /// The system refused.
    #[error("{} cannot be {call}", path.display())]
    Host { call: &'static str, path: PathBuf, source: io::Error },
}

impl DirectoryError {
    pub(crate) fn host(call: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Host { call, path, source }
    }
}

/// The directory. Its functions block, for as long as the disk takes.
pub(crate) struct Directory {
    root: PathBuf,
    pub(crate) uploads: Uploads,
    /// Held by whoever adds something or takes it away, and alone by who removes what nothing refers to.
    publishing: RwLock<()>,
    /// Held by who collects garbage.
    collecting: Mutex<()>,
    /// Blobs that came to be in a repository while garbage is collected.
    fresh: collect::Fresh,
    /// Manifests that are about to get a tag, and by how many.
    kept: Mutex<HashMap<(Name, Digest), usize>>,
    /// Blobs that were compared with their digests.
    pub(crate) verified: Arc<Verified>,
    /// What nothing needs yet.
    pub(crate) waiting: Waiting,
    counter: AtomicU64,
    /// The owner of the lock, unless this only looks; the kernel lets go of it when the process is gone.
    _lock: Option<File>,
}

impl Directory {
    /// Opens it, makes it where there is none, and removes what somebody left who was killed.
    pub(crate) fn open(root: &Path, limits: &Limits) -> Result<Self, DirectoryError> {
        let made = |path: &Path| {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.map_err(DirectoryError::host("made", path))
        };
        made(root)?;
        let at = root.join("lock");
        let lock = OpenOptions::new().create(true).append(true).mode(0o600).open(&at);
        let lock = lock.map_err(DirectoryError::host("opened", at))?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(DirectoryError::Taken { path: root.to_owned() });
        }
        let format = root.join("format");
        match fs::read_to_string(&format) {
            Ok(found) if found == FORMAT => {}
            Ok(found) => {
                let found = found.trim().chars().take(100).collect();
                return Err(DirectoryError::Format { path: root.to_owned(), found });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let strangers = fs::read_dir(root).map_err(DirectoryError::host("read", root))?;
                let known = ["lock", "blobs", "uploads", "repositories"];
                for entry in strangers {
                    let name = entry.map_err(DirectoryError::host("read", root))?.file_name();
                    if known.iter().all(|known| name != *known) {
                        let found = name.to_string_lossy().chars().take(100).collect();
                        return Err(DirectoryError::Format { path: root.to_owned(), found });
                    }
                }
            }
            Err(error) => return Err(DirectoryError::host("read", format)(error)),
        }
        made(&root.join("uploads"))?;
        made(&root.join("repositories"))?;
        let uploads = Uploads::open(root.join("uploads"), limits)?;
        let directory = Self {
            root: root.to_owned(),
            uploads,
            publishing: RwLock::new(()),
            collecting: Mutex::default(),
            fresh: collect::Fresh::default(),
            kept: Mutex::default(),
            verified: Arc::default(),
            waiting: Waiting::new(limits),
            counter: AtomicU64::new(0),
            _lock: Some(lock),
        };
        if !format.exists() {
            directory.write(&format, FORMAT.as_bytes())?;
        }
        directory.find_waiting()?;
        Ok(directory)
    }

    /// Opens one that is there; to `look` at it alone nobody is kept out, and nothing changes.
    pub(crate) fn open_existing(root: &Path, limits: &Limits, look: bool) -> Result<Self, DirectoryError> {
        let format = root.join("format");
        let found = match fs::read_to_string(&format) {
            Ok(found) => found,
            Err(error) if is_gone(&error) => return Err(DirectoryError::Missing { path: root.to_owned() }),
            Err(error) => return Err(DirectoryError::host("read", format)(error)),
        };
        if !look || found != FORMAT {
            // It says what is wrong with the format, too.
            return Self::open(root, limits);
        }
        Ok(Self::at(root, limits))
    }

    /// Looks at one that may not be there yet: until somebody makes it nothing is in it.
    pub(crate) fn open_to_come(root: &Path, limits: &Limits) -> Result<Self, DirectoryError> {
        match Self::open_existing(root, limits, true) {
            Err(DirectoryError::Missing { .. }) => Ok(Self::at(root, limits)),
            opened => opened,
        }
    }

    /// To look at it alone.
    fn at(root: &Path, limits: &Limits) -> Self {
        Self {
            root: root.to_owned(),
            uploads: Uploads::none(root.join("uploads")),
            publishing: RwLock::new(()),
            collecting: Mutex::default(),
            fresh: collect::Fresh::default(),
            kept: Mutex::default(),
            verified: Arc::default(),
            waiting: Waiting::new(limits),
            counter: AtomicU64::new(0),
            _lock: None,
        }
    }

    fn repository(&self, name: &Name) -> PathBuf {
        self.root.join("repositories").join(name.as_str())
    }

    /// Remembers how long things stay here, and how long uploads, for who collects garbage when nobody serves it.
    pub(crate) fn note_times(&self, grace: Duration, life: Duration) -> Result<(), DirectoryError> {
        if (self.noted_grace(), self.noted_life()) == (Some(grace), Some(life)) {
            return Ok(());
        }
        let text = format!("{}\n{}\n", grace.as_secs(), life.as_secs());
        self.write(&self.root.join("grace"), text.as_bytes())
    }

    /// The grace time that [`Directory::note_times`] was told last.
    pub(crate) fn noted_grace(&self) -> Option<Duration> {
        self.noted(0)
    }

    /// How long an upload stays that nobody goes on with.
    pub(crate) fn noted_life(&self) -> Option<Duration> {
        self.noted(1)
    }

    fn noted(&self, line: usize) -> Option<Duration> {
        let text = fs::read_to_string(self.root.join("grace")).ok()?;
        text.lines().nth(line)?.parse().ok().map(Duration::from_secs)
    }

    /// A place for a file that gets its name later.
    pub(crate) fn new_file(&self) -> PathBuf {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        self.root.join(format!("uploads/new-{number}"))
    }

    /// Writes a small file so that it is wholly there, durably, or not at all.
    fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), DirectoryError> {
        let dir = path.parent().unwrap_or(&self.root);
        self.make_dirs(dir)?;
        if bytes.is_empty() {
            // There is nothing that could be half there.
            let made = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
            made.map_err(DirectoryError::host("written", path))?;
            return sync(dir);
        }
        let new = self.new_file();
        let write = || {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(bytes)?;
            file.sync_data()?;
            fs::rename(&new, path)
        };
        if let Err(error) = write() {
            let _ = fs::remove_file(&new);
            return Err(DirectoryError::host("written", path)(error));
        }
        sync(dir)
    }

    /// Makes a directory and those above it, durably.
    fn make_dirs(&self, dir: &Path) -> Result<(), DirectoryError> {
        if dir.is_dir() {
            return Ok(());
        }
        if let Some(above) = dir.parent() {
            self.make_dirs(above)?;
        }
        let made = DirBuilder::new().mode(0o700).create(dir);
        if let Err(error) = made.or_else(|error| match error.kind() {
            // Somebody else was faster, who may not have come as far as to sync it.
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(error),
        }) {
            return Err(DirectoryError::host("made", dir)(error));
        }
        sync(dir.parent().unwrap_or(&self.root))
    }
}

/// Waits until the entries of a directory are on the disk.
fn sync(dir: &Path) -> Result<(), DirectoryError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(DirectoryError::host("synced", dir))
}

/// Removes a file; whether it was there.
fn remove(path: &Path) -> Result<bool, DirectoryError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(DirectoryError::host("removed", path)(error)),
    }
}

/// Nothing of that name, or of one above it.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The disk has lost it.
pub(crate) fn is_unreadable(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// The digests that files of a directory are named by, sorted; what is named otherwise is left out.
fn digests(dir: &Path) -> Result<Vec<Digest>, DirectoryError> {
    Ok(names(dir)?.iter().filter_map(|hex| format!("sha256:{hex}").parse().ok()).collect())
}

/// The names in a directory, sorted; nothing when it is not there.
fn names(dir: &Path) -> Result<Vec<String>, DirectoryError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(DirectoryError::host("read", dir)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(DirectoryError::host("read", dir))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}
