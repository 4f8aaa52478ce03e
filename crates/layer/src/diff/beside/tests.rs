//! Needs root: files get owners.

use std::fs::{self, hard_link, write};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::{CopyRequest, LookedAt, ScanOptions, TopDir, copy, diff, scan};

/// Copies `from` to `destination` in `to`, on top of `below`; what was hashed beside it.
fn follow_copy(from: &Path, destinations: &[&str], below: Option<&Path>, to: &Path) -> Option<Written> {
    let cancel = AtomicBool::new(false);
    let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
    let (source, target) = (File::open(from).unwrap(), File::open(to).unwrap());
    let below = below.map(|below| File::open(below).unwrap());
    let entries = scan(source.as_fd(), b"", &options).unwrap();
    let follower = Follower::start(target.try_clone().unwrap().into(), None).unwrap();
    for destination in destinations {
        copy(&CopyRequest {
            looked_at: Some(LookedAt::now()),
            below: below.as_ref().map(AsFd::as_fd),
            destination: destination.as_bytes(),
            owner: Some((0, 0)),
            top: TopDir::Contents,
            follower: Some(&follower),
            ..CopyRequest::tree(source.as_fd(), &entries, target.as_fd(), &cancel)
        })
        .unwrap();
    }
    follower.complete().wait().map(|followed| followed.written)
}

fn whole(tree: &Path) -> Written {
    let cancel = AtomicBool::new(false);
    let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &cancel };
    diff(File::open(tree).unwrap().as_fd(), io::sink(), &options).unwrap()
}

/// A tree of all kinds, with names that sort otherwise as paths than as components.
fn source() -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    for (nth, dir) in ["", "a", "a-b", "a/b", "a/b/c", "a.d/empty", "z"].into_iter().enumerate() {
        fs::create_dir_all(at(dir)).unwrap();
        fs::set_permissions(at(dir), fs::Permissions::from_mode(0o2755)).unwrap();
        for file in 0..nth * 20 {
            write(at(dir).join(format!("f{file}")), vec![nth as u8; file * 10]).unwrap();
        }
    }
    fs::remove_file(at("a/b/f1")).unwrap();
    symlink("a/b", at("a/link")).unwrap();
    fs::create_dir(at("a.d/more")).unwrap();
    temp
}

#[test]
fn what_is_hashed_beside_a_copy_is_the_layer() {
    let (from, below) = (source(), tempfile::tempdir().unwrap());
    fs::create_dir_all(below.path().join("usr/src/a/b")).unwrap();
    fs::set_permissions(below.path().join("usr/src"), fs::Permissions::from_mode(0o700)).unwrap();
    for (destination, below) in [
        ("", None),
        ("new", None),
        ("new/deep/er", None),
        ("usr/src", Some(below.path())),
        ("usr/other", Some(below.path())),
    ] {
        let to = tempfile::tempdir().unwrap();
        let beside = follow_copy(from.path(), &[destination], below, to.path());
        assert_eq!(beside, Some(whole(to.path())), "{destination:?}");
    }
}

#[test]
fn copies_that_are_made_in_another_order_or_over_each_other_are_not_followed() {
    let from = source();
    for destinations in [["b", "a"], ["same", "same"]] {
        let to = tempfile::tempdir().unwrap();
        assert_eq!(follow_copy(from.path(), &destinations, None, to.path()), None, "{destinations:?}");
    }
    let to = tempfile::tempdir().unwrap();
    let beside = follow_copy(from.path(), &["a", "b"], None, to.path());
    assert_eq!(beside, Some(whole(to.path())));
}

#[test]
fn hard_links_are_not_followed() {
    let (from, to) = (source(), tempfile::tempdir().unwrap());
    hard_link(from.path().join("a/f0"), from.path().join("z/again")).unwrap();
    assert_eq!(follow_copy(from.path(), &["x"], None, to.path()), None);
}

#[test]
fn a_tree_that_has_more_or_became_another_is_not_taken_for_what_was_told() {
    type Change = fn(&Path);
    let cases: [(&str, Change); 6] = [
        ("nothing", |_| {}),
        ("a file in the root", |tree| write(tree.join("extra"), "").unwrap()),
        ("a file in a directory", |tree| write(tree.join("dir/extra"), "").unwrap()),
        ("an empty directory", |tree| fs::create_dir(tree.join("dir/extra")).unwrap()),
        ("a mode", |tree| {
            fs::set_permissions(tree.join("dir"), fs::Permissions::from_mode(0o711)).unwrap();
        }),
        ("a time", |tree| File::open(tree.join("dir")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap()),
    ];
    for (what, change) in cases {
        let to = tempfile::tempdir().unwrap();
        fs::create_dir(to.path().join("dir")).unwrap();
        write(to.path().join("dir/file"), "content").unwrap();
        let mtime = crate::index::mtime(&rustix::fs::stat(to.path().join("dir")).unwrap());
        let cancel = AtomicBool::new(false);
        let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &cancel };
        let upper = File::open(to.path()).unwrap().into();
        let mut behind = Behind::new(upper, None, INTERVAL_BYTES, &options);
        for (path, what) in [("dir", What::Dir(Some(mtime))), ("dir/file", What::File(None))] {
            behind.member(Made { path: path.into(), what }).unwrap();
        }
        change(to.path());
        let beside = behind.finish().map(|followed| followed.written);
        assert_eq!(beside, (what == "nothing").then(|| whole(to.path())), "{what}");
    }
}

#[test]
fn a_copy_that_fails_leaves_no_thread_behind() {
    let to = tempfile::tempdir().unwrap();
    write(to.path().join("file"), "").unwrap();
    let follower = Follower::start(File::open(to.path()).unwrap().into(), None).unwrap();
    follower.made(b"file".to_vec(), What::File(None));
    let Follower { told, batch: _, following: Following { thread, stop } } = follower;
    drop((told, stop));
    assert_eq!(thread.join().unwrap(), None);
}
