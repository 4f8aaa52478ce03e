use std::fs::{self, File, create_dir_all, write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use super::*;

/// Names that end in a slash are directories, `a -> b` is a link.
fn tree(names: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in names {
        let (name, target) = name.split_once(" -> ").map_or((*name, None), |(n, t)| (n, Some(t)));
        let path = dir.path().join(name);
        create_dir_all(path.parent().unwrap()).unwrap();
        match target {
            Some(target) => symlink(target, path).unwrap(),
            None if name.ends_with('/') => create_dir_all(path).unwrap(),
            None => write(path, name).unwrap(),
        }
    }
    dir
}

fn copy(sources: &[&str]) -> llb::Copy {
    llb::Copy {
        from: llb::InputIndex(0),
        sources: sources.iter().map(|&source| source.to_owned()).collect(),
        destination: "/x".to_owned(),
        destination_is_dir: true,
        owner: llb::Owner::Root,
        mode: None,
        parents: false,
        exclude: Vec::new(),
        unpack: llb::Unpack::Never,
    }
}

fn parents(sources: &[&str]) -> llb::Copy {
    llb::Copy { parents: true, ..copy(sources) }
}

fn without(exclude: &[&str], copy: llb::Copy) -> llb::Copy {
    llb::Copy { exclude: exclude.iter().map(|&pattern| pattern.to_owned()).collect(), ..copy }
}

/// Selects from a context with the rules `ignore`; `None`: from a stage.
fn run(dir: &Path, ignore: Option<&str>, copy: &llb::Copy) -> Result<Selection, OpError> {
    let ignore = ignore.map(|text| Patterns::parse(text).unwrap());
    let root = File::open(dir).unwrap();
    let cancel = AtomicBool::new(false);
    select(&Place { root: root.as_fd(), ignore: ignore.as_ref(), digests: None, cancel: &cancel }, copy)
}

/// What would be made below the destination; directories with a slash.
fn shown(selection: &Selection) -> Vec<String> {
    let mut shown = Vec::new();
    for found in &selection.matches {
        for entry in &found.entries {
            let below = entry.path.strip_prefix(found.path.as_slice()).unwrap();
            let below = String::from_utf8_lossy(below.strip_prefix(b"/").unwrap_or(below)).into_owned();
            shown.push(match (&entry.kind, found.is_dir()) {
                (EntryKind::Dir, true) if below.is_empty() => continue,
                (EntryKind::Dir, true) => below + "/",
                (_, true) => below,
                (_, false) => String::from_utf8_lossy(found.file_name()).into_owned(),
            });
        }
    }
    shown
}

#[track_caller]
fn check(names: &[&str], ignore: Option<&str>, copy: &llb::Copy, expected: &[&str]) {
    let dir = tree(names);
    assert_eq!(shown(&run(dir.path(), ignore, copy).unwrap()), expected, "{copy:?}");
}

#[track_caller]
fn check_missing(
    names: &[&str],
    ignore: Option<&str>,
    copy: &llb::Copy,
    line: Option<usize>,
    near: Option<&str>,
) {
    match run(tree(names).path(), ignore, copy) {
        Err(OpError::NoSource { ignored_by, similar, .. }) => {
            let ignored_by = ignored_by.map(|rule| rule.line);
            assert_eq!((ignored_by, similar.as_deref()), (line, near), "{copy:?}");
        }
        other => panic!("{copy:?}: {other:?}"),
    }
}

const APP: &[&str] = &["app/main.rs", "app/sub/deep/x.txt", "app/sub/y.txt", "app/z.txt", "other/z.txt"];

#[test]
fn a_directory_means_its_contents_and_a_file_its_name() {
    check(APP, None, &copy(&["app/sub"]), &["deep/", "deep/x.txt", "y.txt"]);
    check(APP, None, &copy(&["app/main.rs", "other/z.txt"]), &["main.rs", "z.txt"]);
    check(
        APP,
        None,
        &copy(&["."]),
        &[
            "app/",
            "app/main.rs",
            "app/sub/",
            "app/sub/deep/",
            "app/sub/deep/x.txt",
            "app/sub/y.txt",
            "app/z.txt",
            "other/",
            "other/z.txt",
        ],
    );
}

#[test]
fn wildcards_stand_in_any_component_and_do_not_cross_slashes() {
    check(APP, None, &copy(&["*/z.txt"]), &["z.txt", "z.txt"]);
    check(APP, None, &copy(&["app/*"]), &["main.rs", "deep/", "deep/x.txt", "y.txt", "z.txt"]);
    check(APP, None, &copy(&["app/[a-m]*", "none*"]), &["main.rs"]);
    check_missing(APP, None, &copy(&["*.txt"]), None, None);
    assert!(matches!(run(tree(APP).path(), None, &copy(&["[a"])), Err(OpError::Pattern { .. })));
}

#[test]
fn links_lead_inside_the_root_and_wildcards_do_not_look_behind_them() {
    let names = &["real/x", "link -> /real", "file -> ../../real/x", "out -> /etc/passwd", "d/up -> ../real"];
    check(names, None, &copy(&["link"]), &["x"]);
    check(names, None, &copy(&["link/x"]), &["x"]);
    check(names, None, &copy(&["file"]), &["file"]);
    check(names, None, &copy(&["d/up/x"]), &["x"]);
    check(names, None, &copy(&["*/x"]), &["x"]);
    check(names, None, &copy(&["d"]), &["up"]);
    assert!(run(tree(names).path(), None, &copy(&["out"])).is_err());
}

#[test]
fn exclude_leaves_out_what_is_below_a_directory_source() {
    check(
        APP,
        None,
        &without(&["*.txt"], copy(&["app"])),
        &["main.rs", "sub/", "sub/deep/", "sub/deep/x.txt", "sub/y.txt"],
    );
    check(APP, None, &without(&["**/*.txt"], copy(&["app"])), &["main.rs", "sub/", "sub/deep/"]);
    check(
        APP,
        None,
        &without(&["app"], copy(&["app/"])),
        &["main.rs", "sub/", "sub/deep/", "sub/deep/x.txt", "sub/y.txt", "z.txt"],
    );
    check(APP, None, &without(&["sub", "#x"], copy(&["app"])), &["main.rs", "z.txt"]);
    check(
        APP,
        None,
        &without(&["sub", "!sub/deep"], copy(&["app"])),
        &["main.rs", "sub/", "sub/deep/", "sub/deep/x.txt", "z.txt"],
    );
    let dir = tree(APP);
    let selection = run(dir.path(), None, &without(&["sub", "!sub/deep"], copy(&["app"]))).unwrap();
    assert_eq!(selection.matches[0].passed, HashSet::from([b"app/sub".to_vec()]));
}

#[test]
fn exclude_leaves_out_files_that_are_sources_themselves() {
    check(APP, None, &without(&["*.txt"], copy(&["app/*"])), &["main.rs", "deep/", "deep/x.txt"]);
    check(APP, None, &without(&["sub"], copy(&["app/*"])), &["main.rs", "z.txt"]);
    check(APP, None, &without(&["z.txt"], copy(&["app/z.txt"])), &[""; 0]);
    let bad = without(&["[a"], copy(&["app"]));
    assert!(matches!(run(tree(APP).path(), None, &bad), Err(OpError::Pattern { .. })));
}

#[test]
fn parents_keep_directories_below_the_pivot() {
    let sub = ["app/", "app/sub/", "app/sub/deep/", "app/sub/deep/x.txt", "app/sub/y.txt"];
    check(APP, None, &parents(&["app/sub"]), &sub);
    check(APP, None, &parents(&["app/./sub/y.txt"]), &["sub/", "sub/y.txt"]);
    check(
        APP,
        None,
        &parents(&["app/*.txt", "other/z.txt"]),
        &["app/", "app/z.txt", "other/", "other/z.txt"],
    );
    check(
        APP,
        None,
        &parents(&["**/*.txt"]),
        &[
            "app/",
            "app/sub/",
            "app/sub/deep/",
            "app/sub/deep/x.txt",
            "app/sub/y.txt",
            "app/z.txt",
            "other/",
            "other/z.txt",
        ],
    );
    check(APP, None, &parents(&["a*/./**/deep"]), &["sub/", "sub/deep/", "sub/deep/x.txt"]);
    check(APP, None, &parents(&["app/sub/./"]), &["deep/", "deep/x.txt", "y.txt"]);
    check(APP, None, &without(&["app/sub"], parents(&["app"])), &["app/", "app/main.rs", "app/z.txt"]);
}

#[test]
fn parents_pass_directories_that_no_pattern_means() {
    let dir = tree(APP);
    let selection = run(dir.path(), None, &parents(&["app/sub/deep"])).unwrap();
    let passed = &selection.matches[0].passed;
    assert!(passed.contains(&b"app"[..]) && passed.contains(&b"app/sub"[..]), "{passed:?}");
    assert!(!passed.contains(&b"app/sub/deep"[..]), "{passed:?}");
}

#[test]
fn a_missing_source_names_the_rule_or_a_near_name() {
    check_missing(APP, None, &copy(&["app/mian.rs"]), None, Some("app/main.rs"));
    check_missing(APP, Some(""), &copy(&["ap/main.rs"]), None, Some("app/main.rs"));
    check_missing(APP, Some("x\n*.rs\napp/*.rs"), &copy(&["app/main.rs"]), Some(3), None);
    check_missing(APP, Some("app"), &copy(&["app/*.rs"]), Some(1), None);
    check_missing(APP, Some("**/z.txt"), &copy(&["*/z.txt"]), Some(1), None);
    check_missing(APP, Some("app/sub"), &parents(&["app/sub/y.txt"]), Some(1), None);
    check_missing(APP, Some("**/y.txt"), &parents(&["app/./sub/y.txt"]), Some(1), None);
    check_missing(APP, Some("**/*.rs"), &parents(&["**/*.rs"]), Some(1), None);
    check_missing(APP, None, &parents(&["app/./sbu/y.txt"]), None, Some("app/sub/y.txt"));
    check_missing(APP, None, &copy(&["z.txt", "app/*"]), None, None);
    check_missing(APP, Some("other"), &copy(&["othre/z.txt"]), None, None);
}

#[test]
fn an_ignored_directory_shows_only_what_a_rule_takes_back() {
    check(
        APP,
        Some("app\n!app/sub/deep"),
        &copy(&["."]),
        &["app/", "app/sub/", "app/sub/deep/", "app/sub/deep/x.txt", "other/", "other/z.txt"],
    );
    check(APP, Some("app\n!app/sub/y.txt"), &copy(&["app"]), &["sub/", "sub/y.txt"]);
    check_missing(APP, Some("app\n!app/none"), &copy(&["app"]), Some(1), None);
}

#[test]
fn names_that_are_no_text_are_kept() {
    let dir = tree(&["a/x"]);
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    write(dir.path().join("a").join(odd), "").unwrap();
    let selection = run(dir.path(), Some("*.rs"), &copy(&["a/*"])).unwrap();
    let names: Vec<&[u8]> = selection.matches.iter().map(Match::file_name).collect();
    assert_eq!(names, [&b"x"[..], b"\xff\xfe"]);
}

#[test]
fn what_is_no_file_is_left_out_of_a_context_only() {
    let dir = tree(&["d/x"]);
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("d/socket")).unwrap());
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
    rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("d/pipe"), kind, mode, 0).unwrap();
    let context = run(dir.path(), Some(""), &copy(&["d"])).unwrap();
    assert_eq!(shown(&context), ["x"]);
    assert_eq!(context.skipped, [b"d/pipe", &b"d/socket"[..]]);
    let stage = run(dir.path(), None, &copy(&["d"])).unwrap();
    assert_eq!(shown(&stage), ["pipe", "x"]);
    assert_eq!(stage.skipped, [b""; 0]);
    let alone = run(dir.path(), Some(""), &copy(&["d/pipe"])).unwrap();
    assert!(alone.matches.is_empty() && alone.skipped.len() == 1);
}

