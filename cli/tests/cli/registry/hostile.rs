//! A registry that lies: nothing of what it gave stays, and no name moves.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kiln_oci::Digest;
use serde_json::{Value, json};

use super::server::Bench;
use crate::harness::{Running, needs_root};
use crate::web::{Request, Web, response};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// The parts of an image, to be told wrongly.
struct Image {
    layer: Vec<u8>,
    config: Value,
    manifest: Value,
}

impl Image {
    fn new() -> Self {
        let layer = vec![0; 1024];
        let digest = Digest::of(&layer);
        let config = json!({
            "architecture": kiln_oci::Platform::host().architecture, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest]}, "history": [{"created_by": "x"}]
        });
        let mut image = Self { layer, config, manifest: json!({}) };
        image.seal();
        image
    }

    /// Makes the manifest name what there is.
    fn seal(&mut self) {
        let config = serde_json::to_vec(&self.config).unwrap();
        self.manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(&config), "size": config.len()},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": Digest::of(&self.layer), "size": self.layer.len()}]
        });
    }
}

type Blobs = BTreeMap<String, Vec<u8>>;

/// Serves the manifest under every tag and the blobs under the digests that it names.
fn serve(image: &Image, change: impl FnOnce(&mut Vec<u8>, &mut Blobs)) -> Web {
    let mut blobs = Blobs::new();
    let name = |value: &Value| value["digest"].as_str().unwrap_or_default().to_owned();
    blobs.insert(name(&image.manifest["config"]), serde_json::to_vec(&image.config).unwrap());
    blobs.insert(name(&image.manifest["layers"][0]), image.layer.clone());
    let mut manifest = serde_json::to_vec(&image.manifest).unwrap();
    change(&mut manifest, &mut blobs);
    Web::serve(move |request: &Request| {
        let last = request.target.rsplit('/').next().unwrap_or_default();
        match () {
            () if request.target.contains("/manifests/") => {
                response("200 OK", &[("Content-Type", MANIFEST)], &manifest)
            }
            () if request.target == "/v2/" => response("200 OK", &[], b"{}"),
            () => match blobs.get(last) {
                Some(blob) => response("200 OK", &[], blob),
                None => response("404 Not Found", &[], b""),
            },
        }
    })
}

/// Pulls from there, which fails with `code`, saying `said`.
#[track_caller]
fn refused(web: &Web, code: i32, said: &str) {
    let bench = Bench::empty();
    let host = web.url("");
    let name = format!("{}/x:v1", host.trim_start_matches("http://"));
    bench.kiln(&["pull", &name]).expect(code).says(&[said]);
    assert_eq!(bench.ok(&["images", "-q"]), "", "{said}");
    assert_eq!(bench.store.active_snapshots(), [""; 0], "{said}");
    bench.store.sound().unwrap();
}

#[test]
fn what_a_registry_lies_about_is_not_kept() {
    needs_root!();
    let good = Image::new();
    let layer = Digest::of(&good.layer).to_string();

    let web = serve(&good, |_, blobs| blobs.get_mut(&layer).unwrap()[700] = 1);
    refused(&web, 6, &layer);
    let web = serve(&good, |_, blobs| blobs.get_mut(&layer).unwrap().push(0));
    refused(&web, 6, "1025 bytes");
    let config = good.manifest["config"]["digest"].as_str().unwrap().to_owned();
    let web = serve(&good, |_, blobs| blobs.get_mut(&config).unwrap()[3] ^= 1);
    refused(&web, 6, &config);
    let web = serve(&good, |manifest, _| *manifest = b"<html>".to_vec());
    refused(&web, 6, "is no valid JSON");
    let web = serve(&good, |manifest, _| *manifest = vec![b' '; (4 << 20) + 1]);
    refused(&web, 8, "larger than 4194304 bytes");

    // The layer is what its digest says and not what the config promises.
    let mut image = Image::new();
    image.config["rootfs"]["diff_ids"] = json!([Digest::of(b"other")]);
    image.seal();
    refused(&serve(&image, |_, _| {}), 6, "the image promises");
    // Digests that are paths.
    let mut image = Image::new();
    image.manifest["layers"][0]["digest"] = json!("sha256:../../../etc/passwd");
    let web = serve(&image, |_, _| {});
    refused(&web, 6, "sha256:../../../etc/passwd");
    assert!(web.take_seen().iter().all(|request| !request.target.contains("..")));
    // Digests that nobody here verifies.
    let mut image = Image::new();
    image.manifest["layers"][0]["digest"] = json!(format!("sha512:{}", "0".repeat(128)));
    refused(&serve(&image, |_, _| {}), 6, "sha256 is the one algorithm that kiln verifies");
    let by_it = format!("localhost/x@sha512:{}", "0".repeat(128));
    Bench::empty().kiln(&["pull", &by_it]).expect(2).says(&["sha256 is the one"]);
    // Manifest and index at once.
    let mut image = Image::new();
    image.manifest["manifests"] = json!([]);
    refused(&serve(&image, |_, _| {}), 6, "manifest and an index at once");
    // Fewer diff IDs than layers.
    let mut image = Image::new();
    image.config["rootfs"]["diff_ids"] = json!([]);
    image.seal();
    refused(&serve(&image, |_, _| {}), 6, "rootfs.diff_ids");
}

