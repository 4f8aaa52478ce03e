//! kiln, skopeo, podman and buildah push and pull.

use std::fs;
use std::process::Command;

use super::super::server::{Bench, HTPASSWD, context, digest_in, make_certificates, needs_programs};
use super::super::transfer::make_index;
use super::{Own, write};
use crate::harness::{Outcome, needs_root, text};
use crate::interop::Tools;

#[track_caller]
fn skopeo(args: &[&str]) -> String {
    Outcome::of(Command::new("skopeo").arg("--insecure-policy").args(args).output().unwrap()).expect(0).stdout
}

/// The digest of the manifest behind a name, and the one of its config: the image's ID.
#[track_caller]
fn digests(own: &Own, name: &str) -> (String, String) {
    let (repository, tag) = name.split_once(':').unwrap();
    let manifest = own.client().get(&format!("/v2/{repository}/manifests/{tag}")).expect(200);
    let config = manifest.json()["config"]["digest"].as_str().unwrap_or_default().to_owned();
    (manifest.header("docker-content-digest").unwrap().to_owned(), config)
}

#[test]
fn an_image_goes_from_each_tool_to_each_other_one() {
    needs_root!();
    needs_programs!("skopeo", "podman", "buildah");
    let (own, bench, tools) = (Own::start(), Bench::new(), Tools::new());
    bench.build(&context(), &["--push", "-t", &own.name("by/kiln:1")]).expect(0);
    let (manifest, id) = digests(&own, "by/kiln:1");
    assert_eq!(id, bench.id(&own.name("by/kiln:1")));
    let copied = format!("docker://{}", own.name("by/skopeo:1"));
    let from = format!("docker://{}", own.name("by/kiln:1"));
    skopeo(&[
        "copy",
        "-q",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        "--preserve-digests",
        &from,
        &copied,
    ]);
    assert_eq!(digests(&own, "by/skopeo:1"), (manifest.clone(), id.clone()));
    // podman takes it from skopeo, buildah from podman, kiln from all of them.
    let podman = |args: &[&str]| tools.podman(args);
    podman(&["pull", "-q", "--tls-verify=false", &own.name("by/skopeo:1")]);
    let file = tools.path("digest");
    let target = own.name("by/podman:1");
    podman(&[
        "push",
        "-q",
        "--tls-verify=false",
        "--digestfile",
        text(&file),
        &own.name("by/skopeo:1"),
        &target,
    ]);
    let (by_podman, podman_id) = digests(&own, "by/podman:1");
    assert_eq!((fs::read_to_string(&file).unwrap().trim(), &podman_id), (by_podman.as_str(), &id));
    podman(&["rmi", "-f", &own.name("by/skopeo:1")]);
    tools.buildah(&["pull", "-q", "--tls-verify=false", &target]);
    let place = format!("docker://{}", own.name("by/buildah:1"));
    tools.buildah(&["push", "-q", "--tls-verify=false", "--digestfile", text(&file), &target, &place]);
    let (by_buildah, buildah_id) = digests(&own, "by/buildah:1");
    assert_eq!((fs::read_to_string(&file).unwrap().trim(), &buildah_id), (by_buildah.as_str(), &id));
    let fresh = Bench::empty();
    for (name, digest) in [
        ("by/skopeo:1", &manifest),
        ("by/podman:1", &by_podman),
        ("by/buildah:1", &by_buildah),
        ("by/kiln:1", &manifest),
    ] {
        let pulled = fresh.ok(&["pull", &own.name(name)]);
        assert_eq!((digest_in(&pulled), fresh.id(&own.name(name))), (digest.as_str(), id.clone()), "{name}");
    }
    assert_eq!(fresh.store.shell(&own.name("by/buildah:1"), "cat /ran /copied"), "ran\ncopied");
    fresh.store.sound().unwrap();
    // A second push has nothing to send, one under another name mounts.
    assert!(bench.ok(&["push", &own.name("by/kiln:1")]).contains("nothing to send"));
    bench.ok(&["tag", &own.name("by/kiln:1"), &own.name("other:1")]);
    let mounted = bench.ok(&["push", &own.name("other:1")]);
    assert!(mounted.contains("4 mounted") && digest_in(&mounted) == manifest, "{mounted}");
}

