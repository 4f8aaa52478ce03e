//! `kiln build --provenance --sbom`: what is said of an image, where it stands, and what must not be in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kiln_oci::{Digest, Platform};
use serde_json::Value;

use crate::harness::{Context, Outcome, Store, needs_root, text};
use crate::repo::Origin;
use crate::web::{GitServer, Web, response};

const USAGE: i32 = 2;
const SOURCE: i32 = 4;

pub(crate) const PROVENANCE: &str = "https://slsa.dev/provenance/v1";
pub(crate) const SBOM: &str = "https://spdx.dev/Document";

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("written")).expect("JSON")
}

/// A layout that a build has written.
struct Layout(PathBuf);

impl Layout {
    /// Builds into a new one.
    #[track_caller]
    fn build(store: &Store, context: &Context, name: &str, more: &[&str]) -> Self {
        let dir = store.beside(name);
        let output = format!("type=oci,tar=false,dest={}", text(&dir));
        store.build(context, &[&["-o", output.as_str()][..], more].concat()).expect(0);
        Self(dir)
    }

    /// The bytes behind a descriptor, which are what it says.
    #[track_caller]
    fn bytes(&self, descriptor: &Value) -> Vec<u8> {
        let digest = descriptor["digest"].as_str().expect("a digest");
        let bytes = fs::read(self.0.join("blobs").join(digest.replace(':', "/"))).expect("written");
        assert_eq!(Digest::of(&bytes).to_string(), digest);
        assert_eq!(descriptor["size"], bytes.len());
        bytes
    }

    #[track_caller]
    fn json(&self, descriptor: &Value) -> Value {
        serde_json::from_slice(&self.bytes(descriptor)).expect("JSON")
    }

    /// The only entry of `index.json`.
    fn root(&self) -> Value {
        let all = json(&self.0.join("index.json"))["manifests"].clone();
        assert_eq!(all.as_array().map(Vec::len), Some(1));
        all[0].clone()
    }

    /// What the index lists.
    fn entries(&self) -> Vec<Value> {
        self.json(&self.root())["manifests"].as_array().expect("a list").clone()
    }

    /// The predicates of the attestation at `nth` of the index, by what they are, with their subject.
    #[track_caller]
    fn said(&self, nth: usize) -> Vec<(String, Value, Value)> {
        let layers = self.json(&self.entries()[nth])["layers"].as_array().expect("a list").clone();
        let read = |layer: &Value| {
            assert_eq!(layer["mediaType"], "application/vnd.in-toto+json");
            let statement = self.json(layer);
            let kind = statement["predicateType"].as_str().expect("text").to_owned();
            assert_eq!(statement["_type"], "https://in-toto.io/Statement/v1");
            assert_eq!(layer["annotations"]["in-toto.io/predicate-type"], kind.as_str());
            (kind, statement["predicate"].clone(), statement["subject"].clone())
        };
        layers.iter().map(read).collect()
    }

    #[track_caller]
    fn predicate(&self, kind: &str) -> Value {
        let (_, predicate, _) = self.said(1).into_iter().find(|(known, _, _)| known == kind).expect("said");
        predicate
    }
}

fn small() -> Context {
    Context::new(&[("Dockerfile", "FROM busybox\nCOPY app /app\nRUN echo made > /made\n"), ("app", "app\n")])
}

#[test]
fn the_image_is_what_it_is_without_and_what_is_said_stands_beside_it() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), small());
    let plain = Layout::build(&store, &context, "plain", &["-t", "app:1"]);
    let said = Layout::build(&store, &context, "said", &["-t", "app:1", "--provenance", "--sbom"]);
    let root = said.root();
    assert_eq!(root["mediaType"], "application/vnd.oci.image.index.v1+json");
    assert_eq!(root["annotations"]["io.containerd.image.name"], "docker.io/library/app:1");
    let [image, attestation] = said.entries().try_into().expect("an image and what is said of it");
    assert_eq!(image["digest"], plain.root()["digest"], "the manifest is the same");
    let (os, arch) = (&attestation["platform"]["os"], &attestation["platform"]["architecture"]);
    assert_eq!((os.as_str(), arch.as_str()), (Some("unknown"), Some("unknown")));
    assert_eq!(attestation["annotations"]["vnd.docker.reference.type"], "attestation-manifest");
    assert_eq!(attestation["annotations"]["vnd.docker.reference.digest"], image["digest"]);
    let manifest = said.json(&attestation);
    let diff_ids = said.json(&manifest["config"])["rootfs"]["diff_ids"].clone();
    assert_eq!(diff_ids.as_array().map(Vec::len), Some(2));
    let all = said.said(1);
    assert_eq!(all.iter().map(|(kind, _, _)| kind.as_str()).collect::<Vec<_>>(), [PROVENANCE, SBOM]);
    for (_, _, subject) in &all {
        let digest = image["digest"].as_str().expect("a digest");
        assert_eq!(subject[0]["digest"]["sha256"], digest.trim_start_matches("sha256:"));
        let platform = Platform::host().to_string().replace('/', "%2F");
        assert_eq!(subject[0]["name"], format!("pkg:docker/app@1?platform={platform}").as_str());
    }

    // The same again is the same to the last byte.
    let again = Layout::build(&store, &context, "again", &["-t", "app:1", "--provenance", "--sbom"]);
    assert_eq!(again.root(), root);
    // As an artifact.
    let artifact = store.beside("artifact");
    let output = format!("type=oci,tar=false,oci-artifact=true,dest={}", text(&artifact));
    store.build(&context, &["-o", &output, "--sbom"]).expect(0);
    let artifact = Layout(artifact);
    let manifest = artifact.json(&artifact.entries()[1]);
    assert_eq!(manifest["artifactType"], "application/vnd.docker.attestation.manifest.v1+json");
    assert_eq!(manifest["subject"]["digest"], image["digest"]);
    artifact.bytes(&manifest["config"]);
}

