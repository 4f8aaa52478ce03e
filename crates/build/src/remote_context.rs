//! What stands in the place of the build context on the command line, opened.
//!
//! ```text
//! DIRECTORY       read where it is
//! -               standard input: an archive is the context, anything else the Dockerfile
//! git reference   a checkout
//! http(s) URL     an archive is the context, anything else the Dockerfile
//! ```

use std::fs::File;
use std::io::{self, BufReader, Cursor, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use kiln_content::SourceRecord;
use kiln_frontend::git_url;
use kiln_layer::{Compression, ExtractOptions, Limits, beneath, bounded_decoder, is_tar};
use kiln_llb as llb;
use kiln_oci::SnapshotId;
use rustix::fs::OFlags;

use crate::attest::of_git;
use crate::engine::now_unix;
use crate::input::Something;
use crate::input::StandardInput;
use crate::source::{Fetcher, SourceError, SourceOptions, key_of};
use crate::{BuildCancel, BuildError, Engine, dockerfile};

/// A tar's header.
const HEADER_BYTES: u64 = 512;

/// A build context as it was named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContextSource {
    /// A directory of this machine.
    Directory(PathBuf),
    /// `-`.
    Stdin,
    /// A git repository.
    Git(llb::Git),
    /// A file of a web server.
    Http(String),
}

/// A build context, ready to be read.
#[derive(Debug)]
pub enum MainContext {
    /// A directory of this machine.
    Directory(PathBuf),
    /// Files in the store.
    Tree(TreeContext),
    /// No files at all: what came is the Dockerfile.
    DockerfileOnly {
        /// How to call it in messages.
        name: String,
        /// At most 1 MiB.
        bytes: Vec<u8>,
    },
}

/// A context whose files are in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeContext {
    /// The files.
    pub snapshot: SnapshotId,
    /// Where they came from; for messages, without credentials.
    pub origin: String,
    /// Time of its commit, or when the web server says it was changed; seconds since 1970.
    pub modified_unix: Option<i64>,
    /// What was fetched: the name of an algorithm, and the digest. `None`: it came without a name.
    pub revision: Option<(&'static str, String)>,
}

/// Everything that is needed to bring a context in.
pub struct ContextOpener<'a> {
    /// Where it goes.
    pub engine: &'a Engine,
    /// How it is fetched.
    pub options: &'a SourceOptions,
    /// Stops it.
    pub cancel: &'a BuildCancel,
    /// Hears a line about each commit that was resolved.
    pub log: &'a dyn Fn(&str),
}

impl ContextSource {
    /// Tells what `text` names. A directory that exists goes before everything else.
    ///
    /// # Errors
    /// [`SourceError::GitUrl`] for a git reference that is wrong or refused. A directory that does
    /// not exist shows when it is opened.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        if text == "-" {
            return Ok(Self::Stdin);
        }
        if Path::new(text).is_dir() {
            return Ok(Self::Directory(text.into()));
        }
        if let Some(git) = git_url::parse(text) {
            return Ok(Self::Git(git?));
        }
        if is_web(text) {
            return Ok(Self::Http(text.to_owned()));
        }
        Ok(Self::Directory(text.into()))
    }
}

/// Whether `text` begins as the URL of a web server does.
pub(crate) fn is_web(text: &str) -> bool {
    text.split_once("://")
        .is_some_and(|(scheme, _)| ["http", "https"].iter().any(|web| scheme.eq_ignore_ascii_case(web)))
}

