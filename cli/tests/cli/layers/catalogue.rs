//! The catalogue of bad and odd layers, each through `kiln load` and `kiln import`.
//!
//! Of every case the exit code is fixed, and for those that unpack, the tree. What holds for all is in
//! [`crate::universal`].

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::raw::*;
use super::{docker_archive, listing, only_snapshot};
use crate::harness::{Store, needs_root, test_as, text};
use crate::universal::Watch;

/// What becomes of a layer.
enum Expected<'a> {
    /// It unpacks to this.
    Tree(&'a [&'a str]),
    /// It unpacks; the test looks at it itself.
    Loaded,
    /// This exit code and these words.
    Error(i32, &'a [&'a str]),
}
use Expected::{Error, Loaded, Tree};

const STORE: i32 = 6;
const POLICY: i32 = 7;
const LIMIT: i32 = 8;

/// Loads and imports a layer that may be compressed, and holds kiln to what every input is bound to.
#[track_caller]
fn check_packed(plain: &[u8], packed: &[u8], expected: &Expected<'_>) -> (Store, Store) {
    let checked = ["load", "import"].map(|command| {
        let store = Store::empty();
        let source = store.beside("layer");
        let args = if command == "load" {
            fs::write(&source, docker_archive("hostile:1", &[(plain, packed)])).unwrap();
            vec!["load", "-i", text(&source)]
        } else {
            fs::write(&source, packed).unwrap();
            vec!["import", text(&source), "hostile:1"]
        };
        // Makes the store, so that what is compared is not only its directories.
        store.ok(&["images"]);
        let watch = Watch::new(&store);
        match expected {
            Error(code, says) => drop(watch.refuses(&store.command(&args), *code, says)),
            Tree(lines) => {
                watch.kiln(&args).expect(0);
                // What an import stands on is nothing: whiteouts have nothing to hide there.
                let lines: Vec<&str> = match command {
                    "load" => lines.to_vec(),
                    _ => lines.iter().copied().filter(|line| !line.ends_with(" (0, 0)")).collect(),
                };
                assert_eq!(listing(&only_snapshot(&store)), lines, "{command}");
            }
            Loaded => drop(watch.kiln(&args).expect(0)),
        }
        store
    });
    checked.into()
}

#[track_caller]
fn check(members: &[Vec<u8>], expected: &Expected<'_>) -> (Store, Store) {
    let tar = tar(members);
    check_packed(&tar, &tar, expected)
}

#[test]
fn t01_to_t05_paths_stay_inside() {
    needs_root!();
    check(&[file("../x", "")], &Error(POLICY, &["../x", "outside the root"]));
    check(&[file("/abs/x", "inside")], &Tree(&["abs/", "abs/x = inside"]));
    check(&[file("a/../../x", "")], &Error(POLICY, &["a/../../x", "outside the root"]));
    check(&[symlink("d", "/etc"), file("d/passwd", "in")], &Tree(&["d -> /etc", "etc/", "etc/passwd = in"]));
    check(&[symlink("d", "../../.."), file("d/x", "in")], &Tree(&["d -> ../../..", "x = in"]));
    check(
        &[symlink("d", "../sentinel"), file("d/passwd", "in")],
        &Tree(&["d -> ../sentinel", "sentinel/", "sentinel/passwd = in"]),
    );
}

#[test]
fn t06_and_t07_a_directory_replaces_a_link_and_nothing_the_root() {
    needs_root!();
    let open = Member::new("d", b'5').mode(0o777).bytes();
    check(&[symlink("d", "/etc"), open, file("d/x", "in")], &Tree(&["d/", "d/x = in"]));
    check(&[symlink(".", "/etc")], &Error(POLICY, &["replaces the root"]));
    check(&[symlink("./", "/etc")], &Error(POLICY, &["replaces the root"]));
    check(&[hard_link("/", "x")], &Error(POLICY, &["replaces the root"]));
}

#[test]
fn t08_to_t12_hard_links_lead_to_earlier_files_of_the_layer() {
    needs_root!();
    check(&[hard_link("x", "/etc/shadow")], &Error(STORE, &["\"x\"", "hard link"]));
    check(&[hard_link("x", "../../x")], &Error(POLICY, &["\"x\"", "outside the root"]));
    check(&[hard_link("x", "later"), file("later", "")], &Error(STORE, &["\"x\"", "not there"]));
    check(
        &[symlink("l", "/etc/shadow"), hard_link("x", "l")],
        &Tree(&["l -> /etc/shadow", "x -> /etc/shadow"]),
    );
    check(&[dir("d"), hard_link("x", "d")], &Error(STORE, &["\"x\"", "directory"]));
}

