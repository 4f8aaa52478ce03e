//! `kiln layer`: which layer put a file there, and which space is wasted.

use serde_json::{Value, json};

use crate::harness::{Context, Store, needs_root};
use crate::toolkit_image::{Layer, check_screen, image, in_little_memory, json};

/// Three layers: the second changes an owner, replaces and removes; the third removes a directory.
fn sample(store: &Store) {
    image(
        store,
        "app:1",
        [
            Layer::new()
                .dir("usr")
                .dir("usr/lib")
                .file("usr/lib/a", "aaaa")
                .file("usr/lib/b", "bbbb")
                .file("usr/lib/same", "the same")
                .link("lib", "usr/lib")
                .dir("var")
                .file("var/cache", "0123456789")
                .file("first", "linked")
                .hard("second", "first"),
            Layer::new()
                .dir("usr")
                .dir("usr/lib")
                .file("usr/lib/a", "AAAAAAAA")
                .raw(b"usr/lib/same", tar::EntryType::Regular, 0o644, (7, 8), b"", b"the same")
                .gone("usr/lib/b")
                .gone("first"),
            Layer::new().gone("var").gone("second"),
        ],
    );
}

#[test]
fn layers_are_listed_with_sizes_and_instructions() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    let listed = store.ok(&["layer", "ls", "app:1"]);
    // How much is on disk is up to the file system.
    let rows: Vec<Vec<&str>> = listed
        .stdout
        .lines()
        .map(|line| line.split("   ").map(str::trim).filter(|c| !c.is_empty()).collect())
        .collect();
    assert_eq!(rows[0], ["LAYER", "DIFF ID", "TAR", "ON DISK", "CREATED BY"]);
    assert_eq!((rows[1][0], rows[1][2], rows[1][4]), ("1", "8.70kB", "kiln import standard input"));
    assert_eq!((rows[2][0], rows[2][2], rows[2][4]), ("2", "5.12kB", "kiln mutate --append layer-2.tar"));
    assert_eq!((rows[3][0], rows[3][2], rows[3][4]), ("3", "2.05kB", "kiln mutate --append layer-3.tar"));
    assert_eq!(rows.len(), 4);

    let listed = json(&store.ok(&["layer", "ls", "--format", "json", "app:1"]));
    let ids = store.inspect("app:1")["RootFS"]["Layers"].clone();
    let layers = listed["layers"].as_array().expect("a list");
    assert_eq!(Value::from_iter(layers.iter().map(|layer| layer["diff_id"].clone())), ids);
    assert_eq!(rows[3][1], &ids[2].as_str().expect("a digest")[7..19]);
    assert_eq!(layers[0]["blob"], Value::Null);
    // An appended tar is kept as it came.
    assert_eq!(layers[1]["blob"], json!({ "digest": ids[1], "size": layers[1]["tar_bytes"] }));
    let usage = json(&store.ok(&["du", "--format", "json"]));
    for layer in layers {
        let all = usage["layers"].as_array().expect("a list");
        let same = all.iter().find(|other| other["id"] == layer["snapshot"]).expect("du has it too");
        assert_eq!(same["disk_bytes"], layer["disk_bytes"]);
    }
}

#[test]
fn waste_is_shown_largest_first() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    check_screen(
        store.kiln(&["layer", "show", "app:1"]),
        0,
        "
LAYER   DIFF ID        FILES   SIZE   HIDES   WASTED   CREATED BY
1       ............   7       32B    0       32B      kiln import standard input
2       ............   2       16B    4       0B       kiln mutate --append layer-2.tar
3       ............   0       0B     2       0B       kiln mutate --append layer-3.tar

WASTED   PATH            IN LAYER   WHY
10B      /var/cache      1          deleted by layer 3
8B       /usr/lib/same   1          the same content again in layer 2
6B       /second         1          deleted by layer 3
4B       /usr/lib/a      1          overwritten by layer 2
4B       /usr/lib/b      1          deleted by layer 2
32B of 48B are wasted by 5 files
",
    );
    let report = json(&store.ok(&["layer", "show", "app:1", "--format", "json"]));
    assert_eq!(report["wasted_bytes"], 32);
    assert_eq!(
        report["waste"][1],
        json!({ "path": "/usr/lib/same", "bytes": 8, "layer": 1, "by": 2, "how": "same-content" })
    );
    assert_eq!(report["path"], Value::Null);
}

