//! `kiln cp`: files out of an image, and nothing else.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use tar::EntryType;

use crate::harness::{Store, needs_root, own_uid, test_as, text};
use crate::toolkit_image::{Layer, image};

/// Files, links that lead out of anything that does not hold them, and what gives rights.
fn sample(store: &Store) {
    let layer = Layer::new()
        .dir("etc")
        .file("etc/passwd", "of the image")
        .dir("d")
        .raw(b"d/file", EntryType::Regular, 0o640, (5, 6), b"", b"content")
        .hard("d/linked", "d/file")
        .link("d/symbolic", "/etc/passwd")
        .dir("d/e")
        .file("d/e/deep", "deep")
        .link("abs", "/etc")
        .link("up", "../../../../etc")
        .link("to-file", "/etc/passwd")
        .link("loop", "loop")
        .raw(b"suid", EntryType::Regular, 0o6755, (0, 0), b"", b"#!")
        .dir("dev")
        .raw(b"dev/null", EntryType::Char, 0o666, (0, 0), b"", b"")
        .raw(b"dev/pipe", EntryType::Fifo, 0o600, (0, 0), b"", b"");
    image(store, "app:1", [layer]);
}

/// What GNU tar lists of `kiln cp SOURCE -`: modes, owners, sizes, names.
#[track_caller]
fn listed(store: &Store, args: &[&str]) -> Vec<String> {
    let args = [&["cp"], args, &["-"]].concat();
    let output = store.command(&args).output().expect("kiln starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut tar = Command::new("tar");
    let mut tar = tar
        .args(["--numeric-owner", "-tvf", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("tar runs");
    tar.stdin.take().expect("piped").write_all(&output.stdout).expect("tar reads");
    let listed = tar.wait_with_output().expect("our child");
    assert!(listed.status.success());
    let lines = String::from_utf8(listed.stdout).expect("text");
    // Without the time, which stands between the size and the name.
    let short = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        [&words[..3], &words[5..]].concat().join(" ")
    };
    lines.lines().map(short).collect()
}

#[test]
fn tar_has_everything_below_the_last_name() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    let expected = [
        "drwxr-xr-x 0/0 0 d/",
        "drwxr-xr-x 0/0 0 d/e/",
        "-rw-r--r-- 0/0 4 d/e/deep",
        "-rw-r----- 5/6 7 d/file",
        "hrw-r----- 5/6 0 d/linked link to d/file",
        "lrwxrwxrwx 0/0 0 d/symbolic -> /etc/passwd",
    ];
    assert_eq!(listed(&store, &["app:1:/d"]), expected);
    assert_eq!(listed(&store, &["app:1:/d/e/deep"]), ["-rw-r--r-- 0/0 4 deep"]);
    assert_eq!(listed(&store, &["app:1:/d/e/."]), ["-rw-r--r-- 0/0 4 deep"]);
    assert_eq!(listed(&store, &["app:1:/dev"]).len(), 3);
    let whole = listed(&store, &["app:1:/"]);
    assert_eq!((whole.len(), whole[0].as_str()), (16, "lrwxrwxrwx 0/0 0 abs -> /etc"));
    assert!(whole.contains(&"-rwsr-sr-x 0/0 2 suid".to_owned()), "{whole:#?}");
    let first = store.command(&["cp", "app:1:/", "-"]).output().expect("kiln starts").stdout;
    assert!(store.command(&["cp", "app:1:/", "-"]).output().expect("kiln starts").stdout == first);
}

#[test]
fn links_lead_to_the_images_own_files() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    for path in ["abs/passwd", "up/passwd", "abs/../etc/passwd", "../../etc/passwd"] {
        let out = store.beside("passwd");
        store.ok(&["cp", &format!("app:1:/{path}"), text(&out)]);
        assert_eq!(fs::read_to_string(&out).expect("copied"), "of the image", "{path}");
    }
    // The last one is itself what is copied, unless a slash or -L says otherwise.
    assert_eq!(listed(&store, &["app:1:/abs"]), ["lrwxrwxrwx 0/0 0 abs -> /etc"]);
    assert_eq!(listed(&store, &["app:1:/abs/"]), ["drwxr-xr-x 0/0 0 abs/", "-rw-r--r-- 0/0 12 abs/passwd"]);
    assert_eq!(listed(&store, &["-L", "app:1:/to-file"]), ["-rw-r--r-- 0/0 12 to-file"]);
    store.kiln(&["cp", "-L", "app:1:/loop", "-"]).expect(4).says(&["loop"]);
}