#[test]
fn t13_more_links_than_the_file_system_has_become_copies() {
    needs_root!();
    const LINKS: usize = 70_000;
    let mut members = vec![file("first", "content")];
    members.extend((1..LINKS).map(|nth| hard_link(&format!("links/{nth}"), "first")));
    let (loaded, _) = check(&members, &Loaded);
    let tree = only_snapshot(&loaded);
    let stats = fs::read_dir(tree.join("links")).unwrap().map(|e| e.unwrap().metadata().unwrap());
    let (mut count, mut inodes) = (1, std::collections::HashSet::new());
    for stat in stats {
        assert_eq!((stat.len(), stat.mtime(), stat.mode() & 0o777), (7, 1, 0o644));
        inodes.insert(stat.ino());
        count += 1;
    }
    assert_eq!(count, LINKS);
    // ext4 takes 65,000 links, btrfs and xfs take more.
    assert!(inodes.len() <= 2, "{} files", inodes.len());
}

#[test]
fn t14_to_t16_devices_are_of_no_use_on_the_host_and_pipes_are_not_opened() {
    needs_root!();
    let device = Member::new("dev", b'3').device(8, 0).mode(0o666).bytes();
    let (loaded, _) = check(&[device, Member::new("pipe", b'6').bytes()], &Tree(&["dev (8, 0)", "pipe |"]));
    for part in ["", "snapshots", "snapshots/committed"] {
        let mode = fs::metadata(loaded.root().join(part)).unwrap().mode() & 0o777;
        assert_eq!(mode, 0o700, "others must not reach devices in the store by {part:?}");
    }
    let saved = loaded.beside("saved.tar");
    loaded.ok(&["save", "-o", text(&saved), "hostile:1"]);
    let again = Store::empty();
    again.ok(&["load", "-i", text(&saved)]);
    assert_eq!(listing(&only_snapshot(&again)), ["dev (8, 0)", "pipe |"]);
    check(&[Member::new("dev", b'3').device(0, 0).bytes()], &Error(POLICY, &["\"dev\"", "hides files"]));
    // What overlayfs takes for 0:0 once the kernel has cut the number down.
    let cut = Member::new("dev", b'3').device(1 << 12, 1 << 20).bytes();
    check(&[cut], &Error(STORE, &["\"dev\"", "device"]));
}

#[test]
fn t17_to_t21_whiteouts_name_something_inside() {
    needs_root!();
    check(&[file(".wh.", "")], &Error(POLICY, &["\".wh.\"", "whiteout"]));
    check(&[file(".wh...", "")], &Error(POLICY, &["\".wh...\"", "whiteout"]));
    check(&[file("a/.wh..", "")], &Error(POLICY, &["whiteout"]));
    let (loaded, _) = check(&[file(".wh..wh..opq", ""), file("kept", "")], &Tree(&["kept = "]));
    let mut value = [0; 8];
    let opaque = if test_as().is_some() { "user.overlay.opaque" } else { "trusted.overlay.opaque" };
    let length = rustix::fs::getxattr(only_snapshot(&loaded), opaque, &mut value).unwrap();
    assert_eq!(&value[..length], b"y");
    check(&[dir("a"), file("a/.wh..wh.plnk", "")], &Tree(&["a/"]));
    check(
        &[symlink("d", "/etc"), dir("etc"), file("d/.wh.passwd", "")],
        &Tree(&["d -> /etc", "etc/", "etc/passwd (0, 0)"]),
    );
}

#[test]
fn t22_to_t25_attributes_of_overlayfs_are_dropped_and_bad_ones_refused() {
    needs_root!();
    let (loaded, imported) = check(
        &[
            pax(&[("SCHILY.xattr.user.overlay.redirect", b"/etc"), ("SCHILY.xattr.user.kept", b"a\nb\0c")]),
            dir("a"),
            pax(&[("SCHILY.xattr.trusted.overlay.opaque", b"y")]),
            dir("b"),
            pax(&[("LIBARCHIVE.xattr.trusted.overlay.metacopy", b""), ("SCHILY.xattr.trusted.x", b"1")]),
            file("c", ""),
        ],
        &Tree(&["a/", "b/", "c = "]),
    );
    for store in [loaded, imported] {
        let attributes = ["a", "b", "c"].map(|name| {
            let mut names = vec![0; 1024];
            let length = rustix::fs::llistxattr(only_snapshot(&store).join(name), &mut names[..]).unwrap();
            let names = names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty());
            // SELinux labels everything, where it is on; overlayfs notes that what it makes is pure.
            let names = names.filter(|n| *n != b"security.selinux" && *n != b"trusted.overlay.opaque");
            names.map(|name| name.escape_ascii().to_string()).collect::<Vec<_>>().join(" ")
        });
        assert_eq!(attributes, ["user.kept", "", ""]);
    }
    let capability = |value: &[u8]| [pax(&[("SCHILY.xattr.security.capability", value)]), file("x", "")];
    check(&capability(b"bad"), &Error(STORE, &["\"x\"", "attribute"]));
    check(&capability(&[0xff; 20]), &Error(STORE, &["\"x\"", "attribute"]));
    let large = vec![b'v'; 1 << 20];
    check(&[pax(&[("SCHILY.xattr.user.a", &large)]), file("x", "")], &Error(LIMIT, &["extension header"]));
    let names: Vec<String> = (0..100_000).map(|nth| format!("SCHILY.xattr.user.{nth}")).collect();
    let records: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"v"[..])).collect();
    check(&[pax(&records), file("x", "")], &Error(LIMIT, &["extension header"]));
}