#[test]
fn an_image_of_the_store_keeps_what_is_said_of_it_and_is_run_and_saved_with_it() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), small());
    store.build(&context, &["-t", "plain"]).expect(0);
    let id = store.inspect("plain")["Id"].clone();
    assert!(store.inspect("plain")["Attestations"].is_null());
    let metadata = store.beside("metadata.json");
    let args = ["-t", "app:1", "--provenance=mode=max", "--sbom", "--metadata-file", text(&metadata)];
    let built = store.build(&context, &args).expect(0);
    assert!(built.ran().is_empty(), "{}", built.stderr);
    let shown = store.inspect("app:1");
    assert_eq!(shown["Id"], id, "the image is the same");
    let written = json(&metadata);
    assert_eq!(written["containerimage.digest"], shown["Index"]);
    assert_eq!(written["containerimage.config.digest"], id);
    let kinds = |shown: &Value| -> Vec<String> {
        let all = shown["Attestations"].as_array().expect("a list").iter();
        all.map(|said| said["PredicateType"].as_str().expect("text").to_owned()).collect()
    };
    assert_eq!(kinds(&shown), [PROVENANCE, SBOM]);
    assert_eq!(shown["Attestations"][0]["Platform"], Platform::host().to_string().as_str());
    assert_eq!(store.shell("app:1", "cat /app /made"), "app\nmade");

    // It stays, and comes along.
    for _ in 0..2 {
        store.ok(&["gc"]);
        store.sound().unwrap();
        let saved = store.beside("saved.tar");
        store.ok(&["save", "--format", "oci", "-o", text(&saved), "app:1"]);
        let other = Store::empty();
        other.ok(&["load", "-i", text(&saved)]);
        let loaded = other.inspect("app:1");
        assert_eq!((&loaded["Id"], &loaded["Index"]), (&id, &shown["Index"]));
        assert_eq!(loaded["Attestations"], shown["Attestations"]);
        assert_eq!(other.shell("app:1", "cat /made"), "made");
        other.sound().unwrap();
        // One platform of it is the image alone.
        let chosen = Store::empty();
        chosen.ok(&["load", "-i", text(&saved), "--platform", &Platform::host().to_string()]);
        assert!(chosen.inspect("app:1")["Index"].is_null());
    }
    let again = store.build(&context, &args).expect(0);
    assert!(again.ran().is_empty() && again.stdout.contains("everything from the cache"), "{}", again.stdout);
    assert_eq!(store.inspect("app:1"), shown);

    // Who builds it without says nothing, and takes back what was said.
    store.build(&context, &["-t", "app:1"]).expect(0);
    assert!(store.inspect("app:1")["Index"].is_null());
    store.ok(&["gc"]);
    let index = shown["Index"].as_str().expect("a digest").trim_start_matches("sha256:").to_owned();
    assert!(!store.root().join("blobs/sha256").join(&index[..2]).join(&index).exists());
    store.sound().unwrap();

    // Under another name, too; whose name goes without it is told, once.
    store.build(&context, &args).expect(0);
    let back = "warning: what was said of app:1, plain:latest, the very same image, is taken back";
    store.build(&context, &["-t", "app:2"]).expect(0).says(&[back]);
    assert!(store.inspect("app:1")["Index"].is_null());
    let silent = |args: &[&str]| {
        let built = store.build(&context, args).expect(0);
        assert!(!built.stderr.contains("warning: "), "{}", built.stderr);
    };
    silent(&["-t", "app:2"]);
    store.build(&context, &args).expect(0);
    silent(&["-t", "app:1", "-t", "app:2", "-t", "plain"]);
    assert!(store.inspect("plain")["Index"].is_null());
    // And by one without a name.
    store.build(&context, &args).expect(0);
    store
        .build(&context, &["--load"])
        .expect(0)
        .says(&["what was said of app:1, app:2, plain:latest, the very same"]);
    assert!(store.inspect("app:2")["Index"].is_null());
}

