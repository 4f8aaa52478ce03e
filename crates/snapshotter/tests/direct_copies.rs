//! A copy straight into an upperdir is the copy that is made through a mount of it. Needs root.

use std::collections::HashSet;
use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use kiln_layer::{
    CopyError, CopyRequest, DiffOptions, Earlier, Entry, EntryKind, Identity, LookedAt, Part, ScanOptions,
    Timestamp, TopDir, TreeForm, Whole, beneath, changed, copy, diff, made, make_dirs_over, scan,
};
use kiln_oci::{ActiveKey, SnapshotId};
use kiln_snapshotter::{OpenOptions, Overlay, Snapshotter};
use kiln_testkit::random::Random;
use tempfile::TempDir;

const CASES: usize = 80;
const NAMES: [&str; 3] = ["a", "b", "c"];
const DESTINATIONS: [&str; 7] = ["", "a", "a/b", "b/c/a", "new", "a/new/er", "c/../a"];
static NEVER: AtomicBool = AtomicBool::new(false);

fn skip() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED ALOUD: mounting needs root");
    }
    !is_root
}

fn store() -> (TempDir, Overlay) {
    let temp = tempfile::tempdir().unwrap();
    let store = Overlay::open(&temp.path().join("snapshots")).unwrap();
    (temp, store)
}

fn key(name: &str) -> ActiveKey {
    name.parse().unwrap()
}

fn id(name: &str) -> SnapshotId {
    name.parse().unwrap()
}

/// The path behind a descriptor, for what the standard library has no `*at` calls for.
fn path_of(dir: &OwnedFd) -> String {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", dir.as_raw_fd())
}

/// Some of everything in `dir`, three levels deep.
fn furnish(dir: &Path, random: &mut Random, depth: u32) {
    for name in NAMES {
        let at = dir.join(name);
        match random.below(6) {
            0 | 1 if depth > 0 => {
                fs::create_dir(&at).unwrap();
                furnish(&at, random, depth - 1);
                fs::set_permissions(&at, Permissions::from_mode([0o755, 0o700, 0o2775][random.below(3)]))
                    .unwrap();
            }
            2 | 3 => {
                fs::write(&at, format!("content {}", random.below(4))).unwrap();
                fs::set_permissions(&at, Permissions::from_mode([0o644, 0o600, 0o444][random.below(3)]))
                    .unwrap();
            }
            4 => symlink(["a", "/b", "../c", "nowhere"][random.below(4)], &at).unwrap(),
            _ => continue,
        }
        lchown(&at, Some(random.below(2) as u32 * 7), Some(random.below(2) as u32 * 8)).unwrap();
        let old = rustix::fs::Timespec { tv_sec: 1_000_000 + random.below(9) as i64, tv_nsec: 5 };
        let times = rustix::fs::Timestamps { last_access: old, last_modification: old };
        rustix::fs::utimensat(rustix::fs::CWD, &at, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn scan_all(root: BorrowedFd<'_>) -> Vec<Entry> {
    scan(root, b"", &ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &NEVER }).unwrap()
}

/// What a build could tell of a tree; times that are those of this test are only that.
fn shown(root: BorrowedFd<'_>) -> Vec<Entry> {
    let mut entries = scan_all(root);
    for entry in &mut entries {
        entry.ctime = Timestamp::default();
        if entry.mtime.secs > 2_000_000 {
            entry.mtime = Timestamp::default();
        }
        entry.xattrs.retain(|name, _| !name.starts_with(b"trusted.overlay."));
        if let EntryKind::File { inode, nlink, .. } = &mut entry.kind {
            (*inode, *nlink) = ((0, 0), 0);
        }
    }
    // Nothing keeps the time of a root directory.
    entries[0].mtime = Timestamp::default();
    entries
}

fn request<'a>(
    from: BorrowedFd<'a>,
    entries: &'a [Entry],
    to: BorrowedFd<'a>,
    destination: &'a [u8],
) -> CopyRequest<'a> {
    CopyRequest {
        destination,
        owner: Some((0, 0)),
        top: TopDir::Contents,
        ..CopyRequest::tree(from, entries, to, &NEVER)
    }
}

