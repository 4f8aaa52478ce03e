//! Archives of the tools that people have, and such as nobody's tool writes, unpacked to what GNU tar and umoci
//! make of them. Layers with whiteouts, which GNU tar does not know, are judged by umoci. And each tree of the
//! corpus is the same when it has been a layer.
//!
//! Needs root, GNU tar, bsdtar, Python and umoci; what is missing is skipped aloud.

mod umoci;
mod written;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use kiln_layer::{
    Applied, ApplyOptions, DiffOptions, EntryKind, Limits, Reading, ScanOptions, TreeForm, Whiteouts, apply,
    bounded_decoder, diff, scan, shape,
};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

/// A tree and what makes it.
type Tree = (&'static str, fn(&Path));

const TREES: [Tree; 7] = [
    ("plain", plain),
    ("names", names),
    ("links", links),
    ("sparse", sparse),
    ("attributes", attributes),
    ("special", special),
    ("numbers", numbers),
];

fn plain(dir: &Path) {
    fs::create_dir_all(dir.join("usr/bin")).unwrap();
    fs::create_dir(dir.join("empty")).unwrap();
    fs::write(dir.join("usr/bin/tool"), "#!/bin/sh\n").unwrap();
    fs::write(dir.join("large"), vec![b'x'; 300_001]).unwrap();
    fs::write(dir.join("nothing"), "").unwrap();
    for (path, mode) in [("usr/bin/tool", 0o6755), ("empty", 0o1777), ("large", 0o600), ("nothing", 0)] {
        lchown(dir.join(path), Some(7), Some(8)).unwrap();
        fs::set_permissions(dir.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
}

fn names(dir: &Path) {
    for length in [98, 99, 100, 101, 155, 156, 200, 255] {
        fs::write(dir.join("f".repeat(length)), length.to_string()).unwrap();
        fs::create_dir(dir.join("d".repeat(length))).unwrap();
        fs::write(dir.join("d".repeat(length)).join("g".repeat(length)), "").unwrap();
        symlink("t".repeat(length), dir.join(format!("link{length}"))).unwrap();
    }
    for name in [&b"sp ace"[..], "ümläut".as_bytes(), b"not\xffutf8", b"new\nline", b"back\\slash", b"-dash"]
    {
        fs::write(dir.join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
    }
}

fn links(dir: &Path) {
    fs::create_dir_all(dir.join("a/b")).unwrap();
    fs::write(dir.join("a/file"), "linked").unwrap();
    fs::hard_link(dir.join("a/file"), dir.join("a/b/again")).unwrap();
    fs::hard_link(dir.join("a/file"), dir.join("z")).unwrap();
    symlink("../a/file", dir.join("a/b/up")).unwrap();
    symlink("/etc/passwd", dir.join("absolute")).unwrap();
    symlink("nowhere", dir.join("dangling")).unwrap();
    fs::hard_link(dir.join("dangling"), dir.join("dangling-too")).unwrap();
}

fn sparse(dir: &Path) {
    for (name, size, pieces) in [("hole", 1_000_000, 0_u64), ("pieces", 4_000_000, 40), ("odd", 77_777, 1)] {
        let file = File::create(dir.join(name)).unwrap();
        for piece in 0..pieces {
            file.write_all_at(b"piece of content", piece * 90_000).unwrap();
        }
        file.set_len(size).unwrap();
    }
}

fn attributes(dir: &Path) {
    fs::write(dir.join("file"), "").unwrap();
    fs::create_dir(dir.join("dir")).unwrap();
    let set = |path: &str, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(dir.join(path), name, value, XattrFlags::empty()).unwrap();
    };
    set("file", "user.text", b"value");
    set("file", "user.bytes", b"\0\n=\xff");
    set("file", "security.capability", &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    set("dir", "user.of-a-directory", &[b'v'; 300]);
}

fn special(dir: &Path) {
    let make = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, dir.join(name), kind, Mode::RUSR | Mode::WGRP, device).unwrap();
    };
    make("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    make("block", FileType::BlockDevice, rustix::fs::makedev(8, 17));
    make("pipe", FileType::Fifo, 0);
}

fn numbers(dir: &Path) {
    for (name, owner, secs, nanos) in [
        ("old", 0, 1, 0),
        ("precise", 65_534, 1_700_000_000, 123_456_789),
        ("large-owner", 2_097_151, 1_600_000_000, 0),
    ] {
        fs::write(dir.join(name), "").unwrap();
        lchown(dir.join(name), Some(owner), Some(owner)).unwrap();
        let time = Timespec { tv_sec: secs, tv_nsec: nanos };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, dir.join(name), &times, AtFlags::empty()).unwrap();
    }
}

/// A way to make an archive `$out` of the current directory: its name, the program it needs, and a
/// line for the shell.
struct Maker {
    name: String,
    needs: &'static str,
    line: String,
    /// Trees that its format can hold.
    trees: &'static [&'static str],
}

const ALL: &[&str] = &["plain", "names", "links", "sparse", "attributes", "special", "numbers"];
/// What ustar holds: no name longer than 255 bytes, no link target longer than 100.
const NO_LONG_NAMES: &[&str] = &["plain", "links", "sparse", "attributes", "special", "numbers"];
const V7: &[&str] = &["plain", "links", "sparse"];
const PYTHON: &str = "import sys, tarfile\n\
    with tarfile.open(sys.argv[1], sys.argv[2], format=getattr(tarfile, sys.argv[3])) as tar: tar.add('.')";

fn makers() -> Vec<Maker> {
    let mut makers = Vec::new();
    let mut add = |needs: &'static str, name: &str, trees: &'static [&'static str], line: String| {
        makers.push(Maker { name: format!("{needs} {name}"), needs, line, trees });
    };
    for (format, trees) in
        [("v7", V7), ("ustar", NO_LONG_NAMES), ("oldgnu", ALL), ("gnu", ALL), ("posix", ALL)]
    {
        add("tar", format, trees, format!("tar --format={format} --numeric-owner -cf $out ."));
    }
    for (name, options) in [
        ("with attributes", "--format=posix --xattrs --xattrs-include='*'"),
        ("sparse gnu", "--format=gnu --sparse"),
        ("sparse 0.0", "--format=posix --sparse --sparse-version=0.0"),
        ("sparse 0.1", "--format=posix --sparse --sparse-version=0.1"),
        ("sparse 1.0", "--format=posix --sparse --sparse-version=1.0"),
        ("pax options", "--format=posix --pax-option=exthdr.name=%d/x%f,delete=atime,delete=ctime"),
        ("links as files", "--format=gnu --hard-dereference"),
        ("large records", "--format=gnu -b 100"),
        ("sorted", "--format=posix --sort=name --owner=root:0 --group=staff:50"),
    ] {
        add("tar", name, ALL, format!("tar {options} -cf $out ."));
    }
    add("tar", "names without ./", &["plain", "links"], "tar -cf $out *".into());
    add(
        "tar",
        "files alone",
        &["sparse", "special", "numbers"],
        "find . ! -type d -print0 | tar --null -T - -cf $out".into(),
    );
    add("tar", "appended", &["plain", "links"], "tar -cf $out . && touch -d @5 * && tar -rf $out .".into());
    for (format, trees) in
        [("ustar", &["plain", "links", "sparse", "special"][..]), ("pax", ALL), ("gnutar", ALL), ("v7", V7)]
    {
        add("bsdtar", format, trees, format!("bsdtar --format {format} -cf $out ."));
    }
    for format in ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"] {
        let trees = if format == "USTAR_FORMAT" { NO_LONG_NAMES } else { ALL };
        add("python3", format, trees, format!("python3 -c \"{PYTHON}\" $out w {format}"));
    }
    for (name, needs, line) in [
        ("gzip", "gzip", "tar -cf - . | gzip > $out"),
        ("gzip of several members", "gzip", "tar -cf - . | split -b 100000 --filter 'gzip >> '$out"),
        ("bzip2", "bzip2", "tar -cf - . | bzip2 > $out"),
        ("several streams", "bzip2", "tar -cf - . | split -b 100000 --filter 'bzip2 >> '$out"),
        ("xz", "xz", "tar -cf - . | xz -0 > $out"),
        ("blocks of xz", "xz", "tar -cf - . | xz -0 --block-size=65536 --check=sha256 > $out"),
        ("zstd", "zstd", "tar -cf - . | zstd -q > $out"),
        (
            "skippable frames",
            "zstd",
            "{ tar -cf - . | zstd -q -19 --check; printf '\\120\\052\\115\\030\\3\\0\\0\\0abc'; } > $out",
        ),
        ("several frames", "zstd", "tar -cf - . | split -b 100000 --filter 'zstd -q >> '$out"),
    ] {
        add(needs, name, &["plain"], line.into());
    }
    makers
}

fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// All that both keep of a tree.
fn describe(dir: &Path) -> Vec<String> {
    let never = AtomicBool::new(false);
    let options = ScanOptions { hash: true, filter: None, stat_cache: None, cancel: &never };
    let mut first = HashMap::new();
    let entries = scan(File::open(dir).unwrap().as_fd(), b"", &options).unwrap();
    let lines = entries.into_iter().filter(|entry| !entry.path.is_empty()).map(|mut entry| {
        let path = entry.path.escape_ascii().to_string();
        entry.xattrs.retain(|name, _| name != b"security.selinux");
        let mut same = String::new();
        if let EntryKind::File { inode, .. } = &mut entry.kind {
            same = first.entry(*inode).or_insert(path.clone()).clone();
            *inode = (0, 0);
        }
        let kiln_layer::Entry { kind, mode, uid, gid, mtime, xattrs, .. } = entry;
        format!("{path} {kind:?} {mode:o} {uid}:{gid} {mtime:?} {xattrs:?} {same}")
    });
    lines.collect()
}

fn apply_to(tar: impl Read + Send, to: &Path) -> Applied {
    let never = AtomicBool::new(false);
    let (whiteouts, limits) = (Whiteouts::Remove, Limits::default());
    let options =
        ApplyOptions { whiteouts, keep_owner: true, limits, reading: Reading::Ahead, cancel: &never };
    let root = File::open(to).unwrap();
    apply(tar, root.as_fd(), &options).unwrap_or_else(|error| panic!("{error}: {error:?}"))
}

