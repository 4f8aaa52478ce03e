//! What every [`Snapshotter`] keeps to, run against each backend.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kiln_oci::{ActiveKey, SnapshotId};

use crate::{Backend, Error, Form, LayerForm, Needs, OpenOptions, Snapshotter, open};

mod deltas;
mod layers;

fn id(name: &str) -> SnapshotId {
    name.parse().unwrap()
}

fn key(name: &str) -> ActiveKey {
    name.parse().unwrap()
}

/// A path below an open tree, for `std::fs`.
fn at(tree: &OwnedFd, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{path}", tree.as_raw_fd()))
}

fn read(store: &dyn Snapshotter, name: &str, path: &str) -> io::Result<String> {
    fs::read_to_string(at(&store.open_view(&id(name)).unwrap(), path))
}

/// Makes the snapshot `name` on top of `parent` with what `write` does to the tree.
fn snapshot(store: &dyn Snapshotter, name: &str, parent: Option<&str>, write: impl FnOnce(&OwnedFd)) {
    let active = key(&format!("k-{name}"));
    store.prepare(&active, parent.map(id).as_ref()).unwrap();
    write(&store.open_active(&active, &OpenOptions::default()).unwrap());
    store.commit(&active, &id(name)).unwrap();
}

/// Makes the snapshot `name`: what `layer` alone changes, on top of `parent`.
fn stack(store: &dyn Snapshotter, name: &str, parent: Option<&str>, layer: &str) {
    let active = key(&format!("k-{name}"));
    store.prepare(&active, parent.map(id).as_ref()).unwrap();
    store.commit_layer(&active, &id(name), &id(layer)).unwrap();
}

/// A snapshot with the given files, on nothing, written without a mount.
fn layer(store: &dyn Snapshotter, name: &str, files: &[(&str, &str)]) {
    let active = key(&format!("k-{name}"));
    store.prepare(&active, None).unwrap();
    let tree = store.open_layer(&active).unwrap();
    for (path, text) in files {
        fs::create_dir_all(at(&tree, path).parent().unwrap()).unwrap();
        fs::write(at(&tree, path), text).unwrap();
    }
    store.commit(&active, &id(name)).unwrap();
}

/// Runs a test against every backend that works here.
fn with_each(test: impl Fn(&dyn Snapshotter, &Path)) {
    with(&[Backend::Overlay, Backend::FuseOverlayfs, Backend::Copy], |store, root, _| test(store, root));
}

/// Runs a test against the backends that stack changes.
fn with_stacking(test: impl Fn(&dyn Snapshotter, &Path)) {
    with(&[Backend::Overlay, Backend::FuseOverlayfs], |store, root, _| test(store, root));
}

fn with(backends: &[Backend], test: impl Fn(&dyn Snapshotter, &Path, Backend)) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED ALOUD: mounting needs root");
        return;
    }
    for &backend in backends {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("snapshots");
        match open(&root, backend) {
            Ok(store) => test(&*store, &root, backend),
            Err(Error::Fuse { reason }) => eprintln!("SKIPPED ALOUD: fuse-overlayfs: {reason}"),
            Err(error) => panic!("{backend}: {error}"),
        }
    }
}

#[test]
fn chains_of_1_3_and_130_layers_show_every_layer() {
    with_each(|store, _| {
        let mut parent = None;
        for nth in 1..=130 {
            let name = format!("s{nth}");
            snapshot(store, &name, parent.as_deref(), |tree| {
                fs::write(at(tree, &format!("file{nth}")), nth.to_string()).unwrap();
            });
            if [1, 3, 130].contains(&nth) {
                assert_eq!(store.chain(&id(&name)).unwrap().len(), nth);
                for below in [1, nth.div_ceil(2), nth] {
                    assert_eq!(read(store, &name, &format!("file{below}")).unwrap(), below.to_string());
                }
            }
            parent = Some(name);
        }
        assert_eq!(store.needs(&id("s3")).unwrap().parent, Some(id("s2")));
        assert_eq!(store.needs(&id("s1")).unwrap(), Needs::default());
        assert_eq!(store.chain(&id("s3")).unwrap(), [id("s1"), id("s2"), id("s3")]);
    });
}

