//! Needs root: files get owners.

use std::fs::{self, File, create_dir, hard_link, write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use tempfile::TempDir;

use super::*;
use crate::scan::{ScanOptions, scan};

fn dirs() -> (TempDir, TempDir) {
    (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap())
}

fn entries_of(from: &TempDir, path: &str) -> Vec<Entry> {
    let cancel = AtomicBool::new(false);
    let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &cancel };
    scan(File::open(from.path()).unwrap().as_fd(), path.as_bytes(), &options).unwrap()
}

fn run(
    from: &TempDir,
    entries: &[Entry],
    strip: &str,
    to: &TempDir,
    destination: &str,
    owner: Option<(u32, u32)>,
) -> Result<Copied, CopyError> {
    run_with(from, entries, strip, to, destination, &Options { owner, ..Options::default() })
}

/// How a `COPY` copies when nothing is asked for.
struct Options<'o> {
    passed: &'o [&'o str],
    owner: Option<(u32, u32)>,
    mode: Option<&'o ModeChange<'o>>,
    parent_mode: u32,
    top: TopDir,
    looked_at: LookedAt,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            passed: &[],
            owner: None,
            mode: None,
            parent_mode: 0o755,
            top: TopDir::Contents,
            looked_at: LookedAt::now(),
        }
    }
}

fn run_with(
    from: &TempDir,
    entries: &[Entry],
    strip: &str,
    to: &TempDir,
    destination: &str,
    options: &Options<'_>,
) -> Result<Copied, CopyError> {
    let cancel = AtomicBool::new(false);
    let passed = options.passed.iter().map(|path| path.as_bytes().to_vec()).collect();
    let (source, target) = (File::open(from.path()).unwrap(), File::open(to.path()).unwrap());
    copy(&CopyRequest {
        from: source.as_fd(),
        from_layers: &[],
        looked_at: Some(options.looked_at),
        entries,
        passed: Some(&passed),
        strip: strip.as_bytes(),
        to: target.as_fd(),
        below: None,
        earlier: None,
        identities: None,
        times_of: None,
        follower: None,
        destination: destination.as_bytes(),
        owner: options.owner,
        mode: options.mode,
        parent_mode: options.parent_mode,
        top: options.top,
        cancel: &cancel,
    })
}

fn copy_path(from: &TempDir, path: &str, to: &TempDir, destination: &str) -> Result<Copied, CopyError> {
    run(from, &entries_of(from, path), path, to, destination, Some((0, 0)))
}

