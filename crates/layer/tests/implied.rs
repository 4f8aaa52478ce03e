//! Directories that a layer's paths go through without an entry: on an upperdir, on a copy of the tree
//! below, and by GNU tar, all the same. Needs root and overlayfs.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use kiln_layer::{
    Applied, ApplyOptions, Entry, EntryKind, Inherited, Limits, Reading, ScanOptions, Timestamp, Whiteouts,
    apply, inherit, scan,
};
use proptest::prelude::*;
use rustix::fs::{CWD, Timespec, Timestamps, XattrFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

/// What the tree below has at a path.
#[derive(Debug, Clone)]
enum Below {
    Dir(u32),
    File,
    Link(String),
}

/// What the layer has at a path.
#[derive(Debug, Clone, Copy)]
enum Above {
    Dir(u32),
    File,
    Link(&'static str),
    Whiteout,
    Opaque,
}

const DIRS: [&str; 9] = ["a", "b", "c", "a/b", "a/c", "b/a", "a/b/c", "c/a/b", "b/c"];
const TARGETS: [&str; 6] = ["/a", "/b/a", "a/b", "../c", "../../b", "/"];

fn dir(root: &Path, path: &str, mode: u32, uid: u32) {
    let path = root.join(path);
    if fs::create_dir(&path).is_ok() {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        lchown(&path, Some(uid), Some(uid)).unwrap();
        rustix::fs::setxattr(&path, "user.below", path.as_os_str().as_encoded_bytes(), XattrFlags::empty())
            .unwrap();
    }
}

/// Sets the times of all directories, which making what is in them has changed.
fn age(root: &Path) {
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            age(&path);
            let time = Timespec { tv_sec: 1_000_000 + path.as_os_str().len() as i64, tv_nsec: 0 };
            let times = Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(CWD, &path, &times, rustix::fs::AtFlags::empty()).unwrap();
        }
    }
}

fn make(root: &Path, tree: &[(&str, Below)]) {
    for (path, below) in tree {
        let at = root.join(path);
        // Never through a link: some lead out of here, for kiln to stay inside.
        let parent = Path::new(path).parent().expect("it has a name");
        if parent
            .ancestors()
            .any(|above| !fs::symlink_metadata(root.join(above)).is_ok_and(|stat| stat.is_dir()))
        {
            continue;
        }
        // What meets something that is there does nothing.
        match below {
            Below::Dir(mode) => dir(root, path, *mode, mode & 7),
            Below::File => drop(fs::OpenOptions::new().write(true).create_new(true).open(at)),
            Below::Link(target) => drop(symlink(target, at)),
        }
    }
    age(root);
}

