//! A git repository becomes a snapshot of one of its commits.
//!
//! ```text
//! resolve (ls-remote) ─▶ known? ─▶ fetch into the shared repository ─▶ check out ─▶ commit
//! ```
//! Every remote has one bare repository in the store, so that a later commit costs only what is
//! new in it. A commit that was checked out before costs one `ls-remote`, or nothing at all when
//! it was asked for by its digits.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_content::SourceRecord;
use kiln_frontend::git_url;
use kiln_llb as llb;
use kiln_oci::{Digest, SnapshotId};

use super::git_command::Git;
use super::git_remote::Remote;
use super::{Fetcher, SourceError, key_of};
use crate::BuildError;
use crate::engine::now_unix;

/// A commit's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CheckedOut {
    /// Where they are.
    pub(crate) snapshot: SnapshotId,
    /// The commit.
    pub(crate) commit: String,
    /// When the commit was made; seconds since 1970.
    pub(crate) commit_unix: i64,
}

/// A commit and how it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Resolved {
    /// The commit; for a tag whose object is kept, the commit behind it.
    pub(super) commit: String,
    /// The object of an annotated tag, and the tag's full name.
    pub(super) tag: Option<(String, String)>,
}

impl Fetcher<'_> {
    /// Checks out a commit, or finds the snapshot of an earlier checkout.
    ///
    /// # Errors
    /// [`SourceError::Commit`] when it is not the expected commit, [`SourceError::NoReference`],
    /// [`SourceError::NoSubdir`], [`SourceError::RefusedSubdir`], [`SourceError::Git`].
    pub(crate) fn git(&self, op: &llb::Git) -> Result<CheckedOut, SourceError> {
        // Not every op comes out of a text that was parsed.
        let reference = git_url::parse_reference(&op.reference)?;
        let subdir = git_url::parse_subdir(&op.subdir)?;
        let expected = op.checksum.as_deref().map(git_url::parse_checksum).transpose()?;
        let remote = Remote::parse(&op.remote)?;
        let git = self.git_for(&remote, &remote)?;

        let resolved = match (&expected, op.fetch_by_commit) {
            (Some(commit), true) if git_url::is_commit(commit) => {
                Resolved { commit: commit.clone(), tag: None }
            }
            (_, true) => return Err(SourceError::NeedsCommit),
            (_, false) => git.resolve(&remote, &reference)?,
        };
        if let Some(expected) = &expected
            && !resolved.is(expected)
        {
            return Err(SourceError::Commit {
                remote: remote.shown,
                reference,
                expected: expected.clone(),
                actual: resolved.commit,
            });
        }
        let named = if reference.is_empty() { "HEAD" } else { &reference };
        (self.log)(&format!("{named} of {} is commit {}", remote.shown, resolved.commit));

        let key = git_key(op, &remote, &subdir, &resolved);
        if let Some(found) = self.known_checkout(&key, &resolved)? {
            return Ok(found);
        }
        let found = match git.check_out_whole(op, &remote, &subdir, &resolved, &key) {
            // Fetched well, but not checked out: the shared repository is damaged. It is a cache.
            Err(SourceError::Git { .. }) if git.discard(&remote, resolved.commit.len())? => {
                git.check_out_whole(op, &remote, &subdir, &resolved, &key)?
            }
            other => other?,
        };
        let record = SourceRecord {
            snapshot: found.snapshot.clone(),
            content: None,
            etag: None,
            last_modified: Some(found.commit_unix.to_string()),
            created_unix: now_unix(),
        };
        self.remember(&key, &record)?;
        Ok(found)
    }

    fn known_checkout(&self, key: &Digest, resolved: &Resolved) -> Result<Option<CheckedOut>, SourceError> {
        let Some(record) = self.known(key)? else { return Ok(None) };
        let time = record.last_modified.and_then(|time| time.parse().ok());
        let commit = resolved.commit.clone();
        Ok(time.map(|commit_unix| CheckedOut { snapshot: record.snapshot, commit, commit_unix }))
    }

    /// git with the credentials for `remote`; `main` is the repository that the user named.
    pub(super) fn git_for(&self, remote: &Remote, main: &Remote) -> Result<Git<'_>, SourceError> {
        let state = self.git_dir();
        DirBuilder::new().recursive(true).mode(0o700).create(&state).map_err(host("making a directory"))?;
        Ok(Git::new(self, &state, self.git_credentials(remote, main)?))
    }

    fn git_dir(&self) -> PathBuf {
        self.engine.store.root().join("git")
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> SourceError {
    move |source| SourceError::Host { what, source }
}

/// Everything that a checkout depends on.
fn git_key(op: &llb::Git, remote: &Remote, subdir: &str, resolved: &Resolved) -> Digest {
    let mtime = match op.mtime {
        llb::GitMtime::Checkout => "checkout",
        llb::GitMtime::Commit => "commit",
    };
    // Only a kept `.git` shows how the commit was found.
    let tag = resolved.tag.as_ref().filter(|_| op.keep_git_dir);
    key_of(&[
        "git",
        &remote.url,
        &resolved.commit,
        tag.map_or("", |(object, _)| object),
        tag.map_or("", |(_, name)| name),
        subdir,
        &op.keep_git_dir.to_string(),
        &op.submodules.to_string(),
        mtime,
    ])
}

impl Resolved {
    /// Whether `checksum` is, or begins, the commit or the object of its tag.
    fn is(&self, checksum: &str) -> bool {
        let tag = self.tag.as_ref().is_some_and(|(object, _)| object.starts_with(checksum));
        self.commit.starts_with(checksum) || tag
    }
}

/// A remote's bare repository in the store.
pub(super) struct Repository {
    pub(super) path: PathBuf,
}

/// Held while a shared repository is in use; goes with its process.
pub(super) struct RepositoryLock {
    _file: File,
}

impl Git<'_> {
    /// Finds the commit that `reference` is at the remote. A complete commit is taken as it is.
    fn resolve(&self, remote: &Remote, reference: &str) -> Result<Resolved, SourceError> {
        if git_url::is_commit(reference) {
            return Ok(Resolved { commit: reference.to_owned(), tag: None });
        }
        let mut command = self.command(None);
        command.args(["ls-remote", "--end-of-options", &remote.url]);
        if reference.is_empty() {
            command.arg("HEAD");
        } else {
            command.args([reference, &format!("{reference}^{{}}")]);
        }
        let listed = self.must(command, &format!("list {}", remote.shown))?;
        let listed = String::from_utf8_lossy(&listed);
        let find = |name: &str| {
            let mut lines = listed.lines().filter_map(|line| line.split_once('\t'));
            let object = lines.find(|(_, found)| *found == name).map(|(object, _)| object.to_owned());
            object.filter(|object| git_url::is_commit(object))
        };
        if reference.is_empty() {
            let commit = find("HEAD").ok_or_else(|| SourceError::NoHead { remote: remote.shown.clone() })?;
            return Ok(Resolved { commit, tag: None });
        }
        // git takes a branch where a tag has the same name.
        let names = [
            format!("refs/heads/{}", reference.trim_start_matches("refs/heads/")),
            format!("refs/tags/{}", reference.trim_start_matches("refs/tags/")),
            format!("refs/{}", reference.trim_start_matches("refs/")),
            reference.to_owned(),
        ];
        for name in names {
            let Some(object) = find(&name) else { continue };
            return Ok(match find(&format!("{name}^{{}}")) {
                Some(commit) => Resolved { commit, tag: Some((object, name)) },
                None => Resolved { commit: object, tag: None },
            });
        }
        Err(SourceError::NoReference { remote: remote.shown.clone(), reference: reference.to_owned() })
    }

    /// The remote's repository in the store, locked; made when there is none.
    pub(super) fn repository(
        &self,
        remote: &Remote,
        object_digits: usize,
    ) -> Result<(Repository, RepositoryLock), SourceError> {
        let format = if object_digits == 64 { "sha256" } else { "sha1" };
        let name = key_of(&["repository", &remote.url, format]).hex();
        let state = self.fetcher.git_dir();
        let lock = self.lock(&state.join(format!("{}.lock", &name[..32])))?;
        let path = state.join(&name[..32]);
        if path.join("HEAD").exists() {
            // What a git left that was killed; nobody else is here while the lock is held.
            for stale in ["shallow.lock", "packed-refs.lock", "config.lock"] {
                let _ = fs::remove_file(path.join(stale));
            }
        } else {
            self.init(&path, &state.join(format!("{}.new", &name[..32])), format)?;
        }
        Ok((Repository { path }, lock))
    }

    fn init(&self, path: &Path, new: &Path, format: &str) -> Result<(), SourceError> {
        for leftover in [path, new] {
            if leftover.exists() {
                fs::remove_dir_all(leftover).map_err(host("removing a broken repository"))?;
            }
        }
        let mut command = self.command(None);
        command.args(["init", "--quiet", "--bare", "--template="]);
        if format == "sha256" {
            command.arg("--object-format=sha256");
        }
        command.arg(new);
        self.must(command, "make a repository in the store")?;
        fs::rename(new, path).map_err(host("renaming a repository"))
    }

    fn lock(&self, path: &Path) -> Result<RepositoryLock, SourceError> {
        let file = File::create(path).map_err(host("making a lock file"))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(RepositoryLock { _file: file }),
                Err(TryLockError::WouldBlock) => {
                    self.fetcher.check_cancelled()?;
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::Error(error)) => return Err(host("locking a repository")(error)),
            }
        }
    }

    /// git on a repository of the store.
    pub(super) fn in_repository(&self, repository: &Repository) -> Command {
        let mut command = self.command(None);
        command.arg("--git-dir").arg(&repository.path);
        command
    }

    /// Makes sure that `object` and everything it leads to, parents apart, is in `repository`.
    ///
    /// Costs one local command when it was fetched before, else a transfer of what is new.
    pub(super) fn ensure(
        &self,
        repository: &Repository,
        remote: &Remote,
        object: &str,
        reference: &str,
    ) -> Result<(), SourceError> {
        let own = format!("refs/kiln/{object}");
        let mut command = self.in_repository(repository);
        command.args(["rev-parse", "--quiet", "--verify", "--end-of-options", &own]);
        if self.run(command)?.success {
            return Ok(());
        }
        let fetch = |arguments: &[&str]| {
            let mut command = self.in_repository(repository);
            command.args(["fetch", "--quiet", "--no-tags", "--force", "--no-write-fetch-head"]);
            command.args(arguments);
            self.run(command)
        };
        let action = format!("fetch {object} from {}", remote.shown);
        let refspec = format!("{object}:{own}");
        let one = fetch(&["--depth=1", "--end-of-options", &remote.url, &refspec])?;
        if one.success {
            return Ok(());
        }
        // Old servers give out only what has a name, and simple ones only everything.
        let limited = ["unadvertised object", "not our ref", "dumb http"];
        if !limited.iter().any(|text| one.said.contains(text)) {
            return Err(one.failure(&action));
        }
        let mut arguments = Vec::new();
        if repository.path.join("shallow").exists() {
            arguments.push("--unshallow");
        }
        arguments.extend(["--end-of-options", &remote.url]);
        arguments.extend(["+refs/heads/*:refs/kiln/heads/*", "+refs/tags/*:refs/kiln/tags/*"]);
        let all = fetch(&arguments)?;
        if !all.success {
            return Err(all.failure(&action));
        }
        let mut command = self.in_repository(repository);
        command.args(["update-ref", "--end-of-options", &own, object]);
        if self.run(command)?.success {
            return Ok(());
        }
        let reference = if reference.is_empty() { object } else { reference };
        Err(SourceError::NoReference { remote: remote.shown.clone(), reference: reference.to_owned() })
    }

    /// The commit behind `object`, which may be a tag; it is in `repository`.
    pub(super) fn peel(&self, repository: &Repository, object: &str) -> Result<String, SourceError> {
        let mut command = self.in_repository(repository);
        command.args(["rev-parse", "--verify", "--end-of-options", &format!("{object}^{{commit}}")]);
        let found = self.must(command, &format!("find the commit {object}"))?;
        Ok(String::from_utf8_lossy(&found).trim().to_owned())
    }

    /// When `commit` was made; seconds since 1970.
    pub(super) fn commit_time(&self, repository: &Repository, commit: &str) -> Result<i64, SourceError> {
        let mut command = self.in_repository(repository);
        command.args(["log", "-1", "--no-show-signature", "--format=%ct", "--end-of-options", commit]);
        let found = self.must(command, &format!("read the commit {commit}"))?;
        let text = String::from_utf8_lossy(&found);
        text.trim().parse().map_err(|_| SourceError::Git {
            action: format!("tell the time of commit {commit}"),
            said: text.trim().to_owned(),
        })
    }

    /// Throws the shared repository away, unless it cannot be the culprit because the remote did
    /// not answer; whether it is gone.
    fn discard(&self, remote: &Remote, object_digits: usize) -> Result<bool, SourceError> {
        let (repository, _lock) = self.repository(remote, object_digits)?;
        let mut command = self.command(None);
        command.args(["ls-remote", "--quiet", "--end-of-options", &remote.url, "HEAD"]);
        if !self.run(command)?.success {
            return Ok(false);
        }
        fs::remove_dir_all(&repository.path).map_err(host("removing a broken repository"))?;
        Ok(true)
    }

    /// Fetches and checks out, with submodules, into a committed snapshot; or finds under `key`
    /// that another process did.
    fn check_out_whole(
        &self,
        op: &llb::Git,
        remote: &Remote,
        subdir: &str,
        resolved: &Resolved,
        key: &Digest,
    ) -> Result<CheckedOut, SourceError> {
        let (repository, lock) = self.repository(remote, resolved.commit.len())?;
        if let Some(found) = self.fetcher.known_checkout(key, resolved)? {
            return Ok(found);
        }
        let kept_tag = resolved.tag.as_ref().filter(|_| op.keep_git_dir);
        let object = kept_tag.map_or(&resolved.commit, |(object, _)| object);
        self.ensure(&repository, remote, object, &op.reference)?;
        let commit = self.peel(&repository, object)?;
        self.check_subdir(&repository, remote, &commit, subdir)?;

        let engine = self.fetcher.engine;
        let active = engine.prepare(None)?;
        let root = engine.snapshots.open_layer(active.key()).map_err(BuildError::from)?;
        let time = self.commit_time(&repository, &commit)?;
        // As in BuildKit, a `.git` is kept only beside the whole tree.
        if op.keep_git_dir && subdir.is_empty() {
            self.make_git_dir(&repository, remote, root.as_fd(), &commit, kept_tag)?;
            self.check_out_kept(root.as_fd(), &commit)?;
        } else {
            self.check_out(&repository, root.as_fd(), &commit, subdir)?;
        }
        let modules = if op.submodules { self.list_submodules(&repository, &commit)? } else { Vec::new() };
        // A submodule may live in the same repository.
        drop(lock);
        self.fetcher.submodules(root.as_fd(), remote, remote, &modules, subdir)?;
        let mtime = (op.mtime == llb::GitMtime::Commit).then_some(time);
        if subdir.is_empty() {
            self.fetcher.normalise(root.as_fd(), mtime)?;
            drop(root);
            return Ok(CheckedOut { snapshot: active.commit()?, commit, commit_unix: time });
        }
        let part = engine.prepare(None)?;
        let part_root = engine.snapshots.open_layer(part.key()).map_err(BuildError::from)?;
        self.fetcher.move_subdir(root.as_fd(), part_root.as_fd(), remote, subdir)?;
        self.fetcher.normalise(part_root.as_fd(), mtime)?;
        drop((part_root, root));
        Ok(CheckedOut { snapshot: part.commit()?, commit, commit_unix: time })
    }
}
