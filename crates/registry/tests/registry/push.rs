//! Blobs and manifests to servers that behave, and to others.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_oci::Digest;
use kiln_oci::image::{Descriptor, media_type};
use kiln_registry::{BlobSource, Error, NoCredentials, Pushed, Settings, Which};

use crate::bench::{Bench, text};
use crate::server::{Request, Server, answer};

fn content() -> Vec<u8> {
    (0..1_000_000u32).map(|n| (n ^ (n >> 7)) as u8).collect()
}

fn blob(bytes: &[u8]) -> Descriptor {
    Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::of(bytes), bytes.len() as u64)
}

/// Counts how often it is opened.
struct Counted(Vec<u8>, AtomicUsize);

impl BlobSource for Counted {
    fn open(&self, offset: u64) -> io::Result<Box<dyn Read + Send>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.open(offset)
    }
}

fn check_sent(bench: &Bench, server: &Server, bytes: &[u8]) -> Vec<String> {
    let pushed = bench.run(bench.repository(server).push_blob(&blob(bytes), &bytes.to_vec(), &[]));
    assert_eq!(pushed.unwrap_or_else(|error| panic!("{}", text(&error))), Pushed::Sent);
    assert!(server.state.lock().unwrap().blobs.get(&Digest::of(bytes)).is_some_and(|there| there == bytes));
    server.seen().iter().map(|request| request.method.clone()).collect()
}

#[test]
fn a_blob_is_sent_once_and_known_from_then_on() {
    let (bench, server) = (Bench::new(), Server::new());
    assert_eq!(check_sent(&bench, &server, &content()), ["HEAD", "POST", "PATCH", "PUT"]);
    let source = Counted(content(), AtomicUsize::new(0));
    let again = bench.run(bench.repository(&server).push_blob(&blob(&content()), &source, &[])).unwrap();
    assert_eq!((again, source.1.into_inner()), (Pushed::Known, 0));
    // Small ones go with the request that ends the upload; empty ones do, too.
    let server = Server::new();
    assert_eq!(check_sent(&bench, &server, b"small"), ["HEAD", "POST", "PUT"]);
    let server = Server::new();
    assert_eq!(check_sent(&bench, &server, b""), ["HEAD", "POST", "PUT"]);
}

#[test]
fn a_blob_goes_in_pieces_when_that_is_wanted() {
    let settings = Settings { chunk_bytes: Some(400_000), ..Settings::default() };
    let bench = Bench::with(settings, Arc::new(NoCredentials));
    let server = Server::new();
    assert_eq!(check_sent(&bench, &server, &content()), ["HEAD", "POST", "PATCH", "PATCH", "PATCH", "PUT"]);
    let ranges: Vec<String> = server
        .seen()
        .iter()
        .filter_map(|request| request.header("content-range").map(str::to_owned))
        .collect();
    assert_eq!(ranges, ["0-399999", "400000-799999", "800000-999999"]);
}

#[test]
fn a_broken_upload_goes_on_at_the_byte() {
    let server: Arc<std::sync::OnceLock<Server>> = Arc::default();
    let inner = server.clone();
    let made = Server::scripted(move |request, nth| {
        if request.method != "PATCH" || nth > 0 {
            return None;
        }
        // So much arrived before the connection broke.
        inner.get().unwrap().arrive(request, 700_000);
        Some(answer(502, &[], b""))
    });
    server.set(made.clone()).ok().unwrap();
    let bench = Bench::new();
    assert_eq!(check_sent(&bench, &made, &content()), ["HEAD", "POST", "PATCH", "GET", "PATCH", "PUT"]);
    assert_eq!(made.seen()[4].header("content-range"), Some("700000-999999"));
    assert_eq!(made.seen()[4].body.len(), 300_000);
}

#[test]
fn an_upload_that_the_registry_forgot_is_begun_anew() {
    let forgets = |request: &Request, nth: usize| match (request.method.as_str(), nth) {
        ("PATCH", 0) if request.path.ends_with("u0") => Some(answer(500, &[], b"")),
        ("GET", _) if request.path.ends_with("u0") => Some(answer(404, &[], b"")),
        _ => None,
    };
    let (bench, server) = (Bench::new(), Server::scripted(forgets));
    let lines = check_sent(&bench, &server, &content());
    assert_eq!(lines, ["HEAD", "POST", "PATCH", "GET", "POST", "PATCH", "PUT"]);
}