#[test]
fn mount_points_inside_a_context_are_crossed() {
    let selection = run(Path::new("/"), Some(""), &copy(&["proc/filesystems"])).unwrap();
    assert_eq!(shown(&selection), ["filesystems"]);
}

#[test]
fn of_a_contexts_attributes_only_capabilities_are_taken() {
    let dir = tree(&["x"]);
    let set = |name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(dir.path().join("x"), name, value, rustix::fs::XattrFlags::empty())
    };
    if set("security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err() {
        eprintln!("skipped: setting capabilities needs root");
        return;
    }
    set("user.mark", b"1").unwrap();
    let names = |ignore| -> Vec<Vec<u8>> {
        let selection = run(dir.path(), ignore, &copy(&["x"])).unwrap();
        selection.matches[0].entries[0].xattrs.keys().cloned().collect()
    };
    assert_eq!(names(Some("")), [b"security.capability".to_vec()]);
    assert_eq!(names(None), [b"security.capability".to_vec(), b"user.mark".to_vec()]);
}

/// The digest of `copy` in a tree of its own, after `change` was done to it.
fn digest(names: &[&str], copy: &llb::Copy, change: impl FnOnce(&Path)) -> Digest {
    let dir = tree(names);
    change(dir.path());
    run(dir.path(), Some("ignored"), copy).unwrap().digest(true)
}

