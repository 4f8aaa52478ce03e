//! Attacks on the sandbox, each the class of one that got out of another runtime: A1 to A17 of the
//! threat list. Every one is made for real, in a step of a build or in a container; those that race
//! with kiln do so for a few seconds.

mod attacks;
mod host;
mod identity;
mod paths;
mod races;
mod run_options;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Context, Store, text};

/// A directory of the host that nothing may touch: files, some of them empty and named as what a
/// sandbox puts into `/etc`, and what must not be read.
pub(crate) struct Sentinel {
    dir: PathBuf,
    before: BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)>,
}

/// What must never be seen inside.
pub(crate) const MARKER: &str = "the-hosts-own-secret";

impl Sentinel {
    pub(crate) fn beside(store: &Store) -> Self {
        let dir = store.beside("sentinel");
        fs::create_dir_all(dir.join("sub")).expect("ours to make");
        fs::create_dir_all(dir.join("empty")).expect("ours to make");
        for name in ["hosts", "resolv.conf", "hostname", "proc", "sys", "dev", "passwd", "b"] {
            fs::write(dir.join(name), "").expect("ours to write");
        }
        for name in ["marker", "sub/marker", "shadow"] {
            fs::write(dir.join(name), MARKER).expect("ours to write");
        }
        let before = picture(&dir);
        Self { dir, before }
    }

    pub(crate) fn path(&self) -> &str {
        text(&self.dir)
    }

    /// Fails the test when anything changed, host settings that a process could take over included.
    #[track_caller]
    pub(crate) fn check(&self) {
        assert_eq!(picture(&self.dir), self.before, "the host's files have changed");
        let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").expect("every kernel has it");
        assert!(!pattern.contains("attack"), "{pattern}");
        let null = fs::metadata("/dev/null").expect("every machine has it");
        assert_eq!((null.rdev(), null.mode() & 0o7777), (0x103, 0o666), "/dev/null has changed");
    }
}

/// Mode, times and content of all that is below.
fn picture(dir: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        let metadata = fs::metadata(&dir).expect("it is still there");
        found.insert(dir.clone(), (metadata.mode(), metadata.mtime(), metadata.mtime_nsec(), Vec::new()));
        for entry in fs::read_dir(&dir).expect("ours").flatten() {
            let metadata = entry.metadata().expect("it is still there");
            if metadata.is_dir() {
                dirs.push(entry.path());
            } else {
                let content = fs::read(entry.path()).expect("ours");
                found.insert(
                    entry.path(),
                    (metadata.mode(), metadata.mtime(), metadata.mtime_nsec(), content),
                );
            }
        }
    }
    found
}

/// A context with the Dockerfile, and with the C program `attack` if there is one. `None`, said
/// aloud, where there is no compiler.
pub(crate) fn armed(dockerfile: &str, source: &str) -> Option<Context> {
    let context = Context::new(&[("Dockerfile", dockerfile), ("attack.c", source)]);
    let mut compiler = Command::new("cc");
    compiler.args(["-static", "-O1", "-w", "-o"]).arg(context.at("attack")).arg(context.at("attack.c"));
    if !compiler.status().is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED ALOUD: needs cc and a static C library");
        return None;
    }
    fs::remove_file(context.at("attack.c")).expect("just written");
    Some(context)
}

/// An image of busybox's tree, changed on the host by `change` before it is imported.
#[track_caller]
pub(crate) fn tampered(store: &Store, name: &str, change: impl FnOnce(&Path)) {
    let tree = store.beside(&format!("tree-{name}"));
    fs::create_dir_all(&tree).expect("ours to make");
    let tar = crate::harness::busybox_tar(&tree);
    let unpacked = store.beside(&format!("root-{name}"));
    fs::create_dir_all(&unpacked).expect("ours to make");
    let status = Command::new("tar").arg("-C").arg(&unpacked).arg("-xf").arg(&tar).status();
    assert!(status.expect("tar runs").success());
    change(&unpacked);
    store.ok(&["import", text(&unpacked), name, "-c", "CMD [\"sh\"]", "-c", "ENV PATH=/usr/bin:/bin"]);
}

/// Every row of the threat list has a test by its name, and every mount of the catalogue a row.
#[test]
fn every_row_of_the_list_has_its_test() {
    let sources = [
        include_str!("sandbox/attacks.rs"),
        include_str!("sandbox/host.rs"),
        include_str!("sandbox/identity.rs"),
        include_str!("sandbox/paths.rs"),
        include_str!("sandbox/races.rs"),
    ]
    .concat();
    for row in 1..=17 {
        let name = format!("\n#[test]\nfn a{row:02}_");
        assert!(sources.contains(&name), "A{row} has no test");
    }
    // Those that are accepted and harmless stand among the mounts that work: M05, M06, M07, and M14,
    // whose message is for who forgot the secret.
    let catalogue = [include_str!("catalogue.rs"), include_str!("run_mounts.rs")].concat();
    for row in 1..=14 {
        let as_row =
            catalogue.contains(&format!("\"M{row:02}\"")) || catalogue.contains(&format!("\"M{row:02} "));
        assert!(as_row, "M{row:02} has no row");
    }
}