fn unpack(archive: &Path, to: &Path) {
    let never = AtomicBool::new(false);
    let (_, plain) =
        bounded_decoder(BufReader::new(File::open(archive).unwrap()), &Limits::default()).unwrap();
    let applied = apply_to(plain, to);
    let root = File::open(to).unwrap();
    // A tree has the shape of the very tar that it gives again, and of no other.
    let options = DiffOptions { form: TreeForm::Plain, root_entry: false, cancel: &never };
    let again = diff(root.as_fd(), std::io::sink(), &options).expect("archives have no reserved names");
    let of_tree = shape(root.as_fd(), &options).expect("as above");
    assert_eq!(of_tree == applied.shape, again.diff_id == applied.diff_id, "{}", archive.display());
}

#[test]
fn archives_unpack_to_what_gnu_tar_makes_of_them() {
    if !rustix::process::geteuid().is_root() || !is_there("tar") {
        eprintln!("SKIPPED ALOUD: needs root and GNU tar");
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    for (name, make) in TREES {
        fs::create_dir(temp.path().join(name)).unwrap();
        make(&temp.path().join(name));
    }
    let (mut count, mut by_umoci) = (0, 0);
    for maker in makers() {
        if !is_there(maker.needs) {
            eprintln!("SKIPPED ALOUD: {} is not installed", maker.needs);
            continue;
        }
        for tree in maker.trees {
            let what = format!("{} of {tree}", maker.name);
            let work = tempfile::tempdir().unwrap();
            let archive = work.path().join("archive");
            let made = Command::new("sh")
                .args(["-ec", &maker.line])
                .env("out", &archive)
                .current_dir(temp.path().join(tree))
                .output()
                .unwrap();
            assert!(made.status.success(), "{what}: {}", String::from_utf8_lossy(&made.stderr));
            let [theirs, ours] = two(work.path());
            gnu_unpack(&archive, &theirs, &what);
            unpack(&archive, &ours);
            assert_same(&ours, &theirs, &what);
            if umoci::is_there() && umoci::reads(&maker.name) {
                let layer = fs::read(&archive).unwrap();
                if let Some(theirs) = umoci::unpack(&[layer], work.path(), &what) {
                    assert_same(&ours, &theirs, &format!("{what}, by umoci"));
                    by_umoci += 1;
                }
            }
            count += 1;
        }
    }
    eprintln!("{count} archives, {by_umoci} of them also by umoci");
    assert!(count >= 40, "{count}");
    assert!(by_umoci >= 40 || !umoci::is_there(), "{by_umoci}");
}

/// Unpacks with GNU tar, keeping all that it keeps.
#[track_caller]
fn gnu_unpack(archive: &Path, to: &Path, what: &str) {
    let unpacked = Command::new("tar")
        .args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "--delay-directory-restore", "-xpf"])
        .arg(archive)
        .current_dir(to)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&unpacked.stderr).into_owned();
    assert!(unpacked.status.success(), "{what}: {told}");
}