#[test]
fn a_registry_that_takes_no_pieces_gets_the_blob_in_one() {
    // Some say so, some call every upload unknown, some find every range wrong.
    for (status, methods) in [
        (405, &["HEAD", "POST", "PATCH", "PUT"][..]),
        (501, &["HEAD", "POST", "PATCH", "PUT"]),
        (404, &["HEAD", "POST", "PATCH", "POST", "PATCH", "POST", "PUT"]),
        (416, &["HEAD", "POST", "PATCH", "GET", "PATCH", "POST", "PUT"]),
    ] {
        let server =
            Server::scripted(move |request, _| (request.method == "PATCH").then(|| answer(status, &[], b"")));
        let bench = Bench::new();
        assert_eq!(check_sent(&bench, &server, &content()), methods, "{status}");
    }
}

#[test]
fn a_blob_is_mounted_where_the_registry_has_it() {
    let (bench, server) = (Bench::new(), Server::new());
    server.manifest("mountable", &content());
    let source = Counted(content(), AtomicUsize::new(0));
    let other = ["other/image".to_owned()];
    let pushed = bench.run(bench.repository(&server).push_blob(&blob(&content()), &source, &other)).unwrap();
    assert_eq!(pushed, Pushed::Mounted("other/image".to_owned()));
    assert_eq!(source.1.into_inner(), 0);
    // A registry that would rather not begins an upload, which is given back.
    let server = Server::new();
    let source = content();
    let pushed = bench.run(bench.repository(&server).push_blob(&blob(&content()), &source, &other)).unwrap();
    assert_eq!(pushed, Pushed::Sent);
    let methods: Vec<String> = server.seen().iter().map(|request| request.method.clone()).collect();
    assert_eq!(methods, ["HEAD", "POST", "DELETE", "POST", "PATCH", "PUT"]);
}

#[test]
fn what_the_registry_refuses_is_said() {
    let (bench, server) = (Bench::new(), Server::new());
    // Other bytes than promised.
    let source = b"other".to_vec();
    let error = bench.run(bench.repository(&server).push_blob(&blob(b"bytes"), &source, &[])).unwrap_err();
    assert!(text(&error).contains("DIGEST_INVALID"), "{error}");
    assert!(server.state.lock().unwrap().blobs.is_empty());
    // Fewer bytes than promised.
    let promised = Descriptor { size: 2_000_000, ..blob(&content()) };
    let error = bench.run(bench.repository(&server).push_blob(&promised, &content(), &[])).unwrap_err();
    assert!(matches!(error, Error::Local { .. }), "{}", text(&error));
}

#[test]
fn uploads_do_not_go_anywhere_a_registry_says() {
    for target in ["file:///etc/passwd", "http://169.254.169.254/x"] {
        let server = Server::scripted(move |request, _| {
            (request.method == "POST").then(|| answer(202, &[("Location", target)], b""))
        });
        let bench = Bench::new();
        let error =
            bench.run(bench.repository(&server).push_blob(&blob(b"x"), &b"x".to_vec(), &[])).unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error}");
    }
    let server = Server::scripted(|request, _| (request.method == "POST").then(|| answer(202, &[], b"")));
    let bench = Bench::new();
    let error = bench.run(bench.repository(&server).push_blob(&blob(b"x"), &b"x".to_vec(), &[])).unwrap_err();
    assert!(error.to_string().contains("without a Location"), "{error}");
}

#[test]
fn an_upload_elsewhere_gets_no_credentials() {
    let other = Server::scripted(|_, _| Some(answer(201, &[], b"")));
    let target = format!("http://localhost:{}/upload", other.port);
    let server = Server::scripted(move |request, _| match request.header("authorization") {
        None => Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b"")),
        Some(_) if request.method == "POST" => Some(answer(202, &[("Location", &target)], b"")),
        Some(_) => None,
    });
    let bench = Bench::with_password();
    bench.run(bench.repository(&server).push_blob(&blob(b"x"), &b"x".to_vec(), &[])).unwrap();
    let seen = other.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].header("authorization"), seen[0].body.as_slice()), (None, &b"x"[..]));
}

#[test]
fn a_manifest_is_put_as_it_is() {
    let (bench, server) = (Bench::new(), Server::new());
    let bytes = br#"{"schemaVersion":2}"#;
    let repository = bench.repository(&server);
    let digest =
        bench.run(repository.put_manifest(Which::Tag("v1"), media_type::OCI_MANIFEST, bytes)).unwrap();
    assert_eq!(digest, Digest::of(bytes));
    let (kind, there) = server.state.lock().unwrap().manifests["v1"].clone();
    assert_eq!((kind.as_str(), there.as_slice()), (media_type::OCI_MANIFEST, &bytes[..]));
    let other = Digest::of(b"other");
    let wrong = bench.run(repository.put_manifest(Which::Digest(&other), media_type::OCI_MANIFEST, bytes));
    assert!(matches!(wrong, Err(Error::Mismatch { .. })));
}