fn kind_of(error: &CopyError) -> u8 {
    match error {
        CopyError::OntoDirectory { .. } => 1,
        CopyError::OntoNonDirectory { .. } => 2,
        // Through a mount `openat2` says so of a parent that is a file.
        CopyError::Host { .. } => 2,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_copy_into_the_upperdir_is_that_through_a_mount() {
    if skip() {
        return;
    }
    let seed = Random::new().seed();
    let (mut random, mut refused) = (Random::of(seed), 0);
    let (_temp, store) = store();
    for case in 0..CASES {
        let [base, mounted, bare] = ["base", "mounted", "direct"].map(|name| format!("{name}-{case}"));
        let (base, mounted, bare) = (base.as_str(), mounted.as_str(), bare.as_str());
        store.prepare(&key(base), None).unwrap();
        let dir = store.open_layer(&key(base)).unwrap();
        furnish(Path::new(&path_of(&dir)), &mut random, 2);
        drop(dir);
        store.commit(&key(base), &id(base)).unwrap();
        let source = tempfile::tempdir().unwrap();
        furnish(source.path(), &mut random, 2);
        let from = File::open(source.path()).unwrap();
        let entries = scan_all(from.as_fd());
        let view = store.open_view(&id(base)).unwrap();
        let named = DESTINATIONS[random.below(DESTINATIONS.len())];
        let Ok(real) = beneath::real_path(view.as_fd(), named.as_bytes()) else { continue };
        let made_first = random.below(2) == 0;

        store.prepare(&key(mounted), Some(&id(base))).unwrap();
        let mount = store.open_active(&key(mounted), &OpenOptions::default()).unwrap();
        let through = (|| {
            if made_first && !real.is_empty() {
                beneath::mkdir_all(mount.as_fd(), &real, 0o750, (5, 5)).map_err(CopyError::from)?;
            }
            copy(&request(from.as_fd(), &entries, mount.as_fd(), &real))
        })();
        drop(mount);
        store.prepare(&key(bare), Some(&id(base))).unwrap();
        let upper = store.open_layer(&key(bare)).unwrap();
        let direct = (|| {
            if made_first {
                make_dirs_over(upper.as_fd(), view.as_fd(), &real, 0o750, (5, 5))?;
            }
            let plain = request(from.as_fd(), &entries, upper.as_fd(), &real);
            copy(&CopyRequest { below: Some(view.as_fd()), ..plain })
        })();
        drop(upper);
        let why = format!("KILN_SEED={seed}, case {case}: to {named}");
        match (&through, &direct) {
            (Ok(one), Ok(other)) => assert_eq!(one, other, "{why}"),
            (Err(one), Err(other)) => {
                assert_eq!(kind_of(one), kind_of(other), "{why}: {one:?}\n{other:?}");
                refused += 1;
                continue;
            }
            (one, other) => panic!("{why}: through a mount {one:?}, directly {other:?}"),
        }
        let merged = |name: &str| {
            store.commit(&key(name), &id(name)).unwrap();
            shown(store.open_view(&id(name)).unwrap().as_fd())
        };
        assert_eq!(merged(bare), merged(mounted), "{why}");
        // The layers have the same entries, too; a mount marks new directories opaque.
        let members = |name: &str| {
            let mut entries = shown(store.open_changes(&id(name)).unwrap().dir.as_fd());
            entries.retain(|entry| !entry.path.is_empty());
            entries
        };
        assert_eq!(members(bare), members(mounted), "{why}");
    }
    assert!((CASES / 20..CASES * 9 / 10).contains(&refused), "{refused} of {CASES} tell nothing");
}

#[test]
fn files_that_are_the_same_are_those_of_the_earlier_layer() {
    if skip() {
        return;
    }
    let (_temp, store) = store();
    let source = tempfile::tempdir().unwrap();
    let at = |name: &str| source.path().join(name);
    fs::create_dir(at("d")).unwrap();
    for name in ["d/same", "d/content", "d/mode", "time", "pair"] {
        fs::write(at(name), "same size").unwrap();
    }
    fs::hard_link(at("pair"), at("partner")).unwrap();
    let from = File::open(source.path()).unwrap();
    let run = |name: &str, earlier: Option<&Earlier>, below: Option<&OwnedFd>| {
        let entries = scan_all(from.as_fd());
        store.prepare(&key(name), None).unwrap();
        let upper = store.open_layer(&key(name)).unwrap();
        let part = Part {
            entries: &entries,
            passed: None,
            strip: b"",
            destination: b"app".to_vec(),
            owner: Some((0, 0)),
            mode: None,
        };
        let identities = part.identities();
        let copied = copy(&CopyRequest {
            earlier,
            identities: Some(&identities),
            looked_at: Some(LookedAt::now()),
            below: below.map(AsFd::as_fd),
            ..request(from.as_fd(), &entries, upper.as_fd(), b"app")
        })
        .unwrap();
        drop(upper);
        store.commit(&key(name), &id(name)).unwrap();
        (copied.linked, known(&identities))
    };
    let tar = |name: &str| {
        let mut tar = Vec::new();
        let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &NEVER };
        let changes = store.open_changes(&id(name)).unwrap();
        // The parent directory that the copy made has the time of the copy.
        let now = rustix::fs::Timespec { tv_sec: 1_000_000, tv_nsec: 0 };
        let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
        rustix::fs::utimensat(&changes.dir, "app", &times, rustix::fs::AtFlags::empty()).unwrap();
        diff(changes.dir.as_fd(), &mut tar, &options).unwrap();
        tar
    };
    let earlier =
        |name: &str, made: Vec<[u8; 32]>| Earlier::new(store.open_changes(&id(name)).unwrap().dir, made);
    let (linked, first) = run("first", None, None);
    assert_eq!((linked, first.len()), (0, 5), "a directory; hard links of one another are left out");
    let before = tar("first");
    assert_eq!(run("again", Some(&earlier("first", first.clone())), None), (4, first.clone()));
    assert_eq!(tar("again"), before);
    assert_eq!(tar("first"), before, "the earlier layer is what it was");

    // Same size and time; another mode; another time; a file at another place.
    let time = fs::metadata(at("d/content")).unwrap().modified().unwrap();
    fs::write(at("d/content"), "same SIZE").unwrap();
    File::open(at("d/content")).unwrap().set_modified(time).unwrap();
    fs::set_permissions(at("d/mode"), Permissions::from_mode(0o640)).unwrap();
    File::open(at("time")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    fs::rename(at("d/same"), at("d/moved")).unwrap();
    fs::write(at("d/same"), "same size").unwrap();
    let (linked, changed) = run("changed", Some(&earlier("first", first.clone())), None);
    assert_eq!((linked, changed.len()), (0, 6));
    let (_, cold) = run("cold", None, None);
    assert_eq!((tar("changed"), cold), (tar("cold"), changed));

    // A layer that is not there any more, and one that lost a file: they are copied.
    let gone = earlier("first", first);
    store.remove(&id("first")).unwrap();
    store.empty_trash().unwrap();
    fs::rename(at("d/moved"), at("d/same")).unwrap();
    assert_eq!(run("alone", Some(&gone), None).0, 0);
}

fn known(identities: &[Identity]) -> Vec<[u8; 32]> {
    identities.iter().filter_map(Identity::known).collect()
}

/// Changes something in `dir`.
fn edit(dir: &Path, random: &mut Random) {
    let entries = scan_all(File::open(dir).unwrap().as_fd());
    let any = &entries[random.below(entries.len())];
    let at = dir.join(std::str::from_utf8(&any.path).unwrap());
    let is_dir = any.kind == EntryKind::Dir;
    let inside = if is_dir { at.as_path() } else { at.parent().unwrap() };
    match random.below(10) {
        0 | 1 => drop(fs::write(inside.join("written"), format!("new {}", random.below(4)))),
        2 if !any.path.is_empty() && is_dir => fs::remove_dir_all(&at).unwrap(),
        2 if !is_dir => fs::remove_file(&at).unwrap(),
        3 if !matches!(any.kind, EntryKind::Symlink { .. }) => {
            fs::set_permissions(&at, Permissions::from_mode([0o755, 0o711, 0o640][random.below(3)])).unwrap();
        }
        4 => lchown(&at, Some(9), Some(9)).unwrap(),
        5 => {
            let time = rustix::fs::Timespec { tv_sec: 1_500_000, tv_nsec: 1 };
            let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
            let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::utimensat(rustix::fs::CWD, &at, &times, flags).unwrap();
        }
        6 if matches!(any.kind, EntryKind::File { .. }) => drop(fs::hard_link(&at, dir.join("twin"))),
        7 => drop(symlink("elsewhere", inside.join("pointed"))),
        8 if !any.path.is_empty() => {
            let _ = fs::remove_file(&at).or_else(|_| fs::remove_dir_all(&at));
            if is_dir { fs::write(&at, "now a file").unwrap() } else { fs::create_dir(&at).unwrap() }
        }
        9 if fs::create_dir(inside.join("grown")).is_ok() => furnish(&inside.join("grown"), random, 1),
        _ => {}
    }
}

#[test]
fn a_delta_and_what_it_stands_on_are_the_whole_copy() {
    if skip() {
        return;
    }
    let seed = Random::new().seed();
    let mut random = Random::of(seed);
    let (mut deltas, mut small, mut refused) = (0, 0, 0);
    let (_temp, store) = store();
    for case in 0..3 * CASES {
        let names = ["base", "full", "whole", "delta"].map(|name| format!("{name}-{case}"));
        let [base, full, whole, delta] = names.each_ref().map(String::as_str);
        store.prepare(&key(base), None).unwrap();
        furnish(Path::new(&path_of(&store.open_layer(&key(base)).unwrap())), &mut random, 2);
        store.commit(&key(base), &id(base)).unwrap();
        let source = tempfile::tempdir().unwrap();
        furnish(source.path(), &mut random, 2);
        let from = File::open(source.path()).unwrap();
        let view = store.open_view(&id(base)).unwrap();
        let named = DESTINATIONS[random.below(DESTINATIONS.len())];
        let Ok(real) = beneath::real_path(view.as_fd(), named.as_bytes()) else { continue };
        let passed: HashSet<Vec<u8>> =
            NAMES.iter().filter(|_| random.below(3) == 0).map(|name| name.as_bytes().to_vec()).collect();
        let owner = [None, Some((0, 0)), Some((7, 8))][random.below(3)];
        let part = |entries| Part {
            entries,
            passed: Some(&passed),
            strip: b"",
            destination: real.clone(),
            owner,
            mode: None,
        };
        let run = |name: &str, entries: &[Entry], times_of: Option<BorrowedFd<'_>>| {
            store.prepare(&key(name), Some(&id(base))).unwrap();
            let upper = store.open_layer(&key(name)).unwrap();
            let plain = request(from.as_fd(), entries, upper.as_fd(), &real);
            let below = Some(view.as_fd());
            copy(&CopyRequest { below, passed: Some(&passed), owner, times_of, ..plain }).map(drop)
        };
        let before = scan_all(from.as_fd());
        if run(full, &before, None).is_err() {
            continue;
        }
        store.commit(&key(full), &id(full)).unwrap();
        for _ in 0..1 + random.below(3) {
            edit(source.path(), &mut random);
        }
        let now = scan_all(from.as_fd());
        let dir = store.open_changes(&id(full)).unwrap().dir;
        let listed = [(part(&before), part(&before).identities())];
        let (known, entries) = (known(&listed[0].1), made(&listed).unwrap());
        let parts = [(part(&now), part(&now).identities())];
        let earlier = Whole { dir: dir.as_fd(), known: &known, entries };
        let Some(kept) = changed(&earlier, &parts, usize::MAX) else {
            refused += 1;
            continue;
        };
        let why = format!("KILN_SEED={seed}, case {case}: to {named}");
        match (run(whole, &now, None), run(delta, &kept[0], Some(dir.as_fd()))) {
            (Ok(()), Ok(())) => {}
            (Err(one), Err(other)) => {
                assert_eq!(kind_of(&one), kind_of(&other), "{why}: {one:?}\n{other:?}");
                continue;
            }
            (one, other) => panic!("{why}: the whole {one:?}, the delta {other:?}"),
        }
        deltas += 1;
        small += usize::from(kept[0].len() < now.len());
        store.commit_delta(&key(delta), &id(delta), &id(full)).unwrap();
        // Directories that a copy makes on its way have its time, and in a delta that of the earlier one.
        let of_full = scan_all(dir.as_fd());
        let upper = store.open_layer(&key(whole)).unwrap();
        for entry in scan_all(store.open_changes(&id(delta)).unwrap().dir.as_fd()) {
            let path = std::str::from_utf8(&entry.path).unwrap();
            let is_above = !path.is_empty() && real.starts_with(format!("{path}/").as_bytes());
            if let Some(like) = of_full.iter().find(|like| is_above && like.path == entry.path) {
                assert_eq!(entry.mtime, like.mtime, "{why}: {path}");
            }
            if entry.kind == EntryKind::Dir && entry.mtime.secs > 2_000_000 && !path.is_empty() {
                let time =
                    rustix::fs::Timespec { tv_sec: entry.mtime.secs, tv_nsec: entry.mtime.nanos.into() };
                let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
                let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(&upper, path, &times, flags).unwrap();
            }
        }
        drop(upper);
        store.commit(&key(whole), &id(whole)).unwrap();
        let seen = |name: &str| shown(store.open_view(&id(name)).unwrap().as_fd());
        assert_eq!(seen(delta), seen(whole), "{why}");
        let tar = |name: &str| {
            let mut tar = Vec::new();
            let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: &NEVER };
            diff(store.open_changes(&id(name)).unwrap().dir.as_fd(), &mut tar, &options).unwrap();
            tar
        };
        assert!(tar(delta) == tar(whole), "{why}: the layers differ");
    }
    let least = CASES / 10;
    assert!(small > least && deltas > least && refused > least, "{deltas}, {small} small, {refused} refused");
}