#[test]
fn a_digest_covers_what_would_be_made_and_nothing_else() {
    let plain = copy(&["app"]);
    let (pivot, excluding) = (parents(&["app/./sub"]), without(&["sub"], copy(&["app"])));
    let wild = copy(&["app/*.txt"]);
    for copy in [&plain, &pivot, &excluding, &wild] {
        let base = digest(APP, copy, |_| {});
        let same = |what: &str, change: fn(&Path)| {
            assert_eq!(digest(APP, copy, change), base, "{what} counts for {copy:?}");
        };
        same("time", |dir| {
            for path in ["app/z.txt", "app/sub/y.txt", "app/sub"] {
                let file = File::open(dir.join(path)).unwrap();
                file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
            }
        });
        same("another directory", |dir| write(dir.join("other/z.txt"), "changed").unwrap());
        same("the top directory's mode", |dir| {
            fs::set_permissions(dir.join("app"), fs::Permissions::from_mode(0o700)).unwrap();
        });
        same("a socket", |dir| {
            drop(std::os::unix::net::UnixListener::bind(dir.join("app/s.txt")).unwrap());
        });
    }
    type Change = fn(&Path);
    let file: Change = |dir| write(dir.join("app/z.txt"), "changed").unwrap();
    let name: Change = |dir| fs::rename(dir.join("app/z.txt"), dir.join("app/zz.txt")).unwrap();
    let deep: Change = |dir| write(dir.join("app/sub/deep/x.txt"), "changed").unwrap();
    let mode: Change =
        |dir| fs::set_permissions(dir.join("app/sub"), fs::Permissions::from_mode(0o711)).unwrap();
    for (copy, change, counts) in [
        (&plain, file, true),
        (&plain, name, true),
        (&plain, deep, true),
        (&plain, mode, true),
        (&pivot, file, false),
        (&pivot, deep, true),
        (&pivot, mode, true),
        (&excluding, file, true),
        (&excluding, deep, false),
        (&excluding, mode, false),
        (&wild, file, true),
        (&wild, name, true),
        (&wild, deep, false),
    ] {
        let changed = digest(APP, copy, change) != digest(APP, copy, |_| {});
        assert_eq!(changed, counts, "{copy:?}");
    }
    // The pivot decides what the names begin with.
    let moved = |copy: llb::Copy| digest(&["a/b/x"], &copy, |_| {});
    assert_ne!(moved(parents(&["a/./b"])), moved(parents(&["a/b"])));
    // A directory's own name does not get into the image.
    let named = |name: &str, source: &str| digest(&[name], &copy(&[source]), |_| {});
    assert_eq!(
        digest(&["one/"], &copy(&["one"]), |dir| write(dir.join("one/x"), "").unwrap()),
        digest(&["two/"], &copy(&["two"]), |dir| write(dir.join("two/x"), "").unwrap()),
    );
    assert_ne!(named("a", "a"), named("b", "b"));
}

