//! Images in every direction: what kiln, skopeo, podman and buildah push, each of them pulls, for one platform and for
//! several, by Debian's docker-registry and by our own, both behind TLS and a password.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use kiln_oci::Digest;
use serde_json::Value;
use tempfile::TempDir;

use super::own::Own;
use super::server::{Bench, HTPASSWD, Registry, digest_in, make_certificates, needs_programs};
use super::transfer::make_index;
use crate::harness::{Context, Outcome, needs_root, text};
use crate::interop::Tools;

/// Who pushes and who pulls.
const TOOLS: [&str; 4] = ["kiln", "skopeo", "podman", "buildah"];

/// A registry that nobody gets into without its authority and a password.
enum Guarded {
    Debians(Registry),
    Ours(Own, TempDir),
}

impl Guarded {
    /// Our own, as the other one is.
    fn ours() -> Self {
        let dir = tempfile::tempdir().expect("temporary directories can be made");
        make_certificates(dir.path());
        fs::write(dir.path().join("htpasswd"), HTPASSWD).expect("ours to write");
        let at = |name: &str| text(&dir.path().join(name)).to_owned();
        let files = [at("server.pem"), at("server.key"), at("htpasswd")];
        let own = Own::with(&["--tls-cert", &files[0], "--tls-key", &files[1], "--htpasswd", &files[2]]);
        Self::Ours(own, dir)
    }

    fn host(&self) -> String {
        match self {
            Self::Debians(registry) => registry.host(),
            Self::Ours(own, _) => own.address.to_string(),
        }
    }

    fn authority(&self) -> PathBuf {
        match self {
            Self::Debians(registry) => registry.authority(),
            Self::Ours(_, dir) => dir.path().join("ca.pem"),
        }
    }
}

/// One platform's image as a registry has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Image {
    manifest: String,
    /// Of its config: the image's ID, which no packing changes.
    id: String,
}

/// All tools beside one registry, which they know and which knows them.
struct Bazaar {
    registry: Guarded,
    bench: Bench,
    tools: Tools,
}

