//! Layers through the binary: hostile ones, many of them, in every form.

mod backends;
mod catalogue;
mod implied;
mod large;
pub(crate) mod raw;

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use kiln_oci::Digest;

use crate::harness::Store;

/// A docker archive of one image; of each layer, its uncompressed tar and the bytes in the archive.
pub(crate) fn docker_archive(name: &str, layers: &[(&[u8], &[u8])]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|(plain, _)| Digest::of(plain).to_string()).collect();
    let config = serde_json::json!({
        "architecture": kiln_oci::Platform::host().architecture,
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": [],
    });
    let names: Vec<String> = (0..layers.len()).map(|nth| format!("{nth}/layer.tar")).collect();
    let manifest = serde_json::json!([{ "Config": "config.json", "RepoTags": [name], "Layers": names }]);
    let entry = |name: &str, content: &[u8]| raw::Member::new(name, b'0').content(content).bytes();
    let mut members = vec![
        entry("config.json", config.to_string().as_bytes()),
        entry("manifest.json", manifest.to_string().as_bytes()),
    ];
    members.extend(names.iter().zip(layers).map(|(name, (_, stored))| entry(name, stored)));
    raw::tar(&members)
}

/// Where the only snapshot of a store is.
pub(crate) fn only_snapshot(store: &Store) -> PathBuf {
    let committed = store.root().join("snapshots/committed");
    let mut found = fs::read_dir(&committed).expect("a store").map(|entry| entry.expect("ours").path());
    let only = found.next().expect("one snapshot");
    assert!(found.next().is_none(), "several snapshots");
    only.join("fs")
}

/// A line for everything below `dir`, sorted: path, what it is, and what it holds if that is short.
pub(crate) fn listing(dir: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    list(dir, dir, &mut lines);
    lines.sort();
    lines
}

fn list(root: &Path, dir: &Path, lines: &mut Vec<String>) {
    for entry in fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        let stat = fs::symlink_metadata(&path).expect("it is there");
        let name = path.strip_prefix(root).expect("below").as_os_str().as_bytes().escape_ascii().to_string();
        let kind = stat.file_type();
        let device = || (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev()));
        lines.push(if kind.is_dir() {
            format!("{name}/")
        } else if kind.is_symlink() {
            format!("{name} -> {}", fs::read_link(&path).expect("a link").display())
        } else if kind.is_char_device() || kind.is_block_device() {
            format!("{name} {:?}", device())
        } else if kind.is_fifo() {
            format!("{name} |")
        } else if stat.len() > 40 {
            format!("{name} {} bytes", stat.len())
        } else {
            format!("{name} = {}", fs::read(&path).expect("a file").escape_ascii())
        });
        if kind.is_dir() {
            list(root, &path, lines);
        }
    }
}
