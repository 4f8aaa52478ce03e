//! `kiln diff`: what the files of two images differ in.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{Context, Store, needs_root, text};
use crate::toolkit_image::{Layer, check_screen, image, json};

fn lower() -> Layer {
    let file = tar::EntryType::Regular;
    Layer::new()
        .dir("d")
        .file("d/gone", "five5")
        .file("d/kept", "kept")
        .file("content", "one two")
        .raw(b"mode", file, 0o644, (0, 0), b"", b"m")
        .raw(b"owner", file, 0o644, (0, 0), b"", b"o")
        .link("link", "content")
        .file("type", "a file")
        .dir("turned")
        .file("turned/below", "x")
        .file("again", "the same")
        .file("grown", "1")
}

fn upper() -> Layer {
    let file = tar::EntryType::Regular;
    Layer::new()
        .gone("d/gone")
        .file("d/new", "123")
        .file("content", "two one")
        .raw(b"mode", file, 0o4755, (0, 0), b"", b"m")
        .raw(b"owner", file, 0o644, (10, 20), b"", b"o")
        .link("link", "d/kept")
        .dir("type")
        .file("turned", "into a file")
        .file("again", "the same")
        .raw(b"grown", file, 0o600, (0, 0), b"", "2".repeat(5000).as_bytes())
}

#[test]
fn differences_are_listed_with_what_changed() {
    needs_root!();
    let store = Store::empty();
    image(&store, "one:1", [lower()]);
    image(&store, "two:1", [lower(), upper()]);
    let expected = "
    PATH            BEFORE   AFTER    CHANGED
C   /content        7B       7B       content
D   /d/gone         5B
A   /d/new                   3B
C   /grown          1B       5.00kB   content, mode 0644 -> 0600
C   /link           link     link     target content -> d/kept
C   /mode           1B       1B       mode 0644 -> 4755
C   /owner          1B       1B       owner 0:0 -> 10:20
C   /turned         dir      11B      type, mode 0755 -> 0644
D   /turned/below   1B
C   /type           6B       dir      type, mode 0644 -> 0755
1 added (3B), 2 deleted (6B), 7 changed
";
    check_screen(store.kiln(&["diff", "one:1", "two:1"]), 1, expected);
    // The same when the images share no layer.
    let archive = store.beside("two.tar");
    store.ok(&["flatten", "two:1", "-t", "flat:1"]);
    store.ok(&["save", "-o", text(&archive), "flat:1"]);
    store.ok(&["load", "-i", text(&archive)]);
    check_screen(store.kiln(&["diff", "one:1", "flat:1"]), 1, expected);
    check_screen(store.kiln(&["diff", "two:1", "flat:1"]), 0, "");
    check_screen(store.kiln(&["diff", "two:1", "two:1"]), 0, "");
    store.kiln(&["diff", "two:1", "three:1"]).expect(4).says(&["three:1"]);
    store.kiln(&["diff", "two:1"]).expect(2);
}

#[test]
fn differences_are_told_to_programs() {
    needs_root!();
    let store = Store::empty();
    image(&store, "one:1", [lower()]);
    image(&store, "two:1", [lower(), upper()]);
    let found = json(&store.kiln(&["diff", "one:1", "two:1", "--format", "json"]).expect(1));
    let found = found["differences"].as_array().expect("a list");
    let of = |path: &str| found.iter().find(|one| one["path"] == path).expect("it differs").clone();
    assert_eq!(
        of("/grown"),
        json!({
            "path": "/grown",
            "kind": "C",
            "before": { "type": "file", "mode": "0644", "uid": 0, "gid": 0, "size": 1 },
            "after": { "type": "file", "mode": "0600", "uid": 0, "gid": 0, "size": 5000 },
            "changed": ["content", "mode"],
        })
    );
    assert_eq!(of("/link")["after"]["target"], "d/kept");
    assert_eq!((&of("/d/new")["kind"], &of("/d/new")["before"]), (&json!("A"), &Value::Null));
    let same = json(&store.kiln(&["diff", "two:1", "two:1", "--format", "json"]).expect(0));
    assert_eq!(same, json!({ "differences": [] }));
}

