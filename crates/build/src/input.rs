//! What a build reads before it starts: its contexts and its Dockerfile.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_content::ImageRecord;
use kiln_frontend::ignore::Patterns;
use kiln_frontend::{NamedContext as Known, NeedsTime, TimeOf, git_url, without_credentials};
use kiln_layer::Reading;
use kiln_oci::{Platform, Reference};

use crate::context::Context;
use crate::dockerfile::{self, Dockerfile};
use crate::lock::LockPlace;
use crate::remote_context::{ContextOpener, ContextSource, MainContext, TreeContext};
use crate::streams::InStream;
use crate::tree::Tree;
use crate::{BuildCancel, BuildError, BuildRequest, Engine, NamedSource, SourceOptions, load_layout};

/// Where the Dockerfile comes from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DockerfileSource {
    /// One of the usual names in the context.
    #[default]
    Usual,
    /// A file: of this machine for a directory as context, inside the context otherwise.
    File(PathBuf),
    /// `-f -`
    Stdin,
    /// `-f https://…`
    Url(String),
}

impl DockerfileSource {
    /// Tells what the text behind `-f` names.
    pub fn parse(text: &str) -> Self {
        match text {
            "-" => Self::Stdin,
            text if crate::remote_context::is_web(text) => Self::Url(text.to_owned()),
            text => Self::File(text.into()),
        }
    }
}

/// The stream that `-` stands for; read at most once. Usually it is this process's standard input.
#[derive(Clone, Default)]
pub struct StandardInput(Option<Arc<Mutex<Box<dyn Read + Send>>>>);

impl StandardInput {
    /// `stream` in the place of this process's standard input.
    pub fn new(stream: impl Read + Send + 'static) -> Self {
        Self(Some(Arc::new(Mutex::new(Box::new(stream)))))
    }

    /// What is read, until `cancel` stops it.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub(crate) fn open(&self, cancel: &BuildCancel) -> io::Result<Box<dyn Read + Send>> {
        match &self.0 {
            Some(stream) => Ok(Box::new(Shared(stream.clone()))),
            None => Ok(Box::new(InStream::standard(cancel)?)),
        }
    }
}

struct Shared(Arc<Mutex<Box<dyn Read + Send>>>);

impl Read for Shared {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(buffer)
    }
}

impl fmt::Debug for StandardInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StandardInput").finish_non_exhaustive()
    }
}

/// A stream with something in it: one that ends before its first byte is an error.
pub(crate) struct Something<R> {
    stream: R,
    came: bool,
}

impl<R: Read> Something<R> {
    pub(crate) fn of(stream: R) -> Self {
        Self { stream, came: false }
    }
}

impl<R: Read> Read for Something<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.stream.read(buffer)?;
        if length == 0 && !self.came && !buffer.is_empty() {
            // Rust opens /dev/null in the place of a standard input that is closed.
            let what = "nothing came: standard input is empty, or closed";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
        }
        self.came |= length > 0;
        Ok(length)
    }
}

/// The stream that a path names, `-` being standard input, and who may read it.
///
/// # Errors
/// When the file cannot be opened.
pub(crate) fn open_stream(path: &Path, cancel: &BuildCancel) -> io::Result<(Box<dyn Read + Send>, Reading)> {
    if path == Path::new("-") {
        return Ok((Box::new(Something::of(InStream::standard(cancel)?)), Reading::InPlace));
    }
    let file = File::open(path)?;
    if file.metadata()?.is_file() {
        return Ok((Box::new(file), Reading::Ahead));
    }
    // A FIFO may stall.
    Ok((Box::new(InStream::of(file.into(), cancel)), Reading::InPlace))
}

/// `--build-arg` of this name: whether a repository that is the context keeps its `.git`.
const KEEP_GIT_DIR: &str = "BUILDKIT_CONTEXT_KEEP_GIT_DIR";

/// What was read.
pub(crate) struct Input {
    pub(crate) dockerfile: Arc<Dockerfile>,
    /// Rules of the main context.
    pub(crate) ignore: Patterns,
    /// For the frontend: what names stand for.
    pub(crate) named: BTreeMap<String, Known>,
    /// Where the names that the Dockerfile has are pinned.
    pub(crate) lock: LockPlace,
    main: Files,
    /// Named contexts that are directories, with their rules.
    directories: BTreeMap<String, (PathBuf, Patterns)>,
}

/// Files of the main context.
enum Files {
    Directory(PathBuf),
    Tree(TreeContext),
    None,
}

/// How contexts are fetched.
pub(crate) struct Reader<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) request: &'a BuildRequest,
    pub(crate) cancel: &'a BuildCancel,
}

