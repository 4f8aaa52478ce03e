//! Pushes to a store: what comes becomes an image that can be run, and is given back as it came.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kiln_oci::Digest;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::super::server::{Bench, HTPASSWD, Registry, context, digest_in, needs_programs};
use super::super::transfer::make_index;
use super::client::Client;
use super::{Own, write};
use crate::harness::{Context, Outcome, needs_root, text};
use crate::interop::Tools;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image with one layer, of one file.
struct Image {
    layer: Vec<u8>,
    layer_kind: &'static str,
    config: Vec<u8>,
}

impl Image {
    fn new(name: &[u8], content: &str) -> Self {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1);
        header.set_cksum();
        let mut tar = tar::Builder::new(Vec::new());
        tar.append(&header, content.as_bytes()).unwrap();
        Self::of(tar.into_inner().unwrap())
    }

    fn of(layer: Vec<u8>) -> Self {
        let config = json!({
            "architecture": kiln_oci::Platform::host().architecture, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer)] },
        });
        Self { layer, layer_kind: TAR, config: config.to_string().into_bytes() }
    }

    /// The same layer, as somebody's own gzip makes it.
    fn packed(self, level: u32) -> Self {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
        out.write_all(&self.layer).unwrap();
        Self {
            layer: out.finish().unwrap(),
            layer_kind: "application/vnd.oci.image.layer.v1.tar+gzip",
            ..self
        }
    }

    /// With white space that nobody else would write.
    fn manifest(&self) -> Vec<u8> {
        let blob = |bytes: &[u8], kind: &str| json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": blob(&self.config, "application/vnd.oci.image.config.v1+json"),
            "layers": [blob(&self.layer, self.layer_kind)],
        });
        format!("{manifest:#}\n\n").into_bytes()
    }

    fn push_blobs(&self, client: &mut Client, name: &str) {
        client.push_blob(name, &self.config);
        client.push_blob(name, &self.layer);
    }

    /// Its manifest's digest.
    #[track_caller]
    fn push(&self, client: &mut Client, name: &str, tag: &str) -> Digest {
        self.push_blobs(client, name);
        client.push_manifest(name, tag, &self.manifest())
    }

    /// Whether it is there just as it was pushed.
    #[track_caller]
    fn check(&self, client: &mut Client, name: &str, which: &str) {
        let reply = client.get(&format!("/v2/{name}/manifests/{which}")).expect(200);
        assert_eq!(reply.body, self.manifest());
        for blob in [&self.config, &self.layer] {
            assert!(client.get(&format!("/v2/{name}/blobs/{}", Digest::of(blob))).expect(200).body == *blob);
        }
    }
}

fn taking(bench: &Bench, args: &[&str]) -> Own {
    Own::of_store(bench, &[&["--push"], args].concat())
}

/// What a file of an image of the store says.
#[track_caller]
fn file_of(bench: &Bench, image: &str) -> String {
    let out = bench.at("out");
    bench.ok(&["cp", &format!("{image}:/file"), text(&out)]);
    fs::read_to_string(&out).unwrap()
}

/// What the store has, without what changes by itself.
fn names(bench: &Bench) -> String {
    let lines = bench.ok(&["images", "--format", "json"]);
    let row = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row.as_object_mut().unwrap().remove("CreatedSince");
        row.to_string() + "\n"
    };
    lines.lines().map(row).collect()
}

fn pushed(bench: &Bench) -> PathBuf {
    bench.store.root().join("registry")
}

fn blobs_below(dir: &Path) -> usize {
    let folders = fs::read_dir(dir.join("blobs/sha256")).into_iter().flatten().flatten();
    folders.map(|folder| fs::read_dir(folder.path()).into_iter().flatten().count()).sum()
}

#[track_caller]
fn skopeo(args: &[&str]) {
    let mut command = Command::new("skopeo");
    command.args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]);
    Outcome::of(command.args(args).output().unwrap()).expect(0);
}