impl Bazaar {
    fn beside(registry: Guarded) -> Self {
        let bazaar = Self { registry, bench: Bench::empty(), tools: Tools::new() };
        let authority = bazaar.registry.authority();
        bazaar.bench.write("kiln.toml", format!("ca-certificates = [{authority:?}]\n"));
        let host = bazaar.registry.host();
        let password = bazaar.tools.path("password");
        fs::write(&password, "right-horse").expect("ours to write");
        let mut login = bazaar.bench.command(&["login", "-u", "user", "--password-stdin", &host]);
        login.stdin(fs::File::open(password).expect("just written"));
        // The others read what this has written.
        Outcome::of(login.output().expect("kiln starts")).expect(0);
        bazaar
    }

    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.registry.host())
    }

    fn docker(&self, name: &str) -> String {
        format!("docker://{}", self.name(name))
    }

    /// Runs one of the others.
    #[track_caller]
    fn run(&self, tool: &str, args: &[&str]) -> String {
        let mut command = match tool {
            "skopeo" => {
                let mut skopeo = Command::new("skopeo");
                skopeo.arg("--insecure-policy").args(args);
                skopeo
            }
            _ => self.tools.command(tool, &[], args),
        };
        command.env("SSL_CERT_FILE", self.registry.authority());
        command.env("REGISTRY_AUTH_FILE", self.bench.at("docker/config.json"));
        Outcome::of(command.output().expect("it starts")).expect(0).stdout
    }

    /// What the registry has under a name, as it is.
    #[track_caller]
    fn raw(&self, name: &str) -> (String, Value) {
        let raw = self.run("skopeo", &["inspect", "--raw", &self.docker(name)]);
        (Digest::of(raw.as_bytes()).to_string(), serde_json::from_str(&raw).expect("JSON"))
    }

    #[track_caller]
    fn image(&self, name: &str) -> Image {
        let (manifest, json) = self.raw(name);
        Image { manifest, id: json["config"]["digest"].as_str().expect("a manifest").to_owned() }
    }

    /// The images of an index by their architecture.
    #[track_caller]
    fn index(&self, repository: &str, tag: &str) -> BTreeMap<String, Image> {
        let (_, json) = self.raw(&format!("{repository}:{tag}"));
        let entries = json["manifests"].as_array().expect("an index");
        let of = |entry: &Value| {
            let word = |value: &Value| value.as_str().expect("text").to_owned();
            let image = self.image(&format!("{repository}@{}", word(&entry["digest"])));
            (word(&entry["platform"]["architecture"]), image)
        };
        entries.iter().map(of).collect()
    }

    /// Pushes the image of `layout` as `BY:one`.
    #[track_caller]
    fn push_one(&self, by: &str, layout: &Path) {
        let (from, to) = (format!("oci:{}:made", text(layout)), self.docker(&format!("{by}:one")));
        match by {
            "kiln" => {
                let name = self.name("kiln:one");
                self.bench.ok(&["copy", &from, &name]);
                let pushed = self.bench.ok(&["push", &name]);
                assert_eq!(digest_in(&pushed), self.raw("kiln:one").0);
            }
            "skopeo" => drop(self.run("skopeo", &["copy", "-q", "--preserve-digests", &from, &to])),
            tool => {
                let id = self.run(tool, &["pull", "-q", &from]).trim().to_owned();
                let file = self.tools.path("digest");
                self.run(tool, &["push", "-q", "--digestfile", text(&file), &id, &to]);
                let said = fs::read_to_string(file).expect("it was asked to write it");
                assert_eq!(said.trim(), self.raw(&format!("{by}:one")).0, "{by}");
            }
        }
    }

    /// Pushes the index of `layout` as `BY:many`.
    #[track_caller]
    fn push_many(&self, by: &str, layout: &Path) {
        let (from, to) = (format!("oci:{}", text(layout)), self.docker(&format!("{by}:many")));
        match by {
            "kiln" => drop(self.bench.ok(&["copy", "-q", "--all", &from, &to])),
            "skopeo" => drop(self.run("skopeo", &["copy", "-q", "--all", "--preserve-digests", &from, &to])),
            tool => {
                // From what is at the registry already: they make lists of images that are somewhere.
                self.run(tool, &["manifest", "create", "list"]);
                self.run(tool, &["manifest", "add", "--all", "list", &self.docker("kiln:many")]);
                self.run(tool, &["manifest", "push", "-q", "--all", "list", &to]);
                self.run(tool, &["manifest", "rm", "list"]);
            }
        }
    }

    /// Pulls `name` for one architecture, and says what has come: the image's ID, and the digest if the tool knows it.
    #[track_caller]
    fn pull(&self, by: &str, name: &str, architecture: &str) -> (String, Option<String>) {
        match by {
            "kiln" => {
                let fresh = Bench::empty();
                for file in ["kiln.toml", "docker/config.json"] {
                    fresh.write(file, fs::read(self.bench.at(file)).expect("written above"));
                }
                let (name, platform) = (self.name(name), format!("linux/{architecture}"));
                let pulled = fresh.ok(&["pull", "--platform", &platform, &name]);
                fresh.store.sound().unwrap();
                (fresh.id(&name), Some(digest_in(&pulled).to_owned()))
            }
            "skopeo" => {
                let dir = tempfile::tempdir().expect("temporary directories can be made");
                let to = format!("dir:{}", text(&dir.path().join("copy")));
                self.run("skopeo", &["--override-arch", architecture, "copy", "-q", &self.docker(name), &to]);
                let manifest = fs::read(dir.path().join("copy/manifest.json")).expect("skopeo wrote it");
                let json: Value = serde_json::from_slice(&manifest).expect("JSON");
                let id = json["config"]["digest"].as_str().expect("a manifest").to_owned();
                (id, Some(Digest::of(&manifest).to_string()))
            }
            tool => {
                let pull = ["pull", "-q", "--arch", architecture, &self.name(name)];
                let id = self.run(tool, &pull).trim().to_owned();
                self.run(tool, &["rmi", "-f", &id]);
                (format!("sha256:{}", id.trim_start_matches("sha256:")), None)
            }
        }
    }
}

