//! What snapshots are as layers: told, loaded, stacked, of any number and depth.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::atomic::AtomicBool;

use kiln_layer::{
    ApplyOptions, DiffOptions, EntryKind, Limits, Reading, ScanOptions, TreeForm, Whiteouts, apply, diff,
    diff_trees, scan,
};

use super::{at, id, key, layer, read, snapshot, stack, with_each, with_stacking};
use crate::mount::MAX_LOWER;
use crate::{Error, Form, LayerForm, OpenOptions, Snapshotter};

/// The layer of a snapshot, as a build writes it.
fn tar(store: &dyn Snapshotter, name: &str) -> Vec<u8> {
    let never = AtomicBool::new(false);
    let changes = store.open_changes(&id(name)).unwrap();
    let (form, parent) = match changes.form {
        Form::OverlayUpper => (TreeForm::OverlayUpper, None),
        Form::Tree { parent } => (TreeForm::Plain, parent),
    };
    let options = DiffOptions { form, root_entry: false, cancel: &never };
    let mut tar = Vec::new();
    match parent {
        Some(parent) => diff_trees(parent.as_fd(), changes.dir.as_fd(), &mut tar, &options).unwrap(),
        None => diff(changes.dir.as_fd(), &mut tar, &options).unwrap(),
    };
    tar
}

/// All that a layer keeps of a tree but for the times, which differ from run to run.
fn describe(tree: &OwnedFd) -> Vec<String> {
    let never = AtomicBool::new(false);
    let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &never };
    let mut first = HashMap::new();
    let entries = scan(tree.as_fd(), b"", &options).unwrap();
    let lines = entries.into_iter().filter(|entry| !entry.path.is_empty()).map(|mut entry| {
        entry.xattrs.retain(|name, _| name.starts_with(b"user.test") || name == b"security.capability");
        let path = entry.path.escape_ascii().to_string();
        if let EntryKind::File { inode, nlink, .. } = &mut entry.kind {
            let same = first.entry(*inode).or_insert(path.clone()).clone();
            (*inode, *nlink) = ((0, 0), 0);
            return format!(
                "{path} {:?} {:o} {} {:?} as {same}",
                entry.kind, entry.mode, entry.uid, entry.xattrs
            );
        }
        format!("{path} {:?} {:o} {} {:?}", entry.kind, entry.mode, entry.uid, entry.xattrs)
    });
    lines.collect()
}

/// Does to a tree what RUN steps do.
fn furnish(tree: &OwnedFd) {
    for dir in ["gone", "anew", "moved", "plain/sub", "file-to-be"] {
        fs::create_dir_all(at(tree, dir)).unwrap();
        fs::write(at(tree, &format!("{dir}/file")), dir).unwrap();
    }
    fs::write(at(tree, "hard"), "linked").unwrap();
    fs::hard_link(at(tree, "hard"), at(tree, "plain/link")).unwrap();
    std::os::unix::fs::symlink("plain", at(tree, "soft")).unwrap();
    fs::write(at(tree, "dir-to-be"), "").unwrap();
}

