//! Snapshots whose changes stand in front of another one's.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use kiln_layer::{DiffOptions, TreeForm, diff};

use super::{at, id, key, layer, read, snapshot, stack, with_each, with_stacking};
use crate::mount::MAX_LOWER;
use crate::{Backend, Error, LayerForm, Needs, OpenOptions, Snapshotter, open};

/// Makes the snapshot `name` on `parent`: what `write` does, in front of the changes of `full`.
fn delta(
    store: &dyn Snapshotter,
    name: &str,
    parent: Option<&str>,
    full: &str,
    write: impl FnOnce(&OwnedFd),
) {
    let active = key(&format!("k-{name}"));
    store.prepare(&active, parent.map(id).as_ref()).unwrap();
    write(&store.open_layer(&active).unwrap());
    store.commit_delta(&active, &id(name), &id(full)).unwrap();
}

/// Files with all that a layer keeps of them; all times are the same.
fn fill(tree: &OwnedFd, files: &[(&str, &str)]) {
    for (path, text) in files {
        fs::create_dir_all(at(tree, path).parent().unwrap()).unwrap();
        fs::write(at(tree, path), text).unwrap();
        fs::set_permissions(at(tree, path), fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(at(tree, path), Some(7), Some(8)).unwrap();
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let name = "security.capability";
        rustix::fs::setxattr(at(tree, path), name, &capability, rustix::fs::XattrFlags::empty()).unwrap();
    }
}

fn still(tree: &OwnedFd, paths: &[&str]) {
    for path in paths {
        let time = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 7 };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::utimensat(rustix::fs::CWD, at(tree, path), &times, flags).unwrap();
    }
}

fn tar(store: &dyn Snapshotter, name: &str) -> Vec<u8> {
    let never = AtomicBool::new(false);
    let changes = store.open_changes(&id(name)).unwrap();
    let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &never };
    let mut tar = Vec::new();
    diff(changes.dir.as_fd(), &mut tar, &options).unwrap();
    tar
}

fn left(root: &Path, dir: &str) -> usize {
    fs::read_dir(root.join(dir)).unwrap().count()
}

#[test]
fn a_delta_and_what_it_stands_on_are_one_layer() {
    with_stacking(|store, _| {
        snapshot(store, "base", None, |tree| {
            fs::create_dir(at(tree, "d")).unwrap();
            fs::write(at(tree, "d/of-base"), "base").unwrap();
        });
        let all = ["d/changed", "d/sub/same", "link", "d/pair", "d/twin", "d/sub", "d"];
        let make = |changed: &'static str, only: Option<&'static [&'static str]>| {
            move |tree: &OwnedFd| {
                let wanted = |path: &str| only.is_none_or(|only| only.contains(&path));
                let files = [("d/changed", changed), ("d/sub/same", "same")];
                let files: Vec<_> = files.into_iter().filter(|(path, _)| wanted(path)).collect();
                fill(tree, &files);
                if wanted("link") {
                    symlink("nowhere", at(tree, "link")).unwrap();
                }
                if wanted("d/pair") {
                    fill(tree, &[("d/pair", "pair")]);
                    fs::hard_link(at(tree, "d/pair"), at(tree, "d/twin")).unwrap();
                }
                let there: Vec<&str> =
                    all.iter().copied().filter(|path| at(tree, path).symlink_metadata().is_ok()).collect();
                still(tree, &there);
            }
        };
        let whole = |name: &str, changed: &'static str| {
            store.prepare(&key("k"), Some(&id("base"))).unwrap();
            make(changed, None)(&store.open_layer(&key("k")).unwrap());
            store.commit(&key("k"), &id(name)).unwrap();
        };
        whole("full", "before");
        whole("expected", "after");
        let only: &[&str] = &["d/changed", "d/pair"];
        delta(store, "delta", Some("base"), "full", make("after", Some(only)));
        assert!(tar(store, "delta") == tar(store, "expected"), "the layer is another one");
        assert!(tar(store, "delta") != tar(store, "full"));
        assert_eq!(store.chain(&id("delta")).unwrap(), [id("base"), id("delta")]);
        let needs = Needs { parent: Some(id("base")), full: Some(id("full")) };
        assert_eq!(store.needs(&id("delta")).unwrap(), needs);
        assert_eq!(store.needs(&id("full")).unwrap(), Needs { full: None, ..needs });
        assert_eq!(store.open_dirs(&id("delta")).unwrap().len(), 2);
        let read_view = |path| fs::read_to_string(at(&store.open_view(&id("delta")).unwrap(), path)).unwrap();
        assert_eq!(
            [read_view("d/changed"), read_view("d/sub/same"), read_view("d/of-base")],
            ["after", "same", "base"]
        );
        // What is taken of it takes the place of what it shows, and not more.
        snapshot(store, "next", Some("delta"), |tree| {
            fs::remove_file(at(tree, "d/changed")).unwrap();
            fs::remove_dir_all(at(tree, "d/sub")).unwrap();
            fs::write(at(tree, "d/pair"), "other").unwrap();
        });
        let next = store.open_view(&id("next")).unwrap();
        assert!(!at(&next, "d/changed").exists() && !at(&next, "d/sub").exists());
        assert_eq!(
            read(store, "next", "d/twin").unwrap() + &read(store, "next", "d/pair").unwrap(),
            "pairother"
        );
        assert_eq!(read(store, "full", "d/changed").unwrap(), "before");
        assert!(store.disk_bytes(&id("delta")).unwrap() > 0);
    });
}