#[test]
fn hostile_names_are_escaped() {
    needs_root!();
    let store = Store::empty();
    image(&store, "one:1", [Layer::new().link("l", "x")]);
    let odd = Layer::new().link("l", "\x1b]0;x\x07").raw(
        b"\x1b[31m\xff",
        tar::EntryType::Regular,
        0o644,
        (0, 0),
        b"",
        b"1",
    );
    image(&store, "two:1", [odd]);
    check_screen(
        store.kiln(&["diff", "one:1", "two:1"]),
        1,
        "
    PATH              BEFORE   AFTER   CHANGED
A   /\\u{1b}[31m\\xff            1B
C   /l                link     link    target x -> \\u{1b}]0;x\\u{7}
1 added (1B), 0 deleted (0B), 1 changed
",
    );
    let found = json(&store.kiln(&["diff", "one:1", "two:1", "--format", "json"]).expect(1));
    assert_eq!(found["differences"][0]["path_bytes"], "2f1b5b33316dff");
}

#[test]
fn xattrs_and_capabilities_count() {
    needs_root!();
    let store = Store::empty();
    let with = |value: &str| {
        let mut builder = tar::Builder::new(Vec::new());
        let record = [("SCHILY.xattr.user.colour", value.as_bytes())];
        builder.append_pax_extensions(record).expect("into memory");
        let mut header = tar::Header::new_ustar();
        header.set_size(0);
        header.set_mode(0o644);
        builder.append_data(&mut header, "file", &b""[..]).expect("into memory");
        builder.into_inner().expect("into memory")
    };
    for (name, value) in [("one", "red"), ("two", "blue")] {
        let tar = store.beside(name);
        fs::write(&tar, with(value)).expect("ours to write");
        store.ok(&["import", text(&tar), name]);
    }
    check_screen(
        store.kiln(&["diff", "one", "two"]),
        1,
        "
    PATH    BEFORE   AFTER   CHANGED
C   /file   0B       0B      xattrs
0 added (0B), 0 deleted (0B), 1 changed
",
    );
}

/// Real builds against diff(1), which compares the unpacked trees.
#[test]
fn diff_of_unpacked_trees_says_the_same() {
    needs_root!();
    let store = Store::with_busybox();
    let steps = [
        "RUN mkdir -p /a/b/c && for i in 1 2 3 4; do echo $i > /a/b/$i; done && ln -s ../b /a/l && ln /a/b/1 /a/hard",
        "RUN rm -r /a/b && mkdir -p /a/b && echo 3 > /a/b/3 && echo new > /a/b/2 && rm /bin/yes",
        "RUN rm /a/l && mkdir /a/l && touch /a/l/x && mv /a/b /a/moved && rm /a/hard && ln -s /etc /a/hard",
    ];
    let mut names = Vec::new();
    for count in 0..=steps.len() {
        let name = format!("app:{count}");
        let dockerfile = format!("FROM busybox\n{}\n", steps[..count].join("\n"));
        store.build(&Context::new(&[("Dockerfile", &dockerfile)]), &["-t", &name]).expect(0);
        let tree = store.beside(&format!("tree-{count}"));
        store.ok(&["cp", "-a", &format!("{name}:/"), text(&tree)]);
        names.push((name, tree));
    }
    for (one, one_tree) in &names {
        for (other, other_tree) in &names {
            let mut theirs = BTreeSet::new();
            let mut diff = Command::new("diff");
            diff.args(["-rq", "--no-dereference"]).args([one_tree, other_tree]).env("LC_ALL", "C");
            let output = diff.output().expect("diff is installed");
            let (a, b) = (text(one_tree), text(other_tree));
            for line in String::from_utf8(output.stdout).expect("text").lines() {
                let relative = |dir: &str, name: &str| {
                    let dir = dir.strip_prefix(a).or_else(|| dir.strip_prefix(b)).expect("one of the two");
                    format!("{dir}/{name}")
                };
                if let Some((dir, name)) =
                    line.strip_prefix("Only in ").and_then(|rest| rest.split_once(": "))
                {
                    theirs.insert(relative(dir, name));
                } else {
                    let path =
                        line.split(' ').find_map(|word| word.strip_prefix(a)).expect("a path of the first");
                    theirs.insert(path.to_owned());
                }
            }
            let ours = store.kiln(&["diff", one, other, "--format", "json"]);
            assert_eq!(ours.code, Some(i32::from(!theirs.is_empty())), "{one} {other}: {theirs:?}");
            let ours = json(&ours);
            let all: Vec<String> = ours["differences"]
                .as_array()
                .expect("a list")
                .iter()
                .map(|one| one["path"].as_str().expect("text").to_owned())
                .collect();
            // diff(1) does not look below what only one side has.
            let above = |path: &str| all.iter().any(|other| path.starts_with(&format!("{other}/")));
            let tops: BTreeSet<String> = all.iter().filter(|path| !above(path)).cloned().collect();
            assert_eq!(tops, theirs, "{one} {other}");
        }
    }
}
