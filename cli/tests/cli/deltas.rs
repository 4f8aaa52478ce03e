//! A COPY with few changed files stands in front of the earlier one. But for what it takes, nobody can tell.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Context, Store, needs_root, text};

const FILES: usize = 320;
/// Nothing has a time of its own, so that images of two stores can be compared.
const STILL: [&str; 4] = ["-o", "type=image,rewrite-timestamp=true", "--build-arg", "SOURCE_DATE_EPOCH=1000"];

/// The directories of snapshots that are deltas.
pub(crate) fn deltas(store: &Store) -> Vec<PathBuf> {
    deltas_below(&store.root())
}

/// The same in the store at `root`.
pub(crate) fn deltas_below(root: &Path) -> Vec<PathBuf> {
    // There is none before the first build.
    let committed = fs::read_dir(root.join("snapshots/committed")).into_iter().flatten();
    let places = committed.map(|entry| entry.expect("ours").path());
    let is_delta =
        |place: &PathBuf| fs::read_to_string(place.join("meta")).is_ok_and(|meta| meta.contains("\"full\":"));
    places.filter(is_delta).collect()
}

/// Whether there are any in a store: backends of whole trees have none.
pub(crate) fn are_possible(store: &Store) -> bool {
    fs::read_to_string(store.root().join("snapshots/form")).is_ok_and(|form| form.contains("changes"))
}

/// Names of what is no directory at and below `dir`.
pub(crate) fn files_in(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        if entry.file_type().expect("it stays").is_dir() {
            found.extend(files_in(&entry.path()));
        } else {
            found.push(entry.file_name().into_string().expect("text"));
        }
    }
    found.sort();
    found
}

/// With [`FILES`] and a link below `files`.
pub(crate) fn context(dockerfile: &str) -> Context {
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    for nth in 0..FILES {
        context.write(&format!("files/d{}/{nth}", nth % 4), &format!("content {nth}"));
    }
    symlink("d1/1", context.at("files/link")).expect("ours");
    context
}

/// Images `one` and `two`; the second has a delta for a layer, and `more` behind it.
fn one_and_two(more: &str) -> (Store, Context) {
    let store = Store::with_busybox();
    let context = context(&format!("FROM busybox\nCOPY files /app/files\n{more}"));
    store.build(&context, &["-t", "one"]).expect(0);
    context.write("files/d1/1", "CONTENT 1");
    store.build(&context, &["-t", "two"]).expect(0);
    assert_eq!(deltas(&store).len(), usize::from(are_possible(&store)));
    (store, context)
}

fn layers(store: &Store, tag: &str) -> Value {
    store.inspect(tag)["RootFS"]["Layers"].clone()
}

/// Builds with a fixed time; the image.
#[track_caller]
fn still(store: &Store, context: &Context, tag: &str) -> String {
    store.build(context, &[&STILL[..], &["-t", tag]].concat()).expect(0);
    store.inspect(tag)["Id"].as_str().expect("a digest").to_owned()
}