#[test]
fn nobody_writes_to_the_changes_of_a_delta() {
    with_stacking(|store, _| {
        layer(store, "full", &[("f", "1")]);
        delta(store, "d", None, "full", |tree| fs::write(at(tree, "g"), "2").unwrap());
        let changes = store.open_changes(&id("d")).unwrap();
        let error = fs::write(at(&changes.dir, "x"), "").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    });
}

#[test]
fn what_a_delta_stands_on_lives_as_long_as_it_does() {
    for order in [
        ["full", "delta", "sharer"],
        ["delta", "full", "sharer"],
        ["sharer", "full", "delta"],
        ["delta", "sharer", "full"],
    ] {
        with_stacking(|store, root| {
            snapshot(store, "base", None, |_| {});
            layer(store, "full", &[("f", "full"), ("g", "before")]);
            delta(store, "delta", None, "full", |tree| fs::write(at(tree, "g"), "after").unwrap());
            stack(store, "sharer", Some("base"), "delta");
            assert_eq!(store.needs(&id("sharer")).unwrap().full, Some(id("full")));
            for (nth, gone) in order.iter().enumerate() {
                store.remove(&id(gone)).unwrap();
                assert!(!store.contains(&id(gone)), "{order:?}");
                store.empty_trash().unwrap();
                for kept in &order[nth + 1..] {
                    let g = if *kept == "full" { "before" } else { "after" };
                    assert_eq!(read(store, kept, "f").unwrap(), "full", "{order:?}: {kept} without {gone}");
                    assert_eq!(read(store, kept, "g").unwrap(), g, "{order:?}: {kept} without {gone}");
                    let changes = store.open_changes(&id(kept)).unwrap();
                    assert_eq!(fs::read_to_string(at(&changes.dir, "g")).unwrap(), g);
                    assert!(at(&changes.dir, "f").exists());
                }
            }
            assert_eq!(store.list().unwrap(), (vec![id("base")], vec![]));
            let left = |dir| left(root, dir);
            assert_eq!((left("committed"), left("shared"), left("trash")), (1, 0, 0), "{order:?}");
        });
    }
}

#[test]
fn a_delta_stands_on_no_delta_but_on_whatever_shows_a_full_one() {
    with_stacking(|store, _| {
        layer(store, "full", &[("f", "full")]);
        stack(store, "sharer", None, "full");
        delta(store, "one", None, "sharer", |tree| fs::write(at(tree, "g"), "1").unwrap());
        assert_eq!(store.needs(&id("one")).unwrap().full, Some(id("full")));
        store.prepare(&key("k"), None).unwrap();
        let refused = store.commit_delta(&key("k"), &id("two"), &id("one"));
        assert!(matches!(refused, Err(Error::IsDelta(name)) if name == id("one")));
        assert!(matches!(store.commit_delta(&key("k"), &id("two"), &id("no")), Err(Error::NoSnapshot(_))));
        assert!(matches!(store.commit_delta(&key("k"), &id("one"), &id("full")), Err(Error::IdTaken(_))));
        assert!(matches!(store.commit_delta(&key("no"), &id("two"), &id("full")), Err(Error::NoActive(_))));
        store.commit_delta(&key("k"), &id("two"), &id("full")).unwrap();
        assert_eq!(read(store, "two", "f").unwrap() + &read(store, "one", "g").unwrap(), "full1");
    });
}

