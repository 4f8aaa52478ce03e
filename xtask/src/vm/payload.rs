//! What the machine is given: kiln, its tests and what they read, at the places they were built for.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::image;
use crate::bases::Bases;
use crate::packages;
use crate::step::{self, Failure};

/// Crates whose tests depend on the kernel.
const CRATES: [&str; 4] = ["kiln", "kiln-executor", "kiln-snapshotter", "kiln-containers"];

/// The tests, and how to run them inside.
pub(super) struct Tests {
    binaries: String,
    metadata: String,
}

/// Builds the tests.
///
/// # Errors
/// What cargo reports.
pub(super) fn build() -> Result<Tests, Failure> {
    let mut list = step::cargo();
    list.args(["nextest", "list", "--list-type", "binaries-only", "--message-format", "json"]);
    list.args(CRATES.iter().flat_map(|name| ["-p", name]));
    step::note(&format!("$ {}", step::typed(&list)));
    let binaries = step::read(&mut list)?;
    let metadata = step::read(step::cargo().args(["metadata", "--format-version", "1"]))?;
    Ok(Tests { binaries, metadata })
}

/// A directory that becomes the payload's disk.
pub(super) struct Payload {
    dir: PathBuf,
    /// Shell lines that put things where they belong.
    places: String,
}

impl Payload {
    pub(super) fn new(dir: &Path) -> Result<Self, Failure> {
        fs::create_dir_all(dir.join("tree")).map_err(Failure::io("create", dir))?;
        Ok(Self { dir: dir.to_owned(), places: String::new() })
    }

    /// Programs are stripped: they are read from a disk, and debuggers stay outside.
    fn program(&self, from: &Path) -> Result<(), Failure> {
        let to = self.inside(from)?;
        let strip = step::read(Command::new("strip").args(["--strip-debug", "-o"]).arg(&to).arg(from));
        if strip.is_err() {
            fs::copy(from, &to).map_err(Failure::io("copy", from))?;
        }
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).map_err(Failure::io("chmod", &to))
    }

    fn inside(&self, path: &Path) -> Result<PathBuf, Failure> {
        let to = self.dir.join("tree").join(path.strip_prefix("/").unwrap_or(path));
        let above = to.parent().unwrap_or(&self.dir);
        fs::create_dir_all(above).map_err(Failure::io("create", above))?;
        Ok(to)
    }

    /// Has a directory be at its own place in the machine.
    fn place(&mut self, dir: &Path) {
        let dir = dir.display().to_string().replace('\'', r"'\''");
        self.places.push_str(&format!("mkdir -p '{dir}' && mount --bind '/payload/tree{dir}' '{dir}'\n"));
    }

    /// The base trees.
    pub(super) fn bases(&mut self, bases: &Bases) -> Result<(), Failure> {
        for tar in [&bases.busybox, &bases.debian] {
            let to = self.inside(tar)?;
            fs::copy(tar, &to).map_err(Failure::io("copy", tar))?;
        }
        self.place(&bases.dir);
        Ok(())
    }

    /// kiln alone.
    pub(super) fn kiln(&mut self, kiln: &Path) -> Result<(), Failure> {
        self.program(kiln)?;
        kiln.parent().into_iter().for_each(|dir| self.place(dir));
        Ok(())
    }

    /// All tests, nextest and the repository's files.
    pub(super) fn tests(&mut self, tests: &Tests) -> Result<(), Failure> {
        let wrong =
            || Failure::Output { line: "cargo nextest list".to_owned(), expected: "a list of binaries" };
        let list: Value = serde_json::from_str(&tests.binaries).map_err(|_| wrong())?;
        let binaries = list["rust-binaries"].as_object().ok_or_else(wrong)?;
        for binary in binaries.values() {
            self.program(Path::new(binary["binary-path"].as_str().ok_or_else(wrong)?))?;
        }
        let target = PathBuf::from(list["rust-build-meta"]["target-directory"].as_str().ok_or_else(wrong)?);
        let others = list["rust-build-meta"]["non-test-binaries"].as_object().ok_or_else(wrong)?;
        for binary in others.values().flat_map(|all| all.as_array().into_iter().flatten()) {
            let path = target.join(binary["path"].as_str().ok_or_else(wrong)?);
            if path.is_file() && !self.inside(&path)?.exists() {
                self.program(&path)?;
            }
        }
        self.place(&target);
        for (name, text) in [("binaries.json", &tests.binaries), ("metadata.json", &tests.metadata)] {
            self.write(name, text)?;
        }
        let nextest = packages::find_program("cargo-nextest").ok_or_else(wrong)?;
        let to = self.dir.join("cargo-nextest");
        fs::copy(&nextest, &to).map_err(Failure::io("copy", &nextest))?;
        self.repository()
    }

    // Tests read their data from it, and nextest its configuration.
    fn repository(&mut self) -> Result<(), Failure> {
        let repository = step::repository();
        let mut list = Command::new("git");
        list.current_dir(repository).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
        let files = step::read(&mut list)?;
        for file in files.split('\0').filter(|file| !file.is_empty()) {
            let from = repository.join(file);
            // A file may be deleted and not committed yet.
            if from.is_file() {
                let to = self.inside(&from)?;
                fs::copy(&from, &to).map_err(Failure::io("copy", &from))?;
            }
        }
        self.place(repository);
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<(), Failure> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(Failure::io("write", &path))
    }

    /// The disk, with `script` as what is to be done.
    pub(super) fn disk(self, script: &str, disk: &Path) -> Result<(), Failure> {
        self.write("job", &format!("{PROLOGUE}{}{script}", self.places))?;
        image::file_system(&self.dir, disk, "6G")?;
        fs::remove_dir_all(&self.dir).map_err(Failure::io("remove", &self.dir))
    }
}

/// Everything said goes to the host.
const PROLOGUE: &str = "exec > /dev/virtio-ports/back 2>&1\n\
    export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n";
