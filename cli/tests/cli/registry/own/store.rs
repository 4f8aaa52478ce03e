//! Images of a store, for others to pull.

use kiln_oci::Digest;
use rustix::process::Signal;

use super::super::server::{Bench, context, digest_in, needs_programs};
use super::super::transfer::make_index;
use super::{Own, refused};
use crate::harness::{Context, needs_root, text};

/// An image with a layer of its own on busybox.
fn version(text: &str) -> Context {
    Context::new(&[("Dockerfile", "FROM busybox\nCOPY version /\n"), ("version", text)])
}

/// The digests of config and layers behind a path below `/v2/`.
#[track_caller]
fn blobs(own: &Own, path: &str) -> Vec<String> {
    let manifest = own.client().get(path).expect(200).json();
    let layers = manifest["layers"].as_array().expect("a manifest").iter().chain([&manifest["config"]]);
    layers.map(|blob| blob["digest"].as_str().expect("a digest").to_owned()).collect()
}

#[test]
fn an_image_is_pulled_from_a_store_as_a_push_would_have_sent_it() {
    needs_root!();
    let bench = Bench::new();
    bench.build(&context(), &["-t", "team/app:1", "-t", "localhost:5000/other/app:1"]).expect(0);
    let own = Own::of_store(&bench, &[]);
    let place = bench.store.root();
    assert_eq!(
        own.said,
        format!("registry at http://{}, of the images in {}\n", own.address, place.display())
    );
    let fresh = Bench::empty();
    let pulled = fresh.ok(&["pull", &own.name("team/app:1")]);
    assert_eq!(fresh.id(&own.name("team/app:1")), bench.id("team/app:1"));
    assert_eq!(fresh.store.shell(&own.name("team/app:1"), "cat /ran /copied"), "ran\ncopied");
    // Names of other registries are there without their hosts.
    assert_eq!(digest_in(&fresh.ok(&["pull", &own.name("other/app:1")])), digest_in(&pulled));
    // Official images have their short names, and their long ones.
    for name in ["busybox", "library/busybox"] {
        fresh.ok(&["pull", &own.name(name)]);
        assert_eq!(fresh.id(&own.name(name)), bench.id("busybox"));
    }
    let catalog = own.client().get("/v2/_catalog").expect(200).json();
    assert_eq!(catalog["repositories"], serde_json::json!(["busybox", "other/app", "team/app"]));
    let tags = own.client().get("/v2/team/app/tags/list").expect(200).json();
    assert_eq!(tags["tags"], serde_json::json!(["1"]));

    // Elsewhere it has the same digest.
    let other = Own::start();
    bench.ok(&["tag", "team/app:1", &other.name("team/app:1")]);
    assert_eq!(digest_in(&bench.ok(&["push", &other.name("team/app:1")])), digest_in(&pulled));
    // What was pulled is given on as it came.
    let next = Own::of_store(&fresh, &[]);
    let last = Bench::empty();
    assert_eq!(digest_in(&last.ok(&["pull", &next.name("team/app:1")])), digest_in(&pulled));
    // By its digest also from a process that nobody has asked for the tag.
    own.signal(Signal::TERM);
    assert_eq!(own.wait().0.code(), Some(0));
    let own = Own::of_store(&bench, &[]);
    own.client().get(&format!("/v2/team/app/manifests/{}", digest_in(&pulled))).expect(200);
    for blob in blobs(&own, "/v2/team/app/manifests/1") {
        let bytes = own.client().get(&format!("/v2/team/app/blobs/{blob}")).expect(200).body;
        assert_eq!(Digest::of(&bytes).to_string(), blob);
        own.client().get(&format!("/v2/busybox/blobs/{}", Digest::of(b"none"))).expect(404);
    }
    assert!(own.counts("made_ready_total 0"), "all of it was packed before");
    for store in [&bench, &fresh, &last] {
        store.store.sound().unwrap();
    }
}

#[test]
fn other_tools_pull_from_a_store() {
    needs_root!();
    needs_programs!("skopeo", "podman", "buildah");
    let (bench, tools) = (Bench::new(), crate::interop::Tools::new());
    bench.build(&context(), &["-t", "team/app:1"]).expect(0);
    let own = Own::of_store(&bench, &[]);
    let (name, id) = (own.name("team/app:1"), bench.id("team/app:1"));
    let raw = std::process::Command::new("skopeo")
        .args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false", &format!("docker://{name}")])
        .arg(format!("dir:{}", text(&tools.path("copy"))))
        .output()
        .unwrap();
    crate::harness::Outcome::of(raw).expect(0);
    let manifest = std::fs::read(tools.path("copy").join("manifest.json")).unwrap();
    assert_eq!(manifest, own.client().get("/v2/team/app/manifests/1").expect(200).body);
    tools.podman(&["pull", "-q", "--tls-verify=false", &name]);
    let seen = tools.podman(&["image", "inspect", "--format", "{{.Id}}", &name]);
    assert_eq!(seen.trim(), id.trim_start_matches("sha256:"));
    tools.podman(&["rmi", "-f", &name]);
    tools.buildah(&["pull", "-q", "--tls-verify=false", &name]);
    let push = std::process::Command::new("skopeo")
        .args(["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"])
        .args([
            &format!("dir:{}", text(&tools.path("copy"))),
            &format!("docker://{}", own.name("team/new:1")),
        ])
        .output()
        .unwrap();
    assert!(!push.status.success(), "nothing is pushed to it");
}

