//! `RUN --mount`: what a step finds mounted, and what must live as long as it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use kiln_executor::{ExecError, check_mount_target, detach};
use kiln_layer::beneath;
use kiln_llb as llb;
use kiln_oci::{Digest, FileMount, Mount, TmpfsMount, TreeMount};
use kiln_snapshotter::OpenOptions;
use kiln_solver::{Scope, Stream};
use rustix::fs::{FileType, Mode, OFlags, fstat, openat};

use super::BuildOp;
use crate::OpError;
use crate::cache_mounts::{CacheUse, Waiting, Want};
use crate::context_files::{FILE, Files, copy_selection, select_path};
use crate::engine::Active;
use crate::redact::Redactor;
use crate::secrets::Secret;
use crate::select::{Place, Selection};
use crate::ssh::AgentProxy;
use crate::tree::{Tree, not_here};

/// The mounts of one step, ready for the executor.
#[derive(Default)]
pub(super) struct StepMounts {
    mounts: Vec<Mount>,
    handles: Vec<OwnedFd>,
    env: Vec<(String, String)>,
    secrets: Vec<Arc<Secret>>,
    stubs: Option<Stubs>,
    /// Trees to be written to, thrown away afterwards, and copies that others may use too.
    actives: Vec<Active>,
    copies: Vec<Arc<Active>>,
    caches: Vec<Arc<CacheUse>>,
    agents: Vec<AgentProxy>,
}

/// Mount targets as the lowest layer of the step's root.
///
/// So they are there without a change of the tree that becomes a layer: made in the tree and taken
/// out again, they would leave their parents behind as changed (`docs/adr/0002-trees-travel-as-fds.md`).
struct Stubs {
    dir: OwnedFd,
    _active: Active,
}

/// A tree to mount: a handle, and the path in it.
struct Shown {
    handle: OwnedFd,
    source: String,
    is_dir: bool,
}

impl StepMounts {
    /// Brings everything the mounts of `exec` need. What is cheap and may fail goes first, what
    /// waits for other steps before what takes space.
    pub(super) fn prepare(
        op: &BuildOp,
        exec: &llb::Exec,
        inputs: &[Tree],
        scope: &Scope<'_>,
    ) -> Result<Self, OpError> {
        let mut this = Self::default();
        for mount in &exec.mounts {
            check_mount_target(&mount.target)?;
        }
        let steps = &op.shared.steps;
        for llb::SecretEnv { name, id, required } in &exec.secret_env {
            let Some(secret) = steps.secrets.for_step(id, *required)? else { continue };
            let value = std::str::from_utf8(secret.bytes()).ok().filter(|value| !value.contains('\0'));
            let value = value.ok_or_else(|| OpError::Secret {
                id: id.clone(),
                source: std::io::Error::other("no variable can hold it: it is not text"),
            })?;
            this.env.push((name.clone(), value.to_owned()));
            this.secrets.push(secret);
        }
        // Parents before what is mounted below them.
        let mut ordered: Vec<&llb::Mount> = exec.mounts.iter().collect();
        ordered.sort_by_key(|mount| mount.target.split('/').filter(|part| !part.is_empty()).count());
        let mut targets = Vec::new();
        let mut caches = this.caches(op, &ordered, inputs, scope)?.into_iter();
        for mount in ordered {
            let before = this.mounts.len();
            let is_dir = match &mount.kind {
                llb::MountKind::Bind(bind) => {
                    let tree = bind.from.map_or(&Tree::Empty, |index| &inputs[index.0]);
                    let shown = this.bind(op, bind, tree)?;
                    this.show(&mount.target, shown, !bind.writable)
                }
                llb::MountKind::Cache(cache) => {
                    let data = caches.next().expect("one was taken for each cache mount");
                    let handle = detach(data.as_fd())?;
                    this.caches.push(data);
                    let shown = Shown { handle, source: String::new(), is_dir: true };
                    this.show(&mount.target, shown, cache.read_only)
                }
                llb::MountKind::Tmpfs { size_bytes } => {
                    let tmpfs = TmpfsMount {
                        target: mount.target.clone(),
                        size_bytes: *size_bytes,
                        mode: None,
                        executable: true,
                    };
                    this.mounts.push(Mount::Tmpfs(tmpfs));
                    true
                }
                llb::MountKind::Secret(secret) => {
                    this.secret(op, &mount.target, secret)?;
                    false
                }
                llb::MountKind::Ssh(agent) => {
                    this.agent(op, &mount.target, agent)?;
                    false
                }
            };
            // An optional secret that was not given is no mount.
            if this.mounts.len() > before {
                targets.push((mount.target.as_str(), is_dir));
            }
        }
        this.stubs = Stubs::make(op, &targets)?;
        Ok(this)
    }

