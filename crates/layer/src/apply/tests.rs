//! Needs root: files get owners, devices are made. On a file system with `trusted.*` attributes.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;

use kiln_oci::Digest;
use tempfile::TempDir;

use super::*;
use crate::extract::{ExtractError, ExtractOptions, extract};
use crate::index::Timestamp;
use crate::node;

mod ahead;
mod sparse;

/// One raw member: whatever the header says, unchecked.
fn raw(name: &[u8], flag: u8, link: &[u8], content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    let fields = header.as_old_mut();
    fields.name[..name.len()].copy_from_slice(name);
    fields.linkname[..link.len()].copy_from_slice(link);
    fields.linkflag = [flag];
    header.set_mode(if flag == b'5' { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(content.len() as u64);
    with_content(header, content)
}

fn with_content(mut header: tar::Header, content: &[u8]) -> Vec<u8> {
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(name: &str, content: &str) -> Vec<u8> {
    raw(name.as_bytes(), b'0', b"", content.as_bytes())
}

fn dir(name: &str) -> Vec<u8> {
    raw(name.as_bytes(), b'5', b"", b"")
}

fn link(name: &str, target: &str) -> Vec<u8> {
    raw(name.as_bytes(), b'2', target.as_bytes(), b"")
}

fn hard(name: &str, target: &str) -> Vec<u8> {
    raw(name.as_bytes(), b'1', target.as_bytes(), b"")
}

fn pax(key: &str, value: &[u8]) -> Vec<u8> {
    let mut length = key.len() + value.len() + 3;
    length += (length + length.to_string().len()).to_string().len();
    raw(b"x", b'x', b"", &[format!("{length} {key}=").as_bytes(), value, b"\n"].concat())
}

fn archive(members: &[Vec<u8>]) -> Vec<u8> {
    [members.concat(), vec![0; 1024]].concat()
}

fn unpack_with(tar: &[u8], root: &Path, whiteouts: Whiteouts, limits: Limits) -> Result<Applied, ApplyError> {
    let cancel = AtomicBool::new(false);
    let options =
        ApplyOptions { whiteouts, keep_owner: true, limits, reading: Reading::Ahead, cancel: &cancel };
    apply(tar, File::open(root).unwrap().as_fd(), &options)
}

fn unpack(members: &[Vec<u8>]) -> (TempDir, Result<Applied, ApplyError>) {
    let root = tempfile::tempdir().unwrap();
    let result = unpack_with(&archive(members), root.path(), Whiteouts::Overlay, Limits::default());
    (root, result)
}

#[track_caller]
fn check_ok(members: &[Vec<u8>]) -> TempDir {
    let (root, result) = unpack(members);
    result.unwrap();
    root
}

#[track_caller]
fn check_refused(members: &[Vec<u8>], expected: Refusal) {
    match unpack(members).1 {
        Err(ApplyError::Refused { refusal, .. }) => assert_eq!(refusal, expected),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn check_broken(members: &[Vec<u8>], expected: Defect) {
    match unpack(members).1 {
        Err(ApplyError::Broken { defect, .. }) => assert_eq!(defect, expected),
        other => panic!("{other:?}"),
    }
}

fn text(root: &TempDir, path: &str) -> String {
    fs::read_to_string(root.path().join(path)).unwrap()
}

fn xattrs(root: &Path, name: &str) -> node::Xattrs {
    node::xattrs(File::open(root).unwrap().as_fd(), name.as_bytes()).unwrap()
}

fn is_whiteout(root: &TempDir, path: &str) -> bool {
    let stat = fs::symlink_metadata(root.path().join(path)).unwrap();
    stat.file_type().is_char_device() && stat.rdev() == 0
}

#[test]
fn t01_and_t03_paths_above_the_root_are_refused() {
    check_refused(&[file("../x", "")], Refusal::Escapes);
    check_refused(&[file("a/../../x", "")], Refusal::Escapes);
}

#[test]
fn t02_absolute_paths_land_inside() {
    assert_eq!(text(&check_ok(&[file("/abs/x", "inside")]), "abs/x"), "inside");
}

#[test]
fn t04_and_t05_links_among_the_parents_stay_inside() {
    let root = check_ok(&[link("d", "/etc"), file("d/passwd", "inside")]);
    assert_eq!(text(&root, "etc/passwd"), "inside");
    let root = check_ok(&[link("d", "../../.."), file("d/x", "inside")]);
    assert_eq!(text(&root, "x"), "inside");
}

#[test]
fn t06_a_directory_replaces_a_link_and_leaves_its_target_alone() {
    let outside = tempfile::tempdir().unwrap();
    let before = fs::metadata(outside.path()).unwrap();
    let root = check_ok(&[link("d", outside.path().to_str().unwrap()), dir("d"), file("d/x", "")]);
    assert!(fs::symlink_metadata(root.path().join("d")).unwrap().is_dir());
    let after = fs::metadata(outside.path()).unwrap();
    assert_eq!((after.mode(), after.ctime_nsec()), (before.mode(), before.ctime_nsec()));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn t07_the_root_cannot_be_replaced() {
    check_refused(&[link(".", "/etc")], Refusal::ReplacesRoot);
    check_refused(&[file("./", "")], Refusal::ReplacesRoot);
}

#[test]
fn t08_to_t12_hard_links_need_an_earlier_file_of_the_layer() {
    check_broken(&[hard("x", "/etc/shadow")], Defect::LinkMissing);
    check_refused(&[hard("x", "../../x")], Refusal::Escapes);
    check_broken(&[hard("x", "later"), file("later", "")], Defect::LinkMissing);
    check_broken(&[dir("d"), hard("x", "d")], Defect::LinkToDirectory);
    let root = check_ok(&[link("l", "/etc/shadow"), hard("x", "l")]);
    assert_eq!(fs::read_link(root.path().join("x")).unwrap(), Path::new("/etc/shadow"));
    let root = check_ok(&[file("a", "one"), hard("b", "a"), hard("b", "a")]);
    assert_eq!(fs::metadata(root.path().join("a")).unwrap().nlink(), 2);
}

#[test]
fn t14_to_t16_devices_and_fifos() {
    let device = |major, minor| {
        let mut header = tar::Header::new_ustar();
        header.set_path("dev").unwrap();
        header.set_entry_type(tar::EntryType::Char);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        for set in [tar::Header::set_uid, tar::Header::set_gid, tar::Header::set_mtime, tar::Header::set_size]
        {
            set(&mut header, 0);
        }
        header.set_mode(0o620);
        with_content(header, b"")
    };
    let root = check_ok(&[device(8, 300), raw(b"pipe", b'6', b"", b"")]);
    let stat = fs::metadata(root.path().join("dev")).unwrap();
    assert_eq!((stat.rdev(), stat.mode() & 0o7777), (rustix::fs::makedev(8, 300), 0o620));
    assert!(fs::metadata(root.path().join("pipe")).unwrap().file_type().is_fifo());
    check_refused(&[device(0, 0)], Refusal::OverlayDevice);
    check_broken(&[device(4096, 0)], Defect::Number("device"));
}

/// Unpacks `node`, uses up the links that it may have, and unpacks two more: one copy of up to 5000
/// bytes does for both. ext4 has room for 65,000 links, others for all of these.
#[track_caller]
fn link_once_more(node: &[u8]) -> TempDir {
    let root = check_ok(&[node.to_vec(), dir("many")]);
    let at = |name: &str| root.path().join(name);
    // By the kernel alone: as members of a tar they would take a minute.
    let mut links = (0..65_000).map(|nth| fs::hard_link(at("node"), at(&format!("many/{nth}"))));
    let full = links.find_map(Result::err);
    assert!(full.as_ref().is_none_or(|error| error.kind() == io::ErrorKind::TooManyLinks), "{full:?}");
    let tar = archive(&[hard("d/one", "node"), hard("d/two", "node")]);
    // Room for one copy, and none to spare.
    let limits = Limits { tar_size_bytes: tar.len() as u64 + 5000, ..Limits::default() };
    unpack_with(&tar, root.path(), Whiteouts::Overlay, limits).unwrap();
    let inode = |name: &str| fs::symlink_metadata(at(name)).unwrap().ino();
    assert_eq!(inode("d/one"), inode("d/two"), "one more node is enough for both");
    assert_eq!(inode("d/one") != inode("node"), full.is_some());
    root
}

#[test]
fn more_links_than_a_device_may_have_are_another_device() {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes().copy_from_slice(&raw(b"node", b'3', b"", b""));
    header.set_device_major(1).unwrap();
    header.set_device_minor(3).unwrap();
    header.set_mode(0o620);
    let root = link_once_more(&with_content(header, b""));
    let stat = fs::symlink_metadata(root.path().join("d/two")).unwrap();
    assert!(stat.file_type().is_char_device(), "{stat:?}");
    assert_eq!((stat.rdev(), stat.mode() & 0o7777), (rustix::fs::makedev(1, 3), 0o620));
}

#[test]
fn more_links_than_a_symbolic_link_may_have_are_another_one() {
    let root = link_once_more(&link("node", "/proc/version"));
    assert_eq!(fs::read_link(root.path().join("d/two")).unwrap(), Path::new("/proc/version"));
}

#[test]
fn more_links_than_a_file_may_have_are_one_copy() {
    let root = link_once_more(&file("node", &"x".repeat(5000)));
    assert_eq!(text(&root, "d/two"), "x".repeat(5000));
}

#[test]
fn t17_to_t21_whiteouts_name_something() {
    check_refused(&[file(".wh.", "")], Refusal::Whiteout);
    check_refused(&[file("a/.wh...", "")], Refusal::Whiteout);
    let root = check_ok(&[file(".wh..wh..opq", ""), file("a/.wh..wh.plnk", "")]);
    assert_eq!(xattrs(root.path(), ".")[&b"trusted.overlay.opaque"[..]], b"y");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    let root = check_ok(&[link("d", "/etc"), file("d/.wh.passwd", "")]);
    assert!(is_whiteout(&root, "etc/passwd"));
}

#[test]
fn t22_overlay_attributes_are_dropped() {
    let root = check_ok(&[
        pax("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        file("a", ""),
        pax("SCHILY.xattr.user.overlay.whiteout", b"y"),
        file("b", ""),
        pax("SCHILY.xattr.user.kept", b"a\nb"),
        file("c", ""),
    ]);
    for name in ["a", "b"] {
        assert!(xattrs(root.path(), name).is_empty());
    }
    assert_eq!(xattrs(root.path(), "c")[&b"user.kept"[..]], b"a\nb");
}

#[test]
fn t23_to_t25_bad_and_large_attributes() {
    check_broken(&[pax("SCHILY.xattr.security.capability", b"bad"), file("a", "")], Defect::XattrValue);
    for size in [(64 << 10) + 1, 2 << 20] {
        let error = unpack(&[pax("SCHILY.xattr.user.a", &vec![b'a'; size]), file("a", "")]).1.unwrap_err();
        assert!(matches!(error, ApplyError::Limit { .. }), "{error}");
    }
}

#[test]
fn t26_the_pax_size_wins_for_the_file_behind_it() {
    let inner = file("smuggled", "");
    let mut header = tar::Header::new_ustar();
    header.set_path("a").unwrap();
    for set in [tar::Header::set_uid, tar::Header::set_gid, tar::Header::set_mtime, tar::Header::set_size] {
        set(&mut header, 0);
    }
    header.set_mode(0o644);
    let root = check_ok(&[pax("size", b"512"), with_content(header, &inner)]);
    assert!(!root.path().join("smuggled").exists());
    assert_eq!(fs::metadata(root.path().join("a")).unwrap().len(), 512);
}

#[test]
fn t34_to_t37_damage_and_ends() {
    let mut bad = file("a", "text");
    bad[0] ^= 1;
    check_broken(&[bad], Defect::Checksum);
    let root = tempfile::tempdir().unwrap();
    let run = |tar: &[u8]| unpack_with(tar, root.path(), Whiteouts::Overlay, Limits::default());
    let torn = run(&file("a", &"x".repeat(2000))[..1000]).unwrap_err();
    assert!(matches!(torn, ApplyError::Broken { defect: Defect::Truncated, .. }), "{torn}");
    run(&file("a", "no end blocks")).unwrap();
    let trailing = [archive(&[file("a", "")]), b"garbage".to_vec()].concat();
    let applied = run(&trailing).unwrap();
    assert_eq!(applied.diff_id.0, Digest::of(&trailing));
    assert_eq!((applied.tar_size_bytes, applied.entries), (trailing.len() as u64, 1));
}

#[test]
fn t43_and_t44_names_the_kernel_would_not_take() {
    check_broken(&[pax("path", b"a\0b"), file("x", "")], Defect::Pax);
    let long = [b'a'; 256];
    check_broken(&[pax("path", &long), file("x", "")], Defect::Path(PathError::NameTooLong(256)));
    let deep = b"ab/".repeat(1366);
    check_broken(&[pax("path", &deep), file("x", "")], Defect::Path(PathError::TooLong(4098)));
    let root = check_ok(&[pax("path", b"new\nline\xff"), file("x", "kept")]);
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::OsStr::from_bytes(b"new\nline\xff");
    assert_eq!(fs::read_to_string(root.path().join(name)).unwrap(), "kept");
}

#[test]
fn gnu_long_names_are_read() {
    let name = format!("{}/{}", "d".repeat(200), "f".repeat(200));
    let long = raw(b"././@LongLink", b'L', b"", format!("{name}\0").as_bytes());
    assert_eq!(text(&check_ok(&[long, file("short", "long")]), &name), "long");
}

#[test]
fn the_last_entry_of_a_name_wins_whatever_it_is() {
    let root = check_ok(&[file("a", "old"), file("a", "new")]);
    assert_eq!(text(&root, "a"), "new");
    let root = check_ok(&[dir("a"), file("a/x", ""), file("a", "file")]);
    assert_eq!(text(&root, "a"), "file");
    let root = check_ok(&[file("a", "file"), dir("a"), file("a/x", "in")]);
    assert_eq!(text(&root, "a/x"), "in");
    check_broken(&[file("a", "file"), file("a/x", "")], Defect::ParentNotDirectory);
}

#[test]
fn owner_mode_and_nanoseconds_are_kept() {
    let mut header = tar::Header::new_ustar();
    header.set_path("su").unwrap();
    header.set_uid(7);
    header.set_gid(8);
    header.set_mode(0o6755);
    header.set_size(0);
    header.set_mtime(0);
    let root =
        check_ok(&[dir("d"), pax("mtime", b"12.000000345"), with_content(header, b""), file("d/x", "")]);
    let stat = fs::metadata(root.path().join("su")).unwrap();
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (7, 8, 0o6755));
    let time = Timestamp { secs: stat.mtime(), nanos: u32::try_from(stat.mtime_nsec()).unwrap() };
    assert_eq!(time, Timestamp { secs: 12, nanos: 345 });
    assert_eq!(fs::metadata(root.path().join("d")).unwrap().mtime(), 1, "set after its children");
}

#[test]
fn a_whiteout_hides_lower_files_and_not_those_of_its_layer() {
    let root = check_ok(&[file(".wh.gone", ""), file("here", "kept"), file(".wh.here", "")]);
    assert!(is_whiteout(&root, "gone"));
    assert_eq!(text(&root, "here"), "kept");
    for members in [[dir("d"), file(".wh.d", "")], [file(".wh.d", ""), dir("d")]] {
        let root = check_ok(&members);
        assert_eq!(xattrs(root.path(), "d")[&b"trusted.overlay.opaque"[..]], b"y");
    }
    let root = check_ok(&[file(".wh.d", ""), file("d/x", "in")]);
    assert_eq!(text(&root, "d/x"), "in");
    assert_eq!(xattrs(root.path(), "d")[&b"trusted.overlay.opaque"[..]], b"y");
}

#[test]
fn whiteouts_remove_where_the_root_holds_the_lower_files() {
    let root = tempfile::tempdir().unwrap();
    for name in ["dir", "opaque", "mixed"] {
        fs::create_dir(root.path().join(name)).unwrap();
        fs::write(root.path().join(name).join("lower"), "").unwrap();
    }
    symlink("/", root.path().join("opaque/link")).unwrap();
    let tar = archive(&[
        file(".wh.dir", ""),
        file("opaque/new", ""),
        file("opaque/.wh..wh..opq", ""),
        file("mixed/new", ""),
        file(".wh.mixed", ""),
        file("none/.wh.x", ""),
    ]);
    unpack_with(&tar, root.path(), Whiteouts::Remove, Limits::default()).unwrap();
    let names = |path: &str| -> Vec<_> {
        fs::read_dir(root.path().join(path)).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    assert!(!root.path().join("dir").exists() && !root.path().join("none").exists());
    assert_eq!((names("opaque"), names("mixed")), (vec!["new".into()], vec!["new".into()]));
}

#[test]
fn limits_stop_a_tar_before_it_is_written() {
    let tar = archive(&[file("a", &"x".repeat(4096)), file("b", "")]);
    for limits in
        [Limits { entries: 1, ..Limits::default() }, Limits { tar_size_bytes: 2048, ..Limits::default() }]
    {
        let root = tempfile::tempdir().unwrap();
        let error = unpack_with(&tar, root.path(), Whiteouts::Overlay, limits).unwrap_err();
        assert!(matches!(error, ApplyError::Limit { .. }), "{error}");
        assert!(!root.path().join("b").exists());
    }
}

#[test]
fn names_of_directories_that_are_kept_are_limited() {
    let deep = vec!["x".repeat(250); 15].join("/");
    let member = |nth: u32| [pax("path", format!("{deep}/{nth}").as_bytes()), dir("x")].concat();
    let members: Vec<u8> = (0..18_000).flat_map(member).collect();
    for whiteouts in [Whiteouts::Overlay, Whiteouts::Remove] {
        let root = tempfile::tempdir().unwrap();
        let error =
            unpack_with(&archive(std::slice::from_ref(&members)), root.path(), whiteouts, Limits::default());
        let what = "bytes of directory names";
        assert!(matches!(error, Err(ApplyError::Limit { what: found, .. }) if found == what), "{error:?}");
    }
}

/// Unpacks as `ADD` does, below `dst` of a tree that has a file beside it.
fn extract_into(
    prepare: impl FnOnce(&Path),
    members: &[Vec<u8>],
    owner: Option<(u32, u32)>,
) -> (TempDir, Result<Applied, ExtractError>) {
    let root = tempfile::tempdir().unwrap();
    let dst = root.path().join("dst");
    fs::create_dir(&dst).unwrap();
    prepare(&dst);
    let cancel = AtomicBool::new(false);
    let options = ExtractOptions { owner, limits: Limits::default(), cancel: &cancel };
    let result = extract(archive(members).as_slice(), File::open(&dst).unwrap().as_fd(), &options);
    (root, result)
}

#[test]
fn an_archive_stays_below_its_destination() {
    let members = [
        file("../up", "1"),
        file("a/../../../b", "2"),
        file("/abs//x", "3"),
        link("out", "/"),
        file("out/y", "4"),
        link("above", "../.."),
        dir("above/z"),
        hard("h", "../../abs/x"),
    ];
    let (root, result) = extract_into(|_| {}, &members, None);
    result.unwrap();
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    for (path, content) in [("up", "1"), ("b", "2"), ("abs/x", "3"), ("y", "4"), ("h", "3")] {
        assert_eq!(text(&root, &format!("dst/{path}")), content, "{path}");
    }
    assert!(root.path().join("dst/z").is_dir());
}

#[test]
fn in_an_archive_no_name_is_a_whiteout() {
    let prepare = |dst: &Path| fs::write(dst.join("kept"), "kept").unwrap();
    let (root, result) = extract_into(prepare, &[file(".wh.kept", "plain"), file(".wh..wh..opq", "")], None);
    result.unwrap();
    assert_eq!(text(&root, "dst/kept") + &text(&root, "dst/.wh.kept"), "keptplain");
    assert!(root.path().join("dst/.wh..wh..opq").exists());
}

#[test]
fn an_archives_directory_goes_where_a_link_at_its_place_leads() {
    let prepare = |dst: &Path| {
        fs::create_dir(dst.join("real")).unwrap();
        fs::write(dst.join("real/old"), "old").unwrap();
        symlink("/real", dst.join("link")).unwrap();
        symlink("new", dst.join("dangling")).unwrap();
        symlink("real/old", dst.join("file")).unwrap();
        symlink("/", dst.join("top")).unwrap();
    };
    let members = [
        dir("link/"),
        file("link/x", "x"),
        dir("dangling"),
        dir("top"),
        file("top/y", "y"),
        file("file", "file replaces links"),
    ];
    let (root, result) = extract_into(prepare, &members, None);
    result.unwrap();
    assert_eq!(text(&root, "dst/real/old") + &text(&root, "dst/real/x") + &text(&root, "dst/y"), "oldxy");
    assert!(fs::symlink_metadata(root.path().join("dst/link")).unwrap().is_symlink());
    assert!(root.path().join("dst/new").is_dir());
    assert!(fs::symlink_metadata(root.path().join("dst/file")).unwrap().is_file());
}

#[test]
fn the_owner_of_an_archives_members_can_be_given() {
    let mode = |root: &TempDir, path: &str| {
        let stat = fs::metadata(root.path().join(path)).unwrap();
        (stat.mode() & 0o7777, stat.uid(), stat.gid())
    };
    let mut top = tar::Header::new_ustar();
    top.as_old_mut().name[..2].copy_from_slice(b"./");
    top.as_old_mut().linkflag = [b'5'];
    top.set_mode(0o700);
    top.set_uid(9);
    top.set_gid(9);
    top.set_size(0);
    top.set_mtime(1);
    let members = [with_content(top, b""), file("made/x", "")];
    let (root, result) = extract_into(|_| {}, &members, Some((7, 8)));
    result.unwrap();
    // The archive's root is not the destination, and who makes `made/` is not asked.
    assert_eq!(mode(&root, "dst").1, 0);
    assert_eq!(mode(&root, "dst/made"), (0o755, 0, 0));
    assert_eq!(mode(&root, "dst/made/x"), (0o644, 7, 8));
}

#[test]
fn an_archive_cannot_make_overlays_whiteout() {
    let (_root, result) = extract_into(|_| {}, &[raw(b"null", b'3', b"", b"")], None);
    let error = result.unwrap_err();
    assert!(matches!(error.0, ApplyError::Refused { refusal: Refusal::OverlayDevice, .. }), "{error:?}");
    assert_eq!(error.to_string(), "archive entry \"null\" is refused: it is a device that hides files");
}

#[test]
fn access_lists_of_text_become_attributes() {
    let text = b"user::rw-\nuser:1001:r--\ngroup::r--\nmask::r--\nother::---\n";
    let named = b"user::rw-\nuser:lisa:r--\ngroup::r--\nmask::r--\nother::---\n";
    let root = check_ok(&[
        pax("SCHILY.acl.access", text),
        file("listed", ""),
        pax("SCHILY.acl.default", b"user::rwx\ngroup::r-x\nother::r-x\n"),
        dir("with-default"),
        pax("SCHILY.acl.access", named),
        file("named", ""),
    ]);
    let names = |name: &str| xattrs(root.path(), name).into_keys().collect::<Vec<_>>();
    if names("listed").is_empty() {
        eprintln!("SKIPPED ALOUD: needs a file system with POSIX ACLs");
        return;
    }
    assert_eq!(names("listed"), [b"system.posix_acl_access"]);
    assert_eq!(names("with-default"), [b"system.posix_acl_default"]);
    assert_eq!(names("named"), [b""; 0]);
}