#[test]
fn what_kiln_pushes_is_run_by_its_name_and_pulled_with_the_same_digest() {
    needs_root!();
    let (bench, other) = (Bench::empty(), Bench::new());
    let own = taking(&bench, &[]);
    let pushed = other.build(&context(), &["--push", "-t", &own.name("team/app:1")]).expect(0).stdout;
    let digest = digest_in(&pushed);
    assert_eq!(bench.id("team/app:1"), other.id(&own.name("team/app:1")));
    assert_eq!(bench.store.shell("team/app:1", "cat /ran /copied"), "ran\ncopied");
    let fresh = Bench::empty();
    assert_eq!(digest_in(&fresh.ok(&["pull", &own.name("team/app:1")])), digest);
    // A name of one component is Docker Hub's everywhere.
    other.ok(&["tag", &own.name("team/app:1"), &own.name("app:1")]);
    assert!(other.ok(&["push", &own.name("app:1")]).contains("4 mounted"));
    assert_eq!(bench.store.shell("app:1", "cat /ran"), "ran");
    assert!(other.ok(&["push", &own.name("app:1")]).contains("nothing to send"));
    // Builds on this machine stand on it.
    bench
        .build(
            &crate::harness::Context::new(&[("Dockerfile", "FROM team/app:1\nRUN cat /copied > /seen\n")]),
            &["-t", "next"],
        )
        .expect(0);
    assert_eq!(bench.store.shell("next", "cat /seen"), "copied");
    for store in [&bench, &other, &fresh] {
        store.store.sound().unwrap();
    }
}

#[test]
fn what_came_is_given_back_byte_by_byte() {
    needs_root!();
    let bench = Bench::empty();
    let own = taking(&bench, &[]);
    let mut client = own.client();
    // Two that the store would pack otherwise, of one config, and one that it keeps as a tree alone.
    let plain = Image::new(b"file", "content");
    let (fast, small) = (Image::new(b"file", "content").packed(1), Image::new(b"file", "content").packed(9));
    let digests: Vec<Digest> = [(&plain, "plain"), (&fast, "fast"), (&small, "small")]
        .map(|(image, tag)| image.push(&mut client, "app", tag))
        .to_vec();
    // Nothing is taken for what it is not by garbage collection, and nothing is left with who serves it.
    bench.ok(&["gc"]);
    bench.ok(&["prune", "--force"]);
    own.signal(Signal::TERM);
    assert_eq!(own.wait().0.code(), Some(0));
    bench.ok(&["gc"]);
    bench.ok(&["prune", "--force"]);
    // Also by a process that takes nothing, beside one that does.
    let (own, reader) = (taking(&bench, &[]), Own::of_store(&bench, &[]));
    for own in [&own, &reader] {
        let mut client = own.client();
        for ((image, tag), digest) in
            [(&plain, "plain"), (&fast, "fast"), (&small, "small")].iter().zip(&digests)
        {
            image.check(&mut client, "app", tag);
            image.check(&mut client, "app", &digest.to_string());
            assert_eq!(file_of(&bench, &format!("app:{tag}")), "content");
        }
        let tags = client.get("/v2/app/tags/list").expect(200).json();
        assert_eq!(tags["tags"], json!(["fast", "plain", "small"]));
    }
    assert_eq!(
        reader.client().send("DELETE", "/v2/app/manifests/fast", &[], b"").expect(405).code(),
        "UNSUPPORTED"
    );
    let second = bench.kiln(&["registry", "serve", "--store", "--push", "--listen", "127.0.0.1:0"]);
    assert!(second.stderr.contains("another process serves"), "{}", second.stderr);
    bench.store.sound().unwrap();
}

#[test]
fn tools_push_to_a_store_and_pull_it_back() {
    needs_root!();
    needs_programs!("skopeo", "podman", "buildah", "docker-registry");
    let (bench, source, tools, registry) = (Bench::empty(), Bench::new(), Tools::new(), Registry::open());
    let own = taking(&bench, &[]);
    source.build(&context(), &["--push", "-t", &registry.name("team/app:1")]).expect(0);
    let (from, id) =
        (format!("docker://{}", registry.name("team/app:1")), source.id(&registry.name("team/app:1")));
    let digest = registry.digest("team/app:1");
    let place = |name: &str| format!("docker://{}", own.name(name));
    let served = |name: &str| {
        let path = format!("/v2/{}", name.replace(':', "/manifests/"));
        own.client().get(&path).expect(200).header("docker-content-digest").unwrap().to_owned()
    };
    skopeo(&["--preserve-digests", &from, &place("by/skopeo:1")]);
    assert_eq!(served("by/skopeo:1"), digest);
    // And on to a registry of another make.
    skopeo(&["--preserve-digests", &place("by/skopeo:1"), &format!("docker://{}", registry.name("back:1"))]);
    assert_eq!(registry.digest("back:1"), digest);
    let file = tools.path("digest");
    let digest_file = ["--digestfile", text(&file)];
    tools.podman(&["pull", "-q", "--tls-verify=false", &own.name("by/skopeo:1")]);
    let (podman, buildah) = (own.name("by/podman:1"), own.name("by/buildah:1"));
    let push = ["push", "-q", "--tls-verify=false"];
    tools.podman(&[&push[..], &digest_file, &[&own.name("by/skopeo:1"), &podman]].concat());
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), served("by/podman:1"));
    // Docker's schema 2.
    tools.podman(
        &[
            &push[..],
            &["--format", "v2s2"],
            &digest_file,
            &[&own.name("by/skopeo:1"), &own.name("by/docker:1")],
        ]
        .concat(),
    );
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), served("by/docker:1"));
    tools.podman(&["rmi", "-f", &own.name("by/skopeo:1")]);
    tools.buildah(&["pull", "-q", "--tls-verify=false", &podman]);
    tools.buildah(&[&push[..], &digest_file, &[&podman, &format!("docker://{buildah}")]].concat());
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), served("by/buildah:1"));
    let fresh = Bench::empty();
    for name in ["by/skopeo:1", "by/podman:1", "by/docker:1", "by/buildah:1"] {
        assert_eq!(bench.store.shell(name, "cat /ran /copied"), "ran\ncopied", "{name}");
        let pulled = fresh.ok(&["pull", &own.name(name)]);
        assert_eq!(
            (digest_in(&pulled), fresh.id(&own.name(name))),
            (served(name).as_str(), id.clone()),
            "{name}"
        );
    }
    bench.store.sound().unwrap();
}

