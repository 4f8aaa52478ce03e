//! Mirrors, of the configuration and of the command line.

use kiln_oci::image::media_type;

use super::replies::{Image, offer};
use super::server::Bench;
use crate::harness::{Context, needs_root};
use crate::scripted::{Server, answer};

#[test]
fn an_image_comes_from_a_mirror_and_from_its_registry_when_that_fails() {
    needs_root!();
    let (image, mirror, own) = (Image::new(b"file"), Server::new(), Server::new());
    offer(&mirror, &image);
    offer(&own, &image);
    let name = format!("{}/team/app:v1", own.domain());
    let bench = Bench::empty();
    let flag = format!("--registry-mirror={}={}/hub", own.domain(), mirror.domain());
    bench.ok(&["pull", &flag, &name]);
    assert!(mirror.lines().contains(&"GET /v2/hub/team/app/manifests/v1".to_owned()), "{:?}", mirror.lines());
    assert_eq!(own.lines(), [""; 0]);

    // One that has nothing is no word; one that is broken is a warning; the registry has it.
    let broken = Server::scripted(|_, _| Some(answer(500, &[], b"")));
    let (first, second) = (broken.domain(), Server::new().domain());
    let bench = Bench::empty();
    let mirrors = format!(
        "[registries]\ntries = 2\nmirrors = {{ \"{}\" = [\"{first}\", \"http://{second}\"] }}\n",
        own.domain()
    );
    bench.write("kiln.toml", mirrors);
    let pulled =
        bench.kiln(&["pull", &name]).expect(0).says(&["warning", &format!("the mirror {first}"), "500"]);
    assert!(!pulled.stderr.contains(&second), "{}", pulled.stderr);
    bench.store.sound().unwrap();

    // A mirror that lies about a layer is found out, and the layer comes from the registry.
    let liar = Server::new();
    offer(&liar, &image);
    liar.state.lock().unwrap().blobs.values_mut().for_each(|blob| blob[0] ^= 1);
    let bench = Bench::empty();
    let flag = format!("--registry-mirror={}={}", own.domain(), liar.domain());
    bench.kiln(&["pull", &flag, &name]).expect(0).says(&["is passed over"]);
    bench.store.sound().unwrap();

    // A build says so as well.
    let context = Context::new(&[("Dockerfile", &format!("FROM {name}\nLABEL a=b\n"))]);
    let bench = Bench::empty();
    let flag = format!("--registry-mirror={}={first}", own.domain());
    bench.build(&context, &[&flag]).expect(0).says(&["is passed over"]);
    bench.kiln(&["pull", "--registry-mirror=ftp://x", &name]).expect(2).says(&["is no mirror"]);
    assert!(
        mirror.state.lock().unwrap().manifests.values().all(|(kind, _)| kind == media_type::OCI_MANIFEST)
    );
}