#[test]
fn each_platform_has_what_is_said_of_it() {
    needs_root!();
    let store = Store::empty();
    let context = Context::new(&[("Dockerfile", "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /for\n")]);
    ["amd64", "arm64"].iter().for_each(|name| context.write(name, name));
    let both = ["--platform", "linux/amd64,linux/arm64", "--provenance", "-t", "app"];
    let layout = Layout::build(&store, &context, "both", &both);
    let entries = layout.entries();
    assert_eq!(entries.len(), 4);
    for (nth, arch) in ["amd64", "arm64"].into_iter().enumerate() {
        assert_eq!(entries[nth]["platform"]["architecture"], arch);
        assert_eq!(entries[2 + nth]["annotations"]["vnd.docker.reference.digest"], entries[nth]["digest"]);
        let (_, predicate, _) = layout.said(2 + nth).remove(0);
        let args = &predicate["buildDefinition"]["externalParameters"]["request"]["args"];
        assert_eq!(args["platform"], format!("linux/{arch}").as_str());
    }
    store.build(&context, &both).expect(0);
    let said = store.inspect("app")["Attestations"].as_array().expect("a list").clone();
    let platforms: Vec<&str> = said.iter().map(|said| said["Platform"].as_str().expect("text")).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64"]);
    store.sound().unwrap();
}

#[test]
fn provenance_says_what_was_asked_for_and_what_it_was_made_of() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = "FROM busybox AS unused\nRUN echo never\nFROM busybox\nARG VERSION\n\
                      RUN --mount=type=secret,id=token echo $VERSION > /made\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    let args = ["--build-arg", "VERSION=7", "--label", "team=a", "--network", "none"];
    let with = |name: &str, mode: &str| {
        let layout = Layout::build(&store, &context, name, &[&args[..], &[mode]].concat());
        layout.predicate(PROVENANCE)
    };
    let max = with("max", "--provenance=mode=max,builder-id=https://ci.example/1,reproducible=true");
    let definition = &max["buildDefinition"];
    let request = &definition["externalParameters"]["request"];
    assert_eq!(request["frontend"], "dockerfile.v0");
    assert_eq!(request["args"]["build-arg:VERSION"], "7");
    assert_eq!(request["args"]["label:team"], "a");
    assert_eq!(request["args"]["force-network-mode"], "none");
    assert_eq!(request["secrets"][0]["id"], "token");
    assert_eq!(definition["externalParameters"]["configSource"]["path"], "Dockerfile");
    let [base] = definition["resolvedDependencies"].as_array().expect("a list").as_slice() else {
        panic!("{definition}");
    };
    let uri = base["uri"].as_str().expect("text");
    assert!(uri.starts_with("pkg:docker/busybox@latest?platform="), "{uri}");
    let id = store.inspect("busybox")["Id"].as_str().expect("a digest").to_owned();
    assert_eq!(base["digest"]["sha256"], id.trim_start_matches("sha256:"), "it is in no registry");
    let run = &max["runDetails"];
    assert_eq!(run["builder"]["id"], "https://ci.example/1");
    assert_eq!(run["metadata"]["buildkit_reproducible"], true);
    assert_eq!(run["metadata"]["buildkit_completeness"]["request"], true);
    assert_eq!(run["metadata"]["buildkit_hermetic"], false, "the Dockerfile is the client's");
    let steps = definition["internalParameters"]["steps"].as_array().expect("a list");
    assert_eq!(steps.len(), 2, "{steps:?}");
    let title = steps[1]["name"].as_str().expect("text");
    assert!(
        title.contains("RUN --mount=type=secret") && !steps.iter().any(|it| it.to_string().contains("never"))
    );
    let source = &run["metadata"]["buildkit_metadata"]["source"];
    assert_eq!(source["locations"]["step1"]["locations"][0]["ranges"][0]["start"]["line"], 5);
    assert_eq!(decoded(&source["infos"][0]["data"]), dockerfile);

    let min = with("min", "--provenance");
    let definition = &min["buildDefinition"];
    let request = &definition["externalParameters"]["request"];
    for key in ["build-arg:VERSION", "label:team"] {
        assert!(request["args"][key].is_null(), "{request}");
    }
    assert!(request["secrets"].is_null() && definition["internalParameters"]["steps"].is_null());
    assert!(min["runDetails"]["metadata"]["buildkit_metadata"].is_null());
    assert_eq!(min["runDetails"]["metadata"]["buildkit_completeness"]["request"], false);
    assert_eq!(definition["resolvedDependencies"][0]["uri"], uri);
    assert_eq!(min["runDetails"]["builder"]["id"], "");
}

