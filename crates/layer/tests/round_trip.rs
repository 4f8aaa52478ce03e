//! Diff, then apply, is the identity: whatever happens to a tree on an overlay mount, its layer makes
//! the lower tree into the merged one. Needs root and overlayfs. Of a tree that stands alone anybody can see it, and
//! who is not root sees it without other owners, devices and capabilities: those actions fail.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use kiln_layer::{
    ApplyOptions, DiffOptions, Entry, EntryKind, Limits, Reading, ScanOptions, Timestamp, TreeForm,
    Whiteouts, apply, diff, diff_trees, scan,
};
use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

/// One thing that a RUN may do; what fails, fails there too.
#[derive(Debug, Clone)]
enum Action {
    Write(Name, u16),
    Append(Name, u8),
    Truncate(Name, u16),
    Mkdir(Name),
    Rename(Name, Name),
    Exchange(Name, Name),
    Link(Name, Name),
    Symlink(Name, u8),
    Fifo(Name),
    Device(Name),
    Chmod(Name, u16),
    Chown(Name, u8),
    Xattr(Name, u8),
    Capability(Name),
    Touch(Name),
    /// Touched by nobody, and yet copied up.
    ChmodToTheSame(Name),
    Unlink(Name),
    Rmdir(Name),
    RemoveAll(Name),
    MakeAnew(Name),
}

/// A path of up to three names out of few, so that actions meet.
#[derive(Debug, Clone)]
struct Name(Vec<u8>);

const NAMES: [&[u8]; 5] = [b"a", b"b", b"cc", b"not\xffutf8\n", b"long-name-of-a-file"];
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn name() -> impl Strategy<Value = Name> {
    proptest::collection::vec(0..NAMES.len(), 1..4).prop_map(|parts| {
        let parts: Vec<&[u8]> = parts.into_iter().map(|part| NAMES[part]).collect();
        Name(parts.join(&b'/'))
    })
}

fn action() -> impl Strategy<Value = Action> {
    use Action::*;
    prop_oneof![
        4 => (name(), any::<u16>()).prop_map(|(n, size)| Write(n, size)),
        1 => (name(), any::<u8>()).prop_map(|(n, byte)| Append(n, byte)),
        1 => (name(), any::<u16>()).prop_map(|(n, size)| Truncate(n, size)),
        6 => name().prop_map(Mkdir),
        4 => (name(), name()).prop_map(|(a, b)| Rename(a, b)),
        1 => (name(), name()).prop_map(|(a, b)| Exchange(a, b)),
        3 => (name(), name()).prop_map(|(a, b)| Link(a, b)),
        1 => (name(), any::<u8>()).prop_map(|(n, target)| Symlink(n, target)),
        1 => name().prop_map(Fifo),
        1 => name().prop_map(Device),
        1 => (name(), 0..0o7777_u16).prop_map(|(n, mode)| Chmod(n, mode)),
        1 => (name(), any::<u8>()).prop_map(|(n, uid)| Chown(n, uid)),
        1 => (name(), any::<u8>()).prop_map(|(n, value)| Xattr(n, value)),
        1 => name().prop_map(Capability),
        1 => name().prop_map(Touch),
        1 => name().prop_map(ChmodToTheSame),
        2 => name().prop_map(Unlink),
        2 => name().prop_map(Rmdir),
        1 => name().prop_map(RemoveAll),
        2 => name().prop_map(MakeAnew),
    ]
}