#[test]
fn after_each_edit_the_layer_is_that_of_a_build_in_an_empty_store() {
    needs_root!();
    let store = Store::empty();
    let context = context("FROM scratch\nCOPY files /\n");
    store.build(&context, &["-t", "first"]).expect(0);
    assert_eq!(deltas(&store).len(), 0);
    type Edit = fn(&Context);
    let edits: [(&str, Edit, bool); 12] = [
        ("content", |context| context.write("files/d1/1", "CONTENT 1"), true),
        ("a new file", |context| context.write("files/d2/new", "new"), true),
        ("a new directory", |context| context.write("files/grown/deep/new", "new"), true),
        ("mode of a file", |context| mode(context, "files/d1/5", 0o600), true),
        ("mode of a directory", |context| mode(context, "files/d0", 0o750), true),
        (
            "a pair",
            |context| fs::hard_link(context.at("files/d3/3"), context.at("files/d3/pair")).expect("ours"),
            true,
        ),
        ("a removed file", |context| fs::remove_file(context.at("files/d1/9")).expect("ours"), false),
        ("content in front of another one", |context| context.write("files/d1/1", "Content 1"), true),
        (
            "a link",
            |context| {
                fs::remove_file(context.at("files/link")).expect("ours");
                symlink("d1/5", context.at("files/link")).expect("ours");
            },
            true,
        ),
        (
            "a file that becomes a directory",
            |context| {
                fs::remove_file(context.at("files/d1/5")).expect("ours");
                context.write("files/d1/5/in", "in");
            },
            false,
        ),
        (
            "a file that becomes a link",
            |context| {
                fs::remove_file(context.at("files/d1/13")).expect("ours");
                symlink("nowhere", context.at("files/d1/13")).expect("ours");
            },
            true,
        ),
        (
            "many files",
            |context| (0..40).for_each(|nth| context.write(&format!("files/d0/{}", 4 * nth), "many")),
            false,
        ),
    ];
    for (nth, (what, edit, is_delta)) in edits.into_iter().enumerate() {
        edit(&context);
        let before = deltas(&store).len();
        let tag = format!("edit-{nth}");
        store.build(&context, &["-t", &tag]).expect(0);
        let cold = Store::empty();
        cold.build(&context, &["-t", "cold"]).expect(0);
        assert_eq!(layers(&store, &tag), layers(&cold, "cold"), "{what}");
        assert_eq!(deltas(&store).len() - before, usize::from(is_delta && are_possible(&store)), "{what}");
    }
    store.sound().expect("sound");
    // And so is the archive of it.
    let archive = store.beside("saved.tar");
    store.ok(&["save", "-o", text(&archive), "edit-10"]);
    let other = Store::empty();
    other.ok(&["load", "-i", text(&archive)]);
    assert_eq!(layers(&store, "edit-10"), layers(&other, "edit-10"));
    other.sound().expect("sound");
}

fn mode(context: &Context, path: &str, mode: u32) {
    fs::set_permissions(context.at(path), Permissions::from_mode(mode)).expect("ours");
}

#[test]
fn a_delta_has_what_changed_and_nothing_else() {
    needs_root!();
    let store = Store::with_busybox();
    let context = context("FROM busybox\nCOPY --chown=7:8 files /app/files\n");
    store.build(&context, &["-t", "one"]).expect(0);
    let times = |tag: &str| store.shell(tag, "stat -c '%n %Y %a %u' /app /app/files/d0");
    let before = times("one");
    context.write("files/d1/1", "CONTENT 1");
    store.build(&context, &["-t", "two"]).expect(0);
    context.write("files/d2/2", "CONTENT 2");
    store.build(&context, &["-t", "three"]).expect(0);
    let mut found: Vec<Vec<String>> =
        deltas(&store).iter().map(|place| files_in(&place.join("fs"))).collect();
    found.sort();
    if are_possible(&store) {
        assert_eq!(found, [vec!["1"], vec!["1", "2"]]);
        assert_eq!(times("three"), before, "directories on the way are those of the earlier copy");
    }
    let shown = store.shell("three", "cat /app/files/d1/1 /app/files/d2/2 /app/files/d3/3; stat -c '%u %g' /app/files/d1/1 /app/files/d3/3");
    assert_eq!(shown, "CONTENT 1CONTENT 2content 37 8\n7 8");
    // What is there already is not made again, even if it is asked for.
    store.build(&context, &["--no-cache", "-t", "again"]).expect(0);
    if are_possible(&store) {
        assert_eq!(layers(&store, "again"), layers(&store, "three"));
    }
    store.sound().expect("sound");
}

#[test]
fn steps_and_copies_on_a_delta_see_what_they_would_see_without() {
    needs_root!();
    let dockerfile = "FROM busybox AS base\nCOPY files /app/files\nFROM base AS run\n\
        RUN --network=none cd /app/files && rm -r d0 && mkdir d0 && echo x > d0/x && echo more >> d1/5 && \
        chmod 600 d1/9 && rm d1/1 && mv d2 moved && ln d3/3 d3/twin\n\
        FROM busybox\nCOPY --from=run /app /run\nCOPY --from=base /app /all\nCOPY --link files /linked/\n\
        COPY files /there/\n";
    let (store, cold) = (Store::with_busybox(), Store::empty());
    let archive = store.beside("busybox.tar");
    store.ok(&["save", "-o", text(&archive), "busybox"]);
    cold.ok(&["load", "-i", text(&archive)]);
    let context = context(dockerfile);
    still(&store, &context, "one");
    context.write("files/d1/1", "CONTENT 1");
    context.write("files/d2/new", "new");
    // All but the one from `run`, from which much is gone, in one way or another.
    assert_eq!(still(&store, &context, "two"), still(&cold, &context, "two"));
    // On a base that has changed a copy is made as a whole.
    let count = deltas(&store).len();
    assert!(count >= 3 || !are_possible(&store), "{count} deltas");
    let listing = "cd / && find run all linked there | sort | xargs stat -c '%n %a %u %g %s'; cat linked/d1/1 there/d2/new";
    assert_eq!(store.shell("two", listing), cold.shell("two", listing));
    store.sound().expect("sound");
}