#[test]
fn parts_that_meet_and_what_is_too_much_make_no_delta() {
    let source = tempfile::tempdir().unwrap();
    for name in ["one/x", "other/y", "meeting/x"] {
        fs::create_dir_all(source.path().join(name).parent().unwrap()).unwrap();
        fs::write(source.path().join(name), name).unwrap();
    }
    let from = File::open(source.path()).unwrap();
    let entries = |name: &str| {
        let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &NEVER };
        scan(from.as_fd(), name.as_bytes(), &options).unwrap()
    };
    let names = ["one", "other", "meeting"];
    let found = names.map(entries);
    let part = |nth: usize| {
        let (entries, strip) = (found[nth].as_slice(), names[nth].as_bytes());
        let part =
            Part { entries, passed: None, strip, destination: b"app".to_vec(), owner: None, mode: None };
        let identities = part.identities();
        (part, identities)
    };
    assert_eq!(made(&[part(0), part(1)]), Some(2));
    assert_eq!(made(&[part(0), part(2)]), None);
    assert_eq!(part(0).1[0], Identity::Top);
    // The earlier copy had nothing: both destinations and both files are kept.
    let empty = tempfile::tempdir().unwrap();
    let dir = File::open(empty.path()).unwrap();
    let earlier = Whole { dir: dir.as_fd(), known: &[], entries: 0 };
    let count = |most| {
        changed(&earlier, &[part(0), part(1)], most).map(|kept| kept.iter().map(Vec::len).collect::<Vec<_>>())
    };
    assert_eq!((count(4), count(3)), (Some(vec![2, 2]), None));
    let other = Whole { entries: 1, ..earlier };
    assert!(changed(&other, &[part(0)], 9).is_none(), "something was there that is no more");
}