fn act(root: &Path, action: &Action) {
    let at = |name: &Name| root.join(OsStr::from_bytes(&name.0));
    let done = match action {
        Action::Write(n, size) => {
            open_to_write(fs::OpenOptions::new().write(true).create(true).truncate(true), at(n))
                .and_then(|mut file| file.write_all(&vec![(size % 251) as u8; usize::from(*size)]))
        }
        Action::Append(n, byte) => open_to_write(fs::OpenOptions::new().append(true), at(n))
            .and_then(|mut file| file.write_all(&[*byte])),
        Action::Truncate(n, size) => open_to_write(fs::OpenOptions::new().write(true), at(n))
            .and_then(|file| file.set_len((*size).into())),
        Action::Mkdir(n) => fs::create_dir(at(n)),
        Action::Rename(a, b) => fs::rename(at(a), at(b)),
        Action::Exchange(a, b) => {
            rustix::fs::renameat_with(CWD, at(a), CWD, at(b), RenameFlags::EXCHANGE).map_err(Into::into)
        }
        Action::Link(a, b) => fs::hard_link(at(a), at(b)),
        Action::Symlink(n, target) => symlink(format!("target/{target}"), at(n)),
        Action::Fifo(n) => rustix::fs::mknodat(CWD, at(n), FileType::Fifo, Mode::RUSR, 0).map_err(Into::into),
        Action::Device(n) => {
            let null = rustix::fs::makedev(1, 3);
            rustix::fs::mknodat(CWD, at(n), FileType::CharacterDevice, Mode::RUSR, null).map_err(Into::into)
        }
        Action::Chmod(n, mode) if !at(n).is_symlink() => {
            // Others than root could not read it again.
            let own = if rustix::process::geteuid().is_root() { 0 } else { 0o700 };
            fs::set_permissions(at(n), fs::Permissions::from_mode(u32::from(*mode) | own))
        }
        Action::Chmod(..) => Ok(()),
        Action::Chown(n, uid) => lchown(at(n), Some((*uid).into()), Some(u32::from(*uid) * 3)),
        Action::Xattr(n, value) if at(n).is_file() || at(n).is_dir() => {
            rustix::fs::lsetxattr(at(n), "user.test", &[*value, b'\n', 0], XattrFlags::empty())
                .map_err(Into::into)
        }
        Action::Xattr(..) => Ok(()),
        Action::Capability(n) if at(n).is_file() && !at(n).is_symlink() => {
            rustix::fs::lsetxattr(at(n), "security.capability", &CAPABILITY, XattrFlags::empty())
                .map_err(Into::into)
        }
        Action::Capability(_) => Ok(()),
        Action::Touch(n) => {
            let time = Timespec { tv_sec: -5, tv_nsec: 123_456_789 };
            let times = Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(CWD, at(n), &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
                .map_err(Into::into)
        }
        Action::ChmodToTheSame(n) if !at(n).is_symlink() => {
            fs::metadata(at(n)).and_then(|metadata| fs::set_permissions(at(n), metadata.permissions()))
        }
        Action::ChmodToTheSame(_) => Ok(()),
        Action::Unlink(n) => fs::remove_file(at(n)),
        Action::Rmdir(n) => fs::remove_dir(at(n)),
        Action::RemoveAll(n) => fs::remove_dir_all(at(n)),
        Action::MakeAnew(n) => fs::remove_dir_all(at(n)).and_then(|()| fs::create_dir(at(n))),
    };
    // Most actions meet nothing to act on, which is as good.
    let _ = done;
}

/// Opens to write, without waiting for somebody to read a pipe.
fn open_to_write(options: &mut fs::OpenOptions, path: PathBuf) -> std::io::Result<File> {
    let flag = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).expect("one bit");
    options.custom_flags(flag).open(path)
}

/// A detached overlay mount, as the snapshotter makes them.
fn overlay(lower: &Path, upper: &Path, work: &Path) -> OwnedFd {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for (key, value) in [("lowerdir", lower), ("upperdir", upper), ("workdir", work)] {
        fsconfig_set_string(context.as_fd(), key, value).unwrap();
    }
    for key in ["redirect_dir", "metacopy", "index"] {
        fsconfig_set_string(context.as_fd(), key, "off").unwrap();
    }
    fsconfig_create(context.as_fd()).unwrap();
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap()
}