#[test]
fn images_for_several_platforms_go_whole() {
    needs_root!();
    needs_programs!("skopeo", "buildah");
    let (own, bench, tools) = (Own::start(), Bench::new(), Tools::new());
    let host = kiln_oci::Platform::host().architecture;
    let other = if host == "arm64" { "riscv64" } else { "arm64" };
    let layout = bench.at("layout");
    let dest = format!("type=oci,tar=false,dest={}", text(&layout));
    bench.build(&context(), &["--output", &dest, "-t", "many"]).expect(0);
    let digest = make_index(&layout, other).to_string();
    bench.ok(&["load", "-i", text(&layout)]);
    bench.ok(&["tag", "127.0.0.1/many:v1", &own.name("many:kiln")]);
    assert_eq!(digest_in(&bench.ok(&["push", &own.name("many:kiln")])), digest);
    let docker = |name: &str| format!("docker://{}", own.name(name));
    let insecure = ["--src-tls-verify=false", "--dest-tls-verify=false"];
    let copy = [&["copy", "-q", "--all", "--preserve-digests"], &insecure[..]].concat();
    skopeo(&[&copy[..], &[&docker("many:kiln"), &docker("others/many:skopeo")]].concat());
    assert_eq!(digests(&own, "others/many:skopeo").0, digest);
    tools.buildah(&[
        "manifest",
        "create",
        "--all",
        "--tls-verify=false",
        "list",
        &docker("others/many:skopeo"),
    ]);
    tools.buildah(&[
        "manifest",
        "push",
        "-q",
        "--all",
        "--tls-verify=false",
        "list",
        &docker("many:buildah"),
    ]);
    let list = own.client().get("/v2/many/manifests/buildah").expect(200).json();
    assert_eq!(list["manifests"].as_array().unwrap().len(), 2, "{list}");
    for name in ["many:kiln", "others/many:skopeo", "many:buildah"] {
        for architecture in [host.as_str(), other] {
            let fresh = Bench::empty();
            fresh.ok(&["pull", "--platform", &format!("linux/{architecture}"), &own.name(name)]);
            assert_eq!(fresh.store.inspect(&own.name(name))["Architecture"], architecture, "{name}");
        }
    }
}

#[test]
fn passwords_go_over_tls_and_give_what_the_file_says() {
    needs_root!();
    needs_programs!("skopeo", "openssl");
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path());
    let at = |name: &str| text(&dir.path().join(name)).to_owned();
    let accounts = HTPASSWD.to_owned() + &HTPASSWD.replacen("user", "reader", 1);
    let passwords = write(dir.path(), "htpasswd", &accounts);
    let config = write(
        dir.path(),
        "registry.toml",
        &format!(
            "tls-cert = {:?}\ntls-key = {:?}\nhtpasswd = {passwords:?}\n\
             [[rights]]\nrepositories = [\"*\"]\nusers = [\"user\"]\nallow = [\"pull\", \"push\"]\n\
             [[rights]]\nrepositories = [\"team/*\"]\nusers = [\"reader\"]\nallow = [\"pull\"]\n",
            at("server.pem"),
            at("server.key")
        ),
    );
    let own = Own::with(&["--config", &config]);
    assert!(own.said.starts_with("registry at https://127.0.0.1:"), "{}", own.said);
    let bench = Bench::new();
    bench.write("kiln.toml", format!("ca-certificates = [{:?}]\n", at("ca.pem")));
    let (name, host) = (own.name("team/app:1"), own.address.to_string());
    bench.build(&context(), &["-t", &name]).expect(0);
    bench.kiln(&["push", &name]).expect(5).says(&[&format!("`kiln login {host}`")]);
    let login = |user: &str, password: &str| {
        let file = dir.path().join("password");
        fs::write(&file, password).unwrap();
        let mut command = bench.command(&["login", "-u", user, "--password-stdin", &host]);
        Outcome::of(command.stdin(fs::File::open(file).unwrap()).output().unwrap())
    };
    login("user", "wrong").expect(5);
    login("user", "right-horse").expect(0);
    let pushed = bench.ok(&["push", &name]);
    let cert_dir = format!("--src-cert-dir={}", dir.path().join("certs").display());
    fs::create_dir(dir.path().join("certs")).unwrap();
    fs::copy(at("ca.pem"), dir.path().join("certs/ca.crt")).unwrap();
    let layout = format!("dir:{}", at("copy"));
    skopeo(&[
        "copy",
        "-q",
        "--src-creds=reader:right-horse",
        &cert_dir,
        &format!("docker://{name}"),
        &layout,
    ]);
    let copied = fs::read(dir.path().join("copy/manifest.json")).unwrap();
    assert_eq!(kiln_oci::Digest::of(&copied).to_string(), digest_in(&pushed));
    login("reader", "right-horse").expect(0);
    bench.ok(&["tag", &name, &own.name("team/app:2")]);
    bench.kiln(&["push", &own.name("team/app:2")]).expect(5).says(&["not enough"]);
    let fresh = Bench::empty();
    fresh.write("kiln.toml", format!("ca-certificates = [{:?}]\n", at("ca.pem")));
    fresh.write("docker/config.json", fs::read(bench.at("docker/config.json")).unwrap());
    assert_eq!(digest_in(&fresh.ok(&["pull", &name])), digest_in(&pushed));
    assert_eq!(fresh.id(&name), bench.id(&name));
}