    /// Where the targets are, to be the lowest layer.
    pub(super) fn stubs_path(&self) -> Option<PathBuf> {
        // The dot makes it a path to the directory, not the link that names it.
        self.stubs.as_ref().map(|stubs| format!("/proc/self/fd/{}/.", stubs.dir.as_raw_fd()).into())
    }

    pub(super) fn take_mounts(&mut self) -> Vec<Mount> {
        std::mem::take(&mut self.mounts)
    }

    pub(super) fn take_handles(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.handles)
    }

    /// Secrets as variables.
    pub(super) fn take_env(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.env)
    }

    /// Masks the secrets of this step.
    pub(super) fn redactor(&self) -> Redactor {
        Redactor::new(self.secrets.iter().map(|secret| secret.bytes()))
    }

    /// Adds a read-only directory of kiln's own.
    pub(super) fn add_dir(&mut self, target: &str, dir: BorrowedFd<'_>) -> Result<(), OpError> {
        let shown = Shown { handle: detach(dir)?, source: String::new(), is_dir: true };
        self.show(target, shown, true);
        Ok(())
    }

    fn show(&mut self, target: &str, shown: Shown, read_only: bool) -> bool {
        let input = self.handles.len();
        self.handles.push(shown.handle);
        let target = target.to_owned();
        self.mounts.push(Mount::Tree(TreeMount { input, source: shown.source, target, read_only }));
        shown.is_dir
    }

    fn bind(&mut self, op: &BuildOp, bind: &llb::BindMount, tree: &Tree) -> Result<Shown, OpError> {
        let engine = &op.shared.engine;
        let snapshots = &engine.snapshots;
        let source = &bind.source;
        match tree {
            Tree::Far(_) => Err(not_here().into()),
            Tree::Empty if !matches!(source.as_str(), "" | ".") => Err(nothing_there(source)),
            Tree::Empty => {
                let active = engine.prepare(None)?;
                let dir = snapshots.open_layer(active.key())?;
                self.actives.push(active);
                Ok(Shown { handle: detach(dir.as_fd())?, source: String::new(), is_dir: true })
            }
            Tree::Snapshot(id) => {
                let handle = if bind.writable {
                    let active = engine.prepare(Some(id))?;
                    let handle = snapshots.open_active(active.key(), &OpenOptions::default())?;
                    self.actives.push(active);
                    handle
                } else {
                    snapshots.open_view(id)?
                };
                let is_dir = op.is_dir_in(handle.as_fd(), source)?;
                Ok(Shown { handle, source: source.clone(), is_dir })
            }
            Tree::Context(context) => {
                let part = op.shared.steps.contexts.part(context, source);
                let cancel = op.shared.cancel.flag();
                let is_dir = part.selection(cancel)?.matches.iter().all(|found| found.is_dir());
                let copy = part.copy(engine, cancel)?;
                let dir = snapshots.open_layer(copy.key())?;
                let handle = if bind.writable {
                    let active = engine.prepare(None)?;
                    let below = format!("/proc/self/fd/{}/.", dir.as_raw_fd()).into();
                    let options = OpenOptions { extra_lower: vec![below], ..OpenOptions::default() };
                    let handle = snapshots.open_active(active.key(), &options)?;
                    self.actives.push(active);
                    handle
                } else {
                    detach(dir.as_fd())?
                };
                self.copies.push(copy);
                let source = if is_dir { String::new() } else { FILE.to_owned() };
                Ok(Shown { handle, source, is_dir })
            }
        }
    }

    fn secret(&mut self, op: &BuildOp, target: &str, wanted: &llb::SecretMount) -> Result<(), OpError> {
        let llb::SecretMount { id, mode, uid, gid, required } = wanted;
        let Some(secret) = op.shared.steps.secrets.for_step(id, *required)? else { return Ok(()) };
        let file = secret.to_file().map_err(|source| OpError::Secret { id: id.clone(), source })?;
        let (input, target) = (self.handles.len(), target.to_owned());
        self.handles.push(file);
        self.mounts.push(Mount::File(FileMount { input, target, mode: *mode, uid: *uid, gid: *gid }));
        self.secrets.push(secret);
        Ok(())
    }

    fn agent(&mut self, op: &BuildOp, target: &str, wanted: &llb::SecretMount) -> Result<(), OpError> {
        let engine = &op.shared.engine;
        // A directory that the next command removes if this process is killed.
        let scratch = engine.prepare(None)?;
        let dir = engine.snapshots.open_layer(scratch.key())?;
        let Some(agent) = op.shared.steps.ssh.for_step(wanted, dir)? else { return Ok(()) };
        self.actives.push(scratch);
        let handle = detach(agent.as_fd())?;
        self.show(target, Shown { handle, source: String::new(), is_dir: false }, true);
        self.agents.push(agent);
        Ok(())
    }

    /// Takes the step's cache mounts, in the order of `mounts`; waits for those that others hold.
    fn caches(
        &self,
        op: &BuildOp,
        mounts: &[&llb::Mount],
        inputs: &[Tree],
        scope: &Scope<'_>,
    ) -> Result<Vec<Arc<CacheUse>>, OpError> {
        let caches: Vec<&llb::CacheMount> = mounts
            .iter()
            .filter_map(|mount| match &mount.kind {
                llb::MountKind::Cache(cache) => Some(cache),
                llb::MountKind::Bind(_)
                | llb::MountKind::Tmpfs { .. }
                | llb::MountKind::Secret(_)
                | llb::MountKind::Ssh(_) => None,
            })
            .collect();
        let tree = |cache: &llb::CacheMount| cache.from.map_or(&Tree::Empty, |index| &inputs[index.0]);
        let mut wanted = Vec::with_capacity(caches.len());
        for cache in &caches {
            let llb::CacheMount { id, sharing, mode, uid, gid, source, .. } = cache;
            let seed = op.seed_name(tree(cache), source)?;
            wanted.push(Want { id: id.clone(), sharing: *sharing, mode: *mode, uid: *uid, gid: *gid, seed });
        }
        let seed = |position: usize, dir: BorrowedFd<'_>| {
            let cache: &llb::CacheMount = caches[position];
            op.seed(tree(cache), &cache.source, dir)
        };
        op.shared.steps.caches.acquire(&wanted, &seed, &StepWaits { scope })
    }
}