fn open(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

/// All that a layer keeps. Hard links are told by the order in which their files appear.
fn describe(tree: BorrowedFd<'_>) -> Vec<Entry> {
    let cancel = AtomicBool::new(false);
    let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
    let mut entries = scan(tree, b"", &options).unwrap();
    let mut numbers = HashMap::new();
    entries.retain(|entry| !entry.path.is_empty());
    for entry in &mut entries {
        entry.ctime = Timestamp::default();
        entry.xattrs.retain(|name, _| !name.starts_with(b"trusted.overlay") && name != b"security.selinux");
        if let EntryKind::File { inode, nlink, .. } = &mut entry.kind {
            // A lower file that lost a name to the upper layer still counts it.
            *nlink = 0;
            let next = numbers.len() as u64;
            *inode = (0, *numbers.entry(*inode).or_insert(next));
        }
    }
    entries
}

fn layer_of(upper: BorrowedFd<'_>, lower: Option<BorrowedFd<'_>>) -> Vec<u8> {
    let cancel = AtomicBool::new(false);
    let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &cancel };
    let mut tar = Vec::new();
    match lower {
        None => diff(upper, &mut tar, &options).unwrap(),
        Some(lower) => diff_trees(lower, upper, &mut tar, &options).unwrap(),
    };
    tar
}

fn unpack(tar: &[u8], root: BorrowedFd<'_>, whiteouts: Whiteouts) {
    let cancel = AtomicBool::new(false);
    let options = ApplyOptions {
        whiteouts,
        keep_owner: true,
        limits: Limits::default(),
        reading: Reading::Ahead,
        cancel: &cancel,
    };
    apply(tar, root, &options).unwrap();
}

#[track_caller]
fn assert_same(left: &[Entry], right: &[Entry], what: &str) {
    let show = |entry: &Entry| {
        let (path, xattrs) = (entry.path.escape_ascii(), entry.xattrs.len());
        let Entry { kind, mode, uid, gid, mtime, .. } = entry;
        format!("{path} {kind:?} {mode:o} {uid}:{gid} {mtime:?}, {xattrs} xattrs")
    };
    let different = |entries: &[Entry], others: &[Entry]| -> Vec<String> {
        entries.iter().filter(|entry| !others.contains(entry)).map(show).collect()
    };
    assert_eq!(different(left, right), different(right, left), "{what}");
    assert_eq!(left.len(), right.len(), "{what}");
}

