//! An image archive or an image layout directory: files by name, never by path.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Take};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_content::Store;
use kiln_layer::beneath;
use kiln_oci::document::DocumentError;
use kiln_oci::{DiffId, Digest};
use rustix::fs::{Mode, OFlags, open};

use crate::BuildError;

/// Links within an archive are followed this far (old docker archives link equal layers).
const MAX_LINKS: usize = 8;
/// Archives list a few files a layer; more is no image archive.
const MAX_ENTRIES: usize = 100_000;
/// Manifests and configs of one archive together: small ones may all name the same large one.
const MAX_DOCUMENTS_BYTES: u64 = 64 << 20;

/// Header, long name and extension records of one member.
const MAX_HEADER_BYTES: u64 = 1 << 20;
/// Names and link targets of all members together.
const MAX_NAMES_BYTES: u64 = 64 << 20;

/// An archive of which only headers are read, content being skipped: so much of one member, no more.
struct Headers<'f> {
    file: &'f File,
    left_bytes: Cell<u64>,
    is_exceeded: Cell<bool>,
}

impl Read for &Headers<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left_bytes = self.left_bytes.get();
        if left_bytes == 0 && !buffer.is_empty() {
            self.is_exceeded.set(true);
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let length = buffer.len().min(usize::try_from(left_bytes).unwrap_or(usize::MAX));
        let mut file = self.file;
        let read_bytes = file.read(&mut buffer[..length])?;
        self.left_bytes.set(left_bytes - read_bytes as u64);
        Ok(read_bytes)
    }
}

impl Seek for &Headers<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let mut file = self.file;
        file.seek(to)
    }
}

enum Place {
    File { offset: u64, size_bytes: u64 },
    Link { target: String },
}

/// Named files: the entries of an uncompressed tar, found without unpacking it, or a directory's.
pub(crate) struct Archive {
    path: PathBuf,
    backing: Backing,
    /// Files that stand in front of those of the backing.
    added: HashMap<String, Added>,
    /// Bytes of documents that were read.
    read_bytes: AtomicU64,
    heals: bool,
    stranger: Option<Arc<Compared>>,
}

/// Blobs of strangers that were unpacked, or decompressed, and what layer is in each: nobody has to do it again.
#[derive(Default)]
pub(crate) struct Compared(Mutex<HashSet<(DiffId, Digest)>>);

impl Compared {
    const MOST: usize = 1 << 16;

    pub(crate) fn has(&self, layer: &DiffId, blob: &Digest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&(*layer, *blob))
    }

    pub(crate) fn add(&self, layer: &DiffId, blob: &Digest) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= Self::MOST {
            all.clear();
        }
        all.insert((*layer, *blob));
    }
}

/// A file that an archive gets beside its own.
pub(crate) enum Added {
    File(File),
    /// One of its own under another name.
    Link(String),
}

enum Backing {
    Tar {
        file: File,
        places: HashMap<String, Place>,
    },
    Directory(OwnedFd),
    /// Files that may have no name.
    Files(HashMap<String, File>),
    Blobs {
        store: Arc<Store>,
        source: Box<dyn Blobs>,
    },
}

/// Where blobs come from that are not in the store yet.
pub(crate) trait Blobs: Send + Sync {
    /// Waits until the blob is in the store, as what it is named after.
    fn bring(&self, digest: &Digest) -> Result<(), BuildError>;

    /// A reader of a blob that is still on its way, and its size in bytes; `None`: it is there, or it has to be
    /// brought first. The reader ends only when the blob is in the store, as what it is named after: what comes out
    /// of it before is nobody's word.
    fn early(&self, digest: &Digest) -> Option<(Box<dyn Read + Send>, u64)>;
}

/// The content of a file of an archive.
pub(crate) enum Content {
    File(Take<File>),
    /// On its way.
    Coming(Box<dyn Read + Send>),
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Content::File(file) => file.read(buffer),
            Content::Coming(coming) => coming.read(buffer),
        }
    }
}