#[test]
fn urls_of_layers_are_never_asked() {
    needs_root!();
    let asked = Arc::new(Mutex::new(false));
    let note = asked.clone();
    let elsewhere = Web::serve(move |_| {
        *note.lock().unwrap() = true;
        response("200 OK", &[], b"")
    });
    let mut image = Image::new();
    image.manifest["layers"][0]["urls"] = json!([elsewhere.url("/layer")]);
    let layer = Digest::of(&image.layer).to_string();
    refused(&serve(&image, |_, blobs| drop(blobs.remove(&layer))), 5, "does not have");
    assert!(!*asked.lock().unwrap());
}

#[test]
fn a_proxy_of_the_environment_is_asked_for_registries_elsewhere() {
    needs_root!();
    let (bench, image) = (Bench::empty(), Image::new());
    // No name server knows it: only a proxy can.
    bench.write("kiln.toml", "[registries]\ninsecure = [\"registry.invalid\"]\n");
    let proxy = serve(&image, |_, _| {});
    let mut command = bench.command(&["pull", "registry.invalid/x:v1"]);
    let outcome = command.env("HTTP_PROXY", proxy.url("")).env("https_proxy", proxy.url("")).output();
    crate::harness::Outcome::of(outcome.unwrap()).expect(0);
    let seen = proxy.take_seen();
    assert!(
        seen.iter().any(|request| request.target == "http://registry.invalid/v2/x/manifests/v1"),
        "{seen:?}"
    );
}

#[test]
fn a_pull_that_is_killed_leaves_nothing_in_the_way_of_the_next() {
    needs_root!();
    let (bench, image) = (Bench::empty(), Image::new());
    let good = serve(&image, |_, _| {});
    let (port, held) = (good.url(""), Arc::new(Mutex::new(())));
    // Like the other, but that blobs wait until the test lets go.
    let gate = held.clone();
    let layer = Digest::of(&image.layer).to_string();
    let (config, manifest) =
        (serde_json::to_vec(&image.config).unwrap(), serde_json::to_vec(&image.manifest).unwrap());
    let bytes = image.layer.clone();
    let slow = Web::serve(move |request: &Request| match request.target.rsplit('/').next() {
        _ if request.target.contains("/manifests/") => {
            response("200 OK", &[("Content-Type", MANIFEST)], &manifest)
        }
        Some(last) if last == layer => {
            drop(gate.lock());
            response("200 OK", &[], &bytes)
        }
        _ => response("200 OK", &[], &config),
    });
    let waits = held.lock().unwrap();
    let name = format!("{}/x:v1", slow.url("").trim_start_matches("http://"));
    for (signal, code) in [(rustix::process::Signal::KILL, None), (rustix::process::Signal::INT, Some(130))] {
        let mut pull = Running::start(bench.command(&["pull", &name]));
        pull.wait_for("fetching 1 of 1 layers");
        pull.signal(signal);
        assert_eq!(pull.end().code, code);
        assert_eq!(bench.ok(&["images", "-q"]), "");
        bench.store.sound().unwrap();
    }
    drop(waits);
    bench.ok(&["pull", &name]);
    bench.ok(&["pull", &format!("{}/x:v1", port.trim_start_matches("http://"))]);
    bench.store.sound().unwrap();
    assert_eq!(std::fs::read_dir(bench.store.root().join("ingest")).unwrap().count(), 0);
}