/// Whoever changes a context while it is read: asked about each file between its `stat` and the next one's.
struct Meddler<'m>(&'m (dyn Fn(u64) + Sync));

impl StatCache for Meddler<'_> {
    fn get(&self, stat: &kiln_layer::FileStat) -> Option<kiln_layer::KnownFile> {
        (self.0)(stat.size);
        None
    }

    fn put(&self, _: &kiln_layer::FileStat, _: kiln_layer::KnownFile) {}
}

fn select_while(dir: &Path, meddle: &(dyn Fn(u64) + Sync)) -> Result<Selection, OpError> {
    let (root, ignore, cancel) =
        (File::open(dir).unwrap(), Patterns::parse("").unwrap(), AtomicBool::new(false));
    let meddler = Meddler(meddle);
    let place = Place { root: root.as_fd(), ignore: Some(&ignore), digests: Some(&meddler), cancel: &cancel };
    select(&place, &copy(&["."]))
}

#[test]
fn what_changes_while_a_context_is_read_is_read_again() {
    let dir = tree(&["a", "b/", "temporary"]);
    let at = |name: &str| dir.path().join(name);
    let selection = select_while(dir.path(), &|_| drop(fs::remove_file(at("temporary")))).unwrap();
    assert_eq!(shown(&selection), ["a", "b/"]);
    // A directory that is a file now, and one that is a link.
    let selection = select_while(dir.path(), &|_| {
        let _ = fs::remove_dir(at("b")).and_then(|()| write(at("b"), "bbb"));
    });
    assert_eq!(shown(&selection.unwrap()), ["a", "b"]);
    let found = |selection: &Selection| match &selection.matches[0].entries[2].kind {
        EntryKind::File { content, .. } => *content,
        other => panic!("{other:?}"),
    };
    let again = select_while(dir.path(), &|_| ()).unwrap();
    assert_eq!(found(&again), Some(*blake3::hash(b"bbb").as_bytes()));
}