impl Archive {
    /// Reads all headers of `file`; `path` is for messages. Costs one seek an entry.
    ///
    /// # Errors
    /// [`BuildError::LargeDocument`] for a header, or names, beyond what memory is for.
    pub(crate) fn open(path: &Path, file: File) -> Result<Self, BuildError> {
        let headers = Headers { file: &file, left_bytes: Cell::new(0), is_exceeded: Cell::new(false) };
        let too_large = |what: &str, size_bytes, limit_bytes| BuildError::LargeDocument {
            path: path.to_owned(),
            member: what.to_owned(),
            size_bytes,
            limit_bytes,
        };
        let broken = |error: io::Error| match headers.is_exceeded.get() {
            true => too_large("a member's header", MAX_HEADER_BYTES + 1, MAX_HEADER_BYTES),
            false => broken(path, &format!("not a tar archive ({error})")),
        };
        let mut places = HashMap::new();
        let mut names_bytes = 0;
        let mut tar = tar::Archive::new(&headers);
        let mut entries = tar.entries_with_seek().map_err(broken)?;
        loop {
            headers.left_bytes.set(MAX_HEADER_BYTES);
            let Some(entry) = entries.next() else { break };
            let entry = entry.map_err(broken)?;
            let name = clean(&String::from_utf8_lossy(&entry.path_bytes()));
            let kind = entry.header().entry_type();
            let place = if kind.is_symlink() || kind.is_hard_link() {
                let target = entry.link_name_bytes().unwrap_or_default();
                let target = String::from_utf8_lossy(&target).into_owned();
                let base = if kind.is_symlink() { parent(&name) } else { "" };
                Place::Link { target: clean(&format!("{base}/{target}")) }
            } else if kind.is_file() {
                Place::File { offset: entry.raw_file_position(), size_bytes: entry.size() }
            } else {
                continue;
            };
            names_bytes += name.len() as u64;
            if let Place::Link { target } = &place {
                names_bytes += target.len() as u64;
            }
            if names_bytes > MAX_NAMES_BYTES {
                return Err(too_large("the list of members", names_bytes, MAX_NAMES_BYTES));
            }
            places.insert(name, place);
            if places.len() > MAX_ENTRIES {
                return Err(self::broken(path, "more than 100,000 entries: not an image archive"));
            }
        }
        Ok(Self::of(path, Backing::Tar { file, places }))
    }

    fn of(path: &Path, backing: Backing) -> Self {
        let (path, added, read_bytes) = (path.to_owned(), HashMap::new(), AtomicU64::new(0));
        Self { path, backing, added, read_bytes, heals: false, stranger: None }
    }