#[test]
fn files_go_into_directories_or_under_new_names() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    let here = store.beside("here");
    fs::create_dir(&here).expect("ours to write");
    let read =
        |name: &str| fs::read_to_string(here.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let at = |name: &str| here.join(name).to_str().expect("UTF-8").to_owned();
    store.ok(&["cp", "app:1:/d/file", &at("")]);
    store.ok(&["cp", "app:1:/d/file", &at("named")]);
    store.ok(&["cp", "app:1:/d", &at("")]);
    store.ok(&["cp", "app:1:/d", &at("new")]);
    store.ok(&["cp", "app:1:/d/.", &at("")]);
    store.ok(&["cp", "app:1:/etc/passwd", &at("named")]);
    for (name, content) in [
        ("file", "content"),
        ("named", "of the image"),
        ("d/file", "content"),
        ("new/e/deep", "deep"),
        ("e/deep", "deep"),
    ] {
        assert_eq!(read(name), content, "{name}");
    }
    assert_eq!(fs::read_link(here.join("symbolic")).expect("a link"), Path::new("/etc/passwd"));
    let (one, other) = (fs::metadata(here.join("d/file")), fs::metadata(here.join("d/linked")));
    assert_eq!(one.expect("copied").ino(), other.expect("copied").ino(), "hard links stay");
}

#[test]
fn image_gives_no_rights_here_unless_asked() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    let plain = store.beside("plain");
    let copied = store.ok(&["cp", "app:1:/", text(&plain)]);
    assert_eq!(copied.stderr, "warning: the device /dev/null is left out; --archive copies it\n");
    let file = |dir: &Path, name: &str| fs::symlink_metadata(dir.join(name)).expect("copied");
    assert_eq!(file(&plain, "suid").mode() & 0o7777, 0o755);
    assert_eq!((file(&plain, "d/file").uid(), file(&plain, "d/file").mode() & 0o7777), (own_uid(), 0o640));
    assert!(!plain.join("dev/null").exists() && file(&plain, "dev/pipe").file_type().is_fifo());

    let archive = store.beside("archive");
    assert_eq!(store.ok(&["cp", "-a", "app:1:/", text(&archive)]).stderr, "");
    assert_eq!(file(&archive, "suid").mode() & 0o7777, 0o6755);
    if test_as().is_none() {
        // Others on the host get nothing from a user, and devices neither.
        assert_eq!((file(&archive, "d/file").uid(), file(&archive, "d/file").gid()), (5, 6));
        assert!(file(&archive, "dev/null").file_type().is_char_device());
    }
    assert_eq!(file(&archive, "d/file").mtime(), 1_000_000_000);
}

#[test]
fn nothing_outside_the_destination_is_written() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    let (outside, here) = (store.beside("outside"), store.beside("here"));
    for dir in [&outside, &here] {
        fs::create_dir(dir).expect("ours to write");
    }
    fs::write(outside.join("file"), "untouched").expect("ours to write");
    // Links that stand where files and directories of the image shall be.
    symlink(&outside, here.join("d")).expect("ours to write");
    symlink(outside.join("file"), here.join("file")).expect("ours to write");
    store.ok(&["cp", "app:1:/d/file", text(&here)]);
    assert!(fs::symlink_metadata(here.join("file")).expect("copied").is_file(), "the link was replaced");
    // Followed inside the destination only, where there is no such directory yet.
    store.kiln(&["cp", "app:1:/d", text(&here)]);
    store.kiln(&["cp", "app:1:/", text(&here)]);
    assert_eq!(fs::read_to_string(outside.join("file")).expect("still there"), "untouched");
    assert_eq!(fs::read_dir(&outside).expect("still there").count(), 1);
}

#[test]
fn what_cannot_be_copied_is_said() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    let file = store.beside("file");
    fs::write(&file, "mine").expect("ours to write");
    let no_parent = store.beside("no/such/place");
    for (source, destination, code, says) in [
        ("app:1:/nothing", "-", 4, "there is nothing at \"/nothing\""),
        ("app:1:/etc/passwd/below", "-", 4, "there is nothing at"),
        ("app:1:/etc/passwd/", "-", 4, "is not a directory in the image"),
        ("app:1:/d", text(&file), 4, "is a directory in the image, but"),
        ("app:1:/d", text(&no_parent), 4, "cannot copy to"),
        ("app:1:/d/file", text(&no_parent), 4, "cannot copy to"),
        ("app:1", "-", 2, "IMAGE:/PATH"),
        ("app:1:relative", "-", 2, "IMAGE:/PATH"),
        ("none:1:/d", "-", 4, "none:1"),
    ] {
        let outcome = store.kiln(&["cp", source, destination]).expect(code).says(&[says]);
        assert_eq!(outcome.stdout, "", "{source}");
    }
    assert_eq!(fs::read_to_string(&file).expect("still there"), "mine");
    // Nobody reads: no panic, no success.
    let mut command = store.command(&["cp", "app:1:/", "-"]);
    let (reader, writer) = std::io::pipe().expect("there are file descriptors left");
    drop(reader);
    let outcome = command.stdout(writer).stderr(Stdio::piped()).output().expect("kiln starts");
    assert_eq!(outcome.status.code(), Some(4), "{}", String::from_utf8_lossy(&outcome.stderr));
    // A full disk.
    let full = fs::File::options().write(true).open("/dev/full").expect("every Linux has it");
    let outcome = store.command(&["cp", "app:1:/", "-"]).stdout(full).output().expect("kiln starts");
    assert_eq!(outcome.status.code(), Some(8), "{}", String::from_utf8_lossy(&outcome.stderr));
}
