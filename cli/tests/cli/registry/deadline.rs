//! How long a transfer may take, however well it gets on; and whether a build may say who is insecure.

use std::time::{Duration, Instant};

use super::replies::{Image, offer};
use super::server::Bench;
use crate::harness::{Context, needs_root};
use crate::scripted::{Reply, Server, head};

/// As much as nobody calls a standstill, and no more.
fn dripping() -> Server {
    Server::scripted(|request, _| {
        let layer = Image::new(&vec![7; 600_000]).layer;
        let is_layer = request.is_blob() && request.path.ends_with(&kiln_oci::Digest::of(&layer).to_string());
        is_layer.then(|| Reply::Trickle(head(200, &[], layer.len()), layer))
    })
}

#[test]
fn a_transfer_that_gets_on_has_an_end_all_the_same() {
    needs_root!();
    let server = dripping();
    offer(&server, &Image::new(&vec![7; 600_000]));
    let name = format!("{}/team/app:v1", server.domain());
    let patient = "stall-timeout = \"1h\"\n";
    let pull = |config: &str, args: &[&str]| {
        let bench = Bench::empty();
        bench.write("kiln.toml", format!("[registries]\n{patient}{config}"));
        let begun = Instant::now();
        let outcome = bench.kiln(&[&["pull"], args, &[name.as_str()]].concat()).expect(5);
        outcome.says(&[
            &server.domain(),
            "was given 1 seconds for /v2/team/app/blobs/",
            "--transfer-timeout",
        ]);
        // It would have taken hours.
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
        assert_eq!(bench.ok(&["images", "-q"]), "");
        bench.store.sound().unwrap();
    };
    pull("", &["--transfer-timeout", "1s"]);
    pull("transfer-timeout = \"1s\"\n", &[]);
    // The command line wins.
    pull("transfer-timeout = \"1h\"\n", &["--transfer-timeout=1s"]);
    let bench = Bench::empty();
    bench.kiln(&["pull", "--transfer-timeout", "0s", &name]).expect(2).says(&["no time"]);
    bench.kiln(&["pull", "--transfer-timeout", "soon", &name]).expect(2).says(&["\"soon\" is no time"]);
}

#[test]
fn an_upload_that_nobody_answers_has_an_end() {
    needs_root!();
    let server = Server::scripted(|request, _| {
        (request.method == "PUT" && request.path.contains("/uploads/")).then(|| Reply::Hang(Vec::new()))
    });
    let bench = Bench::empty();
    let name = format!("{}/team/app:v1", server.domain());
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    let begun = Instant::now();
    let pushed = bench.build(&context, &["--push", "-t", &name, "--transfer-timeout", "1s"]).expect(5);
    pushed.says(&["was given 1 seconds for /v2/team/app/blobs/uploads/"]);
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert!(server.state.lock().unwrap().manifests.is_empty());
    bench.store.sound().unwrap();
}

#[test]
fn an_output_does_not_make_a_registry_insecure() {
    needs_root!();
    let (server, bench) = (Server::new(), Bench::empty());
    let name = format!("{}/team/app:v1", server.domain());
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    let output = |more: &str| format!("type=registry,name={name}{more}");
    for word in ["true", "1"] {
        let output = output(&format!(",registry.insecure={word}"));
        let refused = bench.build(&context, &["--output", &output]).expect(2);
        refused.says(&["registry.insecure", "--insecure-registry HOST", "[registries] insecure"]);
    }
    assert_eq!(server.lines(), [""; 0]);
    bench.build(&context, &["--output", &output(",registry.insecure=maybe")]).expect(2);
    bench.build(&context, &["--output", &output(",registry.insecure=false")]).expect(0);
    assert!(server.state.lock().unwrap().manifests.contains_key("v1"));
}
