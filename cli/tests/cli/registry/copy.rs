//! Copies between places, beside skopeo.

use std::fs;

use kiln_oci::Digest;

use super::replies::{Image, offer};
use super::server::{Bench, Registry, context, digest_in, needs_programs};
use crate::harness::{needs_root, text};
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
    bench.kiln(&["copy", &oci, &target]).expect(5).says(&["DIGEST_INVALID"]);
    assert!(to.state.lock().unwrap().manifests.is_empty());
    // A registry that lies.
    let liar = Server::scripted(|request, _| request.is_blob().then(|| answer(200, &[], b"other")));
    offer(&liar, &image);
    let lies = format!("docker://{}/team/app:v1", liar.domain());
    let fresh = Bench::empty();
    fresh.kiln(&["copy", &lies, &format!("oci:{}", text(&bench.at("y")))]).expect(6);
    for (args, code, said) in [
        (["copy", "dir:/x", "y"], 2, "none of kiln's"),
        (["copy", "docker:x", "y"], 2, "docker://NAME"),
        (["copy", "absent", "docker-archive:/tmp/x.tar"], 4, "there is no image"),
        (["copy", &oci, "docker-archive:/tmp/x.tar"], 2, "a name of the store first"),
    ] {
        bench.kiln(&args).expect(code).says(&[said]);
    }
    bench.store.sound().unwrap();
}
