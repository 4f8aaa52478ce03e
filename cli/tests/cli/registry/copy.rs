//! Copies between places, beside skopeo.

use std::fs;

use kiln_oci::Digest;
use serde_json::Value;

use super::replies::{Image, offer};
use super::server::{Bench, Registry, context, digest_in, needs_programs};
use super::transfer::make_index;
use crate::harness::{Context, needs_root, text};
use crate::scripted::{Server, answer};

#[test]
fn an_image_keeps_its_digest_from_place_to_place() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (first, second, maker, bench) = (Registry::open(), Registry::open(), Bench::new(), Bench::empty());
    let built = maker.build(&context(), &["--push", "-t", &first.name("team/app:v1")]).expect(0);
    let digest = digest_in(&built.stdout).to_owned();
    let (layout, archive) = (bench.at("layout"), bench.at("app.tar"));
    let [origin, near, far] = [first.name("team/app:v1"), first.name("other/app:v2"), second.name("copy:v3")]
        .map(|name| format!("docker://{name}"));
    let [oci, tar] = [format!("oci:{}:v4", text(&layout)), format!("oci-archive:{}:v5", text(&archive))];

    let copied = bench.ok(&["copy", &origin, &near]);
    assert!(copied.contains("4 mounted") && digest_in(&copied) == digest, "{copied}");
    let steps = [(&origin, &far), (&far, &oci), (&oci, &tar)];
    for (from, to) in steps {
        assert_eq!(bench.ok(&["copy", "-q", from, to]), format!("{digest}\n"), "{from} to {to}");
    }
    for (registry, name) in [(&first, "other/app:v2"), (&second, "copy:v3")] {
        assert_eq!(registry.digest(name), digest);
    }
    // Nothing of it was unpacked, and nothing has a name.
    assert_eq!(bench.ok(&["images", "-q"]), "");
    // skopeo reads what kiln wrote, and kiln what skopeo did.
    second.skopeo(&["copy", &tar, &format!("docker://{}", second.name("skopeo:v1"))]);
    assert_eq!(second.digest("skopeo:v1"), digest);
    let other = format!("oci:{}:v6", text(&bench.at("skopeo")));
    second.skopeo(&["copy", &oci, &other]);
    assert_eq!(
        bench.ok(&["copy", "-q", &other, &format!("docker://{}", first.name("again:v1"))]),
        format!("{digest}\n")
    );

    // The second time there is nothing to do.
    let again = bench.ok(&["copy", &origin, &far]);
    assert!(again.contains("0 blobs, 0B; 0 mounted, 4 there already"), "{again}");
    // Into the store and out of it.
    bench.ok(&["copy", &tar, "app"]);
    assert_eq!(bench.store.shell("app", "cat /ran /copied"), "ran\ncopied");
    bench.ok(&["copy", "app", &format!("docker://{}", first.name("store:v1"))]);
    let docker = format!("docker-archive:{}", text(&bench.at("docker.tar")));
    bench.ok(&["copy", "app", &docker]);
    bench.ok(&["copy", &docker, "back"]);
    assert_eq!(bench.id("back"), bench.id("app"));
    bench.store.sound().unwrap();
}

