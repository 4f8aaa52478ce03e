//! A layer's diff ID goes on from where its tar first differs from the last one's, and is what it would be
//! without.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::harness::{Context, Store, needs_root, test_as};

const FILES: usize = 96;
/// Together some times what is between two states.
const FILE_BYTES: usize = 160 << 10;

/// A context whose files are old, and stay of one size.
fn context() -> Context {
    let context = Context::new(&[("Dockerfile", "FROM scratch\nWORKDIR /app\nCOPY files .\n")]);
    (0..FILES).for_each(|nth| edit(&context, nth, "first"));
    context
}

fn edit(context: &Context, nth: usize, text: &str) {
    context.write(&name(nth), &format!("{nth} {text:>8}").repeat(FILE_BYTES / 8)[..FILE_BYTES]);
    settle(context, nth);
}

/// Times do not tell what changed, and are the same for all builders.
fn settle(context: &Context, nth: usize) {
    for path in [context.at(&name(nth)), context.at("files")] {
        set_time(&File::open(path).expect("ours to read"));
    }
}

fn set_time(file: &File) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    file.set_modified(time).expect("ours to write");
}

fn name(nth: usize) -> String {
    format!("files/f{nth:02}")
}

/// The image's ID.
fn build(store: &Store, context: &Context, args: &[&str]) -> String {
    let epoch = ["-t", "image", "--build-arg", "SOURCE_DATE_EPOCH=1000000000"];
    store.build(context, &[&epoch, args].concat()).expect(0);
    store.inspect("image")["Id"].as_str().expect("an image has one").to_owned()
}

fn build_in_an_empty_store(context: &Context) -> String {
    build(&Store::empty(), context, &[])
}

/// The only file with states.
pub(crate) fn states_file(store: &Store) -> PathBuf {
    let files: Vec<_> = fs::read_dir(store.root().join("state/hash-states")).expect("ours").collect();
    let [file] = files.as_slice() else { panic!("{files:?}") };
    file.as_ref().expect("ours").path()
}

#[test]
fn whatever_changed_the_image_is_that_of_a_builder_that_never_saw_another() {
    needs_root!();
    let (store, context) = (Store::empty(), context());
    type Edit = fn(&Context);
    let edits: [(&str, Edit); 8] = [
        ("nothing", |_| {}),
        ("the last", |context| edit(context, FILES - 1, "second")),
        ("one in the middle", |context| edit(context, FILES / 2, "second")),
        ("the first", |context| edit(context, 0, "second")),
        ("two change places", |context| {
            let [one, other, between] = [name(40), name(60), "files/between".to_owned()];
            for (from, to) in [(&one, &between), (&other, &one), (&between, &other)] {
                fs::rename(context.at(from), context.at(to)).expect("ours to write");
            }
            settle(context, 40);
        }),
        ("a mode", |context| {
            fs::set_permissions(context.at(&name(70)), fs::Permissions::from_mode(0o711)).expect("ours");
        }),
        ("one more", |context| edit(context, FILES, "new")),
        ("one less", |context| {
            fs::remove_file(context.at(&name(80))).expect("ours to write");
            settle(context, 70);
        }),
    ];
    let mut seen = Vec::new();
    for (what, edit) in edits {
        edit(&context);
        let warm = build(&store, &context, &[]);
        assert_eq!(warm, build_in_an_empty_store(&context), "{what}");
        assert_eq!(warm, build(&store, &context, &["--no-cache"]), "{what}");
        assert!(!seen.contains(&warm), "{what}");
        seen.push(warm);
    }
    store.sound().expect("sound");
}

/// Those of a copy that begins otherwise.
fn foreign_states() -> Vec<u8> {
    let (store, context) = (Store::empty(), context());
    edit(&context, 0, "foreign");
    build(&store, &context, &[]);
    fs::read(states_file(&store)).expect("ours")
}

#[test]
fn what_is_in_front_of_a_change_is_not_read_again_but_by_who_checks_the_store() {
    needs_root!();
    if test_as().is_some() {
        eprintln!("SKIPPED ALOUD: the files of a user's store are not ours to write");
        return;
    }
    let (store, context) = (Store::empty(), context());
    build(&store, &context, &[]);
    let rotten = fs::read_dir(store.root().join("snapshots/committed")).expect("ours");
    let mut rotten = rotten.map(|entry| entry.expect("ours").path().join("fs/app/f03"));
    let rotten = rotten.find(|path| path.exists()).expect("the layer has it");
    let file = OpenOptions::new().write(true).open(rotten).expect("ours to write");
    file.write_all_at(b"rotten", 7).expect("ours to write");
    set_time(&file);
    edit(&context, 90, "second");
    assert_eq!(build(&store, &context, &[]), build_in_an_empty_store(&context));
    // Without states, with damaged ones, and with some of another layer than the one that is shared, everything
    // is read.
    let kept = fs::read(states_file(&store)).expect("ours");
    let damaged = kept[..kept.len() - 1].to_vec();
    for (nth, states) in [Vec::new(), damaged, foreign_states()].into_iter().enumerate() {
        fs::write(states_file(&store), states).expect("ours to write");
        edit(&context, 90, &format!("next {nth}"));
        assert_ne!(build(&store, &context, &[]), build_in_an_empty_store(&context), "{nth}");
    }
    // With its own again, nothing in front of the change is: these stay those of the copy that is shared.
    fs::write(states_file(&store), kept).expect("ours to write");
    edit(&context, 90, "last");
    assert_eq!(build(&store, &context, &[]), build_in_an_empty_store(&context));
    let found = store.sound().expect_err("layers are not what their diff IDs say");
    assert!(found.contains("its files make sha256:"), "{found}");
}
