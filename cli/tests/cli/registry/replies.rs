//! What registries answer that they should not (R of the catalogue, and J where it is theirs), to kiln as a
//! whole: the exit code, the words, and nothing wrong in the store.

use kiln_oci::Digest;
use kiln_oci::image::media_type;
use serde_json::{Value, json};

use super::server::{Bench, Registry, needs_programs};
use crate::harness::{Context, Outcome, needs_root, text};
use crate::scripted::{Reply, Request, Server, answer, head};
use crate::universal::Watch;

/// `user:canary-password`
const BASIC: &str = "Basic dXNlcjpjYW5hcnktcGFzc3dvcmQ=";
/// For servers that do not stand still: on a busy machine they may seem to.
const PATIENCE: &str = "30s";
const CHALLENGE: (&str, &str) = ("WWW-Authenticate", "Basic realm=\"x\"");

/// An image of one layer, which is no compressed one.
pub(super) struct Image {
    pub(super) layer: Vec<u8>,
    pub(super) config: Vec<u8>,
    pub(super) manifest: Value,
}

impl Image {
    /// With one file.
    pub(super) fn new(content: &[u8]) -> Self {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, "file", content).unwrap();
        let layer = tar.into_inner().unwrap();
        let digest = Digest::of(&layer);
        let config = serde_json::to_vec(&json!({
            "architecture": kiln_oci::Platform::host().architecture, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest]}, "history": [{"created_by": "x"}]
        }));
        let config = config.unwrap();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media_type::OCI_MANIFEST,
            "config": {"mediaType": media_type::OCI_CONFIG, "digest": Digest::of(&config), "size": config.len()},
            "layers": [{"mediaType": media_type::OCI_LAYER, "digest": digest, "size": layer.len()}]
        });
        Self { layer, config, manifest }
    }
}

/// Gives the server the image, as `v1`.
pub(super) fn offer(server: &Server, image: &Image) {
    server.blob(&image.layer);
    server.blob(&image.config);
    server.manifest("v1", &serde_json::to_vec(&image.manifest).unwrap());
}

type Script = fn(&Request, usize) -> Option<Reply>;

/// A store, and a password for this server and no other. What stands still for so long is given up.
fn bench(server: &Server, with: Bench, stall: &str) -> Bench {
    let auth = json!({"auths": {server.domain(): {"auth": &BASIC[6..]}}});
    with.write("docker/config.json", auth.to_string());
    std::fs::set_permissions(
        with.at("docker/config.json"),
        std::os::unix::fs::PermissionsExt::from_mode(0o600),
    )
    .unwrap();
    with.write("kiln.toml", format!("[registries]\nstall-timeout = \"{stall}\"\ntries = 3\n"));
    with
}

/// Runs kiln and holds it to what every input is bound to: whatever comes of it, it says no secret, and leaves no
/// half of anything.
#[track_caller]
fn watched(bench: &Bench, args: &[&str]) -> Outcome {
    let outcome = Watch::new(&bench.store).run(&bench.command(args));
    assert!(!format!("{outcome:?}").contains("canary"), "{outcome:?}");
    assert!(!format!("{outcome:?}").contains(&BASIC[6..]), "{outcome:?}");
    if outcome.code != Some(0) {
        assert_eq!(outcome.stderr.matches("error:").count(), 1, "not one error:\n{}", outcome.stderr);
    }
    assert_eq!(std::fs::read_dir(bench.store.root().join("ingest")).unwrap().count(), 0);
    outcome
}

/// Pulls an image with a file of 600 KB from a server that answers so. Returns the server, too.
#[track_caller]
fn pull(
    code: i32,
    said: &str,
    script: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
) -> Server {
    pull_patiently(PATIENCE, code, said, script)
}

/// The same, with so much patience for what stands still.
#[track_caller]
fn pull_patiently(
    stall: &str,
    code: i32,
    said: &str,
    script: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
) -> Server {
    let image = Image::new(&bytes());
    let server = Server::scripted(
        move |request, nth| {
            if request.path == "/v2/" { None } else { script(request, nth) }
        },
    );
    offer(&server, &image);
    let bench = bench(&server, Bench::empty(), stall);
    watched(&bench, &["pull", &format!("{}/team/app:v1", server.domain())]).expect(code).says(&[said]);
    let named = bench.ok(&["images", "-q"]);
    assert_eq!(named.is_empty(), code != 0, "{named}");
    server
}

