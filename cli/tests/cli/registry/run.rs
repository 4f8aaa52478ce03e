//! Containers of images that are not there yet.

use super::server::{Bench, Registry, needs_programs};
use crate::harness::{Context, needs_root};

#[test]
fn a_container_of_an_image_that_is_missing_pulls_it() {
    needs_root!();
    needs_programs!("docker-registry");
    let (registry, maker, bench) = (Registry::open(), Bench::new(), Bench::empty());
    let name = registry.name("app:v1");
    let version =
        |text: &str| Context::new(&[("Dockerfile", &format!("FROM busybox\nRUN echo {text} > /v\n"))]);
    maker.build(&version("one"), &["--push", "-t", &name]).expect(0);

    bench
        .kiln(&["run", "--rm", "--pull", "never", &name, "cat", "/v"])
        .expect(125)
        .says(&["there is no image"]);
    let ran = bench.kiln(&["run", "--rm", &name, "cat", "/v"]).expect(0).says(&["pulling"]);
    assert_eq!(ran.stdout, "one\n");
    // What is there is good, and nobody is asked.
    maker.build(&version("two"), &["--push", "-t", &name]).expect(0);
    let ran = bench.kiln(&["run", "--rm", &name, "cat", "/v"]).expect(0);
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("one\n", ""));
    assert_eq!(bench.ok(&["run", "--rm", "--pull=always", &name, "cat", "/v"]), "two\n");
    let fresh = Bench::empty();
    fresh.ok(&["create", "--name", "it", &name, "true"]);
    assert!(fresh.ok(&["images"]).contains("app"));
    // An ID is no name.
    let id = bench.id(&name);
    bench.ok(&["run", "--rm", "--pull=always", &id[7..20], "true"]);
    drop(registry);
    bench.kiln(&["run", "--rm", "--pull=always", &name, "true"]).expect(125).says(&["Connection refused"]);
    bench.ok(&["run", "--rm", &name, "true"]);
    Bench::empty().kiln(&["run", "--rm", &name, "true"]).expect(125).says(&["Connection refused"]);
}
