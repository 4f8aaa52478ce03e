//! push and pull, beside skopeo.

use std::fs;
use std::path::Path;

use kiln_oci::Digest;
use serde_json::{Value, json};

use super::server::{Bench, Registry, context, digest_in, needs_programs};
use crate::harness::{Context, needs_root, text};

#[test]
fn an_image_is_pushed_once_and_pulled_as_it_was() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (registry, bench) = (Registry::open(), Bench::new());
    let (name, other) = (registry.name("team/app:v1"), registry.name("other/app:v2"));
    let metadata = bench.at("metadata.json");
    let built =
        bench.build(&context(), &["--push", "-t", &name, "--metadata-file", text(&metadata)]).expect(0);
    assert!(built.stdout.contains("4 blobs sent"), "{}", built.stdout);
    let digest = digest_in(&built.stdout).to_owned();
    assert_eq!(registry.digest("team/app:v1"), digest);
    let metadata: Value = serde_json::from_slice(&fs::read(metadata).unwrap()).unwrap();
    assert_eq!(metadata["containerimage.digest"], json!(digest));

    // The same again, from the store and from the cache, sends nothing.
    assert!(bench.ok(&["push", &name]).contains("nothing to send"));
    let again = bench.build(&context(), &["--push", "-t", &name]).expect(0);
    assert!(again.stdout.contains("nothing to send") && again.stdout.contains(&digest), "{}", again.stdout);
    // Under another name the registry has all of it already.
    bench.ok(&["tag", &name, &other]);
    let mounted = bench.ok(&["push", &other]);
    assert!(mounted.contains("nothing to send, 4 mounted") && mounted.contains(&digest), "{mounted}");

    let fresh = Bench::empty();
    let pulled = fresh.kiln(&["pull", &name]).expect(0).says(&["fetching 3 of 3 layers"]);
    assert_eq!(digest_in(&pulled.stdout), digest);
    assert_eq!(fresh.id(&name), bench.id(&name));
    assert_eq!(fresh.store.shell(&name, "cat /ran /copied"), "ran\ncopied");
    fresh.store.sound().unwrap();
    let known = fresh.kiln(&["pull", &name]).expect(0);
    assert!(known.stdout.contains("Up to date") && known.stderr.is_empty(), "{known:?}");
    // Layers that are there are not fetched again, and what came leaves as it came.
    fresh.kiln(&["pull", &other]).expect(0);
    assert!(fresh.ok(&["push", &name]).contains("nothing to send"));
    let by_digest = format!("{}@{digest}", registry.name("team/app"));
    assert_eq!(fresh.ok(&["pull", "-q", &by_digest]), format!("{by_digest}\n"));
    assert_eq!(fresh.id(&by_digest), bench.id(&name));
    fresh.store.sound().unwrap();
}

#[test]
fn layers_travel_as_they_were_asked_to_be_packed() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (registry, bench) = (Registry::open(), Bench::new());
    bench.build(&context(), &["-t", &registry.name("app")]).expect(0);
    for (packing, kind) in [("zstd", "tar+zstd"), ("uncompressed", "layer.v1.tar")] {
        bench.ok(&["push", "--compression", packing, &registry.name("app")]);
        let raw = registry.skopeo(&["inspect", "--raw", &format!("docker://{}", registry.name("app"))]);
        let manifest: Value = serde_json::from_str(&raw).unwrap();
        for layer in manifest["layers"].as_array().unwrap() {
            assert!(layer["mediaType"].as_str().unwrap().ends_with(kind), "{packing}: {layer}");
        }
        let fresh = Bench::empty();
        fresh.ok(&["pull", &registry.name("app")]);
        assert_eq!(fresh.id(&registry.name("app")), bench.id(&registry.name("app")), "{packing}");
        assert_eq!(fresh.store.shell(&registry.name("app"), "cat /copied"), "copied", "{packing}");
        fresh.store.sound().unwrap();
    }
    let output =
        format!("type=registry,name={},push-by-digest=true,oci-mediatypes=false", registry.name("by/digest"));
    let pushed = bench.build(&context(), &["--output", &output]).expect(0);
    let by_digest = format!("by/digest@{}", digest_in(&pushed.stdout));
    let raw = registry.skopeo(&["inspect", "--raw", &format!("docker://{}", registry.name(&by_digest))]);
    assert!(raw.contains("vnd.docker.distribution.manifest.v2"), "{raw}");
}

#[test]
fn skopeo_and_kiln_see_the_same_image_in_both_directions() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (registry, bench) = (Registry::open(), Bench::new());
    bench.build(&context(), &["--push", "-t", &registry.name("ours")]).expect(0);
    let docker = |name: &str| format!("docker://{}", registry.name(name));
    registry.skopeo(&["copy", "--preserve-digests", &docker("ours"), &docker("theirs")]);
    let fresh = Bench::empty();
    let pulled = fresh.ok(&["pull", &registry.name("theirs")]);
    assert_eq!(digest_in(&pulled), registry.digest("ours"));
    assert_eq!(fresh.id(&registry.name("theirs")), bench.id(&registry.name("ours")));
    // docker's media types, as most images of registries have them.
    registry.skopeo(&["copy", "--format", "v2s2", &docker("ours"), &docker("v2s2")]);
    let pulled = fresh.ok(&["pull", &registry.name("v2s2")]);
    assert_eq!(digest_in(&pulled), registry.digest("v2s2"));
    let pushed = fresh.ok(&["push", &registry.name("v2s2")]);
    assert!(pushed.contains("nothing to send"), "{pushed}");
    fresh.store.sound().unwrap();
}