struct StepWaits<'a> {
    scope: &'a Scope<'a>,
}

impl Waiting for StepWaits<'_> {
    fn waiting(&self, id: &str) {
        let line = format!("waiting for another step to be done with the cache mount {id:?}\n");
        self.scope.log(Stream::Stderr, line.as_bytes());
    }

    fn is_cancelled(&self) -> bool {
        self.scope.is_cancelled()
    }
}

impl BuildOp {
    /// Digest of what is at `source` in `tree`.
    pub(super) fn part_digest(&self, tree: &Tree, source: &str) -> Result<Digest, OpError> {
        let (selection, ignore_owner) = self.part(tree, source)?;
        Ok(selection.digest(ignore_owner))
    }

    /// What is at `source` in `tree`, and whether owners do not count: copies belong to root, whoever the
    /// files belong to.
    pub(super) fn part(&self, tree: &Tree, source: &str) -> Result<(Arc<Selection>, bool), OpError> {
        Ok((self.part_of(tree, source)?, matches!(tree, Tree::Context(_))))
    }

    /// What is at `source` in `tree`, scanned.
    fn part_of(&self, tree: &Tree, source: &str) -> Result<Arc<Selection>, OpError> {
        let cancel = self.shared.cancel.flag();
        match tree {
            Tree::Context(context) => self.shared.steps.contexts.part(context, source).selection(cancel),
            Tree::Snapshot(id) => {
                let root = self.shared.engine.snapshots.open_view(id)?;
                let place = Place { root: root.as_fd(), ignore: None, digests: None, cancel };
                Ok(Arc::new(select_path(&place, source)?))
            }
            Tree::Empty if matches!(source, "" | ".") => Ok(Arc::default()),
            Tree::Empty => Err(nothing_there(source)),
            Tree::Far(_) => Err(not_here().into()),
        }
    }

