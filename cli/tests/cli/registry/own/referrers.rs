//! What refers to an image is shown, and goes along with it.

use std::fs;
use std::path::Path;

use kiln_oci::Digest;
use serde_json::{Value, json};

use super::super::server::{Bench, Registry, context, needs_programs};
use super::Own;
use crate::harness::{needs_root, text};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Adds to a layout what is of this kind and refers to `subject`, as oras does.
fn attach(layout: &Path, subject: &str, kind: &str) -> String {
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).expect("ours to write");
        (digest, bytes.len())
    };
    let size = fs::metadata(layout.join("blobs").join(subject.replace(':', "/"))).expect("there").len();
    let blob = |bytes: &[u8], kind: &str| {
        let (digest, size) = put(bytes);
        json!({"mediaType": kind, "digest": digest, "size": size})
    };
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": kind,
        "config": blob(b"{}", "application/vnd.oci.empty.v1+json"),
        "layers": [blob(kind.as_bytes(), "text/plain")],
        "subject": {"mediaType": MANIFEST, "digest": subject, "size": size},
        "annotations": {"of": "test"},
    });
    let (digest, size) = put(&serde_json::to_vec(&manifest).expect("JSON"));
    let path = layout.join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&path).expect("written")).expect("JSON");
    let list = index["manifests"].as_array_mut().expect("a list");
    list.push(json!({"mediaType": MANIFEST, "digest": digest, "size": size}));
    fs::write(path, serde_json::to_vec(&index).expect("JSON")).expect("ours to write");
    digest.to_string()
}

/// What `kiln manifest referrers --format json` says, without the name.
#[track_caller]
fn listed(bench: &Bench, args: &[&str]) -> Value {
    let json = bench.ok(&[&["manifest", "referrers", "--format", "json"], args].concat());
    let mut value: Value = serde_json::from_str(&json).expect("JSON");
    value.as_object_mut().expect("an object").remove("name");
    value
}

#[test]
fn what_refers_to_an_image_goes_along_where_somebody_asks_for_it() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    // One lists by itself what refers to what, the other one knows nothing of it.
    let (own, plain, bench) = (Own::start(), Registry::open(), Bench::new());
    let layout = bench.at("layout");
    let oci = format!("oci:{}", text(&layout));
    bench.build(&context(), &["-t", "app"]).expect(0);
    let image = bench.ok(&["copy", "-q", "app", &oci]).trim_end().to_owned();
    assert_eq!(bench.ok(&["manifest", "referrers", &oci]), format!("nothing refers to {image}\n"));
    let sbom = attach(&layout, &image, "example/sbom");
    let signature = attach(&layout, &sbom, "example/signature");
    let other = attach(&layout, &image, "example/other");

    let first = format!("docker://{}", own.name("app:v1"));
    let said = bench.ok(&["copy", "--referrers", &oci, &first]);
    assert!(
        said.contains("3 manifests refer to it") && said.ends_with(&format!("digest {image}\n")),
        "{said}"
    );
    let shown = bench.ok(&["manifest", "referrers", &own.name("app:v1")]);
    let mut lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines.remove(0), image);
    let find = |kind: &str| lines.iter().find(|line| line.contains(kind)).copied().unwrap_or_default();
    assert!(find("example/sbom").ends_with(&format!("─ example/sbom  {sbom}")), "{shown}");
    assert!(find("example/other").ends_with(&format!("─ example/other  {other}")), "{shown}");
    assert!(find("example/signature").ends_with(&format!(" └─ example/signature  {signature}")), "{shown}");
    assert_eq!(lines.len(), 3, "{shown}");

    // Through a registry that knows nothing of subjects, and back into a layout and an archive.
    let second = format!("docker://{}", plain.name("app:v1"));
    let back = bench.at("back");
    let places = [
        second.clone(),
        format!("oci:{}", text(&back)),
        format!("oci-archive:{}", text(&bench.at("back.tar"))),
        format!("docker://{}", own.name("again:v1")),
    ];
    let sorted = |mut value: Value| {
        let list = value["referrers"].as_array_mut().expect("a list");
        list.sort_by_key(|referrer| referrer["digest"].to_string());
        value
    };
    let expected = sorted(listed(&bench, &[&oci]));
    assert_eq!(expected["referrers"].as_array().map(Vec::len), Some(2));
    assert!(expected.to_string().contains("example/signature"), "{expected}");
    let mut from = first.clone();
    for to in places {
        assert_eq!(
            bench.ok(&["copy", "-q", "--referrers", &from, &to]),
            format!("{image}\n"),
            "{from} to {to}"
        );
        assert_eq!(sorted(listed(&bench, &[&to])), expected, "{from} to {to}");
        from = to;
    }
    let kept = plain.name(&format!("app:{}", image.replace(':', "-")));
    let index: Value =
        serde_json::from_str(&plain.skopeo(&["inspect", "--raw", &format!("docker://{kept}")]))
            .expect("JSON");
    assert_eq!(index["manifests"].as_array().map(Vec::len), Some(2));
    assert_eq!(index["manifests"][0]["annotations"]["of"], "test");
    // The second time nothing is new.
    let again = bench.ok(&["copy", "--referrers", &first, &second]);
    assert!(again.starts_with("copied (0 blobs, 0B"), "{again}");

    // Without the flag the image goes alone.
    bench.ok(&["copy", &first, &format!("docker://{}", plain.name("alone:v1"))]);
    assert_eq!(listed(&bench, &[&plain.name("alone:v1")])["referrers"], json!([]));
    // By kind; and nothing is of a kind that there is not.
    let some = listed(&bench, &["--artifact-type", "example/other", &plain.name("app:v1")]);
    assert_eq!(some["referrers"][0]["digest"], other.as_str());
    assert_eq!(some["referrers"].as_array().map(Vec::len), Some(1));
    assert_eq!(
        bench.ok(&["manifest", "referrers", "--artifact-type", "x", &own.name("app:v1")]),
        format!("nothing refers to {image}\n")
    );
    // What refers to an image is no image to choose, nor one to load.
    let fresh = Bench::empty();
    fresh.ok(&["copy", &format!("oci:{}", text(&back)), "app"]);
    assert_eq!(fresh.id("app"), bench.id("app"));
    fresh.ok(&["load", "-i", text(&back)]);
    assert_eq!(fresh.ok(&["images", "-q"]).lines().count(), 1);

    let docker = format!("docker-archive:{}", text(&bench.at("x.tar")));
    for (args, said) in [
        (vec!["--referrers", &first, "x"], "the store has images"),
        (vec!["--referrers", "app", &second], "the store has images"),
        (vec!["--referrers", &first, &docker], "a docker archive has no place"),
        (vec!["--referrers", "--compression", "zstd", &first, &second], "another digest"),
    ] {
        bench.kiln(&[&["copy"], &args[..]].concat()).expect(2).says(&[said]);
    }
    bench.kiln(&["manifest", "referrers", &docker]).expect(2).says(&["docker archive"]);
    bench.kiln(&["manifest", "referrers", "--platform", "linux/s390x", &own.name("app:v1")]).expect(5);
    let host = kiln_oci::Platform::host().to_string();
    let of_host = listed(&bench, &["--platform", &host, &own.name("app:v1")]);
    assert_eq!(sorted(of_host), expected);
    bench.store.sound().unwrap();
}