impl Reader<'_> {
    fn opener<'o>(&'o self, options: &'o SourceOptions) -> ContextOpener<'o> {
        ContextOpener { engine: self.engine, options, cancel: self.cancel, log: &|_| {} }
    }

    /// Opens the main context, reads the Dockerfile and the ignore files. Blocks; fetches what is
    /// elsewhere.
    ///
    /// # Errors
    /// As [`ContextOpener::open`]; [`BuildError::TwoDockerfiles`]; what is wrong with the files.
    pub(crate) fn read(&self) -> Result<Input, BuildError> {
        let request = self.request;
        let options = request.source_options();
        let opener = self.opener(&options);
        let stdin_twice =
            request.context == ContextSource::Stdin && request.dockerfile == DockerfileSource::Stdin;
        if stdin_twice {
            return Err(BuildError::StdinTwice);
        }
        let source = self.context()?;
        let context = opener.open(&source, &request.stdin)?;
        let chosen = self.chosen_dockerfile(&opener)?;
        let usual = request.dockerfile == DockerfileSource::Usual;
        let (dockerfile, ignore, lock, main) = match context {
            MainContext::Directory(directory) => {
                let (dockerfile, path) = match (chosen, &request.dockerfile) {
                    (Some(dockerfile), _) => (dockerfile, None),
                    (None, DockerfileSource::File(path)) => {
                        self.read_file(&directory, Some(path.as_path()))?
                    }
                    (None, _) => self.read_file(&directory, None)?,
                };
                let ignore = dockerfile::read_ignore(&directory, path.as_deref())?;
                let lock = path.as_deref().map_or(LockPlace::Nowhere, LockPlace::beside);
                (dockerfile, ignore, lock, Files::Directory(directory))
            }
            // As in BuildKit, a context from elsewhere has no ignore rules.
            MainContext::Tree(tree) => {
                let (dockerfile, lock) = match (chosen, &request.dockerfile) {
                    (Some(dockerfile), _) => (dockerfile, LockPlace::Nowhere),
                    (None, source) => {
                        let path = if let DockerfileSource::File(path) = source {
                            Some(path.as_path())
                        } else {
                            None
                        };
                        let (name, bytes) = tree.dockerfile(self.engine, path)?;
                        let lock = LockPlace::in_tree(&tree, &name);
                        (dockerfile::from_bytes(name, &bytes)?, lock)
                    }
                };
                (dockerfile, dockerfile::no_rules(), lock, Files::Tree(tree))
            }
            MainContext::DockerfileOnly { .. } if !usual => return Err(BuildError::TwoDockerfiles),
            MainContext::DockerfileOnly { name, bytes } => {
                let dockerfile = dockerfile::from_bytes(name, &bytes)?;
                (dockerfile, dockerfile::no_rules(), LockPlace::Nowhere, Files::None)
            }
        };
        let (named, directories) = self.named()?;
        Ok(Input { dockerfile: Arc::new(dockerfile), ignore, named, lock, main, directories })
    }

    /// The main context, with what build arguments say of it.
    fn context(&self) -> Result<Cow<'_, ContextSource>, BuildError> {
        let (context, name) = (&self.request.context, KEEP_GIT_DIR);
        let (ContextSource::Git(git), Some(value)) = (context, self.request.build_args.get(name)) else {
            return Ok(Cow::Borrowed(context));
        };
        let keep_git_dir = match value.as_str() {
            "" => git.keep_git_dir,
            value => git_url::parse_bool(value)
                .ok_or_else(|| BuildError::BuildArg { name, value: value.to_owned() })?,
        };
        Ok(Cow::Owned(ContextSource::Git(kiln_llb::Git { keep_git_dir, ..git.clone() })))
    }

    /// The time of what `SOURCE_DATE_EPOCH` names; seconds since 1970. Blocks; fetches it.
    ///
    /// # Errors
    /// [`BuildError::NoTime`]; as [`ContextOpener::open`].
    pub(crate) fn time_of(&self, input: &Input, asked: &NeedsTime) -> Result<i64, BuildError> {
        let time = match &asked.of {
            TimeOf::Context => match &input.main {
                Files::Tree(tree) => tree.modified_unix,
                Files::Directory(_) | Files::None => None,
            },
            TimeOf::Source(source) => {
                let options = self.request.source_options();
                self.opener(&options).time_of(source)?
            }
        };
        time.ok_or_else(|| BuildError::NoTime { name: asked.name.clone() })
    }

    /// The image of the named context `name`, a layout. Blocks; unpacks it.
    ///
    /// # Errors
    /// As [`load_layout`].
    pub(crate) fn layout(&self, name: &str, platform: &Platform) -> Result<ImageRecord, BuildError> {
        let contexts = self.request.contexts.iter().filter(|context| context.name == name);
        // Of two of one name the last counts.
        let mut places = contexts.filter_map(|context| match &context.source {
            NamedSource::Layout { path, image } => Some((path, image)),
            _ => None,
        });
        let (path, image) =
            places.next_back().ok_or_else(|| BuildError::Bug { what: format!("no layout {name}") })?;
        load_layout(self.engine, path, image, platform, self.cancel)
    }

    fn read_file(
        &self,
        directory: &Path,
        path: Option<&Path>,
    ) -> Result<(Dockerfile, Option<PathBuf>), BuildError> {
        let path = dockerfile::find(directory, path)?;
        Ok((dockerfile::read(&path)?, Some(path)))
    }

    /// A Dockerfile that does not stand in a file.
    fn chosen_dockerfile(&self, opener: &ContextOpener<'_>) -> Result<Option<Dockerfile>, BuildError> {
        let (name, bytes) = match &self.request.dockerfile {
            DockerfileSource::Usual | DockerfileSource::File(_) => return Ok(None),
            DockerfileSource::Stdin => {
                let mut bytes = Vec::new();
                let stream = self.request.stdin.open(self.cancel).map(Something::of);
                let read = stream.and_then(|s| s.take(dockerfile::MAX_BYTES + 1).read_to_end(&mut bytes));
                read.map_err(|source| BuildError::Unreadable { path: "-".into(), source })?;
                ("standard input".to_owned(), bytes)
            }
            DockerfileSource::Url(url) => (without_credentials(url).into_owned(), opener.dockerfile_at(url)?),
        };
        dockerfile::from_bytes(name, &bytes).map(Some)
    }

    #[allow(clippy::type_complexity, reason = "two maps, taken apart at once by the only caller")]
    fn named(&self) -> Result<(BTreeMap<String, Known>, BTreeMap<String, (PathBuf, Patterns)>), BuildError> {
        let (mut named, mut directories) = (BTreeMap::new(), BTreeMap::new());
        for context in &self.request.contexts {
            let name = context.name.clone();
            let known = match &context.source {
                NamedSource::Image(reference) => Known::Image(reference.clone()),
                NamedSource::Layout { path, .. } => Known::Layout(layout_name(&name, path)),
                NamedSource::Files(ContextSource::Git(git)) => Known::Git(git.clone()),
                NamedSource::Files(ContextSource::Http(url)) => Known::Http(url.clone()),
                NamedSource::Files(ContextSource::Directory(path)) => {
                    if !path.is_dir() {
                        let source = io::Error::from(io::ErrorKind::NotADirectory);
                        return Err(BuildError::Unreadable { path: path.clone(), source });
                    }
                    let rules = dockerfile::read_ignore(path, None)?;
                    let ignore = rules.lines().to_vec();
                    directories.insert(name.clone(), (path.clone(), rules));
                    Known::Local { ignore }
                }
                // The reader of named contexts refuses it.
                NamedSource::Files(ContextSource::Stdin) => continue,
            };
            named.insert(name, known);
        }
        Ok((named, directories))
    }
}