#[test]
fn t26_to_t28_extensions_mean_what_they_mean_to_go() {
    needs_root!();
    let smuggled = tar(&[file("smuggled", "")]);
    // The record's size counts, for the file behind it and for no other.
    let inner = Member::new("a", b'0').lying_content(&smuggled).bytes();
    let size = smuggled.len().to_string();
    let members = [pax(&[("size", size.as_bytes())]), inner, file("b", "next")];
    check(&members, &Tree(&[&format!("a {size} bytes"), "b = next"]));
    // A size in front of a long name is not the long name's.
    let long = "n".repeat(150);
    let members = [
        pax(&[("size", b"4")]),
        gnu_long(b'L', long.as_bytes()),
        Member::new("short", b'0').lying_content(b"text").bytes(),
        file("b", ""),
    ];
    check(&members, &Tree(&["b = ", &format!("{long} = text")]));
    let global = Member::new("pax_global", b'g').content(pax_records(&[("path", b"/etc/global")])).bytes();
    check(&[global, file("a", "own name")], &Tree(&["a = own name"]));
}

#[test]
fn t29_to_t33_numbers_without_measure() {
    needs_root!();
    let sparse = Member::new("s", b'S').field(257, 8, b"ustar  \0").binary(483, 12, i128::from(i64::MAX));
    check(&[sparse.bytes()], &Error(LIMIT, &["holes"]));
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", b"9223372036854775807"),
    ];
    let map = [&b"0\n"[..], &[0; 510]].concat();
    check(&[pax(&records), Member::new("s", b'0').content(map).bytes()], &Error(LIMIT, &["holes"]));
    check(&[gnu_long(b'L', &vec![b'n'; 10 << 20]), file("x", "")], &Error(LIMIT, &["extension header"]));
    check(&[Member::new("x", b'0').binary(124, 12, -1).bytes()], &Error(STORE, &["\"x\"", "size"]));
    check(&[Member::new("x", b'0').binary(108, 8, 1 << 40).bytes()], &Error(STORE, &["\"x\"", "uid"]));
    check(&[pax(&[("uid", b"4294967296")]), file("x", "")], &Error(STORE, &["\"x\"", "uid"]));
    for time in [-(1_i128 << 62), 1 << 62] {
        check(&[Member::new("x", b'0').binary(136, 12, time).bytes()], &Tree(&["x = "]));
    }
    check(&[pax(&[("mtime", b"99999999999999999999")]), file("x", "")], &Error(STORE, &["mtime"]));
}

#[test]
fn t34_to_t37_damage_and_what_may_be_missing() {
    needs_root!();
    let mut bad = file("x", "text");
    bad[0] ^= 1;
    check(&[bad], &Error(STORE, &["checksum"]));
    let torn = &file("x", &"t".repeat(4000))[..1500];
    check_packed(torn, torn, &Error(STORE, &["cut off"]));
    let endless = file("x", "no end");
    check_packed(&endless, &endless, &Tree(&["x = no end"]));
    let trailing = [tar(&[file("x", "a")]), b"garbage, and a header in it".to_vec(), file("y", "")].concat();
    check_packed(&trailing, &trailing, &Tree(&["x = a"]));
}

#[test]
fn t38_to_t41_compressed_streams() {
    needs_root!();
    let tar = tar(&[file("x", "text")]);
    let ok = Tree(&["x = text"]);
    check_packed(&tar, &[gzip(&tar[..700]), gzip(&tar[700..])].concat(), &ok);
    check_packed(&tar, &[gzip(&tar), b"junk".to_vec()].concat(), &Error(STORE, &["cannot read the layer"]));
    let torn = gzip(&tar);
    check_packed(&tar, &torn[..torn.len() - 3], &Error(STORE, &["cannot read the layer"]));
    check_packed(&tar, &[zstd_skippable(b"index"), zstd(&tar, 20, None), zstd_skippable(b"")].concat(), &ok);
    check_packed(&tar, &zstd(&tar, 20, Some(7)), &Error(STORE, &["cannot read the layer"]));
    check_packed(&tar, &zstd(&tar, 31, None), &Error(LIMIT, &["128 MiB"]));
}