    /// The files below the directory `path`. Links are followed inside it.
    pub(crate) fn open_dir(path: &Path) -> Result<Self, BuildError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(path, flags, Mode::empty())
            .map_err(|errno| BuildError::Unreadable { path: path.to_owned(), source: errno.into() })?;
        Ok(Self::of(path, Backing::Directory(root)))
    }

    /// These files, by their names; `path` is for messages.
    pub(crate) fn of_files(path: &Path, files: HashMap<String, File>) -> Self {
        Self::of(path, Backing::Files(files))
    }

    /// The blobs that `source` brings into `store`; `path` is for messages.
    pub(crate) fn of_blobs(path: &Path, store: Arc<Store>, source: impl Blobs + 'static) -> Self {
        Self::of(path, Backing::Blobs { store, source: Box::new(source) })
    }

    /// Adds a file, or another name for one.
    pub(crate) fn add(&mut self, name: &str, added: Added) {
        self.added.insert(clean(name), added);
    }

    /// Whether what is read is in the store already, as a blob.
    pub(crate) fn is_in_store(&self) -> bool {
        matches!(self.backing, Backing::Blobs { .. })
    }

    /// The same, to mend with what it has what is damaged in the store.
    pub(crate) fn healing(self) -> Self {
        Self { heals: true, ..self }
    }

    /// Whether what the store has already is read, and replaced where it is damaged. Costs O(bytes) that
    /// came as blobs: no stamp of a file tells that its disk has lost a bit.
    pub(crate) fn heals(&self) -> bool {
        self.heals
    }

    /// The same from somebody who may not have what the store has.
    pub(crate) fn of_stranger(self, compared: Arc<Compared>) -> Self {
        Self { stranger: Some(compared), ..self }
    }

    /// Where nothing may come of it that is not in it: what layers its blobs are known to hold. Others that the store
    /// knows are read all the same: digests alone get nobody a layer. And how its layers are packed is for nobody else.
    pub(crate) fn stranger(&self) -> Option<&Compared> {
        self.stranger.as_deref()
    }

    /// The archive's path, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        match self.added.get(&clean(name)) {
            Some(Added::File(_)) => return true,
            Some(Added::Link(target)) => return self.contains_own(target),
            None => {}
        }
        self.contains_own(name)
    }

    fn contains_own(&self, name: &str) -> bool {
        match &self.backing {
            Backing::Tar { places, .. } => places.contains_key(&clean(name)),
            Backing::Files(files) => files.contains_key(name),
            Backing::Directory(root) => {
                beneath::open_file(root.as_fd(), clean(name).as_bytes(), OFlags::PATH).is_ok()
            }
            Backing::Blobs { .. } => blob_digest(name).is_some(),
        }
    }

    /// A reader over one entry's content, and its size in bytes.
    pub(crate) fn read(&self, name: &str) -> Result<(BufReader<Take<File>>, u64), BuildError> {
        let mut name = clean(name);
        match self.added.get(&name) {
            Some(Added::File(file)) => return self.read_open(&name, file),
            Some(Added::Link(target)) => name = clean(target),
            None => {}
        }
        let (own_file, places) = match &self.backing {
            Backing::Tar { file, places } => (file, places),
            Backing::Directory(root) => return self.read_file(root.as_fd(), &name),
            Backing::Files(files) => {
                let file = files.get(&name);
                let file = file.ok_or_else(|| broken(&self.path, &format!("{name} is missing")))?;
                return self.read_open(&name, file);
            }
            Backing::Blobs { store, source } => {
                let digest = blob_digest(&name)
                    .ok_or_else(|| broken(&self.path, &format!("{name} is not the name of a blob")))?;
                source.bring(&digest)?;
                let (file, size_bytes) = store.open_blob(&digest)?;
                return Ok((BufReader::with_capacity(256 << 10, file.take(size_bytes)), size_bytes));
            }
        };
        for _ in 0..MAX_LINKS {
            match places.get(&name) {
                None => return Err(broken(&self.path, &format!("{name} is missing in the archive"))),
                Some(Place::Link { target }) => name = target.clone(),
                Some(Place::File { offset, size_bytes }) => {
                    let io = |error: io::Error| broken(&self.path, &format!("cannot be read ({error})"));
                    let mut file = self::own_file(own_file).map_err(io)?;
                    file.seek(SeekFrom::Start(*offset)).map_err(io)?;
                    return Ok((BufReader::with_capacity(256 << 10, file.take(*size_bytes)), *size_bytes));
                }
            }
        }
        Err(broken(&self.path, &format!("{name} is a loop of links")))
    }

    fn read_open(&self, name: &str, file: &File) -> Result<(BufReader<Take<File>>, u64), BuildError> {
        let unreadable = |error| broken(&self.path, &format!("{name} cannot be read ({error})"));
        let own = own_file(file).map_err(unreadable)?;
        let size_bytes = own.metadata().map_err(unreadable)?.len();
        Ok((BufReader::with_capacity(256 << 10, own.take(size_bytes)), size_bytes))
    }

    /// The same without waiting for what is on its way. Once all of it was read, it was right; where something
    /// went wrong, [`Archive::settle`] knows more.
    pub(crate) fn read_early(&self, name: &str) -> Result<(BufReader<Content>, u64), BuildError> {
        if let Backing::Blobs { source, .. } = &self.backing
            && !self.added.contains_key(&clean(name))
            && let Some((coming, size_bytes)) = blob_digest(&clean(name)).and_then(|blob| source.early(&blob))
        {
            return Ok((BufReader::with_capacity(256 << 10, Content::Coming(coming)), size_bytes));
        }
        let (reader, size_bytes) = self.read(name)?;
        Ok((BufReader::with_capacity(256 << 10, Content::File(reader.into_inner())), size_bytes))
    }

    /// Waits for what is on its way.
    ///
    /// # Errors
    /// Why it did not come, or was something else than it should be.
    pub(crate) fn settle(&self, name: &str) -> Result<(), BuildError> {
        match (&self.backing, blob_digest(&clean(name))) {
            _ if self.added.contains_key(&clean(name)) => Ok(()),
            (Backing::Blobs { source, .. }, Some(digest)) => source.bring(&digest),
            _ => Ok(()),
        }
    }

    fn read_file(
        &self,
        root: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(BufReader<Take<File>>, u64), BuildError> {
        // NONBLOCK: a named pipe must not hold us here.
        let opened = beneath::open_file(root, name.as_bytes(), OFlags::RDONLY | OFlags::NONBLOCK);
        let file = File::from(opened.map_err(|error| match error.host_kind() {
            Some(io::ErrorKind::NotFound) => broken(&self.path, &format!("{name} is missing")),
            _ => broken(&self.path, &format!("{name} cannot be opened ({error})")),
        })?);
        let metadata = file.metadata();
        let metadata =
            metadata.map_err(|error| broken(&self.path, &format!("{name} cannot be read ({error})")))?;
        if !metadata.is_file() {
            return Err(broken(&self.path, &format!("{name} is not a file")));
        }
        let size_bytes = metadata.len();
        Ok((BufReader::with_capacity(256 << 10, file.take(size_bytes)), size_bytes))
    }

    /// A document as a whole.
    ///
    /// # Errors
    /// [`BuildError::LargeDocument`] for one beyond `max_bytes`, and for all that are read together.
    pub(crate) fn read_small(&self, name: &str, max_bytes: u64) -> Result<Vec<u8>, BuildError> {
        let (mut reader, size_bytes) = self.read(name)?;
        let too_large = |size_bytes, limit_bytes| BuildError::LargeDocument {
            path: self.path.clone(),
            member: name.to_owned(),
            size_bytes,
            limit_bytes,
        };
        if size_bytes > max_bytes {
            return Err(too_large(size_bytes, max_bytes));
        }
        let read_bytes = self.read_bytes.fetch_add(size_bytes, Ordering::Relaxed).saturating_add(size_bytes);
        if read_bytes > MAX_DOCUMENTS_BYTES {
            return Err(too_large(read_bytes, MAX_DOCUMENTS_BYTES));
        }
        let mut bytes = Vec::new();
        reader
            .read_to_end(&mut bytes)
            .map_err(|error| broken(&self.path, &format!("{name} cannot be read ({error})")))?;
        if bytes.len() as u64 != size_bytes {
            return Err(broken(&self.path, &format!("{name} is cut off")));
        }
        Ok(bytes)
    }

    /// Reads the document `name` as `read` says.
    pub(crate) fn parse<T>(
        &self,
        name: &str,
        json: &[u8],
        read: impl FnOnce(&[u8]) -> Result<T, DocumentError>,
    ) -> Result<T, BuildError> {
        read(json).map_err(|error| self.refused(name, error))
    }

    /// Why the document `name` is refused.
    pub(crate) fn refused(&self, name: &str, error: DocumentError) -> BuildError {
        BuildError::Document { path: self.path.clone(), member: name.to_owned(), source: Box::new(error) }
    }
}