#[test]
fn what_came_from_elsewhere_is_named_by_its_digest() {
    needs_root!();
    let (store, origin) = (Store::empty(), Origin::new());
    let files = Web::serve(|_| response("200 OK", &[], b"one"));
    let (repo, url) = (origin.repo("a", &[]), files.url("/f"));
    repo.write("Dockerfile", &format!("FROM scratch\nADD {url} /f\nCOPY sub/g /g\n"));
    repo.write("sub/g", "g");
    let commit = repo.commit();
    let web = origin.serve(GitServer::Today);
    let git = format!("{}#main", web.url("/a/.git"));
    // Fetched, and found to be there.
    for name in ["first", "second"] {
        let dir = store.beside(name);
        let output = format!("type=oci,tar=false,dest={}", text(&dir));
        store.build_from(&git, &["--provenance", "-o", &output]).expect(0);
        let said = Layout(dir).predicate(PROVENANCE);
        let definition = &said["buildDefinition"];
        let source = &definition["externalParameters"]["configSource"];
        assert_eq!((source["uri"].as_str(), source["path"].as_str()), (Some(&*git), Some("Dockerfile")));
        assert_eq!(source["digest"]["sha1"], commit.as_str());
        let all = &definition["resolvedDependencies"];
        assert_eq!(all.as_array().map(Vec::len), Some(2), "{all}");
        assert_eq!(all[0]["digest"]["sha1"], commit.as_str());
        assert_eq!(all[1]["uri"], url.as_str());
        assert_eq!(all[1]["digest"]["sha256"], Digest::of(b"one").hex().as_str());
        let metadata = &said["runDetails"]["metadata"];
        assert_eq!(metadata["buildkit_completeness"]["resolvedDependencies"], true);
        assert_eq!(metadata["buildkit_hermetic"], true, "no step has a network");
    }
}

#[track_caller]
fn decoded(base64: &Value) -> String {
    let mut child = Command::new("base64")
        .arg("-d")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("coreutils are everywhere");
    let mut stdin = child.stdin.take().expect("piped");
    std::io::Write::write_all(&mut stdin, base64.as_str().expect("text").as_bytes()).expect("it reads");
    drop(stdin);
    String::from_utf8(child.wait_with_output().expect("it ends").stdout).expect("UTF-8")
}

#[test]
fn no_secret_is_in_what_is_said() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = "FROM busybox AS fetch\nARG REPO\nARG API_TOKEN\nARG PLAIN\nARG HTTPS_PROXY\n\
                      RUN echo $REPO $PLAIN https://me:canary-text@host/ > /x\n\
                      ENV DB_PASSWORD=canary-env\nRUN true\n\
                      FROM busybox\nCOPY --from=fetch /x /x\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    let secret = store.beside("secret");
    fs::write(&secret, "canary-secret\n").expect("ours");
    let secret = format!("id=s,src={}", text(&secret));
    let proxy = "HTTPS_PROXY=http://me:canary-proxy@proxy:1";
    let args = [
        "--secret",
        &secret,
        "--build-arg",
        "REPO=https://me:canary-url@host/repo.git",
        "--build-arg",
        "API_TOKEN=canary-token",
        "--build-arg",
        "PLAIN=a canary-secret b",
        "--build-arg",
        proxy,
        "--build-context",
        "web=https://me:canary-context@host/x.git",
        "--label",
        "from=https://me:canary-label@host/",
    ];
    let min = Layout::build(&store, &context, "min", &[&args[..], &["--provenance"]].concat());
    let min = min.predicate(PROVENANCE).to_string();
    assert!(!min.contains("canary"), "{min}");
    let layout = Layout::build(&store, &context, "max", &[&args[..], &["--provenance=mode=max"]].concat());
    let max = layout.predicate(PROVENANCE);
    let text = max.to_string();
    assert!(!text.contains("canary"), "{text}");
    let request = &max["buildDefinition"]["externalParameters"]["request"]["args"];
    assert_eq!(request["build-arg:REPO"], "https://***@host/repo.git");
    assert_eq!(request["build-arg:API_TOKEN"], "***");
    assert_eq!(request["build-arg:PLAIN"], "a *** b");
    assert_eq!(request["label:from"], "https://***@host/");
    assert!(request["build-arg:HTTPS_PROXY"].is_null(), "{request}");
    assert_eq!(max["runDetails"]["metadata"]["buildkit_completeness"]["request"], false);
    let source = decoded(&max["runDetails"]["metadata"]["buildkit_metadata"]["source"]["infos"][0]["data"]);
    assert!(source.contains("https://***@host/") && source.contains("DB_PASSWORD=***"), "{source}");
    assert!(!source.contains("canary"), "{source}");
    // Nor where things are on this machine.
    assert!(
        !text.contains(context.path()) && !text.contains(store.root().to_str().expect("UTF-8")),
        "{text}"
    );
}