#[test]
fn an_image_for_several_platforms_comes_whole_and_one_of_them_runs() {
    needs_root!();
    needs_programs!("skopeo");
    let (bench, source) = (Bench::empty(), Bench::new());
    let own = taking(&bench, &[]);
    let host = kiln_oci::Platform::host().architecture;
    let other = if host == "arm64" { "riscv64" } else { "arm64" };
    let layout = source.at("layout");
    let dest = format!("type=oci,tar=false,dest={}", text(&layout));
    source.build(&context(), &["--output", &dest, "-t", "many"]).expect(0);
    let digest = make_index(&layout, other).to_string();
    source.ok(&["load", "-i", text(&layout)]);
    source.ok(&["tag", "127.0.0.1/many:v1", &own.name("many:v1")]);
    assert_eq!(digest_in(&source.ok(&["push", &own.name("many:v1")])), digest);
    assert_eq!(bench.store.shell("many:v1", "cat /ran"), "ran");
    let docker = |name: &str| format!("docker://{}", own.name(name));
    skopeo(&["--all", "--preserve-digests", &docker("many:v1"), &docker("others/many:v1")]);
    for name in ["many:v1", "others/many:v1"] {
        for architecture in [host.as_str(), other] {
            let fresh = Bench::empty();
            let platform = format!("linux/{architecture}");
            let pulled = fresh.ok(&["pull", "--platform", &platform, &own.name(name)]);
            assert_eq!(digest_in(&pulled), digest, "{name}");
            assert_eq!(fresh.store.inspect(&own.name(name))["Architecture"], architecture, "{name}");
        }
    }
    // The store has the image that runs here, and nothing of the others.
    let registry = Own::start();
    bench.ok(&["tag", "many:v1", &registry.name("many:v1")]);
    assert_ne!(digest_in(&bench.ok(&["push", &registry.name("many:v1")])), digest);
    let kept = registry.client().get("/v2/many/manifests/v1").expect(200).json();
    assert!(kept["manifests"].is_null() && kept["config"].is_object(), "{kept}");
    // An index without its children is refused.
    let kind = "application/vnd.oci.image.index.v1+json";
    let child = json!({ "mediaType": MANIFEST, "digest": Digest::of(b"none"), "size": 4 });
    let index = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": [child] }).to_string();
    let reply =
        own.client().send("PUT", "/v2/many/manifests/v2", &[("content-type", kind)], index.as_bytes());
    assert_eq!(reply.expect(400).code(), "MANIFEST_BLOB_UNKNOWN");
    bench.store.sound().unwrap();
}