/// A directory without capitals: podman and buildah make a name of the path of a layout.
fn lower_case() -> TempDir {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!("kiln-directions-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir_in("/tmp").expect("/tmp can be written")
}

/// A layout with an image `made`, and one with an index of it and of another architecture's.
fn layouts(bench: &Bench, dir: &Path, other: &str) -> [PathBuf; 2] {
    let context = Context::new(&[
        ("Dockerfile", "FROM scratch\nCOPY first /\nCOPY second /\nLABEL of=test\n"),
        ("first", "first\n"),
        ("second", &"second\n".repeat(20_000)),
    ]);
    ["one", "many"].map(|name| {
        let layout = dir.join(name);
        let dest = format!("type=oci,tar=false,dest={}", text(&layout));
        bench.build(&context, &["--output", &dest, "-t", "example.com/x:made"]).expect(0);
        if name == "many" {
            make_index(&layout, other);
        }
        layout
    })
}

/// Every tool pushes, and every tool pulls what each of them has pushed.
fn check(registry: Guarded) {
    let bazaar = Bazaar::beside(registry);
    let host = kiln_oci::Platform::host().architecture;
    let other = if host == "arm64" { "riscv64" } else { "arm64" };
    let dir = lower_case();
    let [one, many] = layouts(&bazaar.bench, dir.path(), other);
    for by in TOOLS {
        bazaar.push_one(by, &one);
        bazaar.push_many(by, &many);
    }
    let (first, index) = (bazaar.image("kiln:one"), bazaar.index("kiln", "many"));
    assert_eq!(index[&host], first);
    assert!(index.len() == 2 && index[other].id != first.id, "{index:?}");
    // skopeo keeps the bytes. podman and buildah unpack an image and pack it again, so that only its ID is the same;
    // what they make a list of stays as it is.
    assert_eq!(bazaar.image("skopeo:one"), first);
    assert_eq!(bazaar.raw("skopeo:many").0, bazaar.raw("kiln:many").0);
    for by in TOOLS {
        assert_eq!(bazaar.image(&format!("{by}:one")).id, first.id, "{by}");
        assert_eq!(bazaar.index(by, "many"), index, "{by}");
    }
    for (from, to) in TOOLS.iter().flat_map(|from| TOOLS.map(|to| (*from, to))) {
        let image = bazaar.image(&format!("{from}:one"));
        let (id, digest) = bazaar.pull(to, &format!("{from}:one"), &host);
        assert_eq!(id, image.id, "{from} to {to}");
        assert!(digest.is_none_or(|digest| digest == image.manifest), "{from} to {to}");
        let list = bazaar.raw(&format!("{from}:many")).0;
        for (architecture, image) in &index {
            let (id, digest) = bazaar.pull(to, &format!("{from}:many"), architecture);
            assert_eq!(id, image.id, "{from} to {to} for {architecture}");
            // What kiln prints is what the name leads to.
            let expected = if to == "kiln" { &list } else { &image.manifest };
            assert!(digest.is_none_or(|digest| digest == *expected), "{from} to {to} for {architecture}");
        }
    }
    bazaar.bench.store.sound().unwrap();
}

#[test]
fn every_tool_gets_what_every_tool_gives_to_dockers_registry() {
    needs_root!();
    needs_programs!("docker-registry", "openssl", "skopeo", "podman", "buildah");
    check(Guarded::Debians(Registry::guarded()));
}

#[test]
fn every_tool_gets_what_every_tool_gives_to_ours() {
    needs_root!();
    needs_programs!("openssl", "skopeo", "podman", "buildah");
    check(Guarded::ours());
}
