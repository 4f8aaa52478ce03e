//! Sparse files: what GNU tar writes and reads itself, and what nobody should.

use std::os::unix::fs::FileExt;
use std::process::Command;

use super::*;

/// One header of GNU's type `S`; `numbers` are offset and length in turn.
fn old(real_size: u64, numbers: &[u64], extended: bool, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    let fields = header.as_gnu_mut().unwrap();
    fields.name[..1].copy_from_slice(b"s");
    fields.typeflag = [b'S'];
    fields.isextended = [extended.into()];
    fields.realsize = binary(real_size);
    for (entry, pair) in fields.sparse.iter_mut().zip(numbers.chunks(2)) {
        entry.offset = binary(pair[0]);
        entry.numbytes = binary(pair[1]);
    }
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(content.len() as u64);
    with_content(header, content)
}

/// GNU's form for numbers of any size.
fn binary(number: u64) -> [u8; 12] {
    let mut field = [0; 12];
    field[0] = 0x80;
    field[4..].copy_from_slice(&number.to_be_bytes());
    field
}

/// Several records in one header, then a member with `content`.
fn with_records(records: &[(&str, &str)], content: &[u8]) -> Vec<u8> {
    let mut text = String::new();
    for (key, value) in records {
        let mut length = key.len() + value.len() + 3;
        length += (length + length.to_string().len()).to_string().len();
        text += &format!("{length} {key}={value}\n");
    }
    [raw(b"x", b'x', b"", text.as_bytes()), raw(b"s", b'0', b"", content)].concat()
}

/// A member of PAX 1.0: `map` is padded to blocks and stands before `content`.
fn pax_1_0(real_size: u64, map: &str, content: &[u8]) -> Vec<u8> {
    let mut stored = map.as_bytes().to_vec();
    stored.resize(stored.len().next_multiple_of(512), 0);
    stored.extend_from_slice(content);
    let size = real_size.to_string();
    with_records(
        &[("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", &size)],
        &stored,
    )
}

