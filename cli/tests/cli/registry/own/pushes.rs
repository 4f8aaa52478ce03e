//! Pushes to a store: what comes becomes an image that can be run, and is given back as it came.

mod image;
mod strangers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kiln_oci::Digest;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::super::server::{Bench, Registry, context, digest_in, needs_programs};
use super::super::transfer::make_index;
use super::Own;
use crate::harness::{Outcome, needs_root, text};
use crate::interop::Tools;
use image::{Image, MANIFEST};

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