#[test]
fn what_a_delta_stands_on_stays_until_it_goes_itself() {
    needs_root!();
    let (store, context) = one_and_two("");
    let show = "cat /app/files/d1/1 /app/files/d3/3";
    store.ok(&["rmi", "one"]);
    store.ok(&["prune", "--force"]);
    assert_eq!(store.shell("two", show), "CONTENT 1content 3");
    store.sound().expect("sound");
    // So the next change is a delta, too.
    context.write("files/d1/1", "Content 1");
    store.build(&context, &["-t", "two"]).expect(0);
    let is_possible = are_possible(&store);
    assert_eq!(deltas(&store).len(), if is_possible { 2 } else { 0 });
    let told = store.ok(&["gc", "--dry-run", "--keep-duration", "0s", "--format", "json"]).stdout;
    let told: Value = serde_json::from_str(&told).expect("gc prints JSON");
    let objects = told["objects"].as_array().expect("a list");
    let removed = |object: &&Value| object["removed"] == true;
    assert_eq!(
        objects.iter().filter(removed).filter(|object| object["kind"] == "result").count(),
        if is_possible { 1 } else { 2 }
    );
    store.ok(&["rmi", "two"]);
    store.ok(&["prune", "--force"]);
    assert_eq!(deltas(&store).len(), 0);
    assert_eq!(store.snapshots(), 1, "busybox");
    for place in ["shared", "trash"] {
        assert_eq!(fs::read_dir(store.root().join("snapshots").join(place)).expect("ours").count(), 0);
    }
    store.sound().expect("sound");
    // A full one again, as there is none to stand on.
    store.build(&context, &["-t", "two"]).expect(0);
    assert_eq!(store.shell("two", show), "Content 1content 3");
    assert_eq!(deltas(&store).len(), 0);
}

#[test]
fn damage_below_a_delta_is_found_in_both_and_no_copy_takes_it_over() {
    needs_root!();
    let store = Store::empty();
    let context = context("FROM scratch\nCOPY files /\n");
    store.build(&context, &["-t", "one"]).expect(0);
    context.write("files/d1/1", "CONTENT 1");
    store.build(&context, &["-t", "two"]).expect(0);
    let expected = layers(&store, "two");
    let full = fs::read_dir(store.root().join("snapshots/committed")).expect("ours");
    let mut files = full.map(|entry| entry.expect("ours").path().join("fs/d3/3"));
    let file = files.find(|path| path.exists()).expect("the full one has it");
    let file = fs::File::options().write(true).open(file).expect("ours");
    file.write_at(b"C", 0).expect("ours");
    let found = store.kiln(&["fsck", "--deep", "--repair", "--format", "json"]).expect(0);
    let report: Value = serde_json::from_str(&found.stdout).expect("fsck prints JSON");
    let problems = report["problems"].as_array().expect("a list");
    assert!(problems.iter().any(|problem| problem["kind"] == "snapshot"), "{report:#}");
    for tag in ["one", "two"] {
        assert_ne!(store.kiln(&["inspect", tag]).code, Some(0), "{tag} is there still");
    }
    // Neither linked to nor stood on.
    store.build(&context, &["-t", "two"]).expect(0);
    assert_eq!(layers(&store, "two"), expected);
    store.sound().expect("sound");
}

