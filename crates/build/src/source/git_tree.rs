//! A commit's files below a directory: checked out, cut to a subdirectory, made uniform.
//!
//! git itself writes the files: it knows line ends and what a tree may not hold (`.git`, `..`,
//! files behind links). What it wrote is then reached only through directory descriptors.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use kiln_layer::{Entry, EntryKind, ScanOptions, Visit, beneath, scan};
use rustix::fs::{AtFlags, Dir, Gid, Mode, OFlags, Uid, chmodat, chownat, renameat, utimensat};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::git::Repository;
use super::git_command::Git;
use super::git_remote::Remote;
use super::{Fetcher, SourceError, open_plain_dir, times};

impl Git<'_> {
    /// Refuses a `subdir` that is not a directory of `commit`.
    pub(super) fn check_subdir(
        &self,
        repository: &Repository,
        remote: &Remote,
        commit: &str,
        subdir: &str,
    ) -> Result<(), SourceError> {
        if subdir.is_empty() {
            return Ok(());
        }
        let mut command = self.in_repository(repository);
        command.args(["ls-tree", "-z", "--full-tree", "--end-of-options", commit, "--", subdir]);
        let listed = self.must(command, &format!("list the files of commit {commit}"))?;
        let what = match listed.split(|&b| b == b' ').next().unwrap_or_default() {
            b"040000" => return Ok(()),
            b"120000" => "a symbolic link",
            b"160000" => "a submodule",
            b"" => {
                return Err(SourceError::NoSubdir {
                    remote: remote.shown.clone(),
                    subdir: subdir.to_owned(),
                    commit: commit.to_owned(),
                });
            }
            _ => "a file",
        };
        Err(SourceError::RefusedSubdir { remote: remote.shown.clone(), subdir: subdir.to_owned(), what })
    }

    /// Checks `commit` out into the empty directory `root`; with a `subdir`, only that, under its
    /// own path.
    pub(super) fn check_out(
        &self,
        repository: &Repository,
        root: BorrowedFd<'_>,
        commit: &str,
        subdir: &str,
    ) -> Result<(), SourceError> {
        let index = Index(repository.path.join("checkout.index"));
        index.remove()?;
        let mut command = self.command(Some(root));
        command.env("GIT_INDEX_FILE", &index.0);
        command.arg("--git-dir").arg(&repository.path).arg("--work-tree=.");
        if subdir.is_empty() {
            // Unlike `checkout`, this is content with a tree without files.
            command.args(["read-tree", "--reset", "-u", commit]);
        } else {
            command.args(["checkout", "--quiet", "--force", "--end-of-options", commit, "--", subdir]);
        }
        self.must(command, &format!("check out commit {commit}")).map(drop)
    }

    /// Makes a `.git` in `root` that holds `commit` without its history. The same commit gives the
    /// same objects.
    pub(super) fn make_git_dir(
        &self,
        repository: &Repository,
        remote: &Remote,
        root: BorrowedFd<'_>,
        commit: &str,
        tag: Option<&(String, String)>,
    ) -> Result<(), SourceError> {
        let action = || format!("keep the .git of commit {commit}");
        let mut command = self.command(Some(root));
        command.args(["init", "--quiet", "--template="]);
        if commit.len() == 64 {
            command.arg("--object-format=sha256");
        }
        command.arg(".");
        self.must(command, &action())?;

        // No parents, however much of the history the shared repository happens to have.
        let mut wanted = format!("--shallow {commit}\n{commit}\n");
        if let Some((object, _)) = tag {
            wanted.push_str(&format!("{object}\n"));
        }
        let mut list = self.fetcher.engine.store.spool().map_err(crate::BuildError::from)?;
        let spooled = io::Write::write_all(&mut list, wanted.as_bytes())
            .and_then(|()| io::Seek::seek(&mut list, io::SeekFrom::Start(0)));
        spooled.map_err(|source| SourceError::Host { what: "writing a list for git", source })?;
        let mut command = self.command(Some(root));
        command.arg("--git-dir").arg(&repository.path);
        command.args(["pack-objects", "--quiet", "--revs", "--threads=1", ".git/objects/pack/pack"]);
        command.stdin(list);
        self.must(command, &action())?;

        write_new(root, b".git/shallow", format!("{commit}\n").as_bytes())?;
        for arguments in [
            vec!["update-ref", "--no-deref", "HEAD", commit],
            vec!["config", "remote.origin.url", &remote.shown],
            vec!["config", "remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*"],
        ] {
            let mut command = self.command(Some(root));
            command.arg("--git-dir=.git").args(arguments);
            self.must(command, &action())?;
        }
        if let Some((object, name)) = tag {
            let mut command = self.command(Some(root));
            command.args(["--git-dir=.git", "update-ref", name, object]);
            self.must(command, &action())?;
        }
        Ok(())
    }

    /// Checks `commit` out beside the `.git` that is in `root`.
    pub(super) fn check_out_kept(&self, root: BorrowedFd<'_>, commit: &str) -> Result<(), SourceError> {
        let mut command = self.command(Some(root));
        command.args(["--git-dir=.git", "--work-tree=.", "read-tree", "--reset", "-u", commit]);
        self.must(command, &format!("check out commit {commit}")).map(drop)
    }
}