#[test]
fn what_is_hostile_or_broken_is_refused_and_no_name_moves() {
    needs_root!();
    let bench = Bench::empty();
    let own = taking(&bench, &[]);
    let mut client = own.client();
    let good = Image::new(b"file", "good");
    good.push(&mut client, "app", "v1");
    let before = names(&bench);
    let mut refuse = |image: &Image, said: &str| {
        image.push_blobs(&mut client, "app");
        let reply =
            client.send("PUT", "/v2/app/manifests/v1", &[("content-type", MANIFEST)], &image.manifest());
        let reply = reply.expect(400);
        assert_eq!(reply.code(), "MANIFEST_INVALID");
        let message = reply.json()["errors"][0]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(said), "{message}");
        good.check(&mut client, "app", "v1");
    };
    refuse(&Image::new(b"../../outside", "x"), "outside");
    refuse(&Image::of(b"this is no tar at all, whatever is said of it".repeat(40)), "layer");
    let mut other = Image::new(b"file", "one");
    other.config = Image::new(b"file", "two").config;
    refuse(&other, "but the image promises");
    let mut none = Image::new(b"file", "three");
    none.config = b"{\"rootfs\":".to_vec();
    refuse(&none, "refused");
    // A manifest before its layer.
    let early = Image::new(b"file", "early");
    client.push_blob("app", &early.config);
    let reply = client.send("PUT", "/v2/app/manifests/v2", &[("content-type", MANIFEST)], &early.manifest());
    assert_eq!(reply.expect(400).code(), "MANIFEST_BLOB_UNKNOWN");
    client.get("/v2/app/manifests/v2").expect(404);
    assert_eq!(names(&bench), before);
    bench.store.sound().unwrap();
}

#[test]
fn a_name_that_goes_takes_what_was_pushed_along() {
    needs_root!();
    let bench = Bench::empty();
    let own = taking(&bench, &[]);
    let mut client = own.client();
    let (one, two, three) =
        (Image::new(b"file", "one"), Image::new(b"file", "two"), Image::new(b"file", "three"));
    one.push(&mut client, "app", "one");
    let digest = two.push(&mut client, "app", "two");
    two.push(&mut client, "app", "again");
    three.push(&mut client, "app", "three");
    // By who has the store, by tag, and by digest.
    bench.ok(&["rmi", "app:one"]);
    client.get("/v2/app/manifests/one").expect(404);
    client.send("DELETE", "/v2/app/manifests/one", &[], b"").expect(404);
    client.send("DELETE", &format!("/v2/app/manifests/{digest}"), &[], b"").expect(202);
    client.get(&format!("/v2/app/manifests/{digest}")).expect(404);
    assert_eq!(client.get("/v2/app/tags/list").expect(200).json()["tags"], json!(["three"]));
    // Not while a container needs it.
    bench.ok(&["create", "--name", "user", "app:three", "/file"]);
    let reply = client.send("DELETE", "/v2/app/manifests/three", &[], b"").expect(409);
    assert!(reply.code() == "DENIED" && String::from_utf8_lossy(&reply.body).contains("user"), "{reply:?}");
    three.check(&mut client, "app", "three");
    // Not by halves either.
    let needed = three.push(&mut client, "app", "also");
    client.send("DELETE", &format!("/v2/app/manifests/{needed}"), &[], b"").expect(409);
    for tag in ["three", "also"] {
        three.check(&mut client, "app", tag);
    }
    client.send("DELETE", "/v2/app/manifests/also", &[], b"").expect(202);
    bench.ok(&["rm", "user"]);
    // A name that leads elsewhere: nothing that was pushed is given out under it.
    one.push(&mut client, "other", "v1");
    bench.ok(&["tag", "app:three", "other:v1"]);
    let now = client.get("/v2/other/manifests/v1").expect(200);
    assert_eq!(now.json()["config"]["digest"], json!(Digest::of(&three.config)));
    client.send("DELETE", "/v2/other/manifests/v1", &[], b"").expect(202);
    client.send("DELETE", "/v2/app/manifests/three", &[], b"").expect(202);
    assert_eq!(client.get("/v2/_catalog").expect(200).json(), json!({ "repositories": [] }));
    own.signal(Signal::TERM);
    own.wait();
    // What is young stays for who is about to push its manifest; all of this is old.
    let registry = pushed(&bench);
    assert!(blobs_below(&registry) > 0);
    let aged =
        Command::new("find").arg(&registry).args(["-exec", "touch", "-d", "2 hours ago", "{}", ";"]).output();
    Outcome::of(aged.unwrap()).expect(0);
    bench.ok(&["prune", "--force"]);
    assert_eq!(blobs_below(&registry), 0);
    assert_eq!(blobs_below(&bench.store.root()), 0);
    bench.store.sound().unwrap();
}