#[test]
fn what_is_damaged_or_unknown_is_not_copied() {
    needs_root!();
    let (image, server, to) = (Image::new(b"file"), Server::new(), Server::new());
    offer(&server, &image);
    let from = format!("docker://{}/team/app:v1", server.domain());
    let target = format!("docker://{}/team/app:v1", to.domain());
    let bench = Bench::empty();
    let layout = bench.at("layout");
    let oci = format!("oci:{}", text(&layout));
    bench.ok(&["copy", &from, &oci]);
    let layer = Digest::of(&image.layer);
    let blob = layout.join("blobs/sha256").join(layer.hex());
    let mut bytes = fs::read(&blob).unwrap();
    bytes[600] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let archive = bench.at("x.tar");
    bench
        .kiln(&["copy", &oci, &format!("oci-archive:{}", text(&archive))])
        .expect(6)
        .says(&[&layer.to_string()]);
    assert!(!archive.exists());
    // A layer that is packed anew is held against what the config says.
    let packed = bench.at("packed");
    let packed_oci = format!("oci:{}", text(&packed));
    let damaged = bench.kiln(&["copy", "--compression", "zstd", &oci, &packed_oci]).expect(6);
    damaged.says(&["but the image promises", &layer.to_string()]);
    assert!(!packed.exists());
    bench.kiln(&["copy", &oci, &target]).expect(5).says(&["DIGEST_INVALID"]);
    assert!(to.state.lock().unwrap().manifests.is_empty());
    // A registry that lies.
    let liar = Server::scripted(|request, _| request.is_blob().then(|| answer(200, &[], b"other")));
    offer(&liar, &image);
    let lies = format!("docker://{}/team/app:v1", liar.domain());
    let fresh = Bench::empty();
    fresh.kiln(&["copy", &lies, &format!("oci:{}", text(&bench.at("y")))]).expect(6);
    let docker = format!("docker-archive:{}", text(&bench.at("x.docker.tar")));
    for (args, code, said) in [
        (["copy", "dir:/x", "y"], 2, "none of kiln's"),
        (["copy", "docker:x", "y"], 2, "docker://NAME"),
        (["copy", "absent", &docker], 4, "there is no image"),
        (["copy", &oci, &docker], 6, &layer.to_string()),
    ] {
        bench.kiln(&args).expect(code).says(&[said]);
    }
    assert!(!bench.at("x.docker.tar").exists());
    bench.store.sound().unwrap();
}

const KINDS: [&str; 5] = ["registry", "oci", "oci-archive", "docker-archive", "store"];

/// Places of all kinds, for a registry and a store.
struct Places {
    registry: Registry,
    bench: Bench,
}

impl Places {
    fn new() -> Self {
        Self { registry: Registry::open(), bench: Bench::empty() }
    }

    /// The place of this kind for an image of this name, as an argument.
    fn at(&self, kind: &str, name: &str) -> String {
        let file = |suffix: &str| text(&self.bench.at(&format!("{name}{suffix}"))).to_owned();
        match kind {
            "registry" => format!("docker://{}", self.registry.name(&format!("{name}:v1"))),
            "oci" => format!("oci:{}:v1", file("")),
            "oci-archive" => format!("oci-archive:{}:v1", file(".oci.tar")),
            "docker-archive" => format!("docker-archive:{}", file(".docker.tar")),
            _ => format!("{name}:v1"),
        }
    }

    /// Copies; the digest that it says.
    #[track_caller]
    fn copy(&self, args: &[&str], from: &str, to: &str) -> String {
        self.bench.ok(&[&["copy", "-q"], args, &[from, to]].concat()).trim_end().to_owned()
    }

    /// Copies the image at `from` to a place of each kind.
    fn everywhere(&self, args: &[&str], from: &str, name: &str) {
        for kind in KINDS {
            self.copy(args, from, &self.at(kind, name));
        }
    }

    /// Copies from each kind of place that has `name` to each kind of place, which has `digest` then.
    fn each_pair(&self, args: &[&str], name: &str, digest: &str) {
        for from in KINDS {
            for to in KINDS {
                let target = format!("{from}-{to}{}", args.join("").replace(['/', '='], "-"));
                let target = self.at(to, &target.to_lowercase());
                let copied = self.copy(args, &self.at(from, name), &target);
                assert_eq!(copied, digest, "{from} to {to} with {args:?}");
                // skopeo makes a manifest of its own for docker archives, and knows nothing of the store.
                let raw = match to {
                    "store" => continue,
                    _ => self.registry.skopeo(&["inspect", "--raw", &target]),
                };
                if to != "docker-archive" {
                    assert_eq!(
                        Digest::of(raw.as_bytes()).to_string(),
                        digest,
                        "{from} to {to} with {args:?}"
                    );
                }
            }
        }
    }

    /// The ID of the image that skopeo finds at a place.
    #[track_caller]
    fn id(&self, place: &str) -> String {
        let raw = self.registry.skopeo(&["inspect", "--raw", place]);
        let manifest: Value = serde_json::from_str(&raw).expect("JSON");
        manifest["config"]["digest"].as_str().expect("a manifest").to_owned()
    }
}