#[track_caller]
fn assert_same(ours: &Path, theirs: &Path, what: &str) {
    let (theirs, ours) = (describe(theirs), describe(ours));
    for (theirs, ours) in theirs.iter().zip(&ours) {
        assert_eq!(ours, theirs, "{what}");
    }
    assert_eq!(ours.len(), theirs.len(), "{what}");
    assert!(!ours.is_empty(), "{what}");
}

/// Two empty directories in `work`.
fn two(work: &Path) -> [PathBuf; 2] {
    ["theirs", "ours"].map(|name| {
        fs::create_dir(work.join(name)).unwrap();
        work.join(name)
    })
}

fn may(tool: &str) -> bool {
    let can = rustix::process::geteuid().is_root() && is_there(tool);
    if !can {
        eprintln!("SKIPPED ALOUD: needs root and {tool}");
    }
    can
}

#[test]
fn headers_written_by_hand_mean_what_they_mean_to_gnu_tar_and_umoci() {
    if !may("tar") {
        return;
    }
    for written in written::written() {
        let work = tempfile::tempdir().unwrap();
        let [theirs, ours] = two(work.path());
        let archive = work.path().join("archive");
        fs::write(&archive, &written.bytes).unwrap();
        gnu_unpack(&archive, &theirs, written.name);
        unpack(&archive, &ours);
        assert_same(&ours, &theirs, written.name);
        if umoci::is_there()
            && let Some(theirs) = umoci::unpack(&[written.bytes], work.path(), written.name)
        {
            assert_same(&ours, &theirs, &format!("{}, by umoci", written.name));
        }
    }
}

#[test]
fn whiteouts_hide_what_they_hide_from_umoci() {
    if !may("umoci") {
        return;
    }
    for (what, layers) in written::stacks() {
        let work = tempfile::tempdir().unwrap();
        let [_, ours] = two(work.path());
        for layer in &layers {
            apply_to(&layer[..], &ours);
        }
        let theirs = umoci::unpack(&layers, work.path(), what).expect("kinds that it knows");
        assert_same(&ours, &theirs, what);
    }
}

#[test]
fn each_tree_is_the_same_when_it_has_been_a_layer() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED ALOUD: needs root");
        return;
    }
    for (name, make) in TREES {
        let work = tempfile::tempdir().unwrap();
        let [tree, again] = two(work.path());
        make(&tree);
        let never = AtomicBool::new(false);
        let options = DiffOptions { form: TreeForm::Plain, root_entry: false, cancel: &never };
        let mut layer = Vec::new();
        let written = diff(File::open(&tree).unwrap().as_fd(), &mut layer, &options).unwrap();
        let applied = apply_to(&layer[..], &again);
        assert_eq!(applied.diff_id, written.diff_id, "{name}");
        assert_same(&again, &tree, name);
    }
}