    /// Whether a directory is at `source`, looked at as a mount will be: links lead inside.
    fn is_dir_in(&self, root: BorrowedFd<'_>, source: &str) -> Result<bool, OpError> {
        let failed =
            |source_error: std::io::Error| OpError::Read { path: source.to_owned(), source: source_error };
        match beneath::open_file(root, source.as_bytes(), OFlags::PATH) {
            Ok(found) => {
                let stat = fstat(&found).map_err(|errno| failed(errno.into()))?;
                Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
            }
            Err(error) => {
                // Says what is missing, and what it may have been meant to be.
                let place = Place { root, ignore: None, digests: None, cancel: self.shared.cancel.flag() };
                select_path(&place, source)?;
                Err(OpError::Mkdir { path: source.to_owned(), source: error })
            }
        }
    }

    /// Names what a new cache starts from; `None`: it starts empty.
    fn seed_name(&self, tree: &Tree, source: &str) -> Result<Option<String>, OpError> {
        Ok(match tree {
            Tree::Empty => None,
            Tree::Far(_) => return Err(not_here().into()),
            Tree::Snapshot(id) => Some(format!("{id} {source}")),
            Tree::Context(_) => Some(self.part_digest(tree, source)?.to_string()),
        })
    }

    /// Fills the new cache `dir` with what is at `source` in `tree`.
    fn seed(&self, tree: &Tree, source: &str, dir: BorrowedFd<'_>) -> Result<(), OpError> {
        let cancel = self.shared.cancel.flag();
        let view;
        let from = match tree {
            Tree::Empty => return Ok(()),
            Tree::Far(_) => return Err(not_here().into()),
            Tree::Context(context) => Files { root: context.root(), owner: Some((0, 0)) },
            Tree::Snapshot(id) => {
                view = self.shared.engine.snapshots.open_view(id)?;
                Files { root: view.as_fd(), owner: None }
            }
        };
        let selection = self.part_of(tree, source)?;
        if selection.matches.iter().any(|found| !found.is_dir()) {
            let source_error = std::io::ErrorKind::NotADirectory.into();
            return Err(OpError::Read { path: source.to_owned(), source: source_error });
        }
        copy_selection(&selection, &from, dir, cancel)
    }
}

fn nothing_there(source: &str) -> OpError {
    let place = "the source stage, which has no files".to_owned();
    OpError::NoSource { path: source.to_owned(), place, ignored_by: None, similar: None }
}

impl Stubs {
    /// `None`: nothing to make. `/dev` is a mount of the sandbox's own.
    fn make(op: &BuildOp, targets: &[(&str, bool)]) -> Result<Option<Self>, OpError> {
        let targets: Vec<_> = targets.iter().filter(|(target, _)| !target.starts_with("/dev/")).collect();
        if targets.is_empty() {
            return Ok(None);
        }
        let engine = &op.shared.engine;
        let active = engine.prepare(None)?;
        let dir = engine.snapshots.open_layer(active.key())?;
        for (target, is_dir) in targets {
            let path = target.trim_matches('/');
            let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
            let make_dirs = |path: &str| {
                beneath::mkdir_all(dir.as_fd(), path.as_bytes(), 0o755, (0, 0))
                    .map(drop)
                    .map_err(|source| OpError::Mkdir { path: path.to_owned(), source })
            };
            if *is_dir {
                make_dirs(path)?;
                continue;
            }
            if !above.is_empty() {
                make_dirs(above)?;
            }
            let failed = |source: rustix::io::Errno| ExecError::Start {
                step: format!("mount target {target}"),
                source: source.into(),
            };
            let parent = if above.is_empty() { "." } else { above };
            let parent =
                beneath::open_file(dir.as_fd(), parent.as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY)
                    .map_err(|source| OpError::Mkdir { path: above.to_owned(), source })?;
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            drop(File::from(openat(parent, name, flags, Mode::from_raw_mode(0o644)).map_err(failed)?));
        }
        Ok(Some(Self { dir, _active: active }))
    }
}