#[test]
fn the_sbom_lists_what_package_managers_left_and_tells_what_it_lacks() {
    needs_root!();
    let store = Store::empty();
    let context = Context::new(&[
        ("Dockerfile", "FROM scratch\nCOPY root /\n"),
        ("root/etc/os-release", "ID=debian\nVERSION_ID=\"12\"\n"),
        (
            "root/var/lib/dpkg/status",
            "Package: bash\nStatus: install ok installed\nVersion: 5.2\nArchitecture: amd64\n",
        ),
        ("root/app/node_modules/left-pad/package.json", r#"{"name":"left-pad","version":"1.3.0"}"#),
        ("root/usr/lib/python3/a-1.dist-info/METADATA", "Name: a\nVersion: 1\n"),
        ("root/var/lib/rpm/rpmdb.sqlite", "SQLite format 3"),
    ]);
    let epoch = ["--sbom", "--build-arg", "SOURCE_DATE_EPOCH=86400"];
    let output = format!("type=oci,tar=false,dest={}", text(&store.beside("first")));
    let told = store.build(&context, &[&epoch[..], &["-o", output.as_str()]].concat()).expect(0);
    assert!(told.stderr.contains("warning: the SBOM lacks the RPM packages"), "{}", told.stderr);
    let sbom = Layout(store.beside("first")).predicate(SBOM);
    assert_eq!(sbom["spdxVersion"], "SPDX-2.3");
    assert_eq!(sbom["creationInfo"]["created"], "1970-01-02T00:00:00Z");
    let purls = |sbom: &Value| -> Vec<String> {
        let packages = sbom["packages"].as_array().expect("a list")[1..].iter();
        let purl =
            |package: &Value| package["externalRefs"][0]["referenceLocator"].as_str().map(str::to_owned);
        packages.map(|package| purl(package).expect("text")).collect()
    };
    let expected =
        ["pkg:deb/debian/bash@5.2?arch=amd64&distro=debian-12", "pkg:npm/left-pad@1.3.0", "pkg:pypi/a@1"];
    assert_eq!(purls(&sbom), expected);
    assert!(sbom["comment"].as_str().expect("text").contains("RPM"));

    // Another store says the same; this one does not look twice.
    let other = Store::empty();
    assert_eq!(Layout::build(&other, &context, "other", &epoch).predicate(SBOM), sbom);
    let [kept] = files(&store.root().join("state/sbom")).try_into().expect("one tree was looked at");
    let known = fs::read_to_string(&kept).expect("ours").replace("left-pad", "known-of");
    fs::write(&kept, known).expect("ours");
    let second = Layout::build(&store, &context, "second", &epoch).predicate(SBOM);
    assert_eq!(purls(&second)[1], "pkg:npm/known-of@1.3.0");
    // What is damaged is looked for again.
    fs::write(&kept, "{").expect("ours");
    assert_eq!(Layout::build(&store, &context, "third", &epoch).predicate(SBOM), sbom);
}

fn files(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).expect("it is there").map(|entry| entry.expect("readable").path()).collect()
}

