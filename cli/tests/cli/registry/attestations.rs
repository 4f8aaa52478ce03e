//! Images of which something is said, in a real registry: pushed, and taken by every tool.

use serde_json::Value;

use super::server::{Bench, Registry, context, needs_programs};
use crate::attestations::{PROVENANCE, SBOM};
use crate::harness::{Context, needs_root, text};
use crate::interop::Tools;

const ASKED: [&str; 2] = ["--provenance=mode=max", "--sbom"];

/// The index behind a name.
#[track_caller]
fn index(registry: &Registry, name: &str) -> Value {
    let raw = registry.skopeo(&["inspect", "--raw", &format!("docker://{}", registry.name(name))]);
    serde_json::from_str(&raw).expect("JSON")
}

#[test]
fn what_is_said_is_pushed_once_and_copied_with_the_image() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (registry, bench) = (Registry::open(), Bench::new());
    let plain = registry.name("app:plain");
    bench.build(&context(), &["--push", "-t", &plain]).expect(0);
    let name = registry.name("app:v1");
    let args = [&["--push", "-t", &name][..], &ASKED].concat();
    let pushed = bench.build(&context(), &args).expect(0);
    assert!(pushed.stdout.contains(&registry.digest("app:v1")), "{}", pushed.stdout);
    let found = index(&registry, "app:v1");
    let entries = found["manifests"].as_array().expect("a list");
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0]["digest"], registry.digest("app:plain").as_str(), "the image is the same");
    assert_eq!(entries[1]["annotations"]["vnd.docker.reference.digest"], entries[0]["digest"]);
    let again = bench.build(&context(), &args).expect(0);
    assert!(again.ran().is_empty() && again.stdout.contains("nothing to send"), "{}", again.stdout);

    // What the registry has is listed and shown as it is in the store.
    let show = |image: &str, more: &[&str]| bench.ok(&[&["image", "attestations", image], more].concat());
    let there = format!("docker://{name}");
    assert_eq!(show(&there, &[]), show(&name, &[]));
    assert_eq!(show(&there, &[]).lines().count(), 3);
    let sbom = ["--show=predicate", "--type=sbom"];
    assert_eq!(show(&there, &sbom), show(&name, &sbom));
    assert!(show(&there, &sbom).contains("\"spdxVersion\": \"SPDX-2.3\""));
    let alone = format!("docker://{plain}");
    assert_eq!(show(&alone, &[]), format!("nothing is said of {alone}\n"));

    // Copies are whole.
    let copy = |to: &str| format!("docker://{}", registry.name(to));
    let from = format!("docker://{name}");
    bench.ok(&["copy", "--all", &from, &copy("copied:kiln")]);
    registry.skopeo(&["copy", "--all", &from, &copy("copied:skopeo")]);
    for copied in ["copied:kiln", "copied:skopeo"] {
        assert_eq!(registry.digest(copied), registry.digest("app:v1"), "{copied}");
    }
    // And so is what is pushed out of the store, with an image that was built before.
    bench.build(&context(), &[&["-t", &registry.name("late:v1")][..], &ASKED].concat()).expect(0);
    bench.ok(&["push", &registry.name("late:v1")]);
    let late = index(&registry, "late:v1");
    assert_eq!(late["manifests"][0]["digest"], entries[0]["digest"]);
    assert_eq!(late["manifests"].as_array().map(Vec::len), Some(2));
    // Without being asked for, nothing is said.
    bench.build(&context(), &["-t", &registry.name("silent:v1")]).expect(0);
    bench.ok(&["push", &registry.name("silent:v1")]);
    assert_eq!(registry.digest("silent:v1"), registry.digest("app:plain"));

    // Pulled, it is the image.
    let other = Bench::empty();
    other.ok(&["pull", &name]);
    assert_eq!(other.store.shell(&name, "cat /ran /copied"), "ran\ncopied");
    assert_eq!(other.id(&name), bench.id(&name));
    let base = Context::new(&[("Dockerfile", &format!("FROM {name}\nRUN cat /ran\n"))]);
    let on = registry.name("on:v1");
    other.build(&base, &[&["-t", &on, "--push"][..], &ASKED].concat()).expect(0);
    other.store.sound().unwrap();
    bench.store.sound().unwrap();
    // What it stands on is named by what the registry has.
    let layout = bench.at("on");
    bench.ok(&["copy", "--all", &format!("docker://{on}"), &format!("oci:{}:v1", text(&layout))]);
    let read = |digest: &Value| -> Value {
        let digest = digest.as_str().expect("a digest").replace(':', "/");
        serde_json::from_slice(&std::fs::read(layout.join("blobs").join(digest)).expect("copied"))
            .expect("JSON")
    };
    let layers = read(&index(&registry, "on:v1")["manifests"][1]["digest"])["layers"].clone();
    let kinds = [0, 1].map(|nth: usize| layers[nth]["annotations"]["in-toto.io/predicate-type"].clone());
    assert_eq!(kinds, [PROVENANCE, SBOM]);
    let statement = read(&layers[0]["digest"]);
    let base = &statement["predicate"]["buildDefinition"]["resolvedDependencies"][0];
    assert!(base["uri"].as_str().expect("text").contains("/app@v1?platform="), "{base}");
    let digest = registry.digest("app:v1");
    assert_eq!(base["digest"]["sha256"], digest.trim_start_matches("sha256:"));
}

#[test]
fn every_tool_takes_the_image_out_of_the_index() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo", "podman", "buildah", "runc");
    let (registry, bench, tools) = (Registry::open(), Bench::new(), Tools::new());
    for (name, more) in
        [("app:v1", &[][..]), ("app:artifact", &["-o", "type=registry,oci-artifact=true"][..])]
    {
        let name = registry.name(name);
        let push: &[&str] = if more.is_empty() { &["--push"] } else { more };
        bench.build(&context(), &[&["-t", &name][..], push, &ASKED].concat()).expect(0);
        let from = format!("docker://{name}");
        let shown: Value = serde_json::from_str(&registry.skopeo(&["inspect", &from])).expect("JSON");
        assert_eq!(shown["Labels"]["of"], "test");
        let dir = bench.at(if more.is_empty() { "copy" } else { "copy-artifact" });
        registry.skopeo(&["copy", &from, &format!("dir:{}", text(&dir))]);
        tools.podman(&["pull", "-q", "--tls-verify=false", &name]);
        let said = tools.podman(&["run", "--rm", "--network", "none", &name, "cat", "/ran", "/copied"]);
        assert_eq!(said, "ran\ncopied\n");
        let container = tools.buildah(&["from", "-q", "--tls-verify=false", "--pull-always", &name]);
        let mounted = tools.buildah(&["mount", container.trim()]).trim().to_owned();
        assert_eq!(std::fs::read_to_string(format!("{mounted}/ran")).expect("mounted"), "ran\n");
        tools.buildah(&["rm", container.trim()]);
        tools.podman(&["rmi", "-f", &name]);
    }
}
