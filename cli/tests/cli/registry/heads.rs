//! What a build asks of registries when it knows what it asks about: one HEAD for a tag, and nothing else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_oci::Digest;
use kiln_oci::image::media_type;
use serde_json::Value;

use super::server::Bench;
use crate::harness::{Context, needs_root};
use crate::scripted::{Server, answer};

/// Brings an image of one layer to a registry.
pub(super) fn offer(server: &Server, tag: &str, content: &str) {
    let context =
        Context::new(&[("Dockerfile", "FROM scratch\nCOPY of /of\nENV OF=base\n"), ("of", content)]);
    Bench::empty().build(&context, &["--push", "-t", &base(server, tag)]).expect(0);
}

/// Brings an image for two platforms, neither of them this machine's, and returns what to build for.
pub(super) fn offer_two(server: &Server, tag: &str, content: &str) -> &'static str {
    const BOTH: &str = "linux/mips64le,linux/ppc64le";
    let dockerfile = "FROM scratch\nARG TARGETARCH\nCOPY of /of-$TARGETARCH\n";
    let context = Context::new(&[("Dockerfile", dockerfile), ("of", content)]);
    Bench::empty().build(&context, &["--platform", BOTH, "--push", "-t", &base(server, tag)]).expect(0);
    BOTH
}

pub(super) fn base(server: &Server, tag: &str) -> String {
    format!("{}/team/base:{tag}", server.domain())
}

/// What a tag leads to.
pub(super) fn digest(server: &Server, tag: &str) -> String {
    Digest::of(&server.state.lock().unwrap().manifests[tag].1).to_string()
}

/// The requests about bases since there were `from`, in their order, without the repository.
pub(super) fn asked(server: &Server, from: usize) -> Vec<String> {
    let lines = server.lines().into_iter().skip(from);
    lines
        .filter(|line| line.contains(" /v2/team/base/"))
        .map(|line| line.replace("/v2/team/base/", ""))
        .collect()
}

/// Runs a build that has to end well; what it asked for.
#[track_caller]
pub(super) fn asked_by(server: &Server, bench: &Bench, context: &Context, args: &[&str]) -> Vec<String> {
    let from = server.lines().len();
    bench.build(context, args).expect(0);
    asked(server, from)
}

fn on(server: &Server, tag: &str) -> Context {
    let dockerfile = format!("FROM {}\nCOPY src /src\n", base(server, tag));
    Context::new(&[("Dockerfile", &dockerfile), ("src", "src\n")])
}

#[test]
fn a_tag_whose_digest_is_known_costs_one_head() {
    needs_root!();
    let server = Server::new();
    offer(&server, "v1", "one");
    let (bench, name) = (Bench::empty(), base(&server, "v1"));
    let dockerfile = format!(
        "FROM {name} AS one\nCOPY src /src\nFROM {name} AS two\nCOPY --from=one /src /one\n\
         COPY --from={name} /of /two\nFROM two\nCOPY src /three\n"
    );
    let context = Context::new(&[("Dockerfile", &dockerfile), ("src", "src\n")]);
    let first = asked_by(&server, &bench, &context, &["-t", "app"]);
    assert_eq!(first.iter().filter(|line| line.contains("manifests/")).count(), 1, "{first:?}");
    assert_eq!(asked_by(&server, &bench, &context, &["-t", "app"]), [""; 0]);
    let head = ["HEAD manifests/v1"];
    assert_eq!(asked_by(&server, &bench, &context, &["--pull", "-t", "app"]), head);
    // The time that a tag is good for begins with the answer.
    bench.write("kiln.toml", "[registries]\ntag-ttl = \"0s\"\n");
    assert_eq!(asked_by(&server, &bench, &context, &["-t", "app"]), head);
    bench.write("kiln.toml", "[registries]\ntag-ttl = \"1d\"\n");
    assert_eq!(asked_by(&server, &bench, &context, &["-t", "app"]), [""; 0]);
    bench.store.sound().unwrap();
}

#[test]
fn a_digest_is_never_asked_for_again_under_whatever_name_its_image_came() {
    needs_root!();
    let server = Server::new();
    offer(&server, "v1", "one");
    let (bench, exact) = (Bench::empty(), format!("{}@{}", base(&server, "v1"), digest(&server, "v1")));
    asked_by(&server, &bench, &on(&server, "v1"), &["-t", "app"]);
    let dockerfile = format!("FROM {exact}\nCOPY src /other\n");
    let context = Context::new(&[("Dockerfile", &dockerfile), ("src", "src\n")]);
    for flags in [&["-t", "app"][..], &["--pull", "-t", "app"], &["--offline", "-t", "app"]] {
        assert_eq!(asked_by(&server, &bench, &context, flags), [""; 0], "{flags:?}");
    }
    // It has the name now, as if it had been pulled by it.
    assert_eq!(bench.id(&exact), bench.id(&base(&server, "v1")));
    bench.store.sound().unwrap();
}