#[test]
fn files_without_an_image_get_files_beside_them() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), small());
    let dir = store.beside("out");
    let build = |output: &str, more: &[&str]| -> Outcome {
        store.build(&context, &[&["--provenance", "--sbom", "-o", output][..], more].concat())
    };
    build(text(&dir), &[]).expect(0);
    let statement = json(&dir.join("provenance.json"));
    assert_eq!(statement["predicateType"], PROVENANCE);
    assert_eq!(json(&dir.join("sbom.spdx.json"))["predicateType"], SBOM);
    let subjects = statement["subject"].as_array().expect("a list");
    let of = |name: &str| {
        let found = subjects.iter().find(|subject| subject["name"] == name).expect("each file is a subject");
        found["digest"]["sha256"].as_str().expect("text").to_owned()
    };
    assert_eq!((of("app"), of("made")), (Digest::of(b"app\n").hex(), Digest::of(b"made\n").hex()));
    assert!(subjects.iter().all(|subject| subject["name"] != "provenance.json"));

    // The same in a tar, below a directory, under another name, or not at all.
    let tar = store.beside("out.tar");
    let output = format!("type=tar,dest={},platform-split=true,attestation-prefix=x-", text(&tar));
    build(&output, &[]).expect(0);
    let mut archive = tar::Archive::new(fs::File::open(&tar).expect("written"));
    let names: Vec<String> = archive
        .entries()
        .expect("a tar")
        .map(|entry| entry.expect("a tar").path().expect("UTF-8").to_string_lossy().into_owned())
        .collect();
    let platform = Platform::host().to_string().replace('/', "_");
    for name in ["made", "x-provenance.json", "x-sbom.spdx.json"] {
        assert!(names.contains(&format!("{platform}/{name}")), "{names:?}");
    }
    let inline = store.beside("inline");
    let asked = ["--attest", "type=provenance,inline-only=true", "--attest", "type=sbom,filename=s.json"];
    store.build(&context, &[&["-o", text(&inline)][..], &asked[..]].concat()).expect(0);
    assert!(inline.join("s.json").exists() && !inline.join("provenance.json").exists());
    let several = store.beside("several");
    let output = format!("type=local,dest={},platform-split=false", text(&several));
    let scratch = Context::new(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    let both = ["--platform", "linux/amd64,linux/arm64", "--provenance", "-o", &output];
    store.build(&scratch, &both).expect(0);
    for platform in ["linux_amd64", "linux_arm64"] {
        assert!(several.join(format!("provenance.{platform}.json")).exists());
    }

    // A file of the image is never replaced by what is said of it.
    let clash = Context::new(&[("Dockerfile", "FROM scratch\nCOPY f /provenance.json\n"), ("f", "mine")]);
    let there = store.beside("clash");
    let refused = store.build(&clash, &["--provenance", "-o", text(&there)]).expect(SOURCE);
    refused.says(&["the image has a file \"provenance.json\"", "attestation-prefix"]);
    assert!(!there.join("provenance.json").exists());
}

#[test]
fn what_holds_none_is_told_and_what_is_wrong_is_refused() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), small());
    let archive = store.beside("docker.tar");
    let output = format!("type=docker,dest={}", text(&archive));
    let told = store.build(&context, &["--sbom", "-o", &output]).expect(0);
    assert!(told.stderr.contains("warning: type=docker holds no attestations"), "{}", told.stderr);
    let loaded = Store::empty();
    loaded.ok(&["load", "-i", text(&archive)]);
    for (args, said) in [
        (&["--sbom=generator=x/y"][..], "runs no image for it"),
        (&["--attest", "type=vex"][..], "none of provenance, sbom"),
        (&["--provenance", "--attest", "type=provenance"][..], "asked for twice"),
        (&["--provenance=mode=all"][..], "none of min, max"),
        (&["--sbom", "-o", "type=image,oci-mediatypes=false"][..], "media types"),
        (&["-o", "type=oci,dest=x,annotation-index.a=b"][..], "no index to annotate"),
    ] {
        store.build(&context, args).expect(USAGE).says(&[said]);
    }
    // Off, however it is said.
    for args in [&["--provenance=false", "--sbom=false"][..], &["--attest", "type=sbom,disabled=true"]] {
        store.build(&context, &[args, &["-t", "off"]].concat()).expect(0);
        assert!(store.inspect("off")["Index"].is_null());
    }
    let mut command = store.command(&["build", "-q", "-t", "off", context.path()]);
    let built = command.env("BUILDX_NO_DEFAULT_ATTESTATIONS", "0").output().expect("kiln starts");
    assert!(built.status.success());
    assert!(store.inspect("off")["Index"].is_null(), "there are none by default");
    // An index has annotations.
    let index = ["--sbom", "-t", "noted", "--annotation", "index:a=b"];
    store.build(&context, &index).expect(0);
    assert!(store.inspect("noted")["Index"].is_string());
}

const STORE: i32 = 6;
const LIMIT: i32 = 8;

