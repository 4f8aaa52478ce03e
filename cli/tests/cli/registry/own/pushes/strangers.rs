//! What whoever pushes may not: images that are hostile, other people's names, other people's layers.

use std::fs;
use std::path::Path;

use kiln_oci::Digest;
use serde_json::{Value, json};

use super::super::super::server::{Bench, HTPASSWD};
use super::super::client::Client;
use super::super::{Own, write};
use super::image::{INDEX, Image, MANIFEST, index};
use super::{names, taking};
use crate::harness::{Context, needs_root, text};

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
