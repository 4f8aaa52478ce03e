//! Needs root: files get owners, devices are made.

use std::collections::HashMap;
use std::fs::{self, hard_link};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use kiln_oci::Digest;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, mknodat};

use super::*;
use crate::{ApplyOptions, Limits, Reading, ScanOptions, Whiteouts, apply, scan};

const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn write_form(tree: &Path, form: TreeForm) -> Result<(Vec<u8>, Written), DiffError> {
    let cancel = AtomicBool::new(false);
    let mut tar = Vec::new();
    let options = DiffOptions { form, root_entry: false, cancel: &cancel };
    let written = diff(File::open(tree).unwrap().as_fd(), &mut tar, &options)?;
    assert_eq!((written.diff_id.0, written.tar_size_bytes), (Digest::of(&tar), tar.len() as u64));
    Ok((tar, written))
}

fn write(tree: &Path) -> Vec<u8> {
    write_form(tree, TreeForm::OverlayUpper).unwrap().0
}

fn unpack(tar: &[u8], root: &Path) -> Shape {
    let cancel = AtomicBool::new(false);
    let (whiteouts, limits) = (Whiteouts::Overlay, Limits::default());
    let options =
        ApplyOptions { whiteouts, keep_owner: true, limits, reading: Reading::Ahead, cancel: &cancel };
    let applied = apply(tar, File::open(root).unwrap().as_fd(), &options).unwrap();
    assert_eq!(applied.diff_id.0, Digest::of(tar));
    applied.shape
}

fn shape_of(tree: &Path) -> Shape {
    let cancel = AtomicBool::new(false);
    let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &cancel };
    shape(File::open(tree).unwrap().as_fd(), &options).unwrap()
}

/// Everything that a layer keeps, with hard links told by the first path instead of the inode.
fn describe(tree: &Path) -> Vec<Entry> {
    let cancel = AtomicBool::new(false);
    let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
    let mut entries = scan(File::open(tree).unwrap().as_fd(), b"", &options).unwrap();
    let mut numbers = HashMap::new();
    for entry in &mut entries[1..] {
        entry.ctime = Timestamp::default();
        if let EntryKind::File { inode, .. } = &mut entry.kind {
            let next = numbers.len() as u64;
            *inode = (0, *numbers.entry(*inode).or_insert(next));
        }
        if matches!(entry.kind, EntryKind::Char { major: 0, minor: 0 }) {
            (entry.mtime, entry.mode) = (Timestamp::default(), 0);
        }
    }
    entries.remove(0);
    entries
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

fn whiteout(path: &Path) {
    mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

/// A bit of everything.
fn furnish(tree: &Path) {
    let at = |name: &str| tree.join(name);
    fs::create_dir_all(at("usr/bin")).unwrap();
    fs::write(at("usr/bin/su"), "setuid").unwrap();
    chown(at("usr/bin/su"), Some(0), Some(42)).unwrap();
    fs::set_permissions(at("usr/bin/su"), fs::Permissions::from_mode(0o4755)).unwrap();
    set_xattr(&at("usr/bin/su"), "security.capability", &CAPABILITY);
    fs::write(at("big"), vec![7; 700_001]).unwrap();
    chown(at("big"), Some(3_000_000), Some(u32::MAX - 1)).unwrap();
    set_xattr(&at("big"), "user.lines", b"a\nb=c\n");
    hard_link(at("big"), at("z-link")).unwrap();
    hard_link(at("big"), at("usr/link")).unwrap();
    symlink("l".repeat(300), at("symlink")).unwrap();
    mknodat(CWD, at("null"), FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3)).unwrap();
    mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    for length in [99, 100, 101, 255] {
        fs::create_dir(at(&"d".repeat(length))).unwrap();
        fs::write(at(&"d".repeat(length)).join("f".repeat(length)), "x").unwrap();
    }
    fs::write(tree.join(std::ffi::OsStr::from_bytes(b"not\xffutf8\nname")), "").unwrap();
    whiteout(&at("gone"));
    set_xattr(&at("usr"), "trusted.overlay.opaque", b"y");
}

#[test]
fn what_was_written_unpacks_to_the_same_tree_and_the_same_bytes() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    furnish(one.path());
    let tar = write(one.path());
    unpack(&tar, two.path());
    let (left, right) = (describe(one.path()), describe(two.path()));
    for (a, b) in left.iter().zip(&right) {
        assert_eq!(a, b);
    }
    assert_eq!(left.len(), right.len());
    assert_eq!(write(two.path()), tar);
}