fn member(path: &str, above: Above) -> Vec<u8> {
    let (parent, name) = path.rsplit_once('/').map_or(("", path), |(parent, name)| (parent, name));
    let at = |name: String| if parent.is_empty() { name } else { format!("{parent}/{name}") };
    let (path, kind, mode) = match above {
        Above::Dir(mode) => (format!("{path}/"), b'5', mode),
        Above::File => (path.to_owned(), b'0', 0o640),
        Above::Link(_) => (path.to_owned(), b'2', 0o777),
        Above::Whiteout => (at(format!(".wh.{name}")), b'0', 0),
        Above::Opaque => (format!("{path}/.wh..wh..opq"), b'0', 0),
    };
    let mut header = tar::Header::new_ustar();
    header.set_path(path).unwrap();
    header.as_old_mut().linkflag = [kind];
    if let Above::Link(target) = above {
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
    }
    header.set_mode(mode);
    header.set_uid(5);
    header.set_gid(6);
    header.set_mtime(77);
    header.set_size(0);
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn layer(members: &[(&str, Above)]) -> Vec<u8> {
    let mut tar: Vec<u8> = members.iter().flat_map(|(path, above)| member(path, *above)).collect();
    tar.extend([0; 1024]);
    tar
}

fn overlay(lower: &Path, upper: &Path, work: &Path) -> OwnedFd {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for (key, value) in [("lowerdir", lower), ("upperdir", upper), ("workdir", work)] {
        fsconfig_set_string(context.as_fd(), key, value).unwrap();
    }
    fsconfig_create(context.as_fd()).unwrap();
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap()
}

fn open(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

fn unpack(tar: &[u8], root: BorrowedFd<'_>, whiteouts: Whiteouts) -> Option<Applied> {
    let cancel = AtomicBool::new(false);
    let options = ApplyOptions {
        whiteouts,
        keep_owner: true,
        limits: Limits::default(),
        reading: Reading::Ahead,
        cancel: &cancel,
    };
    apply(tar, root, &options).ok()
}

/// All that counts, by path. The time of a file is what its entry says.
fn describe(tree: BorrowedFd<'_>) -> BTreeMap<Vec<u8>, Entry> {
    let cancel = AtomicBool::new(false);
    let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
    let entries = scan(tree, b"", &options).unwrap().into_iter().filter(|entry| !entry.path.is_empty());
    let described = entries.map(|mut entry| {
        entry.ctime = Timestamp::default();
        entry.xattrs.retain(|name, _| name.starts_with(b"user."));
        if let EntryKind::File { inode, nlink, .. } = &mut entry.kind {
            (*inode, *nlink) = ((0, 0), 0);
        }
        (entry.path.clone(), entry)
    });
    described.collect()
}

/// A place for the trees of one case.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Bench {
        Bench(tempfile::tempdir().unwrap())
    }

    fn dir(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    fn copy_of(&self, lower: &Path, name: &str) -> PathBuf {
        let copy = self.dir(name);
        kiln_layer::clone_tree(open(lower).as_fd(), open(&copy).as_fd(), &AtomicBool::new(false)).unwrap();
        copy
    }

    /// The layer as an upperdir on `lower`, the way a store does it, and whether it met a link.
    fn stacked(&self, lower: &Path, tar: &[u8]) -> Option<(BTreeMap<Vec<u8>, Entry>, Inherited)> {
        let (upper, work) = (self.dir("upper"), self.dir("work"));
        let applied = unpack(tar, open(&upper).as_fd(), Whiteouts::Overlay)?;
        let inherited = inherit(open(lower).as_fd(), open(&upper).as_fd(), &applied.implied).unwrap();
        let merged = match inherited {
            Inherited::Done => overlay(lower, &upper, &work),
            Inherited::Link => {
                let merged = overlay(lower, &self.dir("upper again"), &self.dir("work again"));
                unpack(tar, merged.as_fd(), Whiteouts::Remove)?;
                merged
            }
        };
        Some((describe(merged.as_fd()), inherited))
    }
}

fn can_mount() -> bool {
    let can = rustix::process::geteuid().is_root();
    if !can {
        eprintln!("SKIPPED ALOUD: mounting overlayfs needs root");
    }
    can
}

fn path() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(&DIRS[..])
}

/// `links`: what links lead to.
fn below(links: impl Strategy<Value = String>) -> impl Strategy<Value = (&'static str, Below)> {
    let kind = prop_oneof![
        5 => (0_u32..0o1000).prop_map(|mode| Below::Dir(mode | 0o700)),
        1 => Just(Below::File),
        2 => links.prop_map(Below::Link),
    ];
    (path(), kind)
}

fn any_link() -> impl Strategy<Value = String> {
    proptest::sample::select(&TARGETS[..]).prop_map(str::to_owned)
}

/// Links inside the tree only: GNU tar follows all.
fn below_inside() -> impl Strategy<Value = (&'static str, Below)> {
    below(path().prop_map(str::to_owned)).prop_map(|(path, below)| match below {
        Below::Link(target) => (path, Below::Link("../".repeat(path.matches('/').count()) + &target)),
        other => (path, other),
    })
}

fn above() -> impl Strategy<Value = (&'static str, Above)> {
    let kind = prop_oneof![
        2 => proptest::sample::select(&[0o755_u32, 0o700, 0o750][..]).prop_map(Above::Dir),
        9 => Just(Above::File),
        1 => proptest::sample::select(&TARGETS[..]).prop_map(Above::Link),
        1 => Just(Above::Whiteout),
        1 => Just(Above::Opaque),
    ];
    (path(), kind)
}