#[test]
fn nothing_is_pushed_to_a_store() {
    needs_root!();
    let (bench, other) = (Bench::new(), Bench::new());
    let own = Own::of_store(&bench, &[]);
    other.ok(&["tag", "busybox", &own.name("team/app:1")]);
    let before = bench.ok(&["images", "-q"]);
    other.kiln(&["push", &own.name("team/app:1")]).expect(5).says(&["405", "for pulling only"]);
    assert_eq!(bench.ok(&["images", "-q"]), before);
    let dir = tempfile::tempdir().unwrap();
    refused(&["--store", "--dir", text(dir.path())], 2).says(&["--store", "--dir"]);
    let config = super::write(dir.path(), "registry.toml", "store = true\nmirror = \"docker.io\"\n");
    let outcome = bench.kiln(&["registry", "serve", "--config", &config]);
    outcome.expect(2).says(&["store and mirror"]);
}

#[test]
fn what_is_being_pulled_stays_until_its_name_is_gone() {
    needs_root!();
    let bench = Bench::new();
    bench.build(&version("one\n"), &["-t", "team/app:1"]).expect(0);
    let own = Own::of_store(&bench, &[]);
    let reply = own.client().get("/v2/team/app/manifests/1").expect(200);
    let digest = reply.header("docker-content-digest").unwrap().to_owned();
    let by_digest = format!("/v2/team/app/manifests/{digest}");
    let old = blobs(&own, &by_digest);
    // Somebody builds anew and collects garbage before the client comes for the blobs.
    bench.build(&version("two\n"), &["-t", "team/app:1"]).expect(0);
    bench.ok(&["prune", "--force"]);
    bench.ok(&["gc"]);
    let new = blobs(&own, "/v2/team/app/manifests/1");
    assert_ne!(old, new);
    for blob in old.iter().chain(&new) {
        let bytes = own.client().get(&format!("/v2/team/app/blobs/{blob}")).expect(200).body;
        assert_eq!(Digest::of(&bytes).to_string(), *blob);
    }
    own.client().get(&by_digest).expect(200);
    bench.ok(&["rmi", "team/app:1"]);
    let mut client = own.client();
    assert_eq!(client.get("/v2/team/app/manifests/1").expect(404).code(), "MANIFEST_UNKNOWN");
    client.get(&by_digest).expect(404);
    for blob in old.iter().chain(&new) {
        client.get(&format!("/v2/team/app/blobs/{blob}")).expect(404);
    }
    assert_eq!(client.get("/v2/team/app/tags/list").expect(404).code(), "NAME_UNKNOWN");
    // Nothing keeps it any more.
    bench.ok(&["prune", "--force"]);
    let blob = |digest: &str| {
        let hex = digest.trim_start_matches("sha256:");
        bench.store.root().join("blobs/sha256").join(&hex[..2]).join(hex)
    };
    let busybox = blobs(&own, "/v2/busybox/manifests/latest");
    for digest in old.iter().chain(&new) {
        assert_eq!(blob(digest).exists(), busybox.contains(digest), "{digest}");
    }
    bench.store.sound().unwrap();
}

#[test]
fn an_image_is_packed_once_for_all_who_ask_at_once() {
    needs_root!();
    let bench = Bench::new();
    bench.build(&version(&"some more text\n".repeat(200_000)), &["-t", "team/app:1"]).expect(0);
    let own = Own::of_store(&bench, &[]);
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let mut client = own.client();
            std::thread::spawn(move || {
                let reply = client.get("/v2/team/app/manifests/1").expect(200);
                reply.header("docker-content-digest").unwrap().to_owned()
            })
        })
        .collect();
    let digests: Vec<String> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
    assert!(own.counts("made_ready_total 1"));
    // Nobody's garbage: the image has a name.
    bench.ok(&["gc"]);
    for blob in blobs(&own, "/v2/team/app/manifests/1") {
        own.client().get(&format!("/v2/team/app/blobs/{blob}")).expect(200);
    }
}

#[test]
fn images_for_several_platforms_are_given_out_whole() {
    needs_root!();
    let bench = Bench::new();
    let host = kiln_oci::Platform::host().architecture;
    let other = if host == "arm64" { "riscv64" } else { "arm64" };
    let layout = bench.at("layout");
    let dest = format!("type=oci,tar=false,dest={}", text(&layout));
    bench.build(&context(), &["--output", &dest, "-t", "many"]).expect(0);
    let digest = make_index(&layout, other).to_string();
    bench.ok(&["load", "-i", text(&layout)]);
    let own = Own::of_store(&bench, &[]);
    let fresh = Bench::empty();
    for architecture in [host.as_str(), other] {
        let platform = format!("linux/{architecture}");
        let pulled = fresh.ok(&["pull", "--platform", &platform, &own.name("many:v1")]);
        assert_eq!(digest_in(&pulled), digest);
        assert_eq!(fresh.store.inspect(&own.name("many:v1"))["Architecture"], architecture);
    }
}

#[test]
fn a_store_is_served_until_somebody_ends_it() {
    needs_root!();
    let bench = Bench::new();
    let own = Own::of_store(&bench, &[]);
    // Not by a signal that means something else.
    own.signal(Signal::HUP);
    own.signal(Signal::USR1);
    own.client().get("/v2/busybox/manifests/latest").expect(200);
    // Two may serve the same images, beside commands that use them.
    let second = Own::of_store(&bench, &[]);
    second.client().get("/v2/busybox/manifests/latest").expect(200);
    bench.build(&version("x"), &["-t", "new"]).expect(0);
    second.client().get("/v2/new/manifests/latest").expect(200);
    for (own, signal) in [(own, Signal::TERM), (second, Signal::INT)] {
        own.signal(signal);
        assert_eq!(own.wait().0.code(), Some(0));
    }
    bench.store.sound().unwrap();
}