#[track_caller]
fn check_limit(members: &[Vec<u8>]) {
    let (root, result) = unpack(members);
    assert!(matches!(result, Err(ApplyError::Limit { .. })), "{result:?}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

/// Makes files with holes in `dir`; their names.
fn holey_files(dir: &Path) -> Vec<String> {
    let make = |name: &str, size: u64, pieces: &[(u64, &[u8])]| {
        let file = File::create(dir.join(name)).unwrap();
        for (offset, piece) in pieces {
            file.write_all_at(piece, *offset).unwrap();
        }
        file.set_len(size).unwrap();
    };
    let many: Vec<(u64, &[u8])> = (0..150).map(|n| (n * (64 << 10), &b"piece"[..])).collect();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(120));
    fs::create_dir(dir.join("d".repeat(120))).unwrap();
    make("middle", 4 << 20, &[(2 << 20, b"middle\n")]);
    make("ends", (1 << 20) + 7, &[(0, b"start"), (1 << 20, b"the end")]);
    make("empty", 0, &[]);
    make("hole", 3 << 20, &[]);
    make("odd", 1_000_003, &[(500_000, b"odd")]);
    make("full", 5000, &[(0, &[b'x'; 5000])]);
    // More pieces than a header and one block behind it hold.
    make("many", 150 * (64 << 10), &many);
    make(&long, 1 << 20, &[(9000, b"long name")]);
    ["middle", "ends", "empty", "hole", "odd", "full", "many", &long].map(String::from).into()
}

#[test]
fn sparse_files_of_gnu_tar_become_what_gnu_tar_makes_of_them() {
    let version = Command::new("tar").arg("--version").output();
    if !version.is_ok_and(|output| output.stdout.starts_with(b"tar (GNU tar)")) {
        eprintln!("skipped: needs GNU tar");
        return;
    }
    let run = |arguments: &[&str], dir: &Path| {
        let status = Command::new("tar").args(arguments).current_dir(dir).status().unwrap();
        assert!(status.success(), "{arguments:?}");
    };
    let source = tempfile::tempdir().unwrap();
    let names = holey_files(source.path());
    for form in [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
        // Holes found by looking for zeros instead of by asking the file system.
        &["--format=gnu", "--hole-detection=raw"],
        &["--format=posix", "--hole-detection=raw"],
    ] {
        let work = tempfile::tempdir().unwrap();
        let archive = work.path().join("a.tar");
        let create = [&["--sparse", "-cf", archive.to_str().unwrap()][..], form, &["."]].concat();
        run(&create, source.path());
        assert!(fs::metadata(&archive).unwrap().len() < 2 << 20, "{form:?}: tar wrote the holes");
        let theirs = work.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        run(&["-xf", archive.to_str().unwrap()], &theirs);
        let bytes = fs::read(&archive).unwrap();
        let ours = tempfile::tempdir().unwrap();
        let applied = unpack_with(&bytes, ours.path(), Whiteouts::Overlay, Limits::default()).unwrap();
        assert_eq!((applied.diff_id.0, applied.entries), (Digest::of(&bytes), 10), "{form:?}");
        for name in &names {
            let content = fs::read(ours.path().join(name)).unwrap();
            assert!(content == fs::read(theirs.join(name)).unwrap(), "{form:?} {name}");
            assert!(content == fs::read(source.path().join(name)).unwrap(), "{form:?} {name}");
        }
        let allocated = |name: &str| fs::metadata(ours.path().join(name)).unwrap().blocks() * 512;
        assert!(allocated("hole") < 1 << 20 && allocated("middle") < 1 << 20, "{form:?}: holes were filled");
        assert!(!ours.path().join("GNUSparseFile.0").exists());
    }
}

#[test]
fn what_follows_a_sparse_file_is_found() {
    let members = [
        old(10, &[2, 2, 6, 1], false, b"abc"),
        file("behind", "1"),
        pax_1_0(1 << 20, "1\n3\n2\n", b"de"),
        file("last", "2"),
    ];
    let root = check_ok(&members);
    assert_eq!(text(&root, "behind") + &text(&root, "last"), "12");
    let content = fs::read(root.path().join("s")).unwrap();
    assert_eq!((content.len(), &content[..8]), (1 << 20, &b"\0\0\0de\0\0\0"[..]));
    let root = check_ok(&members[..1]);
    assert_eq!(text(&root, "s"), "\0\0ab\0\0c\0\0\0");
}

#[test]
fn a_sparse_file_has_the_name_in_its_records_and_stays_inside() {
    let records = |name| {
        let map = [("GNU.sparse.size", "4"), ("GNU.sparse.numblocks", "1"), ("GNU.sparse.map", "1,2")];
        with_records(&[&map[..], &[("GNU.sparse.name", name)]].concat(), b"ab")
    };
    let root = check_ok(&[records("d/real")]);
    assert_eq!(text(&root, "d/real"), "\0ab\0");
    assert!(!root.path().join("s").exists());
    check_refused(&[records("../up")], Refusal::Escapes);
    check_broken(&[records("a\0b")], Defect::Path(PathError::Nul));
}

#[test]
fn t29_a_sparse_file_of_8_eib_is_refused_before_it_is_made() {
    let most = u64::MAX >> 1;
    check_limit(&[old(most, &[0, 1], false, b"a")]);
    check_limit(&[pax_1_0(most, "1\n0\n1\n", b"a")]);
    let size = most.to_string();
    check_limit(&[with_records(
        &[("GNU.sparse.size", &size), ("GNU.sparse.numblocks", "1"), ("GNU.sparse.map", "0,1")],
        b"a",
    )]);
    check_broken(&[old(most + 1, &[0, 1], false, b"a")], Defect::SparseMap);
}

#[test]
fn holes_of_all_files_count_together() {
    let half = Limits::default().tar_size_bytes / 2;
    let (root, result) = unpack(&[old(half, &[], false, b""), old(half, &[], false, b"")]);
    assert!(matches!(result, Err(ApplyError::Limit { actual, .. }) if actual > 2 * half), "{result:?}");
    assert_eq!(fs::metadata(root.path().join("s")).unwrap().len(), half);
}

#[test]
fn maps_that_lie_are_refused() {
    for (size, numbers, content) in [
        (100, &[0, 5, 4, 5][..], 10),
        (100, &[50, 5, 0, 5], 10),
        (100, &[99, 2], 2),
        (100, &[u64::MAX >> 1, 2], 2),
        (100, &[0, 10], 9),
        (100, &[0, 10], 11),
        (100, &[0, u64::MAX], 10),
    ] {
        let content = vec![b'x'; content];
        check_broken(&[old(size, numbers, false, &content), file("a", "")], Defect::SparseMap);
        let lines: String = numbers.iter().map(|n| format!("{n}\n")).collect();
        let map = format!("{}\n{lines}", numbers.len() / 2);
        check_broken(&[pax_1_0(size, &map, &content), file("a", "")], Defect::SparseMap);
    }
    // Type `S` in a header of POSIX, which has a prefix where the map would be.
    check_broken(&[raw(b"s", b'S', b"", b"")], Defect::SparseMap);
    // Only files have holes.
    let records = pax("GNU.sparse.map", b"0,0");
    check_broken(&[records, dir("d")], Defect::SparseMap);
    let future = [("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "1")];
    check_broken(&[with_records(&future, b"a")], Defect::SparseFormat);
}

#[test]
fn a_map_in_the_content_ends_with_the_content() {
    // The member behind would pass for the map's next lines.
    check_broken(&[pax_1_0(10, "2\n0\n1\n", b""), file("5\n1\n", "")], Defect::SparseMap);
    let short = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "1")];
    check_broken(&[with_records(&short, b"0\n")], Defect::SparseMap);
}

#[test]
fn the_number_of_segments_is_bounded() {
    let limit = usize::try_from(Limits::default().pax_size_bytes).unwrap();
    // Empty pieces only, in as many blocks as one likes.
    let mut block = [b'0'; 512];
    block[504..].fill(1);
    let blocks = block.repeat(limit / 512 + 1);
    check_limit(&[[old(0, &[], true, b""), blocks].concat()]);
    let lines = "0\n".repeat(limit);
    check_limit(&[pax_1_0(0, &format!("{limit}\n{lines}"), b"")]);
}

#[test]
fn a_map_cut_off_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    for whole in [old(10, &[0, 1], true, b""), pax_1_0(10, "1\n0\n1\n", b"a")[..1536 + 100].to_vec()] {
        let error = unpack_with(&whole, root.path(), Whiteouts::Overlay, Limits::default()).unwrap_err();
        assert!(matches!(error, ApplyError::Broken { defect: Defect::Truncated, .. }), "{error}");
    }
}
