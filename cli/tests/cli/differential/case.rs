//! A case: a folder below `testdata/differential`.
//!
//! All its files are the context, but for three:
//! - `setup.sh` is run by `/bin/sh` in a copy of the folder, and makes what git cannot hold.
//! - `case` has `key: value` lines: `args` and `target` for the builds, where `{context}` is its
//!   directory; `fails`, what kiln says when it
//!   refuses the Dockerfile; `differs`, why buildah 1.28 gives something else; `alone`, why
//!   buildah is not asked.
//! - `expect` has the lines (see [`image`](super::image)) in which kiln's image differs from buildah's, or from
//!   the busybox image when buildah makes none; `absent` stands for a line that kiln's has not.
//!
//! `Dockerfile.base` is built first, as `localhost/base`.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::image::Lines;
use crate::harness::{Context, text};

const NO_CONTEXT: [&str; 3] = ["setup.sh", "case", "expect"];

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) differs: Option<String>,
    pub(crate) alone: Option<String>,
    pub(crate) fails: Option<String>,
    pub(crate) has_base: bool,
    /// `None` for a line that must not be there.
    pub(crate) expect: BTreeMap<String, Option<String>>,
    args: Vec<String>,
    dir: PathBuf,
}

impl Case {
    /// Reads what the folder says; makes nothing.
    pub(crate) fn read(dir: &Path) -> Case {
        let name = dir.file_name().expect("a folder has a name").to_string_lossy().into_owned();
        let mut case = Case {
            args: Vec::new(),
            differs: None,
            alone: None,
            fails: None,
            has_base: dir.join("Dockerfile.base").exists(),
            expect: pairs(&dir.join("expect"))
                .into_iter()
                .map(|(key, value)| (key, (value != "absent").then_some(value)))
                .collect(),
            dir: dir.to_owned(),
            name,
        };
        for (key, value) in pairs(&dir.join("case")) {
            match key.as_str() {
                "args" => case.args.extend(value.split(' ').map(str::to_owned)),
                "target" => case.args.extend(["--target".to_owned(), value]),
                "differs" => case.differs = Some(value),
                "alone" => case.alone = Some(value),
                "fails" => case.fails = Some(value),
                _ => panic!("{}: no key is called {key}", case.name),
            }
        }
        case
    }

    /// Arguments of both builders.
    pub(crate) fn args(&self, context: &Context) -> Vec<String> {
        self.args.iter().map(|word| word.replace("{context}", context.path())).collect()
    }

    /// A context of its own for this run.
    pub(crate) fn context(&self) -> Context {
        let context = Context::new(&[]);
        let root = Path::new(context.path());
        fs::set_permissions(root, Permissions::from_mode(0o755)).expect("ours");
        copy(&self.dir, root, &NO_CONTEXT);
        let setup = self.dir.join("setup.sh");
        if setup.exists() {
            let mut shell = Command::new("/bin/sh");
            shell
                .arg("-euc")
                .arg(format!("umask 022; . {}", text(&setup)))
                .current_dir(root)
                .stdin(Stdio::null());
            let output = shell.output().expect("/bin/sh is everywhere");
            assert!(
                output.status.success(),
                "{}: setup.sh: {}",
                self.name,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        context
    }

    /// What kiln's image must be, from buildah's or, if it made none, from the base image.
    pub(crate) fn expected(&self, from: &Lines) -> Lines {
        let mut lines = from.clone();
        for (key, value) in &self.expect {
            match value {
                Some(value) => lines.insert(key.clone(), value.clone()),
                None => lines.remove(key),
            };
        }
        lines
    }
}

fn pairs(file: &Path) -> Vec<(String, String)> {
    let Ok(lines) = fs::read_to_string(file) else { return Vec::new() };
    let pair = |line: &str| {
        let (key, value) = line.split_once(": ").unwrap_or_else(|| panic!("{}: {line}", file.display()));
        (key.to_owned(), value.to_owned())
    };
    lines.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(pair).collect()
}

// A checkout has the modes of somebody's umask; the copy has those that git records.
fn copy(from: &Path, to: &Path, without: &[&str]) {
    for entry in fs::read_dir(from).expect("the folder is there") {
        let path = entry.expect("the folder is there").path();
        let name = path.file_name().expect("entries have names");
        let target = to.join(name);
        if without.iter().any(|other| name == *other) {
            continue;
        } else if path.is_dir() {
            fs::create_dir(&target).expect("ours to write");
            copy(&path, &target, &[]);
            fs::set_permissions(&target, Permissions::from_mode(0o755)).expect("ours");
        } else {
            fs::copy(&path, &target).expect("ours to write");
            fs::set_permissions(&target, Permissions::from_mode(0o644)).expect("ours");
        }
    }
}