#[test]
fn an_index_that_is_made_anew_knows_deltas() {
    needs_root!();
    let (store, context) = one_and_two("");
    let before = (layers(&store, "one"), layers(&store, "two"));
    store.ok(&["fsck", "--rebuild", "--deep"]);
    for file in ["meta.sqlite", "meta.sqlite-wal", "meta.sqlite-shm", "journal"] {
        let _ = fs::remove_file(store.root().join("db").join(file));
    }
    store.ok(&["fsck", "--rebuild", "--deep"]);
    assert_eq!((layers(&store, "one"), layers(&store, "two")), before);
    assert_eq!(store.build(&context, &["-t", "two"]).expect(0).ran(), [""; 0]);
    store.ok(&["gc"]);
    assert_eq!(store.shell("two", "cat /app/files/d1/1 /app/files/d3/3"), "CONTENT 1content 3");
}

#[test]
fn the_toolkit_takes_a_delta_for_the_layer_that_it_is() {
    needs_root!();
    let (store, _context) = one_and_two("RUN --network=none rm /app/files/d2/2\n");
    let diff = store.kiln(&["diff", "one", "two"]).expect(1).stdout;
    assert!(
        diff.contains("/app/files/d1/1") && diff.contains("0 added") && diff.contains("1 changed"),
        "{diff}"
    );
    let rows = |tag: &str| store.ok(&["layer", "ls", tag]).stdout.lines().count();
    assert_eq!((rows("one"), rows("two")), (4, 4));
    let shown = store.ok(&["layer", "show", "two", "/app/files/d3/3"]).stdout;
    assert!(shown.contains("is from layer 2"), "{shown}");
    let here = store.beside("out");
    fs::create_dir(&here).expect("ours");
    store.ok(&["cp", "two:/app/files", text(&here)]);
    let read = |path: &str| fs::read_to_string(here.join("files").join(path)).unwrap_or_default();
    assert_eq!([read("d1/1"), read("d3/3"), read("d2/2")], ["CONTENT 1", "content 3", ""]);
    store.ok(&["history", "two"]);
    store.ok(&["du", "--verbose"]);
    let row = store.ok(&["du", "--verbose", "--format", "json"]).stdout;
    let row: Value = serde_json::from_str(&row).expect("JSON");
    let images = row["images"].as_array().expect("a list");
    assert!(
        images.iter().all(|image| image["layers"].as_u64().is_none_or(|layers| layers <= 3)),
        "{images:?}"
    );
    store.ok(&["flatten", "two", "-t", "flat"]);
    assert_eq!(
        store.shell("flat", "cat /app/files/d1/1 /app/files/d3/3; ls /app/files/d2/2 2>&1 | wc -l"),
        "CONTENT 1content 31"
    );
    store.sound().expect("sound");
}

#[test]
fn few_changed_files_are_a_delta_on_a_base_that_moved_too() {
    needs_root!();
    let (store, cold) = (Store::with_busybox(), Store::empty());
    let base = |text: &str| store.image("base", &format!("FROM busybox\nRUN --network=none {text}\n"));
    let context = context("FROM base\nCOPY files /\n");
    base("echo one > /etc/motd");
    store.build(&context, &["-t", "one"]).expect(0);
    base("echo two > /etc/motd");
    context.write("files/d1/1", "CONTENT 1");
    store.build(&context, &["-t", "two"]).expect(0);
    let possible = usize::from(are_possible(&store));
    assert_eq!(deltas(&store).len(), possible);
    let archive = store.beside("base.tar");
    store.ok(&["save", "-o", text(&archive), "base"]);
    cold.ok(&["load", "-i", text(&archive)]);
    cold.build(&context, &["-t", "two"]).expect(0);
    assert_eq!(layers(&store, "two"), layers(&cold, "two"));
    // The delta itself goes on to the next base.
    base("echo three > /etc/motd");
    store.build(&context, &["-t", "three"]).expect(0);
    assert_eq!(deltas(&store).len(), 2 * possible);
    let show = "cat /etc/motd /d1/1 /d3/3";
    assert_eq!(store.shell("three", show), "three\nCONTENT 1content 3");
    assert_eq!(store.shell("two", show), "two\nCONTENT 1content 3");
    // Not where a directory of it is there already.
    base("mkdir /d2");
    context.write("files/d1/1", "Content 1");
    store.build(&context, &["-t", "four"]).expect(0);
    assert_eq!(deltas(&store).len(), 2 * possible);
    store.sound().expect("sound");
}