#[test]
fn what_is_said_of_an_image_is_listed_and_shown_wherever_it_is() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), small());
    let context_of_both = Context::new(&[("Dockerfile", "FROM scratch\nCOPY app /\n"), ("app", "app\n")]);
    let host = Platform::host().to_string();
    let other = if host == "linux/s390x" { "linux/riscv64" } else { "linux/s390x" };
    let said = ["--provenance", "--sbom"];
    store.build(&context, &["-t", "plain"]).expect(0);
    store
        .build(
            &context_of_both,
            &[&["-t", "both", "--platform", &format!("{other},{host}")][..], &said].concat(),
        )
        .expect(0);
    let show = |image: &str, more: &[&str]| store.kiln(&[&["image", "attestations", image], more].concat());

    let nothing = show("plain", &[]).expect(0);
    assert_eq!((nothing.stdout.as_str(), nothing.stderr.as_str()), ("nothing is said of plain\n", ""));
    assert_eq!(show("plain", &["--format", "json"]).expect(0).stdout, "[]\n");
    show("plain", &["--show", "predicate"])
        .expect(SOURCE)
        .says(&["nothing is said of plain", "hint: `kiln build"]);
    show("absent", &[]).expect(SOURCE).says(&["absent"]);

    let listed = show("both", &[]).expect(0).stdout;
    let rows: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["PLATFORM", "TYPE", "SIZE", "STATEMENT"]);
    let columns: Vec<[&str; 2]> = rows[1..].iter().map(|row| [row[0], row[1]]).collect();
    assert_eq!(columns, [[other, PROVENANCE], [other, SBOM], [&host, PROVENANCE], [&host, SBOM]]);
    let of_json: Value =
        serde_json::from_str(&show("both", &["--format=json"]).expect(0).stdout).expect("JSON");
    assert_eq!(of_json, store.inspect("both")["Attestations"]);
    assert!(rows[4][3] == of_json[3]["Digest"] && rows[4][2].ends_with('B'), "{listed}");
    let of_other = show("both", &["--platform", other, "--type", "sbom"]).expect(0).stdout;
    assert_eq!(of_other.lines().count(), 2);
    assert!(of_other.lines().nth(1).is_some_and(|line| line.starts_with(other)), "{of_other}");

    // One is shown: this machine's, where nobody asks for another.
    let parse =
        |outcome: Outcome| -> Value { serde_json::from_str(&outcome.expect(0).stdout).expect("JSON") };
    let sbom = parse(show("both", &["--show", "predicate", "--type", "sbom"]));
    assert_eq!(sbom["spdxVersion"], "SPDX-2.3");
    let whole = parse(show("both", &["--show=statement", "--type=sbom"]));
    assert_eq!((&whole["predicate"], &whole["predicateType"]), (&sbom, &Value::from(SBOM)));
    let subject =
        |whole: &Value| format!("sha256:{}", whole["subject"][0]["digest"]["sha256"].as_str().expect("hex"));
    assert_eq!(subject(&whole), of_json[3]["Manifest"].as_str().expect("a digest"));
    let args = ["--show=statement", "--type", PROVENANCE, "--platform", other];
    let provenance = parse(show("both", &args));
    assert_eq!(subject(&provenance), of_json[0]["Manifest"].as_str().expect("a digest"));
    assert_ne!(subject(&provenance), subject(&whole));
    show("both", &["--show=predicate"]).expect(USAGE).says(&["2 statements are meant", "--type", SBOM]);
    show("both", &["--show=predicate", "--type=vex"])
        .expect(SOURCE)
        .says(&["nothing of that is said", PROVENANCE]);
    show("both", &["--show=predicate", "--format=json"]).expect(USAGE);

    // The same bytes elsewhere.
    let (saved, dir) = (store.beside("saved.tar"), store.beside("layout"));
    store.ok(&["save", "--format", "oci", "-o", text(&saved), "both"]);
    store.ok(&["copy", "--all", "both", &format!("oci:{}:v1", text(&dir))]);
    for place in [format!("oci-archive:{}", text(&saved)), format!("oci:{}:v1", text(&dir))] {
        assert_eq!(show(&place, &[]).expect(0).stdout, listed, "{place}");
        assert_eq!(parse(show(&place, &args)), provenance, "{place}");
    }
    show("docker-archive:x.tar", &[]).expect(USAGE).says(&["a docker archive holds nothing"]);
}

impl Layout {
    /// Puts it among the blobs; a descriptor of it.
    fn put(&self, kind: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.0.join("blobs/sha256").join(digest.hex()), bytes).expect("ours");
        serde_json::json!({ "mediaType": kind, "digest": digest, "size": bytes.len() })
    }

    /// Lists `statement` in the place of what is said of the image.
    fn forge(&self, kind: &str, mut statement: Value) {
        let entries = self.entries();
        let mut manifest = self.json(&entries[1]);
        statement["annotations"] = serde_json::json!({ "in-toto.io/predicate-type": kind });
        manifest["layers"] = serde_json::json!([statement]);
        let manifest =
            self.put("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
        let mut entry = entries[1].clone();
        (entry["digest"], entry["size"]) = (manifest["digest"].clone(), manifest["size"].clone());
        let mut index = self.json(&self.root());
        index["manifests"] = serde_json::json!([entries[0], entry]);
        let root = self.put("application/vnd.oci.image.index.v1+json", index.to_string().as_bytes());
        let top = serde_json::json!({ "schemaVersion": 2, "manifests": [root] });
        fs::write(self.0.join("index.json"), top.to_string()).expect("ours");
    }
}