impl ContextOpener<'_> {
    fn fetcher(&self) -> Fetcher<'_> {
        Fetcher { engine: self.engine, options: self.options, cancel: self.cancel, log: self.log }
    }

    /// Opens the main context; `stdin` is read only for [`ContextSource::Stdin`]. Blocks.
    ///
    /// # Errors
    /// [`BuildError::Unreadable`] and [`BuildError::ContextKind`] for a directory that is none;
    /// [`BuildError::Source`] for one that does not come; [`BuildError::Apply`] for a broken or
    /// refused archive; [`BuildError::TooLarge`] for a Dockerfile beyond 1 MiB.
    pub fn open(&self, source: &ContextSource, stdin: &StandardInput) -> Result<MainContext, BuildError> {
        match source {
            ContextSource::Directory(path) => match path.metadata() {
                Ok(metadata) if metadata.is_dir() => Ok(MainContext::Directory(path.clone())),
                Ok(_) => Err(BuildError::ContextKind { path: path.clone() }),
                Err(source) => Err(BuildError::Unreadable { path: path.clone(), source }),
            },
            ContextSource::Stdin => {
                let origin = "standard input";
                let unreadable = |source| BuildError::Unreadable { path: "-".into(), source };
                let stdin = Something::of(stdin.open(self.cancel).map_err(unreadable)?);
                match sniff(stdin, &self.engine.limits).map_err(unreadable)? {
                    Content::Archive(tar) => self.unpacked(tar, origin).map(MainContext::Tree),
                    Content::Other(text) => dockerfile_only(text, origin),
                }
            }
            ContextSource::Git(git) => {
                let found = self.fetcher().git(git)?;
                Ok(MainContext::Tree(TreeContext {
                    snapshot: found.snapshot,
                    origin: shown(&git.remote),
                    modified_unix: Some(found.commit_unix),
                    revision: Some(of_git(&found.commit)),
                }))
            }
            ContextSource::Http(url) => {
                let file = self.download(url)?;
                let origin = shown(url);
                match self.unpack_download(&file)? {
                    Some(snapshot) => {
                        let modified_unix = file.modified_unix;
                        let revision = Some(("sha256", file.content.hex()));
                        Ok(MainContext::Tree(TreeContext { snapshot, origin, modified_unix, revision }))
                    }
                    None => dockerfile_only(self.open_download(&file)?, &origin),
                }
            }
        }
    }

    /// When a commit was made, or a file changed by what its server says; seconds since 1970.
    /// Fetches it, so that whoever needs it next finds it in the store. Blocks.
    ///
    /// # Errors
    /// [`BuildError::Source`]; `None`: it has no such time.
    pub(crate) fn time_of(&self, source: &llb::Source) -> Result<Option<i64>, BuildError> {
        match source {
            llb::Source::Git(git) => Ok(Some(self.fetcher().git(git)?.commit_unix)),
            llb::Source::Http(http) => Ok(self.fetcher().http(http)?.modified_unix),
            llb::Source::Image(_) | llb::Source::Local(_) => Ok(None),
        }
    }

    /// The Dockerfile at a URL (`-f https://…`). Blocks.
    ///
    /// # Errors
    /// [`BuildError::Source`], [`BuildError::TooLarge`].
    pub fn dockerfile_at(&self, url: &str) -> Result<Vec<u8>, BuildError> {
        let file = self.download(url)?;
        read_small(self.open_download(&file)?, &shown(url))
    }

    fn download(&self, url: &str) -> Result<crate::source::Downloaded, BuildError> {
        let (url, filename) = (url.to_owned(), DOWNLOAD_NAME.to_owned());
        Ok(self.fetcher().http(&llb::Http { url, filename, checksum: None, mode: 0o600 })?)
    }

    fn open_download(&self, file: &crate::source::Downloaded) -> Result<File, BuildError> {
        let root = self.engine.snapshots.open_view(&file.snapshot)?;
        let opened = beneath::open_file(root.as_fd(), DOWNLOAD_NAME.as_bytes(), OFlags::RDONLY);
        opened.map(File::from).map_err(|error| BuildError::Unreadable {
            path: DOWNLOAD_NAME.into(),
            source: io::Error::other(error),
        })
    }

    /// Unpacks a download that is an archive, unless that was done before.
    fn unpack_download(&self, file: &crate::source::Downloaded) -> Result<Option<SnapshotId>, BuildError> {
        let fetcher = self.fetcher();
        let key = key_of(&["unpacked", &file.content.to_string()]);
        if let Some(record) = fetcher.known(&key)? {
            return Ok(Some(record.snapshot));
        }
        let unreadable = |source| BuildError::Unreadable { path: DOWNLOAD_NAME.into(), source };
        let Content::Archive(tar) =
            sniff(self.open_download(file)?, &self.engine.limits).map_err(unreadable)?
        else {
            return Ok(None);
        };
        let TreeContext { snapshot, .. } = self.unpacked(tar, "")?;
        let record = SourceRecord {
            snapshot: snapshot.clone(),
            content: None,
            etag: None,
            last_modified: None,
            created_unix: now_unix(),
        };
        fetcher.remember(&key, &record)?;
        Ok(Some(snapshot))
    }

    /// Unpacks a tar into a snapshot of its own; owners are kept. Bounded as layers are.
    fn unpacked(&self, tar: impl Read + Send, origin: &str) -> Result<TreeContext, BuildError> {
        let active = self.engine.prepare(None)?;
        let root = self.engine.snapshots.open_layer(active.key())?;
        let owner = (!rustix::process::geteuid().is_root())
            .then(|| (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()));
        let options = ExtractOptions { owner, limits: self.engine.limits, cancel: self.cancel.flag() };
        kiln_layer::extract(tar, root.as_fd(), &options)?;
        drop(root);
        let (snapshot, origin) = (active.commit()?, origin.to_owned());
        Ok(TreeContext { snapshot, origin, modified_unix: None, revision: None })
    }
}