/// git's index of one checkout; gone with it.
struct Index(PathBuf);

impl Index {
    /// Removes what a killed checkout left.
    fn remove(&self) -> Result<(), SourceError> {
        for path in [self.0.clone(), self.0.with_extension("index.lock")] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(SourceError::Host { what: "removing an old index", source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        // The next checkout removes it otherwise.
        let _ = self.remove();
    }
}

fn write_new(root: BorrowedFd<'_>, path: &[u8], content: &[u8]) -> Result<(), SourceError> {
    let host = |source| SourceError::Host { what: "writing into .git", source };
    let (parent, name) = path.split_at(path.iter().rposition(|&b| b == b'/').map_or(0, |at| at + 1));
    let parent = open_plain_dir(root, parent).map_err(|errno| host(errno.into()))?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644));
    let mut file = fs::File::from(file.map_err(|errno| host(errno.into()))?);
    io::Write::write_all(&mut file, content).map_err(host)
}

impl Fetcher<'_> {
    /// Moves what is in `subdir` of `from` to `to`; no link is followed on the way there.
    pub(super) fn move_subdir(
        &self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        remote: &Remote,
        subdir: &str,
    ) -> Result<(), SourceError> {
        let source = open_plain_dir(from, subdir.as_bytes()).map_err(|errno| match errno {
            Errno::LOOP | Errno::XDEV | Errno::NOTDIR => SourceError::RefusedSubdir {
                remote: remote.shown.clone(),
                subdir: subdir.to_owned(),
                what: "behind a symbolic link",
            },
            errno => SourceError::Host { what: "opening the subdirectory", source: errno.into() },
        })?;
        let host = |errno: Errno| SourceError::Host { what: "moving the subdirectory", source: errno.into() };
        for name in names(source.as_fd()).map_err(host)? {
            renameat(&source, &name, to, &name).map_err(host)?;
        }
        Ok(())
    }

    /// Files 0644 or 0755, directories 0755, all owned by root, and with `mtime` all as old as the
    /// commit. What is in `.git` keeps its permissions.
    pub(super) fn normalise(&self, root: BorrowedFd<'_>, mtime: Option<i64>) -> Result<(), SourceError> {
        let take = |_: &[u8], _: bool| Visit::Take;
        let options =
            ScanOptions { hash: false, filter: Some(&take), stat_cache: None, cancel: self.cancel.flag() };
        let entries = scan(root, b"", &options).map_err(|error| {
            self.check_cancelled().err().unwrap_or_else(|| SourceError::Host {
                what: "reading the checkout",
                source: io::Error::other(error),
            })
        })?;
        let host = |errno: Errno| SourceError::Host { what: "changing the checkout", source: errno.into() };
        let owned = geteuid().is_root();
        for entry in &entries {
            self.check_cancelled()?;
            let (parent, name): (OwnedFd, &[u8]) = if entry.path.is_empty() {
                (root.try_clone_to_owned().map_err(|source| SourceError::Host { what: "dup", source })?, b".")
            } else {
                beneath::open_parent(root, &entry.path).map_err(|error| SourceError::Host {
                    what: "opening the checkout",
                    source: io::Error::other(error),
                })?
            };
            if owned && (entry.uid, entry.gid) != (0, 0) {
                let (uid, gid) = (Some(Uid::ROOT), Some(Gid::ROOT));
                chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).map_err(host)?;
            }
            if let Some(mode) = wanted_mode(entry) {
                chmodat(&parent, name, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(host)?;
            }
            if let Some(mtime) = mtime {
                utimensat(&parent, name, &times(mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(host)?;
            }
        }
        Ok(())
    }
}

/// The mode that `entry` should have, if it has another one.
fn wanted_mode(entry: &Entry) -> Option<u32> {
    let kept = entry.path == b".git" || entry.path.starts_with(b".git/");
    let wanted = match &entry.kind {
        EntryKind::Dir if !kept => 0o755,
        EntryKind::File { .. } if !kept && entry.mode & 0o100 != 0 => 0o755,
        EntryKind::File { .. } if !kept => 0o644,
        _ => return None,
    };
    (entry.mode != wanted).then_some(wanted)
}

fn names(directory: BorrowedFd<'_>) -> rustix::io::Result<Vec<std::ffi::CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_owned();
        if name.to_bytes() != b"." && name.to_bytes() != b".." {
            names.push(name);
        }
    }
    Ok(names)
}