/// An image of two platforms as an OCI layout; the digests of its index, of this machine's image and of the other.
fn many(places: &Places, maker: &Bench, other: &str) -> (String, [String; 3]) {
    let layout = maker.at("layout");
    let dest = format!("type=oci,tar=false,dest={}", text(&layout));
    maker.build(&context(), &["--output", &dest, "-t", "many"]).expect(0);
    let index = make_index(&layout, other);
    let blob = layout.join("blobs/sha256").join(index.hex());
    let json: Value = serde_json::from_slice(&fs::read(blob).expect("written")).expect("JSON");
    let of = |nth: usize| json["manifests"][nth]["digest"].as_str().expect("text").to_owned();
    let from = format!("oci:{}", text(&layout));
    places.everywhere(&["--all"], &from, "many");
    (from, [index.to_string(), of(0), of(1)])
}

fn other_architecture() -> &'static str {
    if kiln_oci::Platform::host().architecture == "arm64" { "riscv64" } else { "arm64" }
}

#[test]
fn every_kind_of_place_gives_an_image_to_every_other_as_it_is() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (places, maker) = (Places::new(), Bench::new());
    let source = places.registry.name("app:v1");
    let digest = digest_in(&maker.build(&context(), &["--push", "-t", &source]).expect(0).stdout).to_owned();
    let id = maker.id(&source);
    places.everywhere(&[], &format!("docker://{source}"), "one");
    places.each_pair(&[], "one", &digest);
    // What is for one platform only is copied with `--all`, too, and for its own platform.
    places.each_pair(&["--all"], "one", &digest);
    let host = kiln_oci::Platform::host().to_string();
    places.each_pair(&["--platform", &host], "one", &digest);
    for from in KINDS {
        let place = |to: &str| places.at(to, &format!("{from}-{to}"));
        assert_eq!(places.id(&place("docker-archive")), id, "{from}");
        assert_eq!(places.bench.id(&place("store")), id, "{from}");
        // For another platform there is nothing to copy, wherever it is.
        let wrong = format!("linux/{}", other_architecture());
        for to in KINDS {
            let to = places.at(to, "wrong");
            let refused = places.bench.kiln(&["copy", "--platform", &wrong, &places.at(from, "one"), &to]);
            refused.expect(5).says(&["holds no image for", &wrong, &host]);
        }
    }
    assert_eq!(places.bench.store.shell("docker-archive-store:v1", "cat /ran /copied"), "ran\ncopied");
    places.bench.store.sound().unwrap();
}

#[test]
fn images_for_several_platforms_are_copied_whole_or_for_one_of_them() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (places, maker) = (Places::new(), Bench::new());
    let other = other_architecture();
    let (_, [index, own, its]) = many(&places, &maker, other);
    places.each_pair(&["--all"], "many", &index);
    places.each_pair(&[], "many", &own);
    places.each_pair(&["--platform", &format!("linux/{other}")], "many", &its);
    let absent = places.bench.kiln(&["copy", "--platform", "linux/s390x", &places.at("oci", "many"), "x"]);
    absent.expect(5).says(&["holds no image for linux/s390x", other]);
    places.bench.kiln(&["copy", "--all", "--platform", "linux/s390x", "a", "b"]).expect(2);
    places.bench.store.sound().unwrap();
}