/// What the tests do to a lower and then to the merged tree; they are compared in every way.
fn check(below: &[Action], above: &[Action]) {
    let temp = tempfile::tempdir().unwrap();
    let dir = |name: &str| -> PathBuf {
        let path = temp.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (lower, upper, work) = (dir("lower"), dir("upper"), dir("work"));
    below.iter().for_each(|action| act(&lower, action));
    let before = describe(open(&lower).as_fd());
    let merged = overlay(&lower, &upper, &work);
    let merged_path = PathBuf::from(format!("/proc/self/fd/{}", merged.as_raw_fd()));
    above.iter().for_each(|action| act(&merged_path, action));
    let expected = describe(merged.as_fd());

    let tar = layer_of(open(&upper).as_fd(), None);
    let compared = layer_of(merged.as_fd(), Some(open(&lower).as_fd()));
    assert_same(&describe(open(&lower).as_fd()), &before, "the lower tree stays");
    drop(merged);
    for (what, tar) in [("of an upperdir", &tar), ("of two trees", &compared)] {
        let (over, over_work) = (dir(&format!("over {what}")), dir(&format!("work {what}")));
        unpack(tar, open(&over).as_fd(), Whiteouts::Overlay);
        let stacked = describe(overlay(&lower, &over, &over_work).as_fd());
        assert_same(&stacked, &expected, &format!("the layer {what} as an upperdir"));

        let copy = dir(&format!("copy {what}"));
        kiln_layer::clone_tree(open(&lower).as_fd(), open(&copy).as_fd(), &AtomicBool::new(false)).unwrap();
        assert_same(&describe(open(&copy).as_fd()), &before, "a cloned tree");
        unpack(tar, open(&copy).as_fd(), Whiteouts::Remove);
        assert_same(&describe(open(&copy).as_fd()), &expected, &format!("the layer {what} on a copy"));
    }
    // Nothing has changed, so there is nothing to tell.
    let same = layer_of(open(&lower).as_fd(), Some(open(&lower).as_fd()));
    assert_eq!(same, vec![0; 1024]);
}

fn can_mount() -> bool {
    let can = rustix::process::geteuid().is_root();
    if !can {
        eprintln!("SKIPPED ALOUD: mounting overlayfs needs root");
    }
    can
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_layer_makes_the_lower_tree_into_the_merged_one(
        below in proptest::collection::vec(action(), 0..60),
        above in proptest::collection::vec(action(), 0..40),
    ) {
        if can_mount() {
            check(&below, &above);
        }
    }
}

/// What a tree that stands alone becomes when it has been a layer.
fn check_alone(actions: &[Action]) {
    let temp = tempfile::tempdir().unwrap();
    let [tree, again] = ["tree", "again"].map(|name| {
        fs::create_dir(temp.path().join(name)).unwrap();
        temp.path().join(name)
    });
    actions.iter().for_each(|action| act(&tree, action));
    let cancel = AtomicBool::new(false);
    let options = DiffOptions { form: TreeForm::Plain, root_entry: false, cancel: &cancel };
    let mut tar = Vec::new();
    diff(open(&tree).as_fd(), &mut tar, &options).unwrap();
    unpack(&tar, open(&again).as_fd(), Whiteouts::Remove);
    let (expected, found) = (describe(open(&tree).as_fd()), describe(open(&again).as_fd()));
    assert_same(&found, &expected, "a tree alone");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tree_alone_is_the_same_when_it_has_been_a_layer(
        actions in proptest::collection::vec(action(), 0..80),
    ) {
        check_alone(&actions);
    }
}

#[test]
fn directories_that_moved_and_came_back_are_told_whole() {
    use Action::*;
    if !can_mount() {
        return;
    }
    let n = |path: &str| Name(path.as_bytes().to_vec());
    let below = [
        Mkdir(n("d")),
        Mkdir(n("d/e")),
        Write(n("d/e/f"), 9),
        Write(n("d/g"), 8),
        Link(n("d/g"), n("h")),
        Write(n("a"), 1),
        Write(n("b"), 2),
    ];
    for above in [
        vec![Rename(n("d"), n("moved"))],
        vec![Rename(n("d"), n("moved")), Rename(n("moved"), n("d"))],
        vec![Rename(n("a"), n("c")), Rename(n("b"), n("a")), Rename(n("c"), n("b"))],
        vec![Exchange(n("a"), n("b")), Exchange(n("a"), n("b"))],
        vec![MakeAnew(n("d")), Write(n("d/g"), 8)],
        vec![RemoveAll(n("d")), Symlink(n("d"), 1)],
        vec![Unlink(n("a")), Mkdir(n("a")), Write(n("a/x"), 1)],
        vec![Append(n("h"), 1)],
        vec![Link(n("h"), n("d/e/another"))],
        vec![ChmodToTheSame(n("d/e/f")), ChmodToTheSame(n("d"))],
        // One of two names becomes a file of its own.
        vec![ChmodToTheSame(n("h"))],
        vec![ChmodToTheSame(n("d/g"))],
        vec![Unlink(n("h"))],
        vec![Unlink(n("h")), Write(n("h"), 8)],
        vec![Capability(n("a")), Chown(n("b"), 7), Xattr(n("d"), 3), Touch(n("d/e"))],
    ] {
        check(&below, &above);
    }
}