#[test]
fn what_refers_to_an_image_is_kept_with_it_and_has_no_name() {
    needs_root!();
    let bench = Bench::empty();
    let own = taking(&bench, &[]);
    let mut client = own.client();
    let image = Image::new(b"file", "signed");
    let subject = image.push(&mut client, "app", "v1");
    let before = names(&bench);
    client.push_blob("app", b"{}");
    client.push_blob("app", b"a signature");
    let blob = |bytes: &[u8], kind: &str| json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() });
    let artifact = |more: Value| {
        let mut artifact = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": blob(b"{}", "application/vnd.oci.image.config.v1+json"),
            "layers": [blob(b"a signature", "application/vnd.dev.cosign.simplesigning.v1+json")],
        });
        artifact.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        artifact.to_string().into_bytes()
    };
    // As cosign tags it, and as the specification refers.
    let tag = format!("{}.sig", subject.to_string().replace(':', "-"));
    let tagged = artifact(json!({}));
    client.push_manifest("app", &tag, &tagged);
    let referring =
        artifact(json!({ "subject": blob(&image.manifest(), MANIFEST), "artifactType": "text/x" }));
    client.push_manifest("app", "", &referring);
    assert_eq!(client.get(&format!("/v2/app/manifests/{tag}")).expect(200).body, tagged);
    let list = client.get(&format!("/v2/app/referrers/{subject}")).expect(200).json();
    assert_eq!(list["manifests"][0]["digest"], json!(Digest::of(&referring)));
    assert_eq!(names(&bench), before, "no image came");
    bench.ok(&["gc"]);
    client.get(&format!("/v2/app/blobs/{}", Digest::of(b"a signature"))).expect(200);
    bench.store.sound().unwrap();
}

#[test]
fn a_server_that_is_killed_leaves_a_sound_store_and_uploads_go_on() {
    needs_root!();
    let bench = Bench::empty();
    let own = taking(&bench, &[]);
    let mut client = own.client();
    let image = Image::new(b"file", &"half of it and the rest ".repeat(1000));
    client.push_blob("app", &image.config);
    let place = client.begin("app");
    let half = image.layer.len() / 2;
    client.send("PATCH", &place, &[], &image.layer[..half]).expect(202);
    own.signal(Signal::KILL);
    own.wait();
    bench.store.sound().unwrap();
    bench.ok(&["gc"]);
    let own = taking(&bench, &[]);
    let mut client = own.client();
    assert_eq!(client.get(&place).expect(204).header("range"), Some(format!("0-{}", half - 1).as_str()));
    client.send("PATCH", &place, &[], &image.layer[half..]).expect(202);
    client.send("PUT", &format!("{place}?digest={}", Digest::of(&image.layer)), &[], b"").expect(201);
    client.push_manifest("app", "v1", &image.manifest());
    image.check(&mut client, "app", "v1");
    bench.store.sound().unwrap();
}

#[test]
fn many_push_and_pull_while_garbage_is_collected() {
    needs_root!();
    const CLIENTS: usize = 16;
    let bench = Bench::empty();
    let own = taking(&bench, &[]);
    let (ended, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let collector = scope.spawn(|| {
            // Twice at least while others push.
            while !ended.load(Ordering::SeqCst) {
                bench.ok(&["gc"]);
                bench.ok(&["prune", "--force"]);
                bench.ok(&["du"]);
                rounds.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (own, rounds) = (&own, &rounds);
                scope.spawn(move || {
                    let mut client = own.client();
                    for round in 0..3 {
                        let begun = Instant::now();
                        while rounds.load(Ordering::SeqCst) < round && begun.elapsed().as_secs() < 60 {
                            Image::new(b"file", &format!("{number}")).push(
                                &mut client,
                                "team/meanwhile",
                                "latest",
                            );
                        }
                        let name = format!("team/app{}", number % 4);
                        let image = Image::new(b"file", &format!("{number} {round}"));
                        let image = if round == 1 { image.packed(6) } else { image };
                        let tag = format!("t{number}-{round}");
                        image.push(&mut client, &name, &tag);
                        image.check(&mut client, &name, &tag);
                        // One tag that all of them want.
                        image.push(&mut client, &name, "latest");
                        if round == 2 {
                            client
                                .send("DELETE", &format!("/v2/{name}/manifests/{tag}"), &[], b"")
                                .expect(202);
                        }
                    }
                })
            })
            .collect();
        let results: Vec<_> = clients.into_iter().map(|client| client.join()).collect();
        ended.store(true, Ordering::SeqCst);
        collector.join().unwrap();
        assert!(results.iter().all(Result::is_ok));
    });
    let mut client = own.client();
    for number in 0..CLIENTS {
        let name = format!("team/app{}", number % 4);
        Image::new(b"file", &format!("{number} 0")).check(&mut client, &name, &format!("t{number}-0"));
        assert_eq!(file_of(&bench, &format!("{name}:t{number}-1")), format!("{number} 1"));
        client.get(&format!("/v2/{name}/manifests/t{number}-2")).expect(404);
        // The last of them is what its name leads to, as it was pushed.
        let last = client.get(&format!("/v2/{name}/manifests/latest")).expect(200);
        let config = last.json()["config"]["digest"].as_str().unwrap().to_owned();
        assert_eq!(bench.id(&format!("{name}:latest")), config);
        let layer = last.json()["layers"][0]["digest"].as_str().unwrap().to_owned();
        client.get(&format!("/v2/{name}/blobs/{layer}")).expect(200);
    }
    bench.store.sound().unwrap();
}

