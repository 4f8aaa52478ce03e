//! Repositories for a git server to give out. The tests of the binary use this file as well.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::web::{GitServer, Web};

/// Repositories on the server's disk.
pub(crate) struct Origin {
    pub(crate) dir: tempfile::TempDir,
}

/// A repository with a working tree; the server gives out its `.git`.
pub(crate) struct Repo {
    pub(crate) path: PathBuf,
}

impl Origin {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn repo(&self, name: &str, arguments: &[&str]) -> Repo {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        let repo = Repo { path };
        repo.git(&[&["init", "--quiet", "--initial-branch=main"], arguments].concat());
        repo
    }

    pub(crate) fn serve(&self, mode: GitServer) -> Web {
        Web::git(self.dir.path(), mode)
    }
}

impl Repo {
    pub(crate) fn git(&self, arguments: &[&str]) -> String {
        let mut command = Command::new("git");
        command.args(["-c", "user.name=A", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]);
        command.args(arguments).current_dir(&self.path);
        command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
        command.env("GIT_AUTHOR_DATE", "1000000000 +0000").env("GIT_COMMITTER_DATE", "1000000000 +0000");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub(crate) fn write(&self, path: &str, content: &str) {
        let path = self.path.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// Commits everything; the commit.
    pub(crate) fn commit(&self) -> String {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--message=m"]);
        self.git(&["rev-parse", "HEAD"])
    }

    /// A submodule at `path`, as it would be added by hand.
    pub(crate) fn submodule(&self, path: &str, url: &str, commit: &str) {
        let old = fs::read_to_string(self.path.join(".gitmodules")).unwrap_or_default();
        let entry = format!("[submodule \"{path}\"]\n\tpath = {path}\n\turl = {url}\n");
        self.write(".gitmodules", &(old + &entry));
        fs::create_dir_all(self.path.join(path)).unwrap();
        self.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{commit},{path}")]);
    }

    /// Commits what is in the index and `.gitmodules`.
    pub(crate) fn commit_index(&self) -> String {
        self.git(&["add", ".gitmodules"]);
        self.git(&["commit", "--quiet", "--message=m"]);
        self.git(&["rev-parse", "HEAD"])
    }
}