#[test]
fn t42_a_bomb_is_cut_off_and_its_disk_returned() {
    needs_root!();
    const SIZE: u64 = 10 << 30;
    // Ten million bytes of gzip: a header, then the same 64 MiB of zeros again and again.
    let header = Member::new("zeros", b'0').binary(124, 12, i128::from(SIZE)).bytes();
    let piece = gzip(&vec![0; 64 << 20]);
    let packed = [gzip(&header), piece.repeat(usize::try_from(SIZE >> 26).unwrap())].concat();
    assert!(packed.len() < 11 << 20);
    let (loaded, _) = check_packed(&header, &packed, &Error(LIMIT, &["times"]));
    let usage = std::process::Command::new("du").arg("-sk").arg(loaded.root()).output().unwrap().stdout;
    let kib: u64 = String::from_utf8_lossy(&usage).split('\t').next().unwrap().parse().unwrap();
    assert!(kib < 32 << 10, "{kib} KiB are left");
}

#[test]
fn t42_honest_zeros_pass_when_their_size_is_named() {
    needs_root!();
    let store = Store::empty();
    let size: u64 = 1_100 << 20;
    let header = Member::new("zeros", b'0').octal(124, 12, size).bytes();
    let packed = [gzip(&header), gzip(&vec![0; 100 << 20]).repeat(11), gzip(&[0; 1024])].concat();
    let input = store.beside("zeros.tar.gz");
    fs::write(&input, packed).unwrap();
    store.kiln(&["import", text(&input), "zeros:1"]).expect(LIMIT).says(&["times", "--max-layer"]);
    store
        .kiln(&["import", "--max-layer", "1GB", text(&input), "zeros:1"])
        .expect(LIMIT)
        .says(&["--max-layer"]);
    let config = store.beside("config.toml");
    fs::write(&config, "max-layer = \"2GB\"\n").unwrap();
    let mut configured = store.command(&["import", text(&input), "zeros:1"]);
    store
        .bounded({
            configured.env("KILN_CONFIG", &config);
            configured
        })
        .expect(0);
    assert_eq!(listing(&only_snapshot(&store)), ["zeros 1153433600 bytes"]);

    // A named limit is one for honest layers, too; the command line goes before the file.
    let plain = tar(&[file("x", "text")]);
    let archive = store.beside("small.tar");
    fs::write(&archive, docker_archive("small:1", &[(&plain, &plain)])).unwrap();
    let mut small = store.command(&["load", "--max-layer", "1kB", "-i", text(&archive)]);
    small.env("KILN_CONFIG", &config);
    store.bounded(small).expect(LIMIT).says(&["1000 are allowed", "--max-layer"]);
    store.ok(&["load", "--max-layer", "100kB", "-i", text(&archive)]);

    // An archive that is compressed as a whole may have four times as much.
    let whole = store.beside("small.tar.gz");
    fs::write(&whole, gzip(&fs::read(&archive).unwrap())).unwrap();
    let refused = store.kiln(&["load", "--max-layer", "1kB", "-i", text(&whole)]).expect(LIMIT);
    refused.says(&["bytes of archive, 4000 are allowed", "--max-layer"]);
    store.ok(&["load", "--max-layer", "100kB", "-i", text(&whole)]);
}

#[test]
fn t43_and_t44_names_that_are_too_much() {
    needs_root!();
    let named = |name: &[u8]| [pax(&[("path", name)]), file("x", "")];
    check(&named(b"a\0b"), &Error(STORE, &["extension records"]));
    check(&named(b"new\nline \xff"), &Tree(&["new\\nline \\xff = "]));
    check(&named(&b"a/".repeat(2049)), &Error(LIMIT, &["levels"]));
    check(&named(&[b'a'; 4097]), &Error(STORE, &["4097"]));
    check(&named(&[b'a'; 256]), &Error(STORE, &["256"]));
    check(&named(&b"a/".repeat(4096)), &Error(LIMIT, &["levels"]));
}

#[test]
fn trees_as_deep_as_paths_go_can_be_loaded_saved_and_removed() {
    needs_root!();
    let deep = b"d/".repeat(2040);
    let (loaded, imported) = check(&[pax(&[("path", &deep)]), dir("x")], &Loaded);
    for store in [loaded, imported] {
        // Few descriptors: they must not be as many as the levels.
        let mut save = std::process::Command::new("sh");
        let saved = store.beside("saved.tar");
        save.args(["-c", "ulimit -n 512; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_kiln")]);
        save.args(["save", "-o", text(&saved), "hostile:1"]).env("KILN_ROOT", store.root());
        store.bounded(save).expect(0);
        let again = Store::empty();
        again.ok(&["load", "-i", text(&saved)]);
        // By the binary too, when the images go.
        store.ok(&["rmi", "hostile:1"]);
    }
}
