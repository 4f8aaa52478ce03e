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
        let mut behind = Behind::new(upper, None, None, INTERVAL_BYTES, &options);
        for (path, what) in [("dir", What::Dir(Some(mtime))), ("dir/file", What::File(None))] {
            behind.member(Made { path: path.into(), what }, &[]).unwrap();
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
    let Follower { told, next: _, following: Following { thread, stop } } = follower;
    drop((told, stop));
    assert_eq!(thread.join().unwrap(), None);
}

#[test]
fn files_of_the_earlier_layer_are_read_where_that_is() {
    let (full, whole) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [&full, &whole] {
        fs::create_dir(dir.path().join("dir")).unwrap();
        for nth in 0..5 {
            write(dir.path().join(format!("dir/f{nth}")), vec![nth; 100]).unwrap();
        }
    }
    let states = {
        let follower = Follower::start(File::open(full.path()).unwrap().into(), None).unwrap();
        follower.made(b"dir".to_vec(), What::Dir(None));
        let content = |nth: u8| Some(*blake3::hash(&[nth; 100]).as_bytes());
        (0..5).for_each(|nth| follower.made(format!("dir/f{nth}").into_bytes(), What::File(content(nth))));
        follower.complete().wait().unwrap().states.unwrap()
    };
    // One has changed. Whoever reads the others in the mount would see that they are not the earlier ones.
    write(whole.path().join("dir/f2"), "changed").unwrap();
    let expected = self::whole(whole.path());
    let open = |dir: &TempDir| File::open(dir.path()).unwrap().into();
    let mut entries = entries(whole.path());
    let follow = |entries: &[Entry]| {
        let follower = Follower::start_delta(open(&whole), open(&full), states.clone()).unwrap();
        for entry in entries {
            let what = match &entry.kind {
                EntryKind::Dir => What::Dir(None),
                _ if entry.path == b"dir/f2" => What::File(entry.content().copied()),
                _ => What::Kept(entry.clone().into()),
            };
            follower.made(entry.path.clone(), what);
        }
        follower.complete().wait().map(|followed| followed.written)
    };
    entries.remove(0);
    for nth in [0, 1, 3, 4] {
        let path = |dir: &TempDir| dir.path().join(format!("dir/f{nth}"));
        let time = fs::metadata(path(&whole)).unwrap().modified().unwrap();
        File::open(path(&full)).unwrap().set_modified(time).unwrap();
        write(path(&whole), "something else").unwrap();
    }
    assert_eq!(follow(&entries), Some(expected));
    fs::remove_file(full.path().join("dir/f4")).unwrap();
    assert_eq!(follow(&entries), None);
}

fn entries(tree: &Path) -> Vec<Entry> {
    let cancel = AtomicBool::new(false);
    let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
    scan(File::open(tree).unwrap().as_fd(), b"", &options).unwrap()
}

#[test]
fn content_comes_with_what_was_written_as_long_as_there_is_memory_for_it() {
    let tree = tempfile::tempdir().unwrap();
    let sizes = [0, 1, 511, 512, 513, 70_000, CONTENT_BYTES, CONTENT_BYTES + 1].into_iter().cycle();
    for (nth, size) in sizes.take(4 * CONTENTS).enumerate() {
        write(tree.path().join(format!("f{nth:03}")), vec![nth as u8; size]).unwrap();
    }
    let follower = Follower::start(File::open(tree.path()).unwrap().into(), None).unwrap();
    for entry in entries(tree.path()).split_off(1) {
        let content = fs::read(tree.path().join(std::str::from_utf8(&entry.path).unwrap())).unwrap();
        follower.wrote(entry, &content);
    }
    let followed = follower.complete().wait().unwrap();
    assert_eq!(followed.written, whole(tree.path()));
    assert!(followed.states.is_some());
}

#[test]
fn memory_for_content_is_bounded_and_used_again() {
    let (used, spare) = channel();
    let mut next = Next { batch: Batch::default(), spare, more: 2 };
    let mut rooms = Vec::new();
    for _ in 0..2 {
        assert!(next.has_room(CONTENT_BYTES));
        next.batch.content.push(0);
        assert!(next.has_room(1) && !next.has_room(CONTENT_BYTES));
        rooms.push(std::mem::take(&mut next.batch).content);
    }
    assert!(!next.has_room(1));
    let mut room = rooms.remove(0);
    let place = room.as_ptr();
    room.clear();
    used.send(room).unwrap();
    assert!(next.has_room(CONTENT_BYTES));
    assert_eq!(next.batch.content.as_ptr(), place);
}

#[test]
fn content_that_is_not_what_the_file_has_is_not_believed() {
    let tree = tempfile::tempdir().unwrap();
    write(tree.path().join("file"), "content").unwrap();
    for (content, is_believed) in [("content", true), ("conten", false), ("content!", false)] {
        let follower = Follower::start(File::open(tree.path()).unwrap().into(), None).unwrap();
        follower.wrote(entries(tree.path()).remove(1), content.as_bytes());
        assert_eq!(follower.complete().wait().is_some(), is_believed, "{content}");
    }
}