#[test]
fn a_context_that_never_rests_is_named() {
    let dir = tree(&["a"]);
    let at = |nth: usize| dir.path().join(format!("z{nth}"));
    let nth = AtomicUsize::new(0);
    write(at(0), "").unwrap();
    // The one that is listed is gone when it is looked at, and another one is there.
    let error = select_while(dir.path(), &|_| {
        let last = nth.fetch_add(1, Ordering::Relaxed);
        fs::remove_file(at(last)).unwrap();
        write(at(last + 1), "").unwrap();
    })
    .unwrap_err();
    let OpError::Scan(ScanError::ChangedWhileReading { path }) = &error else { panic!("{error:?}") };
    let nth = nth.into_inner();
    assert_eq!((path.to_string(), nth), (format!("\"z{}\"", ATTEMPTS - 1), ATTEMPTS));
}

#[test]
fn a_directory_that_is_mounted_counts_with_its_mode() {
    let dir = tree(&["d/file"]);
    let digest = |whole: bool| {
        let selection = run(dir.path(), Some(""), &copy(&["d"])).unwrap();
        Selection { whole, ..selection }.digest(true)
    };
    let before = (digest(false), digest(true));
    fs::set_permissions(dir.path().join("d"), fs::Permissions::from_mode(0o710)).unwrap();
    assert_eq!(digest(false), before.0);
    assert_ne!(digest(true), before.1);
}
