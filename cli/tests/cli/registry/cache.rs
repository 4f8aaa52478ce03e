//! `--cache-to` and `--cache-from` with `type=registry`.

use std::fs;
use std::path::{Path, PathBuf};

use super::server::{Bench, Registry, needs_programs};
use crate::harness::{Context, needs_root};
use crate::remote_cache::{id, list, small, warnings};
use crate::remote_cache_deltas::{self as deltas, Side};

/// The base image's name in the registry, which has it from now on.
fn base(registry: &Registry) -> String {
    let (maker, name) = (Bench::new(), registry.name("base:v1"));
    maker.ok(&["tag", "busybox", &name]);
    maker.ok(&["push", &name]);
    name
}

/// Four steps on an image of the registry.
fn on(registry: &Registry) -> Context {
    let context = small();
    let dockerfile = fs::read_to_string(context.at("Dockerfile")).expect("ours");
    context.write("Dockerfile", &dockerfile.replace("busybox", &base(registry)));
    context
}

/// Files of blobs that are no documents.
fn layers(data: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    list(data, &mut files);
    let is_layer = |path: &PathBuf| {
        path.ends_with("data")
            && fs::read(path).is_ok_and(|bytes| bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]))
    };
    files.retain(is_layer);
    files
}

#[test]
fn an_empty_store_runs_nothing_with_a_registry() {
    needs_root!();
    needs_programs!("docker-registry");
    let registry = Registry::open();
    let context = on(&registry);
    let place = format!("type=registry,ref={}", registry.name("cache/app:main"));
    let to = format!("{place},mode=max");
    let first = Bench::empty().build(&context, &["--cache-to", &to]).expect(0);
    assert_eq!((first.ran().len(), warnings(&first)), (4, vec![]));
    let bench = Bench::empty();
    let again = bench.build(&context, &["-t", "app", "--cache-from", &place, "--cache-to", &to]).expect(0);
    assert_eq!((again.ran(), warnings(&again), id(&again)), (vec![], vec![], id(&first)));
    assert_eq!(bench.store.shell("app", "cat /a /b /c /d"), "a\nb\nb\na");
    let why = bench.ok(&["why"]);
    assert!(why.contains(&format!("cached, from registry {}", registry.name("cache/app:main"))), "{why}");
    bench.store.sound().unwrap();
    // Another tag is another cache.
    let other = format!("type=registry,ref={}", registry.name("cache/app:other"));
    let apart = Bench::empty().build(&context, &["--cache-from", &other]).expect(0);
    assert_eq!((apart.ran().len(), warnings(&apart)), (4, vec![]));

    // Layers that are not what they were, and then nobody at all.
    for layer in layers(&registry.data()) {
        fs::write(layer, "not a layer").expect("ours");
    }
    let bench = Bench::empty();
    let damaged = bench.build(&context, &["-t", "app", "--cache-from", &place]).expect(0);
    assert_eq!(damaged.ran().len(), 4);
    assert!(!warnings(&damaged).is_empty(), "{}", damaged.stderr);
    assert_eq!(bench.store.shell("app", "cat /a /b /c /d"), "a\nb\nb\na");
    drop(registry);
    let offline =
        bench.build(&context, &["--offline", "--no-cache", "--cache-from", &place, "--cache-to", &to]);
    let offline = offline.expect(0);
    let skipped = warnings(&offline);
    assert!(skipped.len() == 2 && skipped.iter().all(|text| text.starts_with("--offline: ")), "{skipped:?}");
    context.write("a", "changed\n");
    let alone = bench.build(&context, &["--cache-from", &place, "--cache-to", &to]).expect(0);
    let warned = warnings(&alone);
    let of = |start: &str| warned.iter().filter(|text| text.starts_with(start)).count();
    assert_eq!(
        (of("the build goes on without the cache"), of("the cache is not exported")),
        (1, 1),
        "{warned:?}"
    );
}

#[test]
fn an_empty_store_gets_whole_layers_from_a_registry() {
    needs_root!();
    needs_programs!("docker-registry");
    let registry = Registry::open();
    let context = deltas::project(&base(&registry));
    let place = format!("type=registry,ref={}", registry.name("cache/app:main"));
    let (one, other) = (Bench::empty(), Bench::empty());
    let sender = Side { store: &one.store, build: &|flags| one.build(&context, flags) };
    let taker = Side { store: &other.store, build: &|flags| other.build(&context, flags) };
    deltas::check(&context, &sender, &taker, &format!("{place},mode=max"), &place);
}