/// The name of a downloaded context, as BuildKit calls it.
const DOWNLOAD_NAME: &str = "context";

impl TreeContext {
    /// Reads the Dockerfile: `path` inside the tree, or else the first of the usual names. Its
    /// name and bytes.
    ///
    /// # Errors
    /// [`BuildError::NoDockerfile`], [`BuildError::TooLarge`], [`BuildError::Unreadable`].
    pub fn dockerfile(&self, engine: &Engine, path: Option<&Path>) -> Result<(String, Vec<u8>), BuildError> {
        let given = path.map(|path| path.to_string_lossy().into_owned());
        let names: Vec<&str> = given.as_deref().map_or(dockerfile::NAMES.to_vec(), |name| vec![name]);
        for name in &names {
            if let Some(bytes) = self.read(engine, Path::new(name))? {
                return Ok(((*name).to_owned(), bytes));
            }
        }
        Err(BuildError::NoDockerfile { path: Path::new(&self.origin).join(names[0]) })
    }

    /// Reads a small file of the tree, at most 1 MiB; links are followed inside the tree.
    /// `None`: there is none.
    ///
    /// # Errors
    /// [`BuildError::TooLarge`]; [`BuildError::Unreadable`] for what is no file.
    pub fn read(&self, engine: &Engine, path: &Path) -> Result<Option<Vec<u8>>, BuildError> {
        self.read_with(engine, path, OFlags::empty())
    }

    /// The same; a link in its place is no file.
    ///
    /// # Errors
    /// As [`TreeContext::read`].
    pub(crate) fn read_itself(&self, engine: &Engine, path: &Path) -> Result<Option<Vec<u8>>, BuildError> {
        self.read_with(engine, path, OFlags::NOFOLLOW)
    }

    fn read_with(&self, engine: &Engine, path: &Path, more: OFlags) -> Result<Option<Vec<u8>>, BuildError> {
        let unreadable = |source| BuildError::Unreadable { path: path.to_owned(), source };
        let root: OwnedFd = engine.snapshots.open_view(&self.snapshot)?;
        // NONBLOCK: a named pipe must not hold us here.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | more;
        let name = path.as_os_str().as_encoded_bytes();
        let file = match beneath::open_file(root.as_fd(), name, flags) {
            Ok(file) => File::from(file),
            Err(error) => match error.host_kind() {
                Some(io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
                _ => return Err(unreadable(io::Error::other(error))),
            },
        };
        if !file.metadata().map_err(unreadable)?.is_file() {
            return Err(unreadable(io::Error::other("not a regular file")));
        }
        read_small(file, &path.display().to_string()).map(Some)
    }
}

/// What a stream holds.
enum Content<'a> {
    /// The tar, uncompressed.
    Archive(Box<dyn Read + Send + 'a>),
    /// The stream as it came.
    Other(Box<dyn Read + Send + 'a>),
}

/// Tells an archive by its content. What is compressed is taken for one, as BuildKit does: a
/// Dockerfile never is.
fn sniff<'a>(stream: impl Read + Send + 'a, limits: &Limits) -> io::Result<Content<'a>> {
    let (compression, mut plain) = bounded_decoder(BufReader::with_capacity(256 << 10, stream), limits)?;
    if compression != Compression::None {
        return Ok(Content::Archive(plain));
    }
    let mut head = Vec::new();
    plain.by_ref().take(HEADER_BYTES).read_to_end(&mut head)?;
    let tar = is_tar(&head);
    let whole: Box<dyn Read + Send + 'a> = Box::new(Cursor::new(head).chain(plain));
    Ok(if tar { Content::Archive(whole) } else { Content::Other(whole) })
}

fn dockerfile_only(text: impl Read, origin: &str) -> Result<MainContext, BuildError> {
    Ok(MainContext::DockerfileOnly { name: origin.to_owned(), bytes: read_small(text, origin)? })
}

/// All of a Dockerfile, unless it is too large for one.
fn read_small(reader: impl Read, name: &str) -> Result<Vec<u8>, BuildError> {
    let mut bytes = Vec::new();
    let read = reader.take(dockerfile::MAX_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|source| BuildError::Unreadable { path: name.into(), source })?;
    if bytes.len() as u64 > dockerfile::MAX_BYTES {
        return Err(BuildError::TooLarge { what: name.to_owned(), limit_bytes: dockerfile::MAX_BYTES });
    }
    Ok(bytes)
}

/// A URL without what stands before `@` in its host.
fn shown(url: &str) -> String {
    crate::source::strip_user(url)
}

#[cfg(test)]
mod tests;