/// What progress lines call an image of a layout.
fn layout_name(name: &str, path: &Path) -> Reference {
    let bare = name.split("::").next().unwrap_or(name);
    bare.parse()
        .or_else(|_| path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default().parse())
        .unwrap_or_else(|_| {
            "oci-layout".parse().unwrap_or_else(|_| unreachable!("a lower-case word is a reference"))
        })
}

impl Input {
    /// Whether the main context's files have owners that mean something: they came in an archive,
    /// and could be kept.
    pub(crate) fn has_owners(&self) -> bool {
        matches!(self.main, Files::Tree(_)) && rustix::process::geteuid().is_root()
    }

    /// Digest of what was fetched as the main context, with the name of its algorithm.
    pub(crate) fn revision(&self) -> Option<(&'static str, String)> {
        match &self.main {
            Files::Tree(tree) => tree.revision.clone(),
            Files::Directory(_) | Files::None => None,
        }
    }

    /// Directories of the client by the names of their sources, with their rules.
    pub(crate) fn directories(&self) -> Vec<(&str, &Path, &Patterns)> {
        let main = match &self.main {
            Files::Directory(path) => Some(("context", path.as_path(), &self.ignore)),
            Files::Tree(_) | Files::None => None,
        };
        let named = self.directories.iter();
        main.into_iter()
            .chain(named.map(|(name, (path, rules))| (name.as_str(), path.as_path(), rules)))
            .collect()
    }

    /// The trees behind the local sources that the definition uses, by name; opened, not read.
    pub(crate) fn trees(
        self,
        state: &Path,
        is_used: impl Fn(&str) -> bool,
    ) -> Result<BTreeMap<String, Tree>, BuildError> {
        let mut trees = BTreeMap::new();
        if is_used("context") {
            let tree = match self.main {
                Files::Directory(path) => Tree::Context(Arc::new(Context::open(&path, self.ignore, state)?)),
                Files::Tree(tree) => Tree::Snapshot(tree.snapshot),
                Files::None => Tree::Empty,
            };
            trees.insert("context".to_owned(), tree);
        }
        for (name, (path, rules)) in self.directories {
            if is_used(&name) {
                trees.insert(name, Tree::Context(Arc::new(Context::open(&path, rules, state)?)));
            }
        }
        Ok(trees)
    }
}