#[test]
fn a_tree_keeps_modes_times_links_and_attributes() {
    let (from, to) = dirs();
    let at = |name: &str| from.path().join("src").join(name);
    fs::create_dir_all(at("sub")).unwrap();
    write(at("sub/file"), vec![1; 300_000]).unwrap();
    fs::set_permissions(at("sub/file"), fs::Permissions::from_mode(0o4711)).unwrap();
    rustix::fs::lsetxattr(at("sub/file"), "user.a", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    hard_link(at("sub/file"), at("again")).unwrap();
    symlink("/etc/shadow", at("link")).unwrap();
    let copied = copy_path(&from, "src", &to, "a/b").unwrap();
    assert_eq!(copied, Copied { bytes: 300_000, entries: 5, ..Copied::default() });
    let made = |name: &str| fs::symlink_metadata(to.path().join("a/b").join(name)).unwrap();
    let (file, original) = (made("sub/file"), fs::metadata(at("sub/file")).unwrap());
    assert_eq!((file.mode(), file.nlink()), (original.mode(), 2));
    assert_eq!((file.mtime(), file.mtime_nsec()), (original.mtime(), original.mtime_nsec()));
    let sub = fs::metadata(at("sub")).unwrap();
    assert_eq!((made("sub").mtime(), made("sub").mtime_nsec()), (sub.mtime(), sub.mtime_nsec()));
    assert_eq!(made("again").ino(), file.ino());
    assert!(made("link").is_symlink());
    let target = File::open(to.path().join("a/b/sub")).unwrap();
    assert_eq!(node::xattrs(target.as_fd(), b"file").unwrap()[&b"user.a"[..]], b"1");
}

#[test]
fn owners_are_set_on_parents_too_or_kept() {
    let (from, to) = dirs();
    write(from.path().join("x"), "").unwrap();
    std::os::unix::fs::chown(from.path().join("x"), Some(5), Some(6)).unwrap();
    let entries = entries_of(&from, "x");
    run(&from, &entries, "x", &to, "new/x", Some((7, 8))).unwrap();
    run(&from, &entries, "x", &to, "kept", None).unwrap();
    let owner = |name: &str| {
        let stat = fs::metadata(to.path().join(name)).unwrap();
        (stat.uid(), stat.gid())
    };
    assert_eq!([owner("new"), owner("new/x"), owner("kept")], [(7, 8), (7, 8), (5, 6)]);
}

#[test]
fn files_replace_files_and_links_but_not_directories() {
    let (from, to) = dirs();
    write(from.path().join("x"), "new").unwrap();
    create_dir(from.path().join("dir")).unwrap();
    write(to.path().join("kept"), "old").unwrap();
    symlink("kept", to.path().join("link")).unwrap();
    create_dir(to.path().join("there")).unwrap();
    copy_path(&from, "x", &to, "link").unwrap();
    assert_eq!(fs::read_to_string(to.path().join("kept")).unwrap(), "old");
    assert_eq!(fs::read_to_string(to.path().join("link")).unwrap(), "new");
    assert!(matches!(copy_path(&from, "x", &to, "there"), Err(CopyError::OntoDirectory { .. })));
    assert!(matches!(copy_path(&from, "dir", &to, "kept"), Err(CopyError::OntoNonDirectory { .. })));
    assert!(matches!(copy_path(&from, "x", &to, "kept/x"), Err(CopyError::OntoNonDirectory { .. })));
}

#[test]
fn an_existing_destination_directory_keeps_its_mode_and_its_files() {
    let (from, to) = dirs();
    create_dir(from.path().join("src")).unwrap();
    write(from.path().join("src/new"), "").unwrap();
    create_dir(to.path().join("dst")).unwrap();
    write(to.path().join("dst/old"), "").unwrap();
    fs::set_permissions(to.path().join("dst"), fs::Permissions::from_mode(0o1777)).unwrap();
    symlink("/dst", to.path().join("link")).unwrap();
    copy_path(&from, "src", &to, "link").unwrap();
    let (after, source) = (fs::metadata(to.path().join("dst")), fs::metadata(from.path().join("src")));
    let (after, source) = (after.unwrap(), source.unwrap());
    assert_eq!((after.mode() & 0o7777, after.mtime_nsec()), (0o1777, source.mtime_nsec()));
    assert_eq!(fs::read_dir(to.path().join("dst")).unwrap().count(), 2);
}

#[test]
fn links_in_the_destination_stay_inside() {
    let ((from, to), outside) = (dirs(), tempfile::tempdir().unwrap());
    write(from.path().join("x"), "").unwrap();
    symlink(outside.path(), to.path().join("out")).unwrap();
    copy_path(&from, "x", &to, "out/x").unwrap();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert!(to.path().join(outside.path().strip_prefix("/").unwrap()).join("x").exists());
}

#[test]
fn a_file_that_changed_since_the_scan_is_an_error_unless_its_content_is_the_same() {
    let (from, to) = dirs();
    let path = from.path().join("x");
    write(&path, "one").unwrap();
    let entries = entries_of(&from, "x");
    fs::remove_file(&path).unwrap();
    write(&path, "one").unwrap();
    run(&from, &entries, "x", &to, "same", None).unwrap();
    write(&path, "two").unwrap();
    let error = run(&from, &entries, "x", &to, "other", None).unwrap_err();
    assert!(matches!(error, CopyError::ChangedWhileReading { .. }), "{error}");
}

#[test]
fn a_file_that_changed_in_the_tick_in_which_it_was_scanned_is_noticed() {
    let ((from, to), looked_at) = (dirs(), LookedAt::now());
    let path = from.path().join("x");
    write(&path, "one").unwrap();
    let mut entries = entries_of(&from, "x");
    write(&path, "two").unwrap();
    // A clock of 10 ms says the same of both.
    let [now] = &entries_of(&from, "x")[..] else { panic!("one file") };
    (entries[0].mtime, entries[0].ctime) = (now.mtime, now.ctime);
    let options = Options { looked_at, ..Options::default() };
    let error = run_with(&from, &entries, "x", &to, "other", &options).unwrap_err();
    assert!(matches!(error, CopyError::ChangedWhileReading { .. }), "{error}");
    let file = File::open(&path).unwrap();
    assert!(!entries[0].is_as_scanned(&file, looked_at).unwrap());
    assert!(now.is_as_scanned(&file, looked_at).unwrap());
}

#[test]
fn a_new_destination_directory_is_like_any_directory_made_on_the_way() {
    let (from, to) = dirs();
    create_dir(from.path().join("src")).unwrap();
    write(from.path().join("src/x"), "").unwrap();
    fs::set_permissions(from.path().join("src"), fs::Permissions::from_mode(0o2700)).unwrap();
    let entries = entries_of(&from, "src");
    let stat = |path: &str| {
        let stat = fs::metadata(to.path().join(path)).unwrap();
        (stat.mode() & 0o7777, stat.uid())
    };
    let run = |destination: &str, options: Options<'_>| {
        run_with(&from, &entries, "src", &to, destination, &options).unwrap();
    };
    run("a/b", Options::default());
    assert_eq!([stat("a"), stat("a/b")], [(0o755, 0), (0o755, 0)]);
    run("c/d", Options { parent_mode: 0o710, owner: Some((7, 7)), ..Options::default() });
    assert_eq!([stat("c"), stat("c/d"), stat("c/d/x")], [(0o710, 7), (0o710, 7), (0o644, 7)]);
    run("e", Options { top: TopDir::Itself, ..Options::default() });
    assert_eq!(stat("e"), (0o2700, 0));
}