#[test]
fn what_a_stranger_says_is_bounded_and_is_what_it_is_listed_as() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), small());
    let layout = Layout::build(&store, &context, "forged", &["-t", "app:1", "--sbom"]);
    let place = format!("oci:{}", text(&layout.0));
    let show = |more: &[&str]| store.kiln(&[&["image", "attestations", &place], more].concat());
    let hex =
        layout.entries()[0]["digest"].as_str().expect("a digest").trim_start_matches("sha256:").to_owned();
    let statement = |kind: &str, hex: &str, predicate: Value| {
        serde_json::json!({ "_type": "https://in-toto.io/Statement/v1", "predicateType": kind,
            "subject": [{ "name": "x", "digest": { "sha1": "1", "sha256": hex } }], "predicate": predicate })
    };
    let is_plain = |text: &str| text.chars().all(|c| c == '\n' || (' '..='~').contains(&c));

    // Neither its words nor its media type reach the terminal.
    let hostile = "\u{1b}[31m\u{9b}2J\u{202e}x\nsecond\u{7f}";
    let predicate = serde_json::json!({ hostile: [hostile, 1.50] });
    let written = statement(hostile, &hex, predicate.clone()).to_string();
    layout.forge(hostile, layout.put(hostile, written.as_bytes()));
    let listed = show(&[]).expect(0).stdout;
    assert!(is_plain(&listed) && listed.lines().count() == 2, "{listed:?}");
    let shown = show(&["--show=predicate"]).expect(0).stdout;
    assert!(is_plain(&shown), "{shown:?}");
    assert_eq!(serde_json::from_str::<Value>(&shown).expect("JSON"), predicate);

    let kind = "https://example/x";
    let good = || statement(kind, &hex, Value::from("said"));
    let check = |statement: &str, code: i32, says: &str| {
        layout.forge(kind, layout.put("application/vnd.in-toto+json", statement.as_bytes()));
        show(&["--show=predicate"]).expect(code).says(&[says]);
    };
    layout.forge(kind, layout.put("", good().to_string().as_bytes()));
    assert_eq!(show(&["--show=predicate"]).expect(0).stdout, "\"said\"\n");
    check(
        &statement(kind, &"0".repeat(64), Value::Null).to_string(),
        STORE,
        "subject: it is not about the image",
    );
    check(
        &statement("https://example/y", &hex, Value::Null).to_string(),
        STORE,
        "predicateType: it is not what",
    );
    check(&good().to_string().replace("Statement/v1", "Envelope/v1"), STORE, "no in-toto statement");
    check(&good().to_string().replace("\"predicate\"", "\"other\""), STORE, "missing field `predicate`");
    check(&good().to_string().replace("{\"sha1\"", "[\"sha1\""), STORE, "is no valid JSON");
    check("{}", STORE, "the statement: missing field");
    check("", STORE, "is no valid JSON");
    let deep = "[".repeat(1000) + &"]".repeat(1000);
    check(&good().to_string().replace("\"said\"", &deep), STORE, "levels");

    // Sizes and digests are not believed.
    let with = |name: &str, value: Value| {
        let mut descriptor = layout.put("application/vnd.in-toto+json", good().to_string().as_bytes());
        descriptor[name] = value;
        layout.forge(kind, descriptor);
        show(&["--show=predicate"])
    };
    with("size", Value::from(5)).expect(STORE);
    with("size", Value::from(1_u64 << 40)).expect(LIMIT).says(&["134217728 are allowed"]);
    with("digest", Value::from(Digest::of(b"absent").to_string())).expect(SOURCE).says(&["is missing"]);
    // More than anybody says.
    let one = layout.put("application/vnd.in-toto+json", good().to_string().as_bytes());
    layout.forge(kind, one.clone());
    let mut manifest = layout.json(&layout.entries()[1]);
    manifest["layers"] = vec![manifest["layers"][0].clone(); 1001].into();
    let mut entry = layout.put("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
    entry["annotations"] = layout.entries()[1]["annotations"].clone();
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [layout.entries()[0], entry] });
    let root = layout.put("application/vnd.oci.image.index.v1+json", index.to_string().as_bytes());
    let top = serde_json::json!({ "schemaVersion": 2, "manifests": [root] });
    fs::write(layout.0.join("index.json"), top.to_string()).expect("ours");
    show(&[]).expect(LIMIT).says(&["more than 1000 statements"]);
}
