//! A COPY whose layer an earlier build has made: on another base, or by other words. Nothing is copied, and nobody
//! can tell.

use serde_json::Value;

use crate::deltas::are_possible;
use crate::harness::{Context, Outcome, Store, needs_root};

/// What a step says that took an earlier layer.
const KEPT: &str = "an earlier build made the same layer: no file is copied";

fn base(store: &Store, command: &str) {
    store.image("base", &format!("FROM busybox\nRUN --network=none {command}\n"));
}

/// The layers of an image, lowest first.
fn layers(store: &Store, tag: &str) -> Vec<Value> {
    store.inspect(tag)["RootFS"]["Layers"].as_array().expect("a list").clone()
}

fn kept(build: &Outcome) -> usize {
    build.stderr.matches(KEPT).count()
}

fn build(store: &Store, context: &Context, flags: &[&str]) -> Outcome {
    store.build(context, flags).expect(0)
}

/// What copies have to do with, with owners and content.
fn listing(store: &Store, tag: &str) -> String {
    let all = "cd / && find app opt 2>/dev/null | sort | while read -r path; do \
        stat -c '%n %F %a %u %g' \"$path\"; [ -f \"$path\" ] && cat \"$path\"; done; true";
    store.shell(tag, all)
}

#[test]
fn a_base_that_moved_leaves_the_layers_of_copies_as_they_are() {
    needs_root!();
    let store = Store::with_busybox();
    base(&store, "echo one > /etc/motd");
    let context = Context::new(&[
        (
            "Dockerfile",
            "FROM base\nCOPY files /app/files\nCOPY single /etc/single\nRUN --network=none echo > /ran\n",
        ),
        ("files/a", "a"),
        ("files/deep/b", "b"),
        ("single", "single"),
    ]);
    let first = build(&store, &context, &["-t", "one"]);
    assert_eq!((first.ran().len(), kept(&first)), (3, 0));
    base(&store, "echo two > /etc/motd");
    let moved = build(&store, &context, &["-t", "two"]);
    assert_eq!(moved.ran().len(), 3);
    if are_possible(&store) {
        assert_eq!(kept(&moved), 2);
        let (one, two) = (layers(&store, "one"), layers(&store, "two"));
        let copies = one.len() - 3..one.len() - 1;
        assert_eq!(one[copies.clone()], two[copies.clone()]);
        assert_ne!(one[copies.start - 1], two[copies.start - 1], "the base");
        let why = store.ok(&["why"]).stdout;
        assert!(why.contains("base base:latest moved from "), "{why}");
        assert_eq!(why.matches("its layer was there already and is kept").count(), 2, "{why}");
    }
    let show = "cat /etc/motd /app/files/a /app/files/deep/b /etc/single";
    assert_eq!(store.shell("two", show), "two\nabsingle");
    assert_eq!(store.shell("one", show), "one\nabsingle");
    // Neither image needs the other.
    store.ok(&["rmi", "one"]);
    store.ok(&["prune", "--force"]);
    assert_eq!(store.shell("two", show), "two\nabsingle");
    store.sound().expect("sound");
    // One that is gone is made again.
    store.ok(&["rmi", "two"]);
    store.ok(&["prune", "--force"]);
    let again = build(&store, &context, &["-t", "three"]);
    assert_eq!((again.ran().len(), kept(&again)), (3, 0));
    // Nor is anything kept by who wants it made.
    base(&store, "echo three > /etc/motd");
    assert_eq!(kept(&build(&store, &context, &["--no-cache"])), 0);
    store.sound().expect("sound");
}