#[test]
fn whiteout_hides_the_lower_file() {
    with_stacking(|store, _| {
        snapshot(store, "base", None, |tree| fs::write(at(tree, "motd"), "hi").unwrap());
        snapshot(store, "top", Some("base"), |tree| fs::remove_file(at(tree, "motd")).unwrap());
        assert_eq!(read(store, "top", "motd").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(read(store, "base", "motd").unwrap(), "hi");
        let changes = store.open_changes(&id("top")).unwrap();
        assert!(matches!(changes.form, Form::OverlayUpper));
        let whiteout = fs::symlink_metadata(at(&changes.dir, "motd")).unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    });
}

#[test]
fn a_directory_made_anew_is_opaque() {
    with_stacking(|store, _| {
        snapshot(store, "base", None, |tree| {
            fs::create_dir(at(tree, "etc")).unwrap();
            fs::write(at(tree, "etc/old"), "").unwrap();
        });
        snapshot(store, "top", Some("base"), |tree| {
            fs::remove_dir_all(at(tree, "etc")).unwrap();
            fs::create_dir(at(tree, "etc")).unwrap();
            fs::write(at(tree, "etc/new"), "").unwrap();
        });
        assert!(read(store, "top", "etc/old").is_err() && read(store, "top", "etc/new").is_ok());
        let changes = store.open_changes(&id("top")).unwrap();
        let mut value = [0; 8];
        let length =
            rustix::fs::getxattr(at(&changes.dir, "etc"), "trusted.overlay.opaque", &mut value[..]).unwrap();
        assert_eq!(&value[..length], b"y");
    });
}

#[test]
fn views_are_read_only() {
    with_each(|store, _| {
        snapshot(store, "base", None, |_| {});
        let view = store.open_view(&id("base")).unwrap();
        let error = File::create(at(&view, "x")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    });
}

#[test]
fn two_snapshots_of_one_parent_are_independent() {
    with_each(|store, _| {
        snapshot(store, "base", None, |tree| fs::write(at(tree, "f"), "base").unwrap());
        for (name, active) in [("a", "ka"), ("b", "kb")] {
            store.prepare(&key(active), Some(&id("base"))).unwrap();
            let tree = store.open_active(&key(active), &OpenOptions::default()).unwrap();
            fs::write(at(&tree, "f"), name).unwrap();
        }
        store.commit(&key("ka"), &id("a")).unwrap();
        store.commit(&key("kb"), &id("b")).unwrap();
        for name in ["base", "a", "b"] {
            assert_eq!(read(store, name, "f").unwrap(), name);
        }
    });
}

#[test]
fn an_active_snapshot_can_be_opened_again() {
    with_each(|store, _| {
        store.prepare(&key("k"), None).unwrap();
        for name in ["a", "b"] {
            let tree = store.open_active(&key("k"), &OpenOptions::default()).unwrap();
            fs::write(at(&tree, name), name).unwrap();
        }
        store.commit(&key("k"), &id("s")).unwrap();
        assert_eq!(read(store, "s", "a").unwrap() + &read(store, "s", "b").unwrap(), "ab");
    });
}

#[test]
fn extra_lower_is_seen_but_not_kept() {
    with_each(|store, root| {
        let stubs = root.join("../stubs");
        fs::create_dir_all(stubs.join("proc")).unwrap();
        store.prepare(&key("k"), None).unwrap();
        let options = OpenOptions { extra_lower: vec![stubs], ..OpenOptions::default() };
        let tree = store.open_active(&key("k"), &options).unwrap();
        assert!(at(&tree, "proc").is_dir());
        drop(tree);
        store.commit(&key("k"), &id("s")).unwrap();
        assert!(!at(&store.open_view(&id("s")).unwrap(), "proc").exists());
    });
}

#[test]
fn what_covers_the_parents_is_seen_and_not_kept_unless_it_is_written_to() {
    with_each(|store, root| {
        if store.form() == LayerForm::Tree {
            return;
        }
        snapshot(store, "base", None, |tree| {
            fs::write(at(tree, "file"), "parent's").unwrap();
            fs::write(at(tree, "other"), "parent's").unwrap();
        });
        let cover = root.join("../cover");
        fs::create_dir_all(&cover).unwrap();
        for name in ["file", "other"] {
            fs::write(cover.join(name), "covered").unwrap();
        }
        store.prepare(&key("k"), Some(&id("base"))).unwrap();
        let options = OpenOptions { covers: vec![cover.clone()], ..OpenOptions::default() };
        let tree = store.open_active(&key("k"), &options).unwrap();
        assert_eq!(fs::read_to_string(at(&tree, "file")).unwrap(), "covered");
        fs::write(at(&tree, "new"), "renamed").unwrap();
        fs::rename(at(&tree, "new"), at(&tree, "other")).unwrap();
        drop(tree);
        assert_eq!(fs::read_to_string(cover.join("other")).unwrap(), "covered");
        store.commit(&key("k"), &id("s")).unwrap();
        let view = store.open_view(&id("s")).unwrap();
        assert_eq!(fs::read_to_string(at(&view, "file")).unwrap(), "parent's");
        assert_eq!(fs::read_to_string(at(&view, "other")).unwrap(), "renamed");
        assert!(!at(&store.open_changes(&id("s")).unwrap().dir, "file").exists());
    });
}

#[test]
fn what_is_written_to_is_read_beside_through_a_mount_that_nobody_writes_to() {
    with_each(|store, _| {
        snapshot(store, "base", None, |tree| fs::write(at(tree, "low"), "low").unwrap());
        store.prepare(&key("k"), Some(&id("base"))).unwrap();
        let durable = OpenOptions { durable: true, ..OpenOptions::default() };
        let writing = store.open_active(&key("k"), &durable).unwrap();
        fs::write(at(&writing, "new"), "new").unwrap();
        fs::remove_file(at(&writing, "low")).unwrap();
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let reading = store.open_active(&key("k"), &options).unwrap();
        assert_eq!(fs::read_to_string(at(&reading, "new")).unwrap(), "new");
        assert!(!at(&reading, "low").exists());
        assert!(fs::write(at(&reading, "no"), "no").is_err());
        fs::write(at(&writing, "more"), "more").unwrap();
    });
}

#[test]
fn the_root_directory_keeps_mode_and_owner_along_the_chain() {
    with_each(|store, _| {
        let stat = |name| fs::metadata(at(&store.open_view(&id(name)).unwrap(), "")).unwrap();
        snapshot(store, "base", None, |_| {});
        assert_eq!(stat("base").mode() & 0o7777, 0o755);
        snapshot(store, "odd", Some("base"), |tree| {
            fs::set_permissions(at(tree, ""), fs::Permissions::from_mode(0o1711)).unwrap();
            std::os::unix::fs::chown(at(tree, ""), Some(7), Some(8)).unwrap();
        });
        snapshot(store, "top", Some("odd"), |_| {});
        let top = stat("top");
        assert_eq!((top.mode() & 0o7777, top.uid(), top.gid()), (0o1711, 7, 8));
    });
}

#[test]
fn names_are_taken_once() {
    with_each(|store, _| {
        snapshot(store, "s", None, |tree| fs::write(at(tree, "f"), "first").unwrap());
        store.prepare(&key("k"), None).unwrap();
        assert!(matches!(store.prepare(&key("k"), None), Err(Error::KeyTaken(_))));
        assert!(matches!(store.commit(&key("k"), &id("s")), Err(Error::IdTaken(_))));
        assert_eq!(read(store, "s", "f").unwrap(), "first");
        store.commit(&key("k"), &id("other")).unwrap();
    });
}

#[test]
fn what_is_not_there_is_said_and_changes_nothing() {
    with_each(|store, _| {
        assert!(matches!(store.prepare(&key("k"), Some(&id("no"))), Err(Error::NoParent(_))));
        assert!(matches!(store.commit(&key("k"), &id("s")), Err(Error::NoActive(_))));
        assert!(matches!(store.open_active(&key("k"), &OpenOptions::default()), Err(Error::NoActive(_))));
        assert!(matches!(store.open_view(&id("no")), Err(Error::NoSnapshot(_))));
        assert!(matches!(store.open_changes(&id("no")), Err(Error::NoSnapshot(_))));
        assert!(matches!(store.remove(&id("no")), Err(Error::NoSnapshot(_))));
        assert!(matches!(store.remove_active(&key("k")), Err(Error::NoActive(_))));
        assert_eq!(store.list().unwrap(), (vec![], vec![]));
    });
}

#[test]
fn removed_snapshots_are_gone_and_leave_no_trash() {
    with_each(|store, root| {
        snapshot(store, "s", None, |tree| fs::write(at(tree, "f"), "").unwrap());
        store.prepare(&key("k"), Some(&id("s"))).unwrap();
        drop(store.open_active(&key("k"), &OpenOptions::default()).unwrap());
        store.remove_active(&key("k")).unwrap();
        store.remove(&id("s")).unwrap();
        assert!(!store.contains(&id("s")));
        assert_eq!(store.list().unwrap(), (vec![], vec![]));
        assert_eq!(fs::read_dir(root.join("trash")).unwrap().count(), 0);
        fs::create_dir_all(root.join("trash/left/by/a/crash")).unwrap();
        assert_eq!(store.empty_trash().unwrap(), 1);
    });
}

#[test]
fn a_store_opened_again_shows_the_same() {
    with_each(|store, root| {
        snapshot(store, "a", None, |tree| fs::write(at(tree, "f"), "kept").unwrap());
        snapshot(store, "b", Some("a"), |_| {});
        store.prepare(&key("k"), Some(&id("b"))).unwrap();
        let again = open(root, Backend::Auto).unwrap();
        assert_eq!(again.list().unwrap(), store.list().unwrap());
        assert_eq!(again.list().unwrap(), (vec![id("a"), id("b")], vec![key("k")]));
        assert_eq!(read(&*again, "b", "f").unwrap(), "kept");
    });
}

#[test]
fn damage_is_told_apart_from_absence() {
    with_each(|store, root| {
        snapshot(store, "a", None, |_| {});
        snapshot(store, "b", Some("a"), |_| {});
        let meta =
            |name: &str, text: &str| fs::write(root.join(format!("committed/{name}/meta")), text).unwrap();
        let damaged = |name| matches!(store.chain(&id(name)), Err(Error::Damaged { .. }));
        meta("a", r#"{"version":1,"parent":"b"}"#);
        assert!(damaged("b"), "circle");
        meta("a", r#"{"version":9,"parent":null}"#);
        let newer = store.needs(&id("a"));
        assert!(matches!(newer, Err(Error::Newer { found: 9, .. })), "{newer:?}");
        meta("a", r#"{"version":1,"parent":"../x"}"#);
        assert!(damaged("a"), "hostile parent");
        meta("a", "");
        assert!(damaged("a"), "empty after a power cut");
        store.remove(&id("a")).unwrap();
        assert!(damaged("b"), "missing parent");
    });
}

#[test]
fn a_layer_stacked_on_another_base_shows_both() {
    with_each(|store, _| {
        snapshot(store, "base", None, |tree| {
            fs::create_dir_all(at(tree, "etc/kept")).unwrap();
            fs::set_permissions(at(tree, "etc"), fs::Permissions::from_mode(0o700)).unwrap();
            fs::write(at(tree, "etc/motd"), "base").unwrap();
            std::os::unix::fs::symlink("etc", at(tree, "link")).unwrap();
        });
        layer(store, "l", &[("etc/motd", "layer"), ("link/x", "dir")]);
        stack(store, "top", Some("base"), "l");
        assert_eq!(read(store, "top", "etc/motd").unwrap(), "layer");
        let view = store.open_view(&id("top")).unwrap();
        assert!(at(&view, "etc/kept").is_dir());
        assert_eq!(fs::metadata(at(&view, "etc")).unwrap().mode() & 0o7777, 0o755);
        assert!(fs::symlink_metadata(at(&view, "link")).unwrap().is_dir());
        assert!(!at(&view, "etc/x").exists());
        assert_eq!(store.chain(&id("top")).unwrap(), [id("base"), id("top")]);
        assert_eq!(store.needs(&id("top")).unwrap().parent, Some(id("base")));
        let changes = store.open_changes(&id("top")).unwrap();
        assert!(at(&changes.dir, "etc/motd").exists());
        assert_eq!(at(&changes.dir, "etc/kept").exists(), store.form() == LayerForm::Tree);
        snapshot(store, "next", Some("top"), |tree| fs::write(at(tree, "etc/motd"), "next").unwrap());
        assert_eq!(read(store, "next", "etc/motd").unwrap(), "next");
        assert_eq!(read(store, "l", "etc/motd").unwrap(), "layer");
    });
}

#[test]
fn shared_changes_live_until_the_last_snapshot_that_shows_them_is_removed() {
    for order in [["l", "a", "b"], ["a", "l", "b"], ["b", "a", "l"]] {
        with_stacking(|store, root| {
            snapshot(store, "base", None, |_| {});
            layer(store, "l", &[("f", "text")]);
            stack(store, "a", Some("base"), "l");
            // Of a snapshot that shares itself.
            stack(store, "b", None, "a");
            for (nth, gone) in order.iter().enumerate() {
                store.remove(&id(gone)).unwrap();
                assert!(!store.contains(&id(gone)), "{order:?}");
                assert!(matches!(store.remove(&id(gone)), Err(Error::NoSnapshot(_))), "{order:?}");
                for kept in &order[nth + 1..] {
                    assert_eq!(read(store, kept, "f").unwrap(), "text", "{order:?}: {kept} without {gone}");
                    assert!(at(&store.open_changes(&id(kept)).unwrap().dir, "f").exists());
                }
            }
            assert_eq!(store.list().unwrap(), (vec![id("base")], vec![]));
            let left = |dir: &str| fs::read_dir(root.join(dir)).unwrap().count();
            assert_eq!((left("committed"), left("shared"), left("trash")), (1, 0, 0), "{order:?}");
        });
    }
}

#[test]
fn a_name_is_taken_while_its_changes_are_shown() {
    with_stacking(|store, _| {
        layer(store, "l", &[("f", "old")]);
        stack(store, "a", None, "l");
        store.remove(&id("l")).unwrap();
        store.prepare(&key("k"), None).unwrap();
        assert!(matches!(store.commit(&key("k"), &id("l")), Err(Error::IdTaken(_))));
        assert!(matches!(store.commit_layer(&key("k"), &id("a"), &id("a")), Err(Error::IdTaken(_))));
        assert!(matches!(store.commit_layer(&key("k"), &id("c"), &id("l")), Err(Error::NoSnapshot(_))));
        assert!(matches!(store.commit_layer(&key("no"), &id("c"), &id("a")), Err(Error::NoActive(_))));
        assert_eq!(read(store, "a", "f").unwrap(), "old");
    });
}

#[test]
fn a_written_snapshot_does_not_take_another_ones_changes() {
    with_each(|store, _| {
        layer(store, "l", &[("f", "layer")]);
        store.prepare(&key("k"), None).unwrap();
        fs::write(at(&store.open_layer(&key("k")).unwrap(), "mine"), "").unwrap();
        assert!(store.commit_layer(&key("k"), &id("s"), &id("l")).is_err());
        assert!(!store.contains(&id("s")));
        store.remove_active(&key("k")).unwrap();
    });
}

#[test]
fn one_layer_may_stand_twice_in_a_stack() {
    with_each(|store, _| {
        layer(store, "l", &[("d/f", "layer")]);
        stack(store, "one", None, "l");
        snapshot(store, "two", Some("one"), |tree| {
            fs::remove_dir_all(at(tree, "d")).unwrap();
            fs::write(at(tree, "d"), "file").unwrap();
        });
        stack(store, "three", Some("two"), "l");
        assert_eq!(read(store, "two", "d").unwrap(), "file");
        assert_eq!(read(store, "three", "d/f").unwrap(), "layer");
        assert_eq!(store.chain(&id("three")).unwrap().len(), 3);
    });
}

#[test]
fn a_stacked_layer_leaves_the_root_directory_as_it_was() {
    with_each(|store, _| {
        snapshot(store, "odd", None, |tree| {
            fs::set_permissions(at(tree, ""), fs::Permissions::from_mode(0o1711)).unwrap();
            std::os::unix::fs::chown(at(tree, ""), Some(7), Some(8)).unwrap();
        });
        layer(store, "l", &[("f", "layer")]);
        stack(store, "top", Some("odd"), "l");
        snapshot(store, "next", Some("top"), |_| {});
        for name in ["top", "next"] {
            let root = fs::metadata(at(&store.open_view(&id(name)).unwrap(), "")).unwrap();
            assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o1711, 7, 8), "{name}");
            assert_eq!(read(store, name, "f").unwrap(), "layer");
        }
        store.remove(&id("l")).unwrap();
        assert_eq!(read(store, "next", "f").unwrap(), "layer");
    });
}

#[test]
fn a_crash_between_hint_and_name_keeps_nothing_alive() {
    with_stacking(|store, root| {
        layer(store, "l", &[("f", "")]);
        stack(store, "a", None, "l");
        // What a process leaves that died before its snapshot got its name.
        fs::write(root.join("committed/l/sharers/never"), "").unwrap();
        store.remove(&id("l")).unwrap();
        assert!(root.join("shared/l").exists());
        // And what one leaves that died after it discarded the last sharer.
        fs::remove_dir_all(root.join("committed/a")).unwrap();
        store.empty_trash().unwrap();
        assert!(!root.join("shared/l").exists());
    });
}

#[test]
fn shared_changes_that_are_gone_are_damage() {
    with_stacking(|store, root| {
        layer(store, "l", &[("f", "")]);
        stack(store, "a", None, "l");
        fs::remove_dir_all(root.join("committed/l")).unwrap();
        assert!(matches!(store.open_view(&id("a")), Err(Error::Damaged { .. })));
        assert!(matches!(store.open_changes(&id("a")), Err(Error::Damaged { .. })));
        store.remove(&id("a")).unwrap();
    });
}

#[test]
fn changes_are_shared_while_their_owner_is_removed() {
    with_stacking(|store, _| {
        layer(store, "base", &[("b", "base")]);
        for nth in 0..30 {
            let name = |what: &str| format!("{what}-{nth}");
            layer(store, &name("owner"), &[("f", "text")]);
            stack(store, &name("sharer"), Some("base"), &name("owner"));
            let start = std::sync::Barrier::new(3);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    start.wait();
                    store.remove(&id(&name("owner"))).unwrap();
                });
                scope.spawn(|| {
                    start.wait();
                    stack(store, &name("new"), None, &name("sharer"));
                });
                start.wait();
                store.prepare(&key(&name("on")), Some(&id(&name("sharer")))).unwrap();
            });
            store.remove(&id(&name("sharer"))).unwrap();
            assert!(at(&store.open_changes(&id(&name("new"))).unwrap().dir, "f").exists());
            store.remove_active(&key(&name("on"))).unwrap();
        }
    });
}