#[test]
fn who_may_push_is_asked_for_and_what_may_wait_is_bounded() {
    needs_root!();
    let (bench, dir) = (Bench::empty(), tempfile::tempdir().unwrap());
    let passwords =
        write(dir.path(), "htpasswd", &(HTPASSWD.to_owned() + &HTPASSWD.replacen("user", "reader", 1)));
    let config = write(
        dir.path(),
        "registry.toml",
        &format!(
            "push = true\nhtpasswd = {passwords:?}\nmax-waiting = \"64KB\"\n\
             [[rights]]\nrepositories = [\"team/*\", \"library/*\"]\nusers = [\"user\"]\nallow = [\"pull\", \"push\"]\n\
             [[rights]]\nrepositories = [\"*\"]\nusers = [\"reader\"]\nallow = [\"pull\"]\n"
        ),
    );
    let own = Own::of_store(&bench, &["--config", &config]);
    // base64 of `user:right-horse`, and of `reader:right-horse`.
    let login = |user: &str| {
        let word = if user == "user" { "dXNlcjpyaWdodC1ob3JzZQ==" } else { "cmVhZGVyOnJpZ2h0LWhvcnNl" };
        Client::with_authorization(own.address, &format!("Basic {word}"))
    };
    let image = Image::new(b"file", "mine");
    image.push(&mut login("user"), "team/app", "v1");
    image.check(&mut login("reader"), "team/app", "v1");
    let uploads = |name: &str| format!("/v2/{name}/blobs/uploads/");
    own.client().send("POST", &uploads("team/app"), &[], b"").expect(401);
    login("reader").send("POST", &uploads("team/app"), &[], b"").expect(403);
    login("user").send("POST", &uploads("other"), &[], b"").expect(403);
    // Two names of one repository: who may not write to one writes to neither.
    login("user").send("POST", &uploads("library/app"), &[], b"").expect(403);
    let manifest = image.manifest();
    let put = |name: &str| {
        let path = format!("/v2/{name}/manifests/v1");
        login("user").send("PUT", &path, &[("content-type", MANIFEST)], &manifest).status
    };
    assert_eq!((put("library/app"), put("app")), (403, 403));
    login("user").send("DELETE", "/v2/team/app/manifests/v1", &[], b"").expect(403);
    let (first, second) = (vec![1; 40_000], vec![2; 40_000]);
    let mut client = login("user");
    client.push_blob("team/app", &first);
    let path = format!("{}?digest={}", uploads("team/app"), Digest::of(&second));
    assert_eq!(client.send("POST", &path, &[], &second).expect(429).code(), "TOOMANYREQUESTS");
    bench.store.sound().unwrap();
}

#[test]
fn a_blob_that_rotted_in_the_store_is_not_given_out() {
    needs_root!();
    let bench = Bench::new();
    bench.build(&context(), &["-t", "team/app:1"]).expect(0);
    let own = Own::of_store(&bench, &[]);
    let mut client = own.client();
    let manifest = client.get("/v2/team/app/manifests/1").expect(200).json();
    let digest = manifest["layers"][1]["digest"].as_str().unwrap().to_owned();
    let path = format!("/v2/team/app/blobs/{digest}");
    client.get(&path).expect(200);
    let hex = digest.trim_start_matches("sha256:");
    let file = bench.store.root().join("blobs/sha256").join(&hex[..2]).join(hex);
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&file, bytes).unwrap();
    assert_eq!(client.get(&path).expect(404).code(), "BLOB_UNKNOWN");
    client.send("GET", &path, &[("range", "bytes=0-3")], b"").expect(404);
    let fresh = Bench::empty();
    fresh.kiln(&["pull", &own.name("team/app:1")]).expect(5);
}

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An index of the first of these for this machine, and of the second for another one.
fn index(images: [(&Image, &[u8]); 2]) -> Vec<u8> {
    let host = kiln_oci::Platform::host().architecture;
    let other = if host == "arm64" { "riscv64" } else { "arm64" };
    let of = images.iter().zip([host.as_str(), other]).map(|((_, manifest), architecture)| {
        let platform = json!({ "os": "linux", "architecture": architecture });
        json!({ "mediaType": MANIFEST, "digest": Digest::of(manifest), "size": manifest.len(), "platform": platform })
    });
    let of: Vec<Value> = of.collect();
    json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": of }).to_string().into_bytes()
}