/// The same file once more: readers must not move each other's position.
pub(crate) fn own_file(file: &File) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)))
}

pub(crate) fn broken(path: &Path, reason: &str) -> BuildError {
    BuildError::Archive { path: path.to_owned(), reason: reason.to_owned() }
}

/// The digest in `blobs/sha256/HEX`.
fn blob_digest(name: &str) -> Option<Digest> {
    format!("sha256:{}", name.strip_prefix("blobs/sha256/")?).parse().ok()
}

fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// Names as text only, never as paths: `./a/../b` is `b`, nothing leaves the archive.
fn clean(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// `count` members, each with a name of `length` bytes.
    fn open_with_names(count: usize, length: usize) -> Result<Archive, BuildError> {
        let mut file = tempfile::tempfile().unwrap();
        for nth in 0..count {
            let mut long = tar::Header::new_gnu();
            long.set_entry_type(tar::EntryType::GNULongName);
            long.set_size(length as u64);
            long.set_cksum();
            let mut name = [vec![b'x'; length - 8], format!("{nth:08}").into_bytes()].concat();
            name.resize(length.next_multiple_of(512), 0);
            let mut member = tar::Header::new_gnu();
            member.set_path("x").unwrap();
            member.set_size(0);
            member.set_cksum();
            file.write_all(&[long.as_bytes().as_slice(), &name, member.as_bytes()].concat()).unwrap();
        }
        file.write_all(&[0; 1024]).unwrap();
        file.rewind().unwrap();
        Archive::open(Path::new("names.tar"), file)
    }

    #[test]
    fn names_in_an_archive_are_limited_one_by_one_and_together() {
        open_with_names(3, 1000).unwrap();
        for (count, length) in [(1, 2 << 20), (1100, 62_000)] {
            let error = open_with_names(count, length).err().expect("too many bytes");
            assert!(matches!(error, BuildError::LargeDocument { .. }), "{error}");
        }
    }
}