fn bytes() -> Vec<u8> {
    (0..600_000u32).map(|n| (n ^ (n >> 9)) as u8).collect()
}

fn is_manifest(request: &Request) -> bool {
    request.path.contains("/manifests/") && request.method == "GET"
}

/// The layer; the config is small.
fn layer(request: &Request) -> Option<Vec<u8>> {
    let layer = Image::new(&bytes()).layer;
    (request.is_blob() && request.path.ends_with(&Digest::of(&layer).to_string())).then_some(layer)
}

#[test]
fn r01_to_r05_challenges_and_token_servers() {
    needs_root!();
    let asks = pull(5, "refuses GET", |_, _| Some(answer(401, &[], b"")));
    assert_eq!(asks.seen().len(), 1);
    // Where the registry speaks TLS, its token server has to as well: `auth.rs` of the client has that case.
    for (realm, said) in [
        ("http://169.254.169.254/token", "without encryption"),
        ("https://169.254.169.254/token", "only this machine's neighbours"),
    ] {
        let challenge = format!("Bearer realm=\"{realm}\"");
        pull(7, said, move |_, _| Some(answer(401, &[("WWW-Authenticate", &challenge)], b"")));
    }
    // A token server of another name gets nothing.
    let tokens = Server::scripted(|_, _| Some(answer(200, &[], b"{\"token\":\"anonymous\"}")));
    let challenge = format!("Bearer realm=\"http://localhost:{}/token\",service=\"s\"", tokens.port);
    pull(0, "", move |request, _| {
        let good = request.header("authorization") == Some("Bearer anonymous");
        (!good).then(|| answer(401, &[("WWW-Authenticate", &challenge)], b""))
    });
    assert_eq!(tokens.seen().len(), 1);
    assert!(
        tokens.seen()[0].header("authorization").is_none() && !tokens.seen()[0].query.contains("account")
    );
    // Never enough.
    let server = pull(5, "are wrong or not enough", |_, _| Some(answer(401, &[CHALLENGE], b"")));
    assert_eq!(server.seen().len(), 2);
    let tokens = Server::scripted(|_, _| {
        let head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{\"token\":\"";
        Some(Reply::Bytes([head.to_vec(), vec![b'a'; 8 << 20]].concat()))
    });
    let challenge = format!("Bearer realm=\"http://{}/token\"", tokens.domain());
    pull(8, "larger than 1048576 bytes", move |_, _| {
        Some(answer(401, &[("WWW-Authenticate", &challenge)], b""))
    });
}

#[test]
fn r06_to_r08_redirects() {
    needs_root!();
    let server = pull(5, "redirects more than 10 times", |request, _| {
        is_manifest(request).then(|| answer(302, &[("Location", &request.path)], b""))
    });
    assert_eq!(server.seen().len(), 11);
    // Elsewhere without the password.
    let other = Server::new();
    offer(&other, &Image::new(&bytes()));
    let port = other.port;
    let server = pull(0, "", move |request, _| match request.header("authorization") {
        None => Some(answer(401, &[CHALLENGE], b"")),
        Some(shown) => {
            assert_eq!(shown, BASIC);
            let target = format!("http://localhost:{port}{}", request.path);
            request.is_blob().then(|| answer(307, &[("Location", &target)], b""))
        }
    });
    assert!(server.seen().len() > 2 && other.seen().len() == 2, "{:?}", other.lines());
    assert!(other.seen().iter().all(|request| request.header("authorization").is_none()));
    pull(7, "only https is followed", |request, _| {
        request.is_blob().then(|| answer(302, &[("Location", "file:///etc/passwd")], b""))
    });
}

#[test]
fn r09_to_r11_what_passes_is_waited_for_within_bounds() {
    needs_root!();
    pull(0, "", |request, nth| {
        (is_manifest(request) && nth == 0).then(|| answer(429, &[("Retry-After", "1")], b""))
    });
    let server = pull(5, "allows no more requests for 86400 seconds: slow down", |request, _| {
        is_manifest(request).then(|| answer(429, &[("Retry-After", "86400")], b"slow down"))
    });
    assert_eq!(server.seen().len(), 1);
    pull(0, "", |request, nth| (is_manifest(request) && nth < 2).then(|| answer(500, &[], b"")));
}

#[test]
fn r12_to_r14_ranges() {
    needs_root!();
    let cut: Script = |request, nth| {
        let whole = layer(request)?;
        (nth == 0).then(|| Reply::Bytes([head(200, &[], whole.len()), whole[..300_000].to_vec()].concat()))
    };
    let server = pull(0, "", cut);
    assert!(server.seen().iter().any(|request| request.header("range") == Some("bytes=300000-")));
    pull(0, "", |request, nth| {
        let whole = layer(request)?;
        let part = if nth == 0 { 300_000 } else { whole.len() };
        Some(Reply::Bytes([head(200, &[], whole.len()), whole[..part].to_vec()].concat()))
    });
    pull(5, "with another range than it was asked for", |request, nth| {
        let whole = layer(request)?;
        let range = format!("bytes 1-{}/{}", whole.len() - 1, whole.len());
        match nth {
            0 => Some(Reply::Bytes([head(200, &[], whole.len()), whole[..300_000].to_vec()].concat())),
            _ => Some(answer(206, &[("Content-Range", &range)], &whole[1..])),
        }
    });
}

#[test]
fn r15_and_r16_what_stands_still_is_given_up() {
    needs_root!();
    let trickle = || {
        pull_patiently("1s", 5, "sent or took next to nothing", |request, _| {
            let whole = layer(request)?;
            Some(Reply::Trickle(head(200, &[], whole.len()), whole[..1000].to_vec()))
        });
    };
    std::thread::scope(|scope| {
        scope.spawn(trickle);
        let server = pull_patiently("1s", 5, "sent or took next to nothing", |request, _| {
            is_manifest(request).then(|| Reply::Hang(Vec::new()))
        });
        assert_eq!(server.seen().len(), 3);
    });
}

#[test]
fn r17_a_certificate_of_nobody_known_is_refused() {
    needs_root!();
    needs_programs!("docker-registry");
    let (registry, bench) = (Registry::guarded(), Bench::empty());
    let name = registry.name("app");
    let refused = watched(&bench, &["pull", &name]).expect(5);
    refused.says(&["certificate", "certs.d"]);
    // Who insists may go without.
    let insecure = ["pull", "--insecure-registry", &registry.host(), &name];
    watched(&bench, &insecure).expect(5).says(&["kiln login"]);
}

#[test]
fn r18_to_r21_other_bytes_than_promised_are_not_kept() {
    needs_root!();
    pull(6, "gave sha256:", |request, _| {
        let mut whole = layer(request)?;
        whole[400_000] ^= 1;
        Some(answer(200, &[], &whole))
    });
    pull(6, "or more for sha256:", |request, _| {
        Some(answer(200, &[], &[layer(request)?, b"x".to_vec()].concat()))
    });
    pull(0, "", |request, _| Some(answer(200, &[("Content-Encoding", "gzip")], &layer(request)?)));
    let page = || answer(200, &[("Content-Type", "text/html")], b"<html>who are you?</html>");
    pull(5, "with a web page: is this a registry?", move |request, _| is_manifest(request).then(page));
    pull(6, "which has", move |request, _| layer(request).map(|_| page()));
}

#[test]
fn r22_a_tag_that_moves_leads_to_one_image() {
    needs_root!();
    let (old, new) = (Image::new(b"old"), Image::new(b"new"));
    let manifest = serde_json::to_vec(&new.manifest).unwrap();
    // From the second build on: one for who looks, another one for who fetches.
    let server = Server::scripted(move |request, nth| {
        let fetches = request.line() == "GET /v2/team/app/manifests/v1" && nth > 0;
        let digest = Digest::of(&manifest).to_string();
        let headers = [("Content-Type", media_type::OCI_MANIFEST), ("Docker-Content-Digest", &digest)];
        fetches.then(|| answer(200, &headers, &manifest))
    });
    offer(&server, &old);
    for blob in [&new.layer, &new.config] {
        server.blob(blob);
    }
    let bench = bench(&server, Bench::empty(), PATIENCE);
    let name = format!("{}/team/app:v1", server.domain());
    let context = Context::new(&[("Dockerfile", &format!("FROM {name}\n"))]);
    let built = |flag: &str| {
        let out = bench.at("out");
        watched(&bench, &["build", "--progress", "plain", flag, "--output", text(&out), context.path()])
            .expect(0);
        std::fs::read_to_string(out.join("file")).unwrap()
    };
    assert_eq!(built("--pull=missing"), "old");
    // HEAD says something else than what is known, GET a third thing: what came is what counts.
    let middle = serde_json::to_vec(&Image::new(b"middle").manifest).unwrap();
    server.manifest("v1", &middle);
    assert_eq!(built("--pull"), "new");
}

/// Pushes an image with a layer of 600 KB to a server that answers so.
#[track_caller]
fn push(
    code: i32,
    said: &str,
    script: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
) -> Server {
    let server = Server::scripted(
        move |request, nth| {
            if request.path == "/v2/" { None } else { script(request, nth) }
        },
    );
    let bench = bench(&server, Bench::empty(), PATIENCE);
    let name = format!("{}/team/app:v1", server.domain());
    // Nothing that gzip would make small.
    let mut seed = 1_u64;
    let noise = std::iter::repeat_with(|| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u8
    });
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /\n")]);
    std::fs::write(
        std::path::Path::new(context.path()).join("file"),
        noise.take(600_000).collect::<Vec<_>>(),
    )
    .unwrap();
    bench.build(&context, &["-t", &name]).expect(0);
    watched(&bench, &["push", &name]).expect(code).says(&[said]);
    server
}