#[test]
fn modes_change_entry_by_entry_but_not_of_links() {
    let (from, to) = dirs();
    fs::create_dir_all(from.path().join("src/sub")).unwrap();
    write(from.path().join("src/file"), "").unwrap();
    symlink("file", from.path().join("src/link")).unwrap();
    let entries = entries_of(&from, "src");
    let change = |mode: u32, is_dir: bool| if is_dir { 0o711 } else { mode | 0o4000 };
    let options = Options { mode: Some(&change), ..Options::default() };
    run_with(&from, &entries, "src", &to, "dst", &options).unwrap();
    let mode = |path: &str| fs::symlink_metadata(to.path().join("dst").join(path)).unwrap().mode() & 0o7777;
    assert_eq!([mode("sub"), mode("file"), mode("link"), mode("")], [0o711, 0o4644, 0o777, 0o755]);
}

#[test]
fn an_existing_directory_that_is_only_passed_keeps_its_owner() {
    let (from, to) = dirs();
    fs::create_dir_all(from.path().join("there")).unwrap();
    fs::create_dir_all(from.path().join("new")).unwrap();
    write(from.path().join("there/x"), "").unwrap();
    write(from.path().join("new/x"), "").unwrap();
    for name in ["there", "new"] {
        fs::set_permissions(from.path().join(name), fs::Permissions::from_mode(0o750)).unwrap();
        std::os::unix::fs::chown(from.path().join(name), Some(5), Some(5)).unwrap();
    }
    create_dir(to.path().join("there")).unwrap();
    let entries = entries_of(&from, "");
    let options = Options { passed: &["there", "new"], ..Options::default() };
    run_with(&from, &entries, "", &to, "", &options).unwrap();
    let stat = |path: &str| {
        let stat = fs::metadata(to.path().join(path)).unwrap();
        (stat.mode() & 0o7777, stat.uid())
    };
    assert_eq!([stat("there"), stat("new")], [(0o750, 0), (0o750, 5)]);
}

#[test]
fn devices_and_fifos_of_a_tree_are_made_again() {
    let (from, to) = dirs();
    let fd = File::open(from.path()).unwrap();
    let mode = Mode::from_raw_mode(0o640);
    fs_mknod(&fd, "null", FileType::CharacterDevice, mode, rustix::fs::makedev(1, 3));
    fs_mknod(&fd, "pipe", FileType::Fifo, mode, 0);
    drop(std::os::unix::net::UnixListener::bind(from.path().join("socket")).unwrap());
    copy_path(&from, "", &to, "").unwrap();
    let kinds = |entries: Vec<Entry>| -> Vec<EntryKind> {
        entries.into_iter().skip(1).map(|entry| entry.kind).collect()
    };
    assert_eq!(kinds(entries_of(&to, "")), [EntryKind::Char { major: 1, minor: 3 }, EntryKind::Fifo]);
}

fn fs_mknod(at: &File, name: &str, kind: FileType, mode: Mode, device: u64) {
    rustix::fs::mknodat(at, name, kind, mode, device).unwrap();
}

#[test]
fn a_link_is_not_a_directory_to_copy_into() {
    let (from, to) = dirs();
    fs::create_dir_all(from.path().join("src/sub")).unwrap();
    create_dir(to.path().join("elsewhere")).unwrap();
    symlink("elsewhere", to.path().join("sub")).unwrap();
    let error = copy_path(&from, "src", &to, "").unwrap_err();
    assert_eq!(error.to_string(), "cannot copy to non-directory \"sub\"");
}