#[test]
fn layers_are_packed_anew_on_their_way_where_somebody_asks_for_it() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (places, maker) = (Places::new(), Bench::new());
    let (_, [index, ..]) = many(&places, &maker, other_architecture());
    let raw = |place: &str| -> Value {
        serde_json::from_str(&places.registry.skopeo(&["inspect", "--raw", place])).expect("JSON")
    };
    let zstd = ["--compression", "zstd", "--force-compression"];
    let outside = &KINDS[..4];
    let mut digests = Vec::new();
    for from in KINDS {
        for to in outside {
            let target = places.at(to, &format!("zstd-{from}-{to}"));
            digests.push(places.copy(&zstd, &places.at(from, "many"), &target));
            if *to != "docker-archive" {
                let kinds = raw(&target)["layers"].to_string();
                assert!(kinds.contains("tar+zstd") && !kinds.contains("tar+gzip"), "{from} to {to}: {kinds}");
            }
        }
        let refused = places.bench.kiln(&["copy", "--compression", "zstd", &places.at(from, "many"), "x"]);
        refused.expect(2).says(&["nothing is packed for it"]);
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
    // The same image, which skopeo unpacks wherever it is.
    let id = places.id(&places.at("oci", "zstd-oci-oci"));
    for (to, name) in [("oci", "zstd-oci-oci"), ("docker-archive", "zstd-oci-docker-archive")] {
        let dir = format!("dir:{}", text(&places.bench.at(&format!("unpacked-{to}"))));
        places.registry.skopeo(&["copy", "--dest-decompress", &places.at(to, name), &dir]);
    }
    places.bench.ok(&["copy", &places.at("registry", "zstd-oci-registry"), "back"]);
    assert_eq!(places.bench.id("back"), id);
    // An index names what has become of its images.
    let whole = places.at("registry", "zstd-whole");
    let args = ["--compression", "zstd", "--force-compression", "--all"];
    assert_ne!(places.copy(&args, &places.at("oci", "many"), &whole), index);
    let manifests = raw(&whole)["manifests"].as_array().expect("an index").clone();
    assert_eq!(manifests[0]["digest"], digests[0].as_str());
    assert_eq!(manifests[1]["platform"]["architecture"], other_architecture());
    // What is packed already stays so unless somebody insists, and that is said.
    let (from, to) = (places.at("oci", "many"), places.at("oci", "kept"));
    let kept = places.bench.kiln(&["copy", "--all", "--compression", "zstd", &from, &to]).expect(0);
    let kept = kept.says(&["layers that stay packed as they were: 6", "--force-compression"]);
    assert_eq!(digest_in(&kept.stdout), index);
    // With other tars inside it is another image.
    let stargz = places.at("oci", "stargz");
    places.copy(&["--compression", "estargz", "--force-compression"], &from, &stargz);
    assert_ne!(places.id(&stargz), id);
    assert!(raw(&stargz)["layers"][0]["annotations"].to_string().contains("toc.digest"));
    places.bench.ok(&["copy", &stargz, "stargz"]);
    assert_eq!(places.bench.store.shell("stargz", "cat /ran /copied"), "ran\ncopied");
    places.bench.store.sound().unwrap();
}

#[test]
fn a_docker_archive_without_a_manifest_gets_one() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (places, maker) = (Places::new(), Bench::new());
    let source = places.registry.name("app:v1");
    let digest = digest_in(&maker.build(&context(), &["--push", "-t", &source]).expect(0).stdout).to_owned();
    // As skopeo writes them: plain layers, and docker's list.
    let tar = text(&places.bench.at("bare.tar")).to_owned();
    let [bare, named] = ["", ":example.com/bare:v1"].map(|name| format!("docker-archive:{tar}{name}"));
    places.registry.skopeo(&["copy", &format!("docker://{source}"), &named]);
    // Packed as for a push, it is the same again.
    for kind in ["registry", "oci", "oci-archive"] {
        assert_eq!(places.copy(&[], &bare, &places.at(kind, "packed")), digest, "{kind}");
    }
    let plain = places.at("registry", "plain");
    let plain_digest = places.copy(&["--compression", "uncompressed"], &bare, &plain);
    assert_eq!(places.copy(&[], &bare, &places.at("docker-archive", "again")), plain_digest);
    let id = maker.id(&source);
    for place in [&plain, &places.at("docker-archive", "again"), &places.at("oci", "packed")] {
        assert_eq!(places.id(place), id, "{place}");
    }
    places.bench.ok(&["copy", &named, "bare"]);
    assert_eq!(places.bench.id("bare"), id);
    assert_eq!(places.bench.ok(&["images", "--quiet"]).lines().count(), 1);
    let wrong = format!("docker-archive:{tar}:other:v1");
    places.bench.kiln(&["copy", &wrong, "x"]).expect(4).says(&["manifest.json has no image other:v1"]);
    // Of several images one has to be named, and only that one comes.
    places
        .bench
        .build(&Context::new(&[("Dockerfile", "FROM bare\nLABEL of=second\n")]), &["-t", "second"])
        .expect(0);
    let two = text(&places.bench.at("two.tar")).to_owned();
    places.bench.ok(&["save", "-o", &two, "bare", "second"]);
    let two = format!("docker-archive:{two}");
    places.bench.kiln(&["copy", &two, "x"]).expect(4).says(&["lists 2 images", ":NAME"]);
    let fresh = Bench::empty();
    fresh.ok(&["copy", &format!("{two}:second"), "x"]);
    assert_eq!(fresh.id("x"), places.bench.id("second"));
    assert_eq!(fresh.ok(&["images", "--quiet"]).lines().count(), 1);
    places.bench.store.sound().unwrap();
    fresh.store.sound().unwrap();
}
