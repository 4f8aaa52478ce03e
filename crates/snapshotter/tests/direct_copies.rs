//! A copy straight into an upperdir is the copy that is made through a mount of it. Needs root.

use std::fs::{self, File, Permissions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use kiln_layer::{
    CopyError, CopyRequest, DiffOptions, Earlier, Entry, EntryKind, LookedAt, ScanOptions, Timestamp, TopDir,
    TreeForm, beneath, copy, diff, make_dirs_over, scan,
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
        let copied = copy(&CopyRequest {
            earlier,
            note_made: true,
            looked_at: Some(LookedAt::now()),
            below: below.map(AsFd::as_fd),
            ..request(from.as_fd(), &entries, upper.as_fd(), b"app")
        })
        .unwrap();
        drop(upper);
        store.commit(&key(name), &id(name)).unwrap();
        copied
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
    let first = run("first", None, None);
    assert_eq!((first.linked, first.made.len()), (0, 4), "hard links of one another are left out");
    let before = tar("first");
    let again = run("again", Some(&earlier("first", first.made.clone())), None);
    assert_eq!((again.linked, &again.made), (4, &first.made));
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
    let changed = run("changed", Some(&earlier("first", first.made.clone())), None);
    assert_eq!((changed.linked, changed.made.len()), (0, 5));
    let cold = run("cold", None, None);
    assert_eq!((tar("changed"), cold.made), (tar("cold"), changed.made));

    // A layer that is not there any more, and one that lost a file: they are copied.
    let gone = earlier("first", first.made);
    store.remove(&id("first")).unwrap();
    store.empty_trash().unwrap();
    fs::rename(at("d/moved"), at("d/same")).unwrap();
    assert_eq!(run("alone", Some(&gone), None).linked, 0);
}