fn refurnish(tree: &OwnedFd) {
    fs::remove_dir_all(at(tree, "gone")).unwrap();
    fs::remove_dir_all(at(tree, "anew")).unwrap();
    fs::create_dir(at(tree, "anew")).unwrap();
    fs::write(at(tree, "anew/other"), "").unwrap();
    // overlayfs without redirects says EXDEV, as to any program, and mv copies.
    if fs::rename(at(tree, "moved"), at(tree, "plain/moved")).is_err() {
        fs::remove_dir_all(at(tree, "moved")).unwrap();
        fs::create_dir(at(tree, "plain/moved")).unwrap();
        fs::write(at(tree, "plain/moved/file"), "moved").unwrap();
    }
    fs::remove_dir_all(at(tree, "file-to-be")).unwrap();
    fs::write(at(tree, "file-to-be"), "now").unwrap();
    fs::remove_file(at(tree, "dir-to-be")).unwrap();
    fs::create_dir(at(tree, "dir-to-be")).unwrap();
    fs::write(at(tree, "hard"), "changed").unwrap();
    let xattr = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::setxattr(at(tree, path), name, value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    xattr("plain/sub/file", "user.test", b"a\nb");
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr("anew/other", "security.capability", &capability);
    std::os::unix::fs::chown(at(tree, "plain"), Some(7), Some(8)).unwrap();
}

#[test]
fn the_layer_of_a_snapshot_makes_its_tree_out_of_its_parents() {
    with_each(|store, _| {
        snapshot(store, "base", None, furnish);
        snapshot(store, "top", Some("base"), refurnish);
        let expected = describe(&store.open_view(&id("top")).unwrap());
        assert!(
            expected.iter().any(|line| line.contains("security.capability") || line.contains("[115, 101"))
        );
        // On the parent, as a layer that is loaded.
        store.prepare(&key("k"), Some(&id("base"))).unwrap();
        let layer = store.open_layer(&key("k")).unwrap();
        let never = AtomicBool::new(false);
        let whiteouts = match store.form() {
            LayerForm::Changes => Whiteouts::Overlay,
            LayerForm::Tree => Whiteouts::Remove,
        };
        let options = ApplyOptions {
            whiteouts,
            keep_owner: true,
            limits: Limits::default(),
            reading: Reading::Ahead,
            cancel: &never,
        };
        apply(tar(store, "top").as_slice(), layer.as_fd(), &options).unwrap();
        store.commit(&key("k"), &id("loaded")).unwrap();
        assert_eq!(describe(&store.open_view(&id("loaded")).unwrap()), expected);
        // And as another snapshot's changes.
        stack(store, "shared", Some("base"), "top");
        assert_eq!(describe(&store.open_view(&id("shared")).unwrap()), expected);
        // Of nothing there is nothing to tell.
        snapshot(store, "same", Some("top"), |_| {});
        assert_eq!(tar(store, "same"), vec![0; 1024]);
    });
}

#[test]
fn a_snapshot_can_be_put_on_its_parent_when_it_is_complete() {
    with_each(|store, _| {
        snapshot(store, "base", None, |tree| {
            fs::write(at(tree, "below"), "below").unwrap();
            fs::set_permissions(at(tree, ""), fs::Permissions::from_mode(0o1711)).unwrap();
        });
        store.prepare(&key("k"), None).unwrap();
        fs::write(at(&store.open_layer(&key("k")).unwrap(), "above"), "above").unwrap();
        let put = store.set_parent(&key("k"), &id("base"), true);
        if store.form() == LayerForm::Tree {
            assert!(matches!(put, Err(Error::WholeTrees)));
            return;
        }
        put.unwrap();
        assert!(matches!(store.set_parent(&key("no"), &id("base"), true), Err(Error::NoActive(_))));
        assert!(matches!(store.set_parent(&key("k"), &id("no"), true), Err(Error::NoParent(_))));
        store.commit(&key("k"), &id("top")).unwrap();
        assert_eq!(
            read(store, "top", "below").unwrap() + &read(store, "top", "above").unwrap(),
            "belowabove"
        );
        let view = store.open_view(&id("top")).unwrap();
        assert_eq!(fs::metadata(at(&view, "")).unwrap().mode() & 0o7777, 0o1711);
    });
}

#[test]
fn stubs_that_a_process_uses_are_its_own() {
    with_each(|store, root| {
        let stubs = root.join("../stubs");
        fs::create_dir_all(stubs.join("etc")).unwrap();
        fs::create_dir_all(stubs.join("used")).unwrap();
        fs::write(stubs.join("etc/hosts"), "").unwrap();
        fs::write(stubs.join("etc/resolv.conf"), "").unwrap();
        layer(store, "base", &[("etc/passwd", "")]);
        let time = |name: &str| {
            let stat = fs::metadata(at(&store.open_view(&id(name)).unwrap(), "etc")).unwrap();
            (stat.mtime(), stat.mtime_nsec())
        };
        for (name, writes) in [("idle", false), ("busy", true)] {
            store.prepare(&key(name), Some(&id("base"))).unwrap();
            let options = OpenOptions { extra_lower: vec![stubs.clone()], ..OpenOptions::default() };
            let tree = store.open_active(&key(name), &options).unwrap();
            assert!(at(&tree, "etc/hosts").exists() && at(&tree, "used").is_dir());
            if writes {
                fs::write(at(&tree, "etc/hosts"), "written").unwrap();
                fs::write(at(&tree, "used/file"), "").unwrap();
            }
            drop(tree);
            store.commit(&key(name), &id(name)).unwrap();
        }
        let seen = |name: &str| -> Vec<String> {
            let view = store.open_view(&id(name)).unwrap();
            describe(&view).iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
        };
        assert_eq!(seen("idle"), ["etc", "etc/passwd"]);
        assert_eq!(time("idle"), time("base"));
        assert_eq!(seen("busy"), ["etc", "etc/hosts", "etc/passwd", "used", "used/file"]);
        assert_eq!(read(store, "busy", "etc/hosts").unwrap(), "written");
    });
}

#[test]
fn a_chain_is_as_long_as_the_kernel_takes_and_one_more_is_an_error() {
    with_stacking(|store, _| {
        let mut parent: Option<String> = None;
        for nth in 1..=MAX_LOWER + 1 {
            let name = format!("s{nth}");
            store.prepare(&key("k"), parent.as_deref().map(id).as_ref()).unwrap();
            let dir = store.open_layer(&key("k")).unwrap();
            fs::write(at(&dir, &format!("f{nth}")), "").unwrap();
            store.commit(&key("k"), &id(&name)).unwrap();
            parent = Some(name);
        }
        let last = format!("s{MAX_LOWER}");
        let view = store.open_view(&id(&last)).unwrap();
        assert!(at(&view, "f1").exists() && at(&view, &format!("f{MAX_LOWER}")).exists());
        let over = store.open_view(&id(&format!("s{}", MAX_LOWER + 1)));
        assert!(matches!(over, Err(Error::TooDeep { limit: MAX_LOWER })));
    });
}

#[test]
fn trees_of_any_depth_are_removed() {
    with_each(|store, root| {
        store.prepare(&key("k"), None).unwrap();
        let mut dir = store.open_layer(&key("k")).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&dir, "d", rustix::fs::Mode::RWXU).unwrap();
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
            dir = rustix::fs::openat(&dir, "d", flags, rustix::fs::Mode::empty()).unwrap();
        }
        store.commit(&key("k"), &id("deep")).unwrap();
        store.remove(&id("deep")).unwrap();
        assert_eq!(fs::read_dir(root.join("trash")).unwrap().count(), 0);
    });
}
