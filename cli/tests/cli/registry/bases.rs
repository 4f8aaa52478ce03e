//! Builds that stand on images of registries.

use super::server::{Bench, Registry, context, needs_programs};
use crate::harness::{Context, needs_root};

#[test]
fn a_build_pulls_what_it_stands_on_and_asks_nobody_when_nothing_changed() {
    needs_root!();
    needs_programs!("docker-registry");
    let (registry, maker, bench) = (Registry::open(), Bench::new(), Bench::empty());
    let base = registry.name("base:v1");
    maker.build(&context(), &["--push", "-t", &base]).expect(0);
    let dockerfile =
        format!("FROM {base}\nRUN cat /ran > /again\nCOPY --from={base} /copied /copied-again\n");
    let context = Context::new(&[("Dockerfile", &dockerfile)]);

    bench.build(&context, &["--pull=never"]).expect(4).says(&["is not in the store", "kiln pull"]);
    bench.build(&context, &["--offline"]).expect(4).says(&["is not in the store"]);
    let first = bench.build(&context, &["-t", "app"]).expect(0);
    assert_eq!(first.ran().len(), 2, "{}", first.stderr);
    assert_eq!(bench.store.shell("app", "cat /again /copied-again"), "ran\ncopied");
    let always = bench.build(&context, &["--pull", "-t", "app"]).expect(0);
    assert!(always.ran().is_empty(), "{}", always.stderr);

    // The tag moves: only who asks sees it.
    let moved = Context::new(&[("Dockerfile", "FROM busybox\nRUN echo moved > /ran; echo x > /copied\n")]);
    maker.build(&moved, &["--push", "-t", &base]).expect(0);
    assert!(bench.build(&context, &["-t", "app"]).expect(0).ran().is_empty());
    bench.build(&context, &["--pull=always", "-t", "app"]).expect(0);
    assert_eq!(bench.store.shell("app", "cat /again"), "moved");

    // Nobody is there any more, and nobody has to be.
    drop(registry);
    assert!(bench.build(&context, &["-t", "app"]).expect(0).ran().is_empty());
    assert!(bench.build(&context, &["--offline", "-t", "app"]).expect(0).ran().is_empty());
    let failed = bench.build(&context, &["--pull", "-t", "app"]).expect(5);
    failed.says(&[&format!("base image {base}"), "Dockerfile:1", "Connection refused"]);
    bench.build(&context, &["--offline", "--pull=always"]).expect(2).says(&["one of them has to go"]);
    // A tag that has outlived its time is asked for, and good enough when nobody answers.
    bench.write("kiln.toml", "[registries]\ntag-ttl = \"0s\"\n");
    let old = bench.build(&context, &["-t", "app"]).expect(0);
    assert!(old.stderr.contains("may have changed since it was pulled"), "{}", old.stderr);
    bench.write("kiln.toml", "[registries]\ntag-ttl = \"1d\"\n");
    let young = bench.build(&context, &["-t", "app"]).expect(0);
    assert!(!young.stderr.contains("may have changed"), "{}", young.stderr);
    bench.store.sound().unwrap();
}

#[test]
fn a_tag_that_outlived_its_time_is_looked_up_again() {
    needs_root!();
    needs_programs!("docker-registry");
    let (registry, maker, bench) = (Registry::open(), Bench::new(), Bench::empty());
    let base = registry.name("base:v1");
    let version =
        |text: &str| Context::new(&[("Dockerfile", &format!("FROM busybox\nRUN echo {text} > /v\n"))]);
    maker.build(&version("one"), &["--push", "-t", &base]).expect(0);
    let context = Context::new(&[("Dockerfile", &format!("FROM {base}\nRUN cp /v /w\n"))]);
    bench.build(&context, &["-t", "app"]).expect(0);
    maker.build(&version("two"), &["--push", "-t", &base]).expect(0);
    bench.write("kiln.toml", "[registries]\ntag-ttl = \"1d\"\n");
    bench.build(&context, &["-t", "app"]).expect(0);
    assert_eq!(bench.store.shell("app", "cat /w"), "one");
    bench.write("kiln.toml", "[registries]\ntag-ttl = \"0s\"\n");
    bench.build(&context, &["-t", "app"]).expect(0);
    assert_eq!(bench.store.shell("app", "cat /w"), "two");
    // What was made here is nobody's to look up.
    let own =
        bench.build(&Context::new(&[("Dockerfile", "FROM app\nRUN echo three > /v\n")]), &["-t", &base]);
    own.expect(0);
    bench.build(&context, &["-t", "app"]).expect(0);
    assert_eq!(bench.store.shell("app", "cat /w"), "three");
}