#[test]
fn r23_to_r27_uploads() {
    needs_root!();
    push(5, "without a Location", |request, _| (request.method == "POST").then(|| answer(202, &[], b"")));
    // The registry's password stays there.
    let other = Server::scripted(|request, _| {
        Some(answer(if request.method == "PATCH" { 202 } else { 201 }, &[], b""))
    });
    let port = other.port;
    push(0, "", move |request, _| match (request.header("authorization"), request.method.as_str()) {
        (None, _) => Some(answer(401, &[CHALLENGE], b"")),
        (_, "POST") => Some(answer(202, &[("Location", &format!("http://localhost:{port}/there"))], b"")),
        _ => None,
    });
    assert!(other.seen().len() >= 2, "{:?}", other.lines());
    assert!(other.seen().iter().all(|request| request.header("authorization").is_none()));
    // It has less than was thought, and says how much.
    let server = push(0, "", |request, nth| {
        (request.method == "PATCH" && nth == 0).then(|| answer(416, &[("Range", "0-0")], b""))
    });
    let seen = server.seen();
    let upload =
        seen.iter().find(|request| request.method == "PATCH").expect("it is too large for one request");
    let about = seen.iter().filter(|request| request.path == upload.path);
    let methods: Vec<&str> = about.map(|request| request.method.as_str()).collect();
    assert_eq!(methods, ["PATCH", "GET", "PATCH", "PUT"]);
    let other = Digest::of(b"other").to_string();
    let server = push(6, "calls /v2/team/app/blobs/uploads/", move |request, _| {
        let is_blob = request.method == "PUT" && request.path.contains("/uploads/");
        is_blob.then(|| answer(201, &[("Docker-Content-Digest", &other)], b""))
    });
    assert!(server.state.lock().unwrap().manifests.is_empty());
    // Another repository of the registry is said to have it, and has not.
    let (server, bench) = (Server::new(), Bench::empty());
    let [first, second] = ["other/app:v1", "team/app:v1"].map(|name| format!("{}/{name}", server.domain()));
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /\n"), ("file", "content")]);
    bench.build(&context, &["-t", &first]).expect(0);
    bench.ok(&["tag", &first, &second]);
    watched(&bench, &["push", &second]).expect(0);
    let lines = server.seen();
    let mounts = lines.iter().filter(|request| request.query.contains("mount=")).count();
    assert!(
        mounts >= 1 && lines.iter().filter(|request| request.method == "PUT").count() == 3,
        "{:?}",
        server.lines()
    );
    assert_eq!(server.state.lock().unwrap().blobs.len(), 2);
}

#[test]
fn j02_and_j03_a_manifest_is_what_it_was_announced_as() {
    needs_root!();
    pull(6, "application/vnd.oci.image.index.v1+json", |request, _| {
        let kind = ("Content-Type", media_type::OCI_INDEX);
        let manifest = serde_json::to_vec(&Image::new(&bytes()).manifest).unwrap();
        is_manifest(request).then(|| answer(200, &[kind], &manifest))
    });
    pull(5, "schema 1", |request, _| {
        let kind = "application/vnd.docker.distribution.manifest.v1+prettyjws";
        let old = br#"{"schemaVersion":1,"name":"team/app","tag":"v1","fsLayers":[],"history":[]}"#;
        is_manifest(request).then(|| answer(200, &[("Content-Type", kind)], old))
    });
}