#[test]
fn a_plain_tree_may_not_have_names_that_mean_whiteouts() {
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join(".wh.x"), "").unwrap();
    assert!(matches!(write_form(tree.path(), TreeForm::Plain), Err(DiffError::ReservedName { .. })));
    assert!(write_form(tree.path(), TreeForm::Archive).is_ok());
}

#[test]
fn whiteouts_and_opaque_directories_become_marker_files() {
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir(tree.path().join("dir")).unwrap();
    set_xattr(&tree.path().join("dir"), "user.overlay.opaque", b"y");
    whiteout(&tree.path().join("dir/gone"));
    fs::write(tree.path().join("also-gone"), "").unwrap();
    set_xattr(&tree.path().join("also-gone"), "trusted.overlay.whiteout", b"y");
    let tar = write(tree.path());
    let names: Vec<String> = tar::Archive::new(tar.as_slice())
        .entries()
        .unwrap()
        .map(|entry| String::from_utf8(entry.unwrap().path_bytes().into_owned()).unwrap())
        .collect();
    assert_eq!(names, [".wh.also-gone", "dir/", "dir/.wh..wh..opq", "dir/.wh.gone"]);
}

#[test]
fn redirects_into_lower_layers_are_refused() {
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir(tree.path().join("moved")).unwrap();
    set_xattr(&tree.path().join("moved"), "trusted.overlay.redirect", b"/was");
    assert!(matches!(write_form(tree.path(), TreeForm::OverlayUpper), Err(DiffError::Redirected { .. })));
}

#[test]
fn sockets_are_left_out() {
    let tree = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(tree.path().join("socket")).unwrap();
    let (tar, written) = write_form(tree.path(), TreeForm::Plain).unwrap();
    assert_eq!((tar, written.entries), (vec![0; 1024], 0));
}

#[test]
fn gnu_tar_lists_what_was_written() {
    let (dir, tree) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    furnish(tree.path());
    let path = dir.path().join("layer.tar");
    fs::write(&path, write(tree.path())).unwrap();
    let Ok(listing) = Command::new("tar").arg("--numeric-owner").arg("-tvf").arg(&path).output() else {
        eprintln!("skipped: no tar on this machine");
        return;
    };
    let text = String::from_utf8_lossy(&listing.stdout);
    assert!(listing.status.success() && listing.stderr.is_empty(), "{listing:?}");
    assert!(text.contains("-rwsr-xr-x 0/42"), "{text}");
    assert!(text.contains("3000000/4294967294 700001"), "{text}");
    assert!(text.contains("usr/link link to big"), "{text}");
    assert_eq!(text.lines().count(), describe(tree.path()).len() + 1, "the opaque marker comes on top");
}

#[test]
fn a_tree_has_the_shape_of_its_own_tar_alone() {
    let temp = tempfile::tempdir().unwrap();
    let (tree, again) = (temp.path().join("tree"), temp.path().join("again"));
    fs::create_dir(&tree).unwrap();
    furnish(&tree);
    let tar = write(&tree);
    let from = |tar: &[u8]| {
        fs::create_dir(&again).unwrap();
        let shape = unpack(tar, &again);
        let of_tree = shape_of(&again);
        let same_bytes = write(&again) == tar;
        fs::remove_dir_all(&again).unwrap();
        (shape == of_tree, same_bytes)
    };
    assert_eq!(from(&tar), (true, true));
    // Behind the end, and the padding of the first file that has any.
    assert_eq!(from(&[&tar[..], &[0; 512]].concat()), (false, false));
    let mut padded = tar.clone();
    let content = tar.windows(6).position(|bytes| bytes == b"setuid").unwrap();
    padded[content + 6] = 1;
    assert_eq!(from(&padded), (false, false));
    // Content is none of its business: it is what the file was given.
    padded[content + 6] = 0;
    padded[content] = b'S';
    assert_eq!(from(&padded), (true, true));
    // The same members in another order.
    let mut archive = tar::Archive::new(&tar[..]);
    let starts =
        archive.entries().unwrap().raw(true).map(|entry| entry.unwrap().raw_header_position() as usize);
    let starts: Vec<usize> = starts.take(2).collect();
    let (first, others) = (&tar[starts[0]..starts[1]], &tar[starts[1]..tar.len() - 1024]);
    assert_eq!(from(&[others, first, &[0; 1024]].concat()), (false, false));
}