/// Pushes two images and the index of them.
#[track_caller]
fn push_index(client: &mut Client, name: &str, tag: &str, images: [(&Image, &[u8]); 2]) -> Digest {
    for (image, manifest) in &images {
        image.push_blobs(client, name);
        client.push_manifest(name, "", manifest);
    }
    client.push_manifest(name, tag, &index(images))
}

/// Writes a layout of two images and the index of them, under this name.
fn write_layout(layout: &Path, name: &str, images: [(&Image, &[u8]); 2]) -> Digest {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| fs::write(blobs.join(Digest::of(bytes).hex()), bytes).unwrap();
    for (image, manifest) in &images {
        [image.config.as_slice(), image.layer.as_slice(), *manifest].into_iter().for_each(put);
    }
    let index = index(images);
    put(&index);
    let root = json!({
        "mediaType": INDEX, "digest": Digest::of(&index), "size": index.len(),
        "annotations": { "io.containerd.image.name": name },
    });
    let list = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [root] });
    fs::write(layout.join("index.json"), list.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    Digest::of(&index)
}

/// The manifest of an image with something in it that nobody else would write.
fn annotated(image: &Image) -> Vec<u8> {
    let mut manifest: Value = serde_json::from_slice(&image.manifest()).unwrap();
    manifest["annotations"] = json!({ "by": "somebody else" });
    manifest.to_string().into_bytes()
}

#[test]
fn a_push_changes_no_other_image_of_the_same_config() {
    needs_root!();
    let (bench, registry) = (Bench::empty(), Own::start());
    let own = taking(&bench, &[]);
    let (image, honest, evil) = (
        Image::new(b"file", "debian").packed(6),
        Image::new(b"file", "for others").packed(6),
        Image::new(b"file", "evil").packed(6),
    );
    let (ours, others) = (image.manifest(), honest.manifest());
    let layout = bench.at("layout");
    let digest = write_layout(&layout, "docker.io/library/base:1", [(&image, &ours), (&honest, &others)]);
    bench.ok(&["load", "-i", text(&layout)]);
    let served = || {
        let reply = own.client().get("/v2/base/manifests/1").expect(200);
        reply.header("docker-content-digest").unwrap().to_owned()
    };
    let sent = |name: &str, to: &str| {
        bench.ok(&["tag", name, &registry.name(to)]);
        bench.ok(&["push", &registry.name(to)]);
        let reply = registry.client().get(&format!("/v2/{}", to.replace(':', "/manifests/"))).expect(200);
        Digest::of(&reply.body)
    };
    assert_eq!((served(), sent("base:1", "sent:0")), (digest.to_string(), digest));
    let mut client = own.client();
    // The same image with another one beside it, and the same as its own with words of its own.
    let theirs = evil.manifest();
    push_index(&mut client, "team/x", "index", [(&image, &ours), (&evil, &theirs)]);
    image.push_blobs(&mut client, "team/x");
    client.push_manifest("team/x", "alone", &annotated(&image));
    let repacked = Image::new(b"file", "debian").packed(1);
    repacked.push(&mut client, "team/x", "repacked");
    assert_eq!((served(), sent("base:1", "sent:1")), (digest.to_string(), digest));
    // One that is refused.
    let whole = String::from_utf8(index([(&image, &ours), (&evil, &theirs)])).unwrap();
    let broken = whole.replace(&Digest::of(&theirs).to_string(), &Digest::of(b"?").to_string()).into_bytes();
    client.send("PUT", "/v2/team/x/manifests/broken", &[("content-type", INDEX)], &broken).expect(400);
    assert_eq!(served(), digest.to_string());
    // Who comes first has no more to say.
    let next = Image::new(b"file", "next").packed(6);
    push_index(&mut client, "team/x", "early", [(&next, &annotated(&next)), (&evil, &theirs)]);
    next.push(&mut client, "next", "1");
    bench.ok(&["tag", "next:1", &registry.name("next:1")]);
    bench.ok(&["push", &registry.name("next:1")]);
    let kept = registry.client().get("/v2/next/manifests/1").expect(200).json();
    assert!(kept["manifests"].is_null() && kept["annotations"].is_null(), "{kept}");
    // What was pushed is given back all the same.
    next.check(&mut client, "next", "1");
    let early = client.get("/v2/team/x/manifests/early").expect(200).body;
    assert_eq!(early, index([(&next, &annotated(&next)), (&evil, &theirs)]));
    // Nor about how the layers of another's image are packed that kiln has made.
    let (maker, out) = (Bench::empty(), bench.at("made"));
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /\n"), ("file", "last")]);
    let output = format!("type=oci,tar=false,compression=uncompressed,dest={}", text(&out));
    maker.build(&context, &["-o", &output]).expect(0);
    let blobs = fs::read_dir(out.join("blobs/sha256")).unwrap().flatten();
    let tar = blobs.map(|blob| fs::read(blob.path()).unwrap()).find(|blob| !blob.starts_with(b"{")).unwrap();
    let first = Image::of(tar.clone()).packed(1);
    first.push(&mut client, "team/x", "first");
    let (last, layout) = (Image::of(tar).packed(6), bench.at("last"));
    write_layout(&layout, "docker.io/library/last:1", [(&last, &last.manifest()), (&evil, &theirs)]);
    bench.ok(&["load", "-i", text(&layout)]);
    sent("last:1", "last:1");
    let packed = registry.client().get("/v2/last/manifests/1").expect(200).json();
    assert_ne!(packed["layers"][0]["digest"], json!(Digest::of(&first.layer)));
    first.check(&mut client, "team/x", "first");
    bench.store.sound().unwrap();
}

