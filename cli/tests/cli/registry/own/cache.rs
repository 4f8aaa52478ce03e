//! Caches in a registry that is kiln's own: one that dies, one that falls silent, and results in an image.

use std::collections::BTreeSet;
use std::fs;

use super::super::server::Bench;
use super::Own;
use crate::between::Between;
use crate::harness::{Context, Outcome, needs_root};
use crate::remote_cache::{project, warnings};
use crate::remote_cache_ends::Ends;

#[test]
fn a_registry_that_dies_costs_time_and_nothing_else() {
    needs_root!();
    let own = Own::start();
    Ends::of(own.address, &|at, more| format!("type=registry,ref={at}/cache/app:main{more}")).die_at_every(2);
}

#[test]
fn a_registry_that_falls_silent_costs_time_and_nothing_else() {
    needs_root!();
    let own = Own::start();
    Ends::of(own.address, &|at, more| format!("type=registry,ref={at}/cache/app:main{more}")).fall_silent();
}

/// Blobs that were fetched through `between`, each as often as it was.
fn fetched(between: &Between, repository: &str) -> Vec<String> {
    let start = format!("GET /v2/{repository}/blobs/");
    between.requests().iter().filter_map(|line| line.strip_prefix(&start).map(str::to_owned)).collect()
}

/// The digests of an image's config and of its layers' blobs, as its manifest has them.
fn parts(own: &Own, repository: &str) -> (String, Vec<String>) {
    let answer = own.client().get(&format!("/v2/{repository}/manifests/latest")).expect(200);
    let manifest: serde_json::Value = serde_json::from_slice(&answer.body).expect("a manifest");
    let digest = |part: &serde_json::Value| part["digest"].as_str().expect("a digest").to_owned();
    let layers = manifest["layers"].as_array().expect("a list");
    (digest(&manifest["config"]), layers.iter().map(digest).collect())
}

fn sorted(mut all: Vec<String>) -> Vec<String> {
    all.sort();
    all
}

/// The project with a base out of this registry.
fn on(host: &str) -> Context {
    let context = project();
    let dockerfile = fs::read_to_string(context.at("Dockerfile")).expect("ours");
    context.write("Dockerfile", &dockerfile.replace("FROM busybox", &format!("FROM {host}/base")));
    context
}

/// Builds on an empty store with the cache in the image, by way of a proxy that counts.
#[track_caller]
fn from_nothing(own: &Own, context: &Context, more: &[&str]) -> (Bench, Between, Outcome) {
    let (bench, between) = (Bench::empty(), Between::new(own.address));
    let from = format!("{}/app", between.address);
    let flags = [&["--cache-from", &from][..], more].concat();
    let built = bench.build(context, &flags).expect(0);
    (bench, between, built)
}

#[test]
fn an_empty_store_runs_nothing_with_the_cache_in_an_image_of_a_registry() {
    needs_root!();
    let own = Own::start();
    let maker = Bench::new();
    let (base, app) = (own.name("base"), own.name("app"));
    maker.ok(&["tag", "busybox", &base]);
    maker.ok(&["push", &base]);
    let context = on(&own.address.to_string());
    let first = maker.build(&context, &["-t", &app, "--cache-to", "type=inline", "--push"]).expect(0);
    assert_eq!(first.ran().len(), 21);
    let (config, layers) = parts(&own, "app");
    let blobs_of = |layers: &[String]| -> Vec<String> {
        let distinct: BTreeSet<&String> = layers.iter().chain([&config]).collect();
        distinct.into_iter().cloned().collect()
    };

    // All of the image, each blob once, and nothing of what other stages made.
    let (bench, between, again) = from_nothing(&own, &context, &["-t", "again"]);
    assert_eq!((again.ran(), warnings(&again)), (vec![], vec![]));
    assert_eq!(sorted(fetched(&between, "app")), blobs_of(&layers));
    assert_eq!(bench.store.shell("again", "cat /made/4 /end/4 /tool"), "made4\nend4\ntools1");
    assert_eq!(bench.store.inspect("again")["RootFS"], maker.store.inspect(&app)["RootFS"]);
    assert!(again.stderr.contains(&format!("CACHED from image {}/app", between.address)), "{}", again.stderr);
    assert_eq!(bench.store.sound(), Ok(()));
    // The last five steps are others: of the image below them only what they stand on comes.
    let dockerfile = fs::read_to_string(context.at("Dockerfile")).expect("ours");
    context.write("Dockerfile", &dockerfile.replace("/end", "/last"));
    let (bench, between, changed) = from_nothing(&own, &context, &["-t", "changed"]);
    assert_eq!((changed.ran().len(), warnings(&changed)), (5, vec![]));
    assert_eq!(sorted(fetched(&between, "app")), blobs_of(&layers[..layers.len() - 5]));
    assert_eq!(bench.store.shell("changed", "cat /made/4 /last/4 /tool"), "made4\nend4\ntools1");

    // An image without a cache, one that is not there, and one that nobody is to be asked for.
    let without = format!("{}/base", own.address);
    let missing = format!("{}/nothing", own.address);
    for (name, more, told) in [
        (&without, &[][..], "was not built with --cache-to type=inline"),
        (&missing, &[][..], "/nothing"),
        (&app, &["--pull=never"][..], "the image is not in the store"),
    ] {
        let small = Context::new(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
        let bench = Bench::empty();
        let built = bench.build(&small, &[&["--cache-from", name.as_str()][..], more].concat()).expect(0);
        let warned = warnings(&built);
        assert_eq!(warned.len(), 1, "{warned:?}");
        assert!(warned[0].starts_with("the build goes on without the cache of image "), "{warned:?}");
        assert!(warned[0].contains(told), "{warned:?}");
    }
}
