//! Submodules: each one a repository like the first, held to the same rules.
//!
//! `git submodule` is not used: what it runs and where it writes is up to the repository. Here a
//! submodule is an address out of `.gitmodules`, a commit out of the tree, and a directory that
//! the checkout made.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

use super::git::Repository;
use super::git_command::Git;
use super::git_remote::Remote;
use super::{Fetcher, SourceError, open_plain_dir};

/// Submodules within submodules are followed this far.
const MAX_DEPTH: usize = 16;
const MAX_SUBMODULES: usize = 1000;

/// One submodule of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Submodule {
    path: Vec<u8>,
    commit: String,
    /// As `.gitmodules` writes it; `None`: there is no entry.
    url: Option<String>,
    /// `update = none`: the directory stays empty.
    skipped: bool,
}

/// A checkout whose submodules are still missing.
struct Pending {
    /// Where it stands below the root.
    place: Vec<u8>,
    remote: Remote,
    modules: Vec<Submodule>,
    depth: usize,
}

impl Git<'_> {
    /// The submodules of `commit`; costs a walk over its trees only when it has a `.gitmodules`.
    pub(super) fn list_submodules(
        &self,
        repository: &Repository,
        commit: &str,
    ) -> Result<Vec<Submodule>, SourceError> {
        let action = format!("list the submodules of commit {commit}");
        let mut command = self.in_repository(repository);
        command.args(["ls-tree", "-r", "-z", "--full-tree", "--end-of-options", commit]);
        let listed = self.must(command, &action)?;
        let links: Vec<(String, Vec<u8>)> = listed.split(|&b| b == 0).filter_map(gitlink).collect();
        if links.is_empty() {
            return Ok(Vec::new());
        }
        if links.len() > MAX_SUBMODULES {
            let what = "a repository has too many submodules";
            return Err(SourceError::Submodules { what, limit: MAX_SUBMODULES });
        }
        let mut command = self.in_repository(repository);
        command.args(["config", "-z", "--list", &format!("--blob={commit}:.gitmodules")]);
        let output = self.run(command)?;
        let settings = if output.success { parse_settings(&output.stdout) } else { Vec::new() };
        let find = |path: &[u8]| {
            settings.iter().find(|setting| setting.get("path").is_some_and(|p| p.as_bytes() == path))
        };
        Ok(links
            .into_iter()
            .map(|(commit, path)| {
                let setting = find(&path);
                let value = |key: &str| setting.and_then(|setting| setting.get(key)).cloned();
                let skipped = value("update").is_some_and(|update| update == "none");
                Submodule { commit, url: value("url"), skipped, path }
            })
            .collect())
    }
}

/// A line of `ls-tree`, if it is a submodule's: its commit and path.
fn gitlink(line: &[u8]) -> Option<(String, Vec<u8>)> {
    let tab = line.iter().position(|&b| b == b'\t')?;
    let mut words = line[..tab].split(|&b| b == b' ');
    let commit = words.next().filter(|mode| *mode == b"160000").and_then(|_| words.nth(1))?;
    Some((String::from_utf8(commit.to_vec()).ok()?, line[tab + 1..].to_vec()))
}

/// `submodule.<name>.<key>\n<value>\0…`, one map a name.
fn parse_settings(bytes: &[u8]) -> Vec<BTreeMap<String, String>> {
    let mut settings: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for item in String::from_utf8_lossy(bytes).split('\0') {
        let Some((name, value)) = item.split_once('\n') else { continue };
        let Some((name, key)) = name.strip_prefix("submodule.").and_then(|rest| rest.rsplit_once('.')) else {
            continue;
        };
        settings.entry(name.to_owned()).or_default().insert(key.to_owned(), value.to_owned());
    }
    settings.into_values().collect()
}

impl Fetcher<'_> {
    /// Checks `modules` of `remote` out below `root`, and theirs in turn; with a `subdir`, only
    /// those in it. `main` is the repository that the user named.
    pub(super) fn submodules(
        &self,
        root: BorrowedFd<'_>,
        remote: &Remote,
        main: &Remote,
        modules: &[Submodule],
        subdir: &str,
    ) -> Result<(), SourceError> {
        let inside = |path: &[u8]| {
            let rest = path.strip_prefix(subdir.as_bytes());
            subdir.is_empty() || rest.is_some_and(|rest| rest.starts_with(b"/"))
        };
        let modules = modules.iter().filter(|module| inside(&module.path)).cloned().collect();
        let mut pending = vec![Pending { place: Vec::new(), remote: remote.clone(), modules, depth: 0 }];
        let mut count = 0;
        while let Some(Pending { place, remote, modules, depth }) = pending.pop() {
            for module in modules.iter().filter(|module| !module.skipped) {
                let limits = [
                    (depth >= MAX_DEPTH, "submodules are nested too deeply", MAX_DEPTH),
                    (count >= MAX_SUBMODULES, "there are too many submodules", MAX_SUBMODULES),
                ];
                if let Some((_, what, limit)) = limits.into_iter().find(|(reached, ..)| *reached) {
                    return Err(SourceError::Submodules { what, limit });
                }
                count += 1;
                let mut path = place.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(&module.path);
                let shown = String::from_utf8_lossy(&path).into_owned();
                let found = self.submodule(root, &path, &remote, main, module);
                let (remote, modules) = found.map_err(|source| match source {
                    SourceError::Cancelled => SourceError::Cancelled,
                    source => SourceError::Submodule { path: shown, source: Box::new(source) },
                })?;
                if !modules.is_empty() {
                    pending.push(Pending { place: path, remote, modules, depth: depth + 1 });
                }
            }
        }
        Ok(())
    }

    /// Checks one submodule out at `path`; its address and its own submodules.
    fn submodule(
        &self,
        root: BorrowedFd<'_>,
        path: &[u8],
        parent: &Remote,
        main: &Remote,
        module: &Submodule,
    ) -> Result<(Remote, Vec<Submodule>), SourceError> {
        let no_entry = || SourceError::NoSubmodule { path: String::from_utf8_lossy(path).into_owned() };
        let remote = parent.submodule(module.url.as_deref().ok_or_else(no_entry)?)?;
        let git = self.git_for(&remote, main)?;
        let (repository, _lock) = git.repository(&remote, module.commit.len())?;
        git.ensure(&repository, &remote, &module.commit, "")?;
        let directory = open_plain_dir(root, path)
            .map_err(|errno| SourceError::Host { what: "opening the submodule", source: errno.into() })?;
        git.check_out(&repository, directory.as_fd(), &module.commit, "")?;
        let modules = git.list_submodules(&repository, &module.commit)?;
        Ok((remote, modules))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_submodules_are_taken_from_a_tree() {
        let commit = "a".repeat(40);
        let line = format!("160000 commit {commit}\tlib/a b");
        assert_eq!(gitlink(line.as_bytes()), Some((commit.clone(), b"lib/a b".to_vec())));
        assert_eq!(gitlink(format!("100644 blob {commit}\tfile").as_bytes()), None);
        assert_eq!(gitlink(b""), None);
    }

    #[test]
    fn names_of_submodules_may_have_dots() {
        let settings = parse_settings(b"submodule.a.b.path\na.b\0submodule.a.b.url\n../c\0core.bare\ntrue\0");
        assert_eq!(settings.len(), 1);
        assert_eq!(settings[0]["path"], "a.b");
        assert_eq!(settings[0]["url"], "../c");
    }
}