#[test]
fn digests_of_a_layer_get_nobody_the_layer() {
    needs_root!();
    let bench = Bench::empty();
    let own = taking(&bench, &[]);
    let mut client = own.client();
    let secret = Image::new(b"file", "a secret").packed(6);
    secret.push(&mut client, "private", "1");
    let hidden = Digest::of(&secret.layer);
    let put = |client: &mut Client, manifest: &[u8]| {
        let reply =
            client.send("PUT", "/v2/team/x/manifests/1", &[("content-type", MANIFEST)], manifest).expect(400);
        let reply = reply.code();
        client.get(&format!("/v2/team/x/blobs/{hidden}")).expect(404);
        client.get("/v2/team/x/manifests/1").expect(404);
        reply
    };
    // The diff ID of the one, the bytes of another: of what is a tar, and of what is none.
    let junk =
        [Image::new(b"file", "mine").packed(6).layer, Image::new(b"file", "mine").layer, b"junk".to_vec()];
    for layer in junk {
        let claimed = Image { layer, layer_kind: secret.layer_kind, config: secret.config.clone() };
        claimed.push_blobs(&mut client, "team/x");
        assert_eq!(put(&mut client, &claimed.manifest()), "MANIFEST_INVALID");
    }
    // The blob itself, not sent.
    assert_eq!(put(&mut client, &secret.manifest()), "MANIFEST_BLOB_UNKNOWN");
    // As one that need not be sent.
    for kind in [
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ] {
        let mut manifest: Value = serde_json::from_slice(&secret.manifest()).unwrap();
        manifest["layers"][0]["mediaType"] = json!(kind);
        assert_eq!(put(&mut client, manifest.to_string().as_bytes()), "MANIFEST_INVALID");
        manifest["layers"][0]["urls"] = json!(["https://example.com/layer"]);
        assert_eq!(put(&mut client, manifest.to_string().as_bytes()), "MANIFEST_INVALID");
    }
    assert!(!names(&bench).contains("team/x"));
    // Who has it gets it, packed as he likes.
    let same = Image::new(b"file", "a secret").packed(1);
    same.push(&mut client, "team/x", "1");
    same.check(&mut client, "team/x", "1");
    bench.store.sound().unwrap();
}

#[test]
fn a_push_mends_what_has_rotted_in_the_store() {
    needs_root!();
    let bench = Bench::empty();
    let own = taking(&bench, &[]);
    let mut client = own.client();
    let image = Image::new(b"file", "content").packed(6);
    image.push(&mut client, "app", "v1");
    let digest = Digest::of(&image.layer);
    let hex = digest.hex();
    let place = bench.store.root().join("blobs/sha256").join(&hex[..2]).join(&hex);
    let mut bytes = fs::read(&place).unwrap();
    bytes[20] ^= 1;
    fs::write(&place, &bytes).unwrap();
    // It is one file with two names.
    client.send("HEAD", &format!("/v2/app/blobs/{digest}"), &[], b"").expect(404);
    assert!(bench.store.sound().is_err());
    image.push(&mut client, "app", "v1");
    image.check(&mut client, "app", "v1");
    assert_eq!(fs::read(&place).unwrap(), image.layer);
    // Also of what the store has alone.
    fs::remove_file(&place).unwrap();
    fs::write(&place, &bytes).unwrap();
    image.push(&mut client, "app", "v2");
    assert_eq!(fs::read(&place).unwrap(), image.layer);
    bench.store.sound().unwrap();
}