/// What is done in the base before and after, and whether the layer can stay.
const BASES: &[(&str, &str, bool)] = &[
    ("echo one > /etc/x", "echo two > /etc/x", true),
    ("mkdir -p /opt/one", "mkdir -p /opt/two", true),
    ("mkdir /app && touch -t 202001010000 /app", "mkdir /app /opt && touch -t 202101010000 /app", true),
    // What is replaced, and what stands beside.
    ("mkdir -p /app/src && echo one > /app/src/a", "mkdir -p /app/src && ln -s nowhere /app/src/a", true),
    ("mkdir -p /app/src && echo one > /app/src/x", "mkdir -p /app/src && echo two > /app/src/y", true),
    // Directories on the way, and those that are copied onto.
    (":", "mkdir /app", false),
    ("mkdir -m 755 /app", "mkdir -m 711 /app", false),
    ("mkdir -p /app/src", "mkdir -p /app/other", false),
    ("mkdir -p /app/src/deep", "mkdir -p /app/src/other", false),
    ("mkdir -p /app/src/deep", "mkdir -p /app/src/deep && chmod 1777 /app/src", false),
    // Where links lead.
    ("mkdir -p /opt/a && ln -s opt/a /app", "mkdir -p /opt/b && ln -s opt/b /app", false),
    ("mkdir -p /opt/a && ln -s opt/a /app", "mkdir -p /opt/a && ln -s /opt/a /app", true),
    // Who a name is.
    ("echo me:x:7:7::/:/bin/sh >> /etc/passwd", "echo me:x:8:8::/:/bin/sh >> /etc/passwd", false),
    ("echo me:x:7:7::/:/bin/sh >> /etc/passwd", "echo me:y:7:7::/x:/bin/sh >> /etc/passwd", true),
    ("mkdir /app && chown 5:6 /app", "mkdir /app && chown 6:5 /app", false),
];

#[test]
fn a_layer_is_kept_where_the_copy_finds_the_same_and_nowhere_else() {
    needs_root!();
    let store = Store::with_busybox();
    for (nth, (before, after, is_kept)) in BASES.iter().enumerate() {
        // No two rows know each other's layers.
        let owner = if before.contains("passwd") { "--chown=me " } else { "" };
        let text = format!("FROM base\nCOPY {owner}src /app/src\n");
        let row = format!("row {nth}");
        let context =
            Context::new(&[("Dockerfile", &text), ("src/a", &row), ("src/b", "b"), ("src/deep/c", "c")]);
        base(&store, before);
        build(&store, &context, &["-t", "first"]);
        base(&store, after);
        let warm = build(&store, &context, &["-t", "warm"]);
        if are_possible(&store) {
            assert_eq!(kept(&warm), usize::from(*is_kept), "{before} -> {after}");
            let top = |tag: &str| layers(&store, tag).last().cloned();
            assert_eq!(top("first") == top("warm"), *is_kept, "{before} -> {after}");
        }
        build(&store, &context, &["--no-cache", "-t", "cold"]);
        assert_eq!(listing(&store, "warm"), listing(&store, "cold"), "{before} -> {after}");
    }
    store.sound().expect("sound");
}

#[test]
fn what_cannot_be_copied_is_an_error_although_its_layer_is_there() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("a/f", "f"), ("b/f", "f"), ("src/a", "a")]);
    let with = |line: &str| context.write("Dockerfile", &format!("FROM base\n{line}\n"));
    base(&store, ":");
    with("COPY src /app");
    build(&store, &context, &[]);
    base(&store, "touch /app");
    store.build(&context, &[]).expect(4).says(&["cannot copy to non-directory \"app\""]);
    base(&store, "mkdir -p /app/a");
    store.build(&context, &[]).expect(4).says(&["cannot replace directory \"app/a\" with a file"]);
    // The same files in the same place, by an instruction that may say so and by one that may not.
    with("COPY a/f b/f /x/");
    build(&store, &context, &[]);
    with("COPY */f /x/f");
    store.build(&context, &[]).expect(3);
    store.sound().expect("sound");
}

#[test]
fn a_step_keeps_what_stands_on_it_when_other_words_make_the_same() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("one", "same"), ("two", "same"), ("three", "other")]);
    let with = |source: &str| {
        let text = format!("FROM busybox\nCOPY {source} /file\nRUN --network=none cp /file /copy\n");
        context.write("Dockerfile", &text);
        build(&store, &context, &["-t", "app"])
    };
    assert_eq!(with("one").ran().len(), 2);
    let copied = with("two");
    let ran = if are_possible(&store) { 1 } else { 2 };
    assert_eq!((copied.ran().len(), kept(&copied)), (ran, 2 - ran));
    // It is known from then on.
    assert_eq!(with("two").ran(), [""; 0]);
    assert_eq!(with("three").ran().len(), 2);
    assert_eq!(store.shell("app", "cat /copy"), "other");
    assert_eq!(with("one").ran(), [""; 0]);
    assert_eq!(store.shell("app", "cat /copy"), "same");
}
