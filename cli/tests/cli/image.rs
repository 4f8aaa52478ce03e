//! `kiln image …`, and images for several platforms.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_oci::Digest;
use serde_json::{Value, json};

use crate::harness::{Context, Store, needs_root, text};

#[test]
fn images_are_listed_by_what_they_are() {
    needs_root!();
    let store = Store::with_busybox();
    store.image("team/app:1", "FROM busybox\nLABEL kind=web\n");
    store.image("team/app:2", "FROM busybox\nLABEL kind=job\n");
    store.image("team/app:2", "FROM busybox\nLABEL kind=new\n");
    let listed = |args: &[&str]| {
        let lines = store.ok(&[&["image", "ls"], args].concat()).stdout;
        let rows =
            lines.lines().skip(1).map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(":"));
        let mut rows: Vec<String> = rows.collect();
        rows.sort();
        rows.join(" ")
    };
    assert_eq!(listed(&[]), "<none>:<none> busybox:latest team/app:1 team/app:2");
    assert_eq!(listed(&["--filter", "dangling=true"]), "<none>:<none>");
    assert_eq!(listed(&["--filter", "reference=team/*"]), "team/app:1 team/app:2");
    assert_eq!(listed(&["team/app"]), "team/app:1 team/app:2");
    assert_eq!(listed(&["--filter", "reference=*/*:1", "-f", "dangling=false"]), "team/app:1");
    assert_eq!(listed(&["--filter", "label=kind=new"]), "team/app:2");
    assert_eq!(listed(&["--filter", "label=kind", "-f", "dangling=true"]), "<none>:<none>");
    store.kiln(&["image", "ls", "--filter", "size=3"]).expect(2).says(&["there are dangling, reference"]);
    let lines = store.ok(&["images", "--format", "json", "--no-trunc", "busybox"]).stdout;
    let object: Value = serde_json::from_str(&lines).expect("an object a line");
    assert_eq!((&object["Repository"], &object["Tag"]), (&json!("busybox"), &json!("latest")));
    assert_eq!(object["ID"], store.inspect("busybox")["Id"]);
    assert!(store.ok(&["images", "--digests"]).stdout.contains("DIGEST"));
}

#[test]
fn the_commands_about_images_have_one_home() {
    needs_root!();
    let store = Store::with_busybox();
    store.image("app", "FROM busybox\nRUN echo 1 > /1\nRUN echo 2 > /2\n");
    store.image("app:more", "FROM app\nRUN echo 3 > /3\n");
    let tree = store.ok(&["image", "tree"]).stdout;
    let lines: Vec<&str> = tree.lines().collect();
    assert!(lines[0].starts_with("busybox:latest (") && lines[0].contains("  1 layer, "), "{tree}");
    assert!(lines[1].starts_with("└─ app:latest (") && lines[1].contains("  +2 layers, +"), "{tree}");
    assert!(lines[2].starts_with("   └─ app:more (") && lines[2].contains("  +1 layer, +"), "{tree}");
    assert_eq!(store.ok(&["image", "inspect", "app"]).stdout, store.ok(&["inspect", "app"]).stdout);
    assert_eq!(store.ok(&["image", "history", "app"]).stdout, store.ok(&["history", "app"]).stdout);
    store.ok(&["image", "tag", "app", "again"]);
    store.ok(&["image", "rm", "again"]);
    store.kiln(&["inspect", "again"]).expect(4);
    store.ok(&["image", "prune", "--force"]);
    store.ok(&["inspect", "app:more"]);
}

/// An OCI layout with one image for two platforms and something that is for none.
pub(crate) struct Layout {
    dir: PathBuf,
    index: Digest,
}

impl Layout {
    /// Out of the image `app` of `store`: the other platform's has another architecture in its config.
    pub(crate) fn new(store: &Store, context: &Context, other: &str) -> Layout {
        let dir = store.beside("layout");
        let output = format!("type=oci,tar=false,dest={}", text(&dir));
        store.build(context, &["-o", &output]).expect(0);
        let read =
            |path: &Path| serde_json::from_slice::<Value>(&fs::read(path).expect("written")).expect("JSON");
        let blob = |digest: &Value| dir.join("blobs").join(digest.as_str().expect("text").replace(':', "/"));
        let listed = read(&dir.join("index.json"))["manifests"][0].clone();
        let mut manifest = read(&blob(&listed["digest"]));
        let mut config = read(&blob(&manifest["config"]["digest"]));
        config["architecture"] = json!(other);
        let put = |value: &Value| {
            let bytes = serde_json::to_vec(value).expect("JSON");
            let digest = Digest::of(&bytes);
            fs::write(blob(&json!(digest)), &bytes).expect("ours");
            (digest, bytes.len())
        };
        let (digest, size) = put(&config);
        manifest["config"]["digest"] = json!(digest);
        manifest["config"]["size"] = json!(size);
        let (digest, size) = put(&manifest);
        let descriptor = |digest: Digest, size: usize, os: &str, architecture: &str| {
            json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": size,
                    "platform": { "os": os, "architecture": architecture } })
        };
        let attested = json!({ "schemaVersion": 2, "config": manifest["config"], "layers": [] });
        let (attestation, attestation_size) = put(&attested);
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [
                descriptor(attestation, attestation_size, "unknown", "unknown"),
                descriptor(digest, size, "linux", other),
                listed,
            ],
        });
        let (index, size) = put(&index);
        let root = json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.index.v1+json", "digest": index, "size": size,
            "annotations": { "io.containerd.image.name": "docker.io/library/app:multi" } }] });
        fs::write(dir.join("index.json"), serde_json::to_vec(&root).expect("JSON")).expect("ours");
        Layout { dir, index }
    }

    /// It as a tar.
    pub(crate) fn tar(&self) -> PathBuf {
        let tar = self.dir.with_extension("tar");
        let packed =
            std::process::Command::new("tar").arg("-C").arg(&self.dir).arg("-cf").arg(&tar).arg(".").status();
        assert!(packed.expect("tar runs").success());
        tar
    }
}