#[test]
fn story_of_a_file_is_told() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    check_screen(
        store.kiln(&["layer", "show", "app:1", "/usr/lib/same"]),
        0,
        "
/usr/lib/same is from layer 2: file, 0644, 7:8, 8B

LAYER   DIFF ID        WHAT             THEN                  CREATED BY
1       ............   added            file, 0644, 0:0, 8B   kiln import standard input
2       ............   changed: owner   file, 0644, 7:8, 8B   kiln mutate --append layer-2.tar

WASTED   PATH            IN LAYER   WHY
8B       /usr/lib/same   1          the same content again in layer 2
8B of 16B are wasted by 1 file
",
    );
    // By way of a link, without the first slash, and one that is gone.
    check_screen(
        store.kiln(&["layer", "show", "app:1", "lib/b"]),
        0,
        "
/usr/lib/b is not in the image

LAYER   DIFF ID        WHAT      THEN                  CREATED BY
1       ............   added     file, 0644, 0:0, 4B   kiln import standard input
2       ............   deleted   -                     kiln mutate --append layer-2.tar

WASTED   PATH         IN LAYER   WHY
4B       /usr/lib/b   1          deleted by layer 2
4B of 4B are wasted by 1 file
",
    );
    check_screen(
        store.kiln(&["layer", "show", "app:1", "/lib"]),
        0,
        "
/lib is from layer 1: link to usr/lib, 0:0

LAYER   DIFF ID        WHAT    THEN                   CREATED BY
1       ............   added   link to usr/lib, 0:0   kiln import standard input

nothing is wasted
",
    );
}

#[test]
fn story_of_a_directory_counts_what_is_below() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    check_screen(
        store.kiln(&["layer", "show", "app:1", "/var"]),
        0,
        "
/var is not in the image

LAYER   DIFF ID        WHAT      THEN             CREATED BY
1       ............   added     dir, 0755, 0:0   kiln import standard input
3       ............   deleted   -                kiln mutate --append layer-3.tar

LAYER   DIFF ID        FILES   SIZE   HIDES   WASTED   CREATED BY
1       ............   1       10B    0       10B      kiln import standard input
2       ............   0       0B     0       0B       kiln mutate --append layer-2.tar
3       ............   0       0B     1       0B       kiln mutate --append layer-3.tar

WASTED   PATH         IN LAYER   WHY
10B      /var/cache   1          deleted by layer 3
10B of 10B are wasted by 1 file
",
    );
}

#[test]
fn path_that_never_was_is_said() {
    needs_root!();
    let store = Store::empty();
    sample(&store);
    for path in ["/nothing", "/usr/lib/a/below", "/usr/libx"] {
        store.kiln(&["layer", "show", "app:1", path]).expect(4).says(&["there is nothing at", path, "hint:"]);
    }
    store.kiln(&["layer", "ls", "none:1"]).expect(4).says(&["none:1", "hint:"]);
}

#[test]
fn steps_of_a_real_build_are_told_apart() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = "FROM busybox
RUN mkdir /d && echo 12345678 > /d/x && echo keep > /d/y && ln /d/y /d/linked
RUN chmod 600 /d/x
RUN rm -r /d && mkdir /d && echo other > /d/x
";
    store.build(&Context::new(&[("Dockerfile", dockerfile)]), &["-t", "app:1"]).expect(0);
    let report = json(&store.ok(&["layer", "show", "app:1", "/d/x", "--format", "json"]));
    let steps = report["path"]["steps"].as_array().expect("a list");
    let told: Vec<_> = steps
        .iter()
        .map(|step| (step["layer"].as_u64(), step["what"].as_str(), step["changed"].clone()))
        .collect();
    assert_eq!(
        told,
        [
            (Some(2), Some("added"), Value::Null),
            (Some(3), Some("changed"), json!(["mode"])),
            (Some(4), Some("changed"), json!(["content", "mode"])),
        ]
    );
    assert_eq!(report["path"]["layer"], 4);
    let waste = json(&store.ok(&["layer", "show", "app:1", "/d", "--format", "json"]))["waste"].clone();
    let told = |nth: usize| {
        [&waste[nth]["path"], &waste[nth]["bytes"], &waste[nth]["layer"], &waste[nth]["by"]]
            .map(Value::to_string)
    };
    assert_eq!(told(0), ["\"/d/x\"", "9", "2", "3"]);
    assert_eq!(told(1), ["\"/d/x\"", "9", "3", "4"]);
    // Of two names of one file the last that went counts.
    assert_eq!(told(2)[1..], ["5", "2", "4"]);
    assert_eq!(waste.as_array().map(Vec::len), Some(3));
}