#[test]
fn documents_that_the_store_has_do_not_come_again() {
    needs_root!();
    let server = Server::new();
    offer(&server, "v1", "one");
    let bench = Bench::empty();
    asked_by(&server, &bench, &on(&server, "v1"), &["-t", "app"]);
    // Another tag of the same image.
    let manifest = server.state.lock().unwrap().manifests["v1"].clone();
    server.state.lock().unwrap().manifests.insert("v2".to_owned(), manifest);
    let asked = asked_by(&server, &bench, &on(&server, "v2"), &["-t", "app"]);
    assert_eq!(asked, ["GET manifests/v2"]);

    // Another index over the same images.
    let both = offer_two(&server, "many", "two");
    let one = both.split(',').next().unwrap();
    let flags = ["--platform", one, "--pull", "-o", "type=cacheonly"];
    asked_by(&server, &bench, &on(&server, "many"), &flags);
    assert_eq!(asked_by(&server, &bench, &on(&server, "many"), &flags), ["HEAD manifests/many"]);
    let index = server.state.lock().unwrap().manifests["many"].1.clone();
    let mut index: Value = serde_json::from_slice(&index).unwrap();
    index["annotations"] = serde_json::json!({"moved": "yes"});
    let moved = (media_type::OCI_INDEX.to_owned(), serde_json::to_vec(&index).unwrap());
    server.state.lock().unwrap().manifests.insert("many".to_owned(), moved);
    let asked = asked_by(&server, &bench, &on(&server, "many"), &flags);
    assert_eq!(asked, ["HEAD manifests/many", "GET manifests/many"]);
    bench.store.sound().unwrap();
}

#[test]
fn all_platforms_of_a_build_stand_on_one_answer() {
    needs_root!();
    let server = Server::new();
    let both = offer_two(&server, "many", "one");
    let (bench, context) = (Bench::empty(), on(&server, "many"));
    let flags = ["--platform", both, "-o", "type=cacheonly"];
    let first = asked_by(&server, &bench, &context, &flags);
    let of_tag = |asked: &[String]| asked.iter().filter(|line| line.ends_with("/many")).count();
    assert_eq!(of_tag(&first), 1, "{first:?}");
    assert_eq!(asked_by(&server, &bench, &context, &flags), [""; 0]);
    let always = [&flags[..], &["--pull"]].concat();
    assert_eq!(asked_by(&server, &bench, &context, &always), ["HEAD manifests/many"]);
    // It moves: what it leads to is looked at once.
    offer_two(&server, "many", "two");
    let moved = asked_by(&server, &bench, &context, &always);
    assert_eq!(of_tag(&moved), 2, "{moved:?}");
    assert!(
        moved.starts_with(&["HEAD manifests/many".to_owned(), "GET manifests/many".to_owned()]),
        "{moved:?}"
    );
    bench.store.sound().unwrap();
}

#[test]
fn a_registry_that_is_down_is_a_warning_where_the_digest_is_known() {
    needs_root!();
    let down = Arc::new(AtomicBool::new(false));
    let is_down = down.clone();
    let server = Server::scripted(move |request, _| {
        (is_down.load(Ordering::SeqCst) && request.path != "/v2/").then(|| answer(503, &[], b"down"))
    });
    offer(&server, "v1", "one");
    let (bench, context) = (Bench::empty(), on(&server, "v1"));
    bench.write("kiln.toml", "[registries]\ntag-ttl = \"0s\"\ntries = 1\n");
    asked_by(&server, &bench, &context, &["-t", "app"]);
    down.store(true, Ordering::SeqCst);
    let from = server.lines().len();
    let built = bench.build(&context, &["-t", "app"]).expect(0);
    built.says(&["may have changed since it was pulled", "503"]);
    assert_eq!(asked(&server, from), ["HEAD manifests/v1"]);
    // Whoever insists hears that it cannot be.
    bench.build(&context, &["--pull", "-t", "app"]).expect(5).says(&["Dockerfile:1", "503"]);
    // Before it was pulled, nothing is known.
    let other = Bench::empty();
    other.write("kiln.toml", "[registries]\ntries = 1\n");
    other.build(&context, &["-t", "app"]).expect(5);
}