fn names(tar: &Path) -> Vec<String> {
    let mut archive = tar::Archive::new(fs::File::open(tar).expect("written"));
    let names = archive.entries().expect("a tar").map(|entry| {
        entry.expect("a tar").path().expect("UTF-8").to_string_lossy().trim_start_matches("./").to_owned()
    });
    let mut names: Vec<String> =
        names.filter(|name| name.starts_with("blobs/sha256/") && !name.ends_with('/')).collect();
    names.sort();
    names
}

#[test]
fn an_index_is_kept_and_written_back_when_all_platforms_are_there() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nRUN echo hello > /hello\n")]);
    let host = kiln_oci::Platform::host();
    let other = if host.architecture == "arm64" { "amd64" } else { "arm64" };
    let layout = Layout::new(&store, &context, other);
    let tar = layout.tar();

    let reader = Store::empty();
    assert_eq!(reader.ok(&["load", "-i", text(&tar)]).stdout, "Loaded image: app:multi\n");
    assert_eq!(reader.inspect("app:multi")["Architecture"], host.architecture.as_str());
    assert_eq!(reader.shell("app:multi", "cat /hello"), "hello");
    for format in ["oci", "docker"] {
        let saved = reader.beside(&format!("{format}.tar"));
        reader.ok(&["save", "--format", format, "-o", text(&saved), "app:multi"]);
        assert_eq!(names(&saved), names(&tar), "{format}");
        let again = Store::empty();
        again.ok(&["load", "-i", text(&saved)]);
        let twice = again.beside("twice.tar");
        again.ok(&["save", "--format", format, "-o", text(&twice), "app:multi"]);
        assert!(fs::read(&twice).expect("written") == fs::read(&saved).expect("written"), "{format}");
        assert!(names(&twice).contains(&format!("blobs/sha256/{}", layout.index.hex())));
    }

    // Garbage collection leaves it; without the image it goes.
    reader.ok(&["gc"]);
    let saved = reader.beside("after-gc.tar");
    reader.ok(&["save", "--format", "oci", "-o", text(&saved), "app:multi"]);
    assert_eq!(names(&saved), names(&tar));
    // In another packing it is another image, for this platform alone.
    let forced = [
        "save",
        "--format",
        "oci",
        "--force-compression",
        "--compression",
        "zstd",
        "-o",
        text(&saved),
        "app:multi",
    ];
    reader.ok(&forced);
    assert!(!names(&saved).contains(&format!("blobs/sha256/{}", layout.index.hex())));
    reader.ok(&["rmi", "app:multi"]);
    reader.ok(&["gc"]);
    let index = reader.root().join("blobs/sha256").join(&layout.index.hex()[..2]).join(layout.index.hex());
    assert!(!index.exists());

    let chooser = Store::empty();
    let platform = format!("linux/{other}");
    chooser.ok(&["load", "-i", text(&tar), "--platform", &platform]);
    assert_eq!(chooser.inspect("app:multi")["Architecture"], other);
    let saved = chooser.beside("one.tar");
    chooser.ok(&["save", "-o", text(&saved), "app:multi"]);
    assert!(!names(&saved).contains(&format!("blobs/sha256/{}", layout.index.hex())));
    chooser
        .kiln(&["load", "-i", text(&tar), "--platform", "linux/riscv64"])
        .expect(5)
        .says(&["holds no image for linux/riscv64", &platform]);
    chooser.kiln(&["load", "-i", text(&tar), "--platform", "linux"]).expect(2);
}

#[test]
fn damaged_blobs_are_whole_again_when_they_are_loaded_again() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nRUN echo hello > /hello\n")]);
    let other = if kiln_oci::Platform::host().architecture == "arm64" { "amd64" } else { "arm64" };
    let tar = Layout::new(&store, &context, other).tar();
    let reader = Store::empty();
    reader.ok(&["load", "-i", text(&tar)]);
    let before = reader.holds();
    let blobs = names(&tar);
    assert!(blobs.len() >= 8, "two layers, two configs, three manifests and an index: {blobs:?}");
    for name in blobs {
        let hex = name.trim_start_matches("blobs/sha256/");
        let blob = reader.root().join("blobs/sha256").join(&hex[..2]).join(hex);
        let whole = fs::read(&blob).expect("it was loaded");
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 1;
        for damaged in [Some(&flipped[..]), Some(&whole[1..]), None] {
            match damaged {
                Some(bytes) => fs::write(&blob, bytes).expect("ours"),
                None => fs::remove_file(&blob).expect("ours"),
            }
            reader.kiln(&["fsck", "--deep"]).expect(6);
            reader.ok(&["load", "-i", text(&tar)]);
            assert!(fs::read(&blob).is_ok_and(|bytes| bytes == whole), "{name}");
        }
    }
    reader.ok(&["fsck", "--deep"]);
    assert_eq!(reader.holds(), before, "nothing was unpacked once more");
}
