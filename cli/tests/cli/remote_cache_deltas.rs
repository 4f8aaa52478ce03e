//! What stands in front of an earlier copy is a whole layer to other stores: they get it from a cache as any
//! other.

use crate::deltas::{are_possible, context, deltas};
use crate::harness::{Context, Outcome, Store, needs_root, text};
use crate::remote_cache::{Cache, id, warnings};

/// Copies that become deltas in the image and in another stage, and steps that stand on each.
pub(crate) fn project(base: &str) -> Context {
    context(&format!(
        "FROM {base} AS made\nCOPY files /files\n\
         FROM {base}\nCOPY --chown=7:8 files /app/files\n\
         RUN --network=none cat /app/files/d1/1 > /shown\nCOPY --from=made /files /made\n"
    ))
}

/// A store, and `kiln build` of the project with more flags on it.
pub(crate) struct Side<'a> {
    pub(crate) store: &'a Store,
    pub(crate) build: &'a dyn Fn(&[&str]) -> Outcome,
}

impl Side<'_> {
    #[track_caller]
    fn build(&self, flags: &[&str]) -> Outcome {
        let built = (self.build)(&[flags, &["-t", "app"]].concat()).expect(0);
        assert_eq!(warnings(&built), [""; 0], "{}", built.stderr);
        built
    }

    /// The same where all is there already, here or in a cache.
    #[track_caller]
    fn take(&self, flags: &[&str]) -> Outcome {
        let built = self.build(flags);
        assert_eq!(built.ran(), [""; 0], "{}", built.stderr);
        built
    }

    /// Builds the project, edits it, and builds it again with `flags`.
    #[track_caller]
    fn build_deltas(&self, context: &Context, flags: &[&str]) -> Outcome {
        self.build(&[]);
        context.write("files/d1/1", "CONTENT 1");
        let built = self.build(flags);
        assert_eq!(built.ran().len(), 4, "{}", built.stderr);
        // What is copied from the stage stands on a step that ran again, and finds there what it found before.
        assert_eq!(deltas(self.store).len(), if are_possible(self.store) { 3 } else { 0 });
        built
    }

    /// Everything that can be seen of the files; how long directories are is the file system's affair.
    fn files(&self) -> String {
        let seen = "cd / && find app made shown | sort | xargs stat -c '%n %f %u %g %Y %N'; \
             find app made shown -type f | sort | xargs cat | sha256sum; cat shown";
        self.store.shell("app", seen)
    }
}

/// What `sender` builds goes to a cache with `to`, and to a store that has the base alone with `from`: there and
/// back.
#[track_caller]
pub(crate) fn check(context: &Context, sender: &Side<'_>, taker: &Side<'_>, to: &str, from: &str) {
    let sent = sender.build_deltas(context, &["--cache-to", to]);
    let taken = taker.take(&["--cache-from", from]);
    assert_eq!(id(&taken), id(&sent));
    assert_eq!(taker.files(), sender.files());
    assert!(taker.files().ends_with("CONTENT 1"), "{}", taker.files());
    assert_eq!(deltas(taker.store).len(), 0, "what comes is a whole layer");
    // The stage that is no part of the image.
    taker.take(&["--target", "made", "--cache-from", from]);
    // What the other one builds on it makes all, for it has not copied before, and that is the same to the first.
    context.write("files/d2/2", "CONTENT 2");
    let sent = taker.build(&["--cache-to", to]);
    assert_eq!((sent.ran().len(), deltas(taker.store).len()), (4, 0));
    let taken = sender.take(&["--cache-from", from]);
    assert_eq!(id(&taken), id(&sent));
    assert_eq!(taker.files(), sender.files());
    for side in [sender, taker] {
        side.store.sound().expect("sound");
    }
}

#[test]
fn an_empty_store_gets_whole_layers_from_a_directory() {
    needs_root!();
    let (context, cache) = (project("busybox"), Cache::new());
    let (one, other) = (cache.store(), cache.store());
    let sender = Side { store: &one, build: &|flags| one.build(&context, flags) };
    let taker = Side { store: &other, build: &|flags| other.build(&context, flags) };
    check(&context, &sender, &taker, &cache.to(",mode=max"), &cache.from(""));
}

#[test]
fn an_image_carries_the_cache_of_its_deltas() {
    needs_root!();
    let (context, cache) = (project("busybox"), Cache::new());
    let (one, other) = (cache.store(), cache.store());
    let sender = Side { store: &one, build: &|flags| one.build(&context, flags) };
    sender.build_deltas(&context, &["--cache-to", "type=inline"]);
    let tar = one.beside("app.tar");
    one.ok(&["save", "-o", text(&tar), "app"]);
    other.ok(&["load", "-i", text(&tar)]);
    let taker = Side { store: &other, build: &|flags| other.build(&context, flags) };
    taker.take(&["--cache-from", "app"]);
    assert_eq!(other.inspect("app")["RootFS"], one.inspect("app")["RootFS"]);
    assert_eq!(taker.files(), sender.files());
    other.sound().expect("sound");
}