#[test]
fn hostile_names_are_escaped_and_exact_in_json() {
    needs_root!();
    let store = Store::empty();
    let names: [&[u8]; 4] = [b"esc\x1b[2J", b"line\nend", b"not\xff\xfeutf8", "bidi\u{202e}".as_bytes()];
    let file = tar::EntryType::Regular;
    let mut lower = Layer::new();
    let mut upper = Layer::new();
    for name in names {
        lower = lower.raw(name, file, 0o644, (0, 0), b"", b"12");
        upper = upper.raw(&[b".wh.", name].concat(), file, 0, (0, 0), b"", b"");
    }
    image(&store, "odd:1", [lower.link("to", "a\x1bb"), upper]);
    let shown = store.ok(&["layer", "show", "odd:1"]).stdout;
    for name in ["/esc\\u{1b}[2J ", "/line\\nend ", "/not\\xff\\xfeutf8 ", "/bidi\\u{202e} "] {
        assert!(shown.contains(name), "{name}\n{shown}");
    }
    assert!(shown.chars().all(|c| c == '\n' || (!c.is_control() && c != '\u{202e}')), "{shown}");
    let shown = store.ok(&["layer", "show", "odd:1", "to"]).stdout;
    assert!(shown.contains("link to a\\u{1b}b, 0:0"), "{shown}");
    let report = json(&store.ok(&["layer", "show", "odd:1", "--format", "json"]));
    let waste = report["waste"].as_array().expect("a list");
    assert!(waste.iter().any(|lost| lost["path"] == "/line\nend" && lost["path_bytes"] == Value::Null));
    let odd = waste.iter().find(|lost| lost["path_bytes"] != Value::Null).expect("one is not UTF-8");
    assert_eq!(odd["path_bytes"], "2f6e6f74fffe75746638");
}

#[test]
fn hundred_thousand_files_need_little_memory() {
    needs_root!();
    let store = Store::empty();
    let (mut lower, mut upper) = (Layer::new(), Layer::new());
    for dir in 0..100 {
        lower = lower.dir(&format!("directory-{dir}"));
        for file in 0..1000 {
            lower = lower.file(&format!("directory-{dir}/a-file-with-a-long-name-{file}"), "x");
        }
        upper = upper.file(&format!("directory-{dir}/a-file-with-a-long-name-7"), "y");
    }
    image(&store, "many:1", [lower]);
    store.ok(&["tag", "many:1", "base:1"]);
    let path = store.beside("upper.tar");
    std::fs::write(&path, upper.bytes()).expect("ours to write");
    let append = crate::harness::text(&path).to_owned();
    store.ok(&["mutate", "many:1", "--append", &append, "-t", "many:1"]);
    let shown = in_little_memory(store.command(&["layer", "show", "many:1"])).expect(0);
    assert!(shown.stdout.ends_with("100B of 100kB are wasted by 100 files\n"), "{}", shown.stdout);
    let differ = in_little_memory(store.command(&["diff", "base:1", "many:1"])).expect(1);
    assert!(differ.stdout.ends_with("0 added (0B), 0 deleted (0B), 100 changed\n"));
    let all = in_little_memory(store.command(&["diff", "many:1", "base:1", "--format", "json"])).expect(1);
    assert_eq!(json(&all)["differences"].as_array().map(Vec::len), Some(100));
}

#[test]
fn snapshots_that_are_whole_trees_tell_the_same() {
    needs_root!();
    let (changes, trees) = (Store::empty(), Store::empty());
    changes.ok(&["--snapshotter", "overlay", "images"]);
    trees.ok(&["--snapshotter", "copy", "images"]);
    for store in [&changes, &trees] {
        sample(store);
        store.ok(&["mutate", "app:1", "--squash=all", "-t", "all:1"]);
        store.ok(&["flatten", "app:1", "-t", "flat:1"]);
        image(store, "base:1", [Layer::new().file("usr", "a file")]);
    }
    for args in [
        &["layer", "show", "app:1"][..],
        &["layer", "show", "app:1", "/usr/lib/same"],
        &["layer", "show", "app:1", "/var"],
        &["layer", "show", "all:1"],
        &["diff", "base:1", "app:1"],
        &["diff", "app:1", "all:1"],
        &["diff", "flat:1", "app:1"],
    ] {
        let (one, other) = (changes.kiln(args), trees.kiln(args));
        assert_eq!((one.code, one.stdout), (other.code, other.stdout), "{args:?}: {}", other.stderr);
    }
}

/// `chown -R` copies all files up, whoever they belonged to before.
#[test]
fn a_step_that_changes_nothing_adds_no_files() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile =
        "FROM busybox\nRUN chown -R 0:0 /bin && chmod 0755 /bin/busybox\nRUN chown 5 /etc/passwd\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    store.build(&context, &["-t", "app"]).expect(0);
    let listed = json(&store.ok(&["layer", "ls", "--format", "json", "app"]));
    let sizes: Vec<u64> = listed["layers"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|layer| layer["tar_bytes"].as_u64().expect("a number"))
        .collect();
    // The first is busybox; directories stay, files go.
    assert!(sizes[0] > 500_000 && sizes[1] < 8192, "{sizes:?}");
    let changed = store.kiln(&["diff", "busybox", "app"]).expect(1).stdout;
    assert!(changed.contains("etc/passwd") && !changed.contains("bin/busybox"), "{changed}");
}