/// Adds the image of `layout`, as another architecture's, and an index of both; its digest.
pub(super) fn make_index(layout: &Path, architecture: &str) -> Digest {
    let blob = |digest: &str| layout.join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let read = |digest: &Value| -> Value {
        serde_json::from_slice(&fs::read(blob(digest.as_str().unwrap())).unwrap()).unwrap()
    };
    let put = |value: &Value| -> (Digest, usize) {
        let bytes = serde_json::to_vec(value).unwrap();
        let digest = Digest::of(&bytes);
        fs::write(blob(&digest.to_string()), &bytes).unwrap();
        (digest, bytes.len())
    };
    let index_path = layout.join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&index_path).unwrap()).unwrap();
    let mut first = index["manifests"][0].clone();
    let mut manifest = read(&first["digest"]);
    let mut config = read(&manifest["config"]["digest"]);
    first["platform"] = json!({"os": "linux", "architecture": config["architecture"]});
    first.as_object_mut().unwrap().remove("annotations");
    config["architecture"] = json!(architecture);
    let (digest, size) = put(&config);
    manifest["config"]["digest"] = json!(digest);
    manifest["config"]["size"] = json!(size);
    let (digest, size) = put(&manifest);
    let mut second = first.clone();
    second["digest"] = json!(digest);
    second["size"] = json!(size);
    second["platform"] = json!({"os": "linux", "architecture": architecture});
    let kind = "application/vnd.oci.image.index.v1+json";
    let both = json!({"schemaVersion": 2, "mediaType": kind, "manifests": [first, second]});
    let (digest, size) = put(&both);
    let annotations = json!({"org.opencontainers.image.ref.name": "127.0.0.1/many:v1"});
    index["manifests"] =
        json!([{"mediaType": kind, "digest": digest, "size": size, "annotations": annotations}]);
    fs::write(index_path, serde_json::to_vec(&index).unwrap()).unwrap();
    digest
}

#[test]
fn images_for_several_platforms_travel_whole_and_are_pulled_for_one() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (registry, bench) = (Registry::open(), Bench::new());
    let host = kiln_oci::Platform::host().architecture;
    let other = if host == "arm64" { "riscv64" } else { "arm64" };
    let layout = bench.at("layout");
    let dest = format!("type=oci,tar=false,dest={}", text(&layout));
    bench.build(&context(), &["--output", &dest, "-t", "many"]).expect(0);
    let digest = make_index(&layout, other);
    // Loaded with all that it lists, it is pushed with all of it.
    bench.ok(&["load", "-i", text(&layout)]);
    let name = registry.name("many:v1");
    bench.ok(&["tag", "127.0.0.1/many:v1", &name]);
    let pushed = bench.ok(&["push", &name]);
    assert_eq!(digest_in(&pushed), digest.to_string());
    assert_eq!(registry.digest("many:v1"), digest.to_string());

    let fresh = Bench::empty();
    let pulled = fresh.ok(&["pull", &name]);
    assert_eq!(digest_in(&pulled), digest.to_string());
    assert_eq!(fresh.store.inspect(&name)["Architecture"], json!(host));
    fresh.ok(&["pull", "--platform", &format!("linux/{other}"), &name]);
    assert_eq!(fresh.store.inspect(&name)["Architecture"], json!(other));
    let absent = fresh.kiln(&["pull", "--platform", "linux/s390x", &name]).expect(5);
    absent.says(&["no image for linux/s390x", &format!("linux/{other}")]);
    // skopeo's own copy of all of it.
    let docker = |name: &str| format!("docker://{}", registry.name(name));
    registry.skopeo(&["copy", "--all", &docker("many:v1"), &docker("copied:v1")]);
    let pulled = fresh.ok(&["pull", &registry.name("copied:v1")]);
    assert_eq!(digest_in(&pulled), digest.to_string());
    fresh.store.sound().unwrap();
}

#[test]
fn what_is_not_there_is_said() {
    needs_root!();
    needs_programs!("docker-registry");
    let (registry, bench) = (Registry::open(), Bench::empty());
    let absent = registry.name("no/such:tag");
    let outcome = bench.kiln(&["pull", &absent]).expect(5);
    outcome.says(&[&registry.host(), "/v2/no/such/manifests/tag", "hint: look for a mistake"]);
    bench.kiln(&["push", &absent]).expect(4).says(&["there is no image"]);
    bench.kiln(&["pull", "UPPER/x"]).expect(2);
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    bench.build(&context, &["--push"]).expect(2).says(&["a push needs a name"]);
    bench.build(&context, &["--push", "--offline", "-t", &absent]).expect(2).says(&["--offline"]);
    // Nobody listens on port 1.
    let outcome = bench.kiln(&["pull", "127.0.0.1:1/x"]).expect(5);
    outcome.says(&["127.0.0.1:1", "Connection refused", "is 127.0.0.1:1 the right name?"]);
    // After a push that fails no name has moved; the image is there for another try.
    bench.build(&context, &["--push", "-t", "127.0.0.1:1/x"]).expect(5);
    let images = bench.ok(&["images"]);
    assert!(!images.contains("127.0.0.1:1/x") && images.lines().count() == 2, "{images}");
}