#[test]
fn backends_of_whole_trees_have_no_deltas() {
    with_each(|store, _| {
        if store.form() == LayerForm::Changes {
            return;
        }
        snapshot(store, "full", None, |_| {});
        store.prepare(&key("k"), None).unwrap();
        assert!(matches!(store.commit_delta(&key("k"), &id("d"), &id("full")), Err(Error::WholeTrees)));
        assert_eq!(store.needs(&id("full")).unwrap().full, None);
        store.commit(&key("k"), &id("d")).unwrap();
    });
}

#[test]
fn one_full_layer_may_stand_below_several_deltas_of_a_stack() {
    with_stacking(|store, _| {
        layer(store, "full", &[("d/f", "full"), ("d/g", "full")]);
        delta(store, "one", None, "full", |tree| fill(tree, &[("d/f", "one")]));
        snapshot(store, "two", Some("one"), |tree| {
            fs::remove_file(at(tree, "d/g")).unwrap();
            fs::write(at(tree, "d/f"), "two").unwrap();
        });
        delta(store, "three", Some("two"), "full", |tree| fill(tree, &[("d/new", "three")]));
        let all = |name| ["d/f", "d/g", "d/new"].map(|path| read(store, name, path).unwrap_or_default());
        assert_eq!(all("one"), ["one", "full", ""]);
        assert_eq!(all("two"), ["two", "", ""]);
        assert_eq!(all("three"), ["full", "full", "three"]);
    });
}

#[test]
fn a_delta_whose_full_layer_is_gone_is_damaged_and_can_be_removed() {
    with_stacking(|store, root| {
        layer(store, "full", &[("f", "")]);
        delta(store, "d", None, "full", |_| {});
        fs::remove_dir_all(root.join("committed/full")).unwrap();
        assert!(matches!(store.open_view(&id("d")), Err(Error::Damaged { .. })));
        assert!(matches!(store.open_changes(&id("d")), Err(Error::Damaged { .. })));
        assert!(matches!(store.open_dirs(&id("d")), Err(Error::Damaged { .. })));
        store.remove(&id("d")).unwrap();
    });
}

#[test]
fn a_crash_before_a_delta_has_its_name_keeps_nothing_alive() {
    with_stacking(|store, root| {
        layer(store, "full", &[("f", "")]);
        store.prepare(&key("k"), None).unwrap();
        // All but the last step of a commit.
        let meta = root.join("active/k/meta");
        fs::write(meta, r#"{"version":3,"parent":null,"full":"full"}"#).unwrap();
        fs::create_dir(root.join("committed/full/sharers")).unwrap();
        fs::write(root.join("committed/full/sharers/never"), "").unwrap();
        store.remove_active(&key("k")).unwrap();
        store.remove(&id("full")).unwrap();
        store.empty_trash().unwrap();
        assert_eq!((left(root, "committed"), left(root, "shared"), left(root, "trash")), (0, 0, 0));
    });
}

#[test]
fn a_store_opened_again_knows_its_deltas() {
    with_stacking(|store, root| {
        layer(store, "full", &[("f", "full")]);
        delta(store, "d", None, "full", |tree| fs::write(at(tree, "g"), "delta").unwrap());
        let again = open(root, Backend::Auto).unwrap();
        assert_eq!(again.needs(&id("d")).unwrap().full, Some(id("full")));
        assert_eq!(read(&*again, "d", "f").unwrap() + &read(&*again, "d", "g").unwrap(), "fulldelta");
    });
}

#[test]
fn a_delta_takes_a_place_more_in_a_stack() {
    with_stacking(|store, _| {
        layer(store, "full", &[("f", "")]);
        layer(store, "s0", &[("0", "")]);
        for nth in 1..MAX_LOWER - 1 {
            let name = format!("s{nth}");
            store.prepare(&key("k"), Some(&id(&format!("s{}", nth - 1)))).unwrap();
            store.commit(&key("k"), &id(&name)).unwrap();
        }
        let top = format!("s{}", MAX_LOWER - 2);
        delta(store, "over", Some(&top), "full", |_| {});
        assert!(matches!(store.open_view(&id("over")), Err(Error::TooDeep { limit: MAX_LOWER })));
        let top = format!("s{}", MAX_LOWER - 3);
        delta(store, "just", Some(&top), "full", |_| {});
        let view = store.open_view(&id("just")).unwrap();
        assert!(at(&view, "f").exists() && at(&view, "0").exists());
        assert_eq!(fs::metadata(at(&view, "f")).unwrap().nlink(), 1);
        store.prepare(&key("k"), Some(&id("just"))).unwrap();
        // The one above has an upperdir, which does not count.
        drop(store.open_active(&key("k"), &OpenOptions::default()).unwrap());
    });
}