/// Names no two of which are the same: the order of entries for one path is another matter.
fn distinct<T>(entries: Vec<(&'static str, T)>) -> Vec<(&'static str, T)> {
    let mut seen = HashSet::new();
    entries.into_iter().filter(|(path, _)| seen.insert(*path)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the tree below has in the place of what the layer implies.
    #[test]
    fn an_upperdir_shows_what_unpacking_on_a_copy_makes(
        tree in proptest::collection::vec(below(any_link()), 0..12),
        members in proptest::collection::vec(above(), 1..6),
    ) {
        if can_mount() {
            let bench = Bench::new();
            let lower = bench.dir("lower");
            make(&lower, &tree);
            let tar = layer(&distinct(members));
            let copy = bench.copy_of(&lower, "copy");
            // What does not unpack (a whiteout's directory may be a file) is not compared.
            if unpack(&tar, open(&copy).as_fd(), Whiteouts::Remove).is_some()
                && let Some((mut stacked, _)) = bench.stacked(&lower, &tar)
            {
                let mut copied = describe(open(&copy).as_fd());
                // On a tree of its own a whiteout of nothing makes no directory to stand in, nor does
                // it hide a file in the place of that.
                let for_nothing: Vec<Vec<u8>> = stacked
                    .iter()
                    .filter(|(_, entry)| entry.kind == EntryKind::Dir && entry.mtime == Timestamp::default())
                    .filter(|(path, _)| copied.get(*path).is_none_or(|entry| entry.kind != EntryKind::Dir))
                    .map(|(path, _)| path.clone())
                    .collect();
                stacked.retain(|path, _| !for_nothing.contains(path));
                copied.retain(|path, _| !for_nothing.contains(path));
                prop_assert_eq!(stacked, copied);
            }
        }
    }

    /// GNU tar knows no whiteouts, and leaves the times of directories to the kernel.
    #[test]
    fn an_upperdir_shows_what_gnu_tar_makes(
        tree in proptest::collection::vec(below_inside(), 0..12),
        members in proptest::collection::vec(path(), 1..5),
    ) {
        if can_mount() {
            let bench = Bench::new();
            let lower = bench.dir("lower");
            make(&lower, &tree);
            let names: Vec<String> = members.iter().enumerate().map(|(nth, at)| format!("{at}/new-{nth}")).collect();
            let members: Vec<(&str, Above)> = names.iter().map(|name| (name.as_str(), Above::File)).collect();
            let tar = layer(&members);
            let copy = bench.copy_of(&lower, "copy");
            if gnu_tar(&tar, &copy) {
                let (mut stacked, _) = bench.stacked(&lower, &tar).expect("it has nothing but files");
                let mut expected = describe(open(&copy).as_fd());
                for entry in stacked.values_mut().chain(expected.values_mut()) {
                    if entry.kind == EntryKind::Dir {
                        entry.mtime = Timestamp::default();
                    }
                }
                prop_assert_eq!(stacked, expected);
            }
        }
    }
}

/// Whether GNU tar could do it: it makes nothing in the place of files and dangling links.
fn gnu_tar(tar: &[u8], root: &Path) -> bool {
    use std::io::Write;
    let args = ["-x", "--keep-directory-symlink", "--same-owner", "--no-same-permissions", "-f", "-", "-C"];
    let mut child = Command::new("sh")
        .args(["-c", "umask 022; exec tar \"$@\"", "sh"])
        .args(args)
        .arg(root)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(tar).unwrap();
    child.wait().unwrap().success()
}

/// Mode, owner, time, and whether it has attributes.
type Shown = (u32, u32, i64, bool);

fn stat(tree: &BTreeMap<Vec<u8>, Entry>, path: &str) -> Shown {
    let entry = &tree[path.as_bytes()];
    (entry.mode & 0o7777, entry.uid, entry.mtime.secs, entry.xattrs.contains_key(&b"user.below"[..]))
}

/// What the lower tree below makes of these paths.
#[track_caller]
fn check(members: &[(&str, Above)], expected: &[(&str, Shown)], inherited: Inherited) {
    if !can_mount() {
        return;
    }
    let bench = Bench::new();
    let lower = bench.dir("lower");
    make(
        &lower,
        &[
            ("tmp", Below::Dir(0o1777)),
            ("tmp/sub", Below::Dir(0o2775)),
            ("usr", Below::Dir(0o711)),
            ("usr/lib", Below::Dir(0o751)),
            ("lib", Below::Link("usr/lib".to_owned())),
            ("dangling", Below::Link("/new/place".to_owned())),
            ("file", Below::File),
        ],
    );
    let time = |path: &str| fs::symlink_metadata(lower.join(path)).unwrap().mtime();
    let (stacked, met) = bench.stacked(&lower, &layer(members)).unwrap();
    assert_eq!(met, inherited);
    let copy = bench.copy_of(&lower, "copy");
    unpack(&layer(members), open(&copy).as_fd(), Whiteouts::Remove).unwrap();
    for (what, tree) in [("as an upperdir", stacked), ("on a copy", describe(open(&copy).as_fd()))] {
        for (path, (mode, uid, secs, attributes)) in expected {
            let secs = if *secs == -1 { time(path) } else { *secs };
            assert_eq!(stat(&tree, path), (*mode, *uid, secs, *attributes), "{path} {what}");
        }
    }
}

/// Stands for the time that the lower tree has.
const LOWER: i64 = -1;

#[test]
fn an_implied_directory_is_as_the_one_below() {
    check(
        &[("tmp/x", Above::File), ("tmp/sub/y", Above::File), ("new/er/z", Above::File)],
        &[
            ("tmp", (0o1777, 7, LOWER, true)),
            ("tmp/sub", (0o2775, 5, LOWER, true)),
            ("new", (0o755, 0, 0, false)),
            ("new/er", (0o755, 0, 0, false)),
        ],
        Inherited::Done,
    );
}

#[test]
fn a_directory_with_an_entry_is_as_that_says_wherever_it_stands() {
    for members in [
        [("tmp", Above::Dir(0o750)), ("tmp/x", Above::File)],
        [("tmp/x", Above::File), ("tmp", Above::Dir(0o750))],
    ] {
        check(&members, &[("tmp", (0o750, 5, 77, false))], Inherited::Done);
    }
}

#[test]
fn what_is_hidden_is_not_inherited() {
    let fresh = (0o755, 0, 0, false);
    for members in [
        [("tmp", Above::Whiteout), ("tmp/sub/y", Above::File)],
        [("tmp/sub/y", Above::File), ("tmp", Above::Whiteout)],
    ] {
        check(&members, &[("tmp", fresh), ("tmp/sub", fresh)], Inherited::Done);
    }
    for members in [
        [("tmp", Above::Opaque), ("tmp/sub/y", Above::File)],
        [("tmp/sub/y", Above::File), ("tmp", Above::Opaque)],
    ] {
        check(&members, &[("tmp", (0o1777, 7, LOWER, true)), ("tmp/sub", fresh)], Inherited::Done);
    }
    check(&[("file/x", Above::File)], &[("file", fresh)], Inherited::Done);
    // A link that is hidden is not followed.
    check(&[("lib", Above::Whiteout), ("lib/x", Above::File)], &[("lib", fresh)], Inherited::Done);
    let followed = [("usr/lib/x", (0o640, 5, 77, false))];
    check(&[("lib/x", Above::File), ("lib", Above::Whiteout)], &followed, Inherited::Link);
    check(&[("lib/x", Above::File), ("lib", Above::Dir(0o700))], &followed, Inherited::Link);
}

#[test]
fn a_link_below_is_followed_and_stays() {
    check(
        &[("lib/x", Above::File)],
        &[
            ("lib", (0o777, 0, LOWER, false)),
            ("usr", (0o711, 1, LOWER, true)),
            ("usr/lib", (0o751, 1, LOWER, true)),
            ("usr/lib/x", (0o640, 5, 77, false)),
        ],
        Inherited::Link,
    );
    // One of the layer itself leads to one below.
    check(
        &[("l", Above::Link("/lib")), ("l/x", Above::File)],
        &[("usr/lib/x", (0o640, 5, 77, false)), ("usr/lib", (0o751, 1, LOWER, true))],
        Inherited::Link,
    );
    check(
        &[("dangling/x", Above::File)],
        &[("new", (0o755, 0, 0, false)), ("new/place/x", (0o640, 5, 77, false))],
        Inherited::Link,
    );
}
