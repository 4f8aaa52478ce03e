//! Manifests and blobs from servers that behave, and from others.

use std::sync::Arc;
use std::time::Duration;

use kiln_oci::Digest;
use kiln_oci::image::Descriptor;
use kiln_registry::{Error, Fault, NoCredentials, Settings, Which};

use crate::bench::{Bench, text};
use crate::server::{Reply, Request, Server, answer, head};

fn content() -> Vec<u8> {
    (0..1_000_000u32).map(|n| (n ^ (n >> 8)) as u8).collect()
}

/// Fetches the blob of a server that answers the nth request for it as `script` says.
fn fetch(
    bench: &Bench,
    script: impl Fn(&Request, usize, &[u8]) -> Option<Reply> + Send + Sync + 'static,
) -> (Result<(), Error>, Vec<u8>, Server) {
    let bytes = content();
    let server = Server::scripted(
        move |request, nth| if request.is_blob() { script(request, nth, &bytes) } else { None },
    );
    let blob = server.blob(&content());
    let mut out = Vec::new();
    let result = bench.run(bench.repository(&server).fetch_blob(&blob, &mut out));
    (result, out, server)
}

fn check_fetched(
    script: impl Fn(&Request, usize, &[u8]) -> Option<Reply> + Send + Sync + 'static,
    requests: usize,
) -> Bench {
    let bench = Bench::new();
    let (result, out, server) = fetch(&bench, script);
    result.unwrap_or_else(|error| panic!("{}", text(&error)));
    assert!(out == content(), "other bytes");
    assert_eq!(server.seen().len(), requests, "{:?}", server.lines());
    bench
}

#[test]
fn a_blob_comes_with_one_request() {
    check_fetched(|_, _, _| None, 1);
}

#[test]
fn a_broken_transfer_goes_on_at_the_byte() {
    let cut = |request: &Request, nth: usize, bytes: &[u8]| {
        let from = [0, 300_000, 600_000][nth.min(2)];
        let range = format!("bytes {from}-999999/1000000");
        let asked = format!("bytes={from}-");
        assert_eq!(request.header("range"), (nth > 0).then_some(asked.as_str()));
        let status = if nth == 0 { 200 } else { 206 };
        let mut reply = head(status, &[("Content-Range", &range)], bytes.len() - from);
        let end = if nth < 2 { from + 300_000 } else { bytes.len() };
        reply.extend_from_slice(&bytes[from..end]);
        Some(Reply::Bytes(reply))
    };
    check_fetched(cut, 3);
}

#[test]
fn a_server_that_ignores_the_range_is_read_past_what_is_there() {
    let ignores = |_: &Request, nth: usize, bytes: &[u8]| {
        let mut reply = head(200, &[], bytes.len());
        reply.extend_from_slice(&bytes[..if nth == 0 { 500_000 } else { bytes.len() }]);
        Some(Reply::Bytes(reply))
    };
    check_fetched(ignores, 2);
}

#[test]
fn what_passes_is_tried_again_after_pauses_that_grow() {
    let fails = |_: &Request, nth: usize, _: &[u8]| {
        let status = [500, 502, 503, 504].get(nth)?;
        Some(answer(*status, &[], b""))
    };
    let bench = check_fetched(fails, 5);
    assert_eq!(bench.pauses_ms(), [300, 600, 1200, 2400]);
}

#[test]
fn a_registry_that_stays_broken_is_given_up_with_its_words() {
    let bench = Bench::new();
    let body = br#"{"errors":[{"code":"OOPS","message":"no \u001b[31mdisk"}]}"#;
    let (result, _, server) = fetch(&bench, |_, _, _| Some(answer(500, &[], body)));
    let error = result.unwrap_err();
    assert_eq!(server.seen().len(), 5);
    let said = text(&error);
    assert!(said.contains("127.0.0.1") && said.contains("500") && said.contains("GET"), "{said}");
    assert!(said.contains("OOPS: no [31mdisk"), "{said}");
}

#[test]
fn a_registry_that_wants_patience_gets_it_within_bounds() {
    let bench = check_fetched(|_, nth, _| (nth == 0).then(|| answer(429, &[("Retry-After", "7")], b"")), 2);
    assert!((7000..8000).contains(&bench.pauses_ms()[0]), "{:?}", bench.pauses_ms());
    // A date, as the clock of the test has it.
    let date = "Sun, 09 Sep 2001 01:46:49 GMT";
    let bench =
        check_fetched(move |_, nth, _| (nth == 0).then(|| answer(503, &[("Retry-After", date)], b"")), 2);
    assert!((9000..10_000).contains(&bench.pauses_ms()[0]), "{:?}", bench.pauses_ms());
    let bench = Bench::new();
    let (result, _, server) =
        fetch(&bench, |_, _, _| Some(answer(429, &[("Retry-After", "86400")], b"slow down")));
    assert!(matches!(result, Err(Error::Limited { .. })), "{result:?}");
    assert_eq!((server.seen().len(), bench.pauses_ms().len()), (1, 0));
}

#[test]
fn all_tries_together_have_a_deadline() {
    let settings = Settings { blob_deadline: Duration::from_millis(800), ..Settings::default() };
    let bench = Bench::with(settings, std::sync::Arc::new(kiln_registry::NoCredentials));
    let (result, _, server) = fetch(&bench, |_, _, _| Some(answer(500, &[], b"")));
    assert!(matches!(result, Err(Error::Deadline { .. })), "{result:?}");
    assert_eq!(server.seen().len(), 2);
}

#[test]
fn what_stands_still_is_given_up() {
    // Before the answer, in its head, in its body.
    type Stage = fn(&[u8]) -> Vec<u8>;
    let stages: [Stage; 3] = [
        |_| Vec::new(),
        |bytes| head(200, &[], bytes.len())[..20].to_vec(),
        |bytes| [head(200, &[], bytes.len()), bytes[..10].to_vec()].concat(),
    ];
    for stage in stages {
        let bench = Bench::impatient();
        let (result, _, server) = fetch(&bench, move |_, _, bytes| Some(Reply::Hang(stage(bytes))));
        assert!(matches!(result, Err(Error::Stalled { .. })), "{result:?}");
        assert_eq!(server.seen().len(), 2);
    }
    let bench = Bench::impatient();
    let hangs_once = |_: &Request, nth: usize, bytes: &[u8]| {
        (nth == 0).then(|| Reply::Hang([head(200, &[], bytes.len()), bytes[..99].to_vec()].concat()))
    };
    let (result, out, _) = fetch(&bench, hangs_once);
    assert!(result.is_ok() && out == content(), "{result:?}");
}

#[test]
fn a_trickle_is_given_up() {
    let bench = Bench::impatient();
    let trickles = |_: &Request, _: usize, bytes: &[u8]| {
        Some(Reply::Trickle(head(200, &[], bytes.len()), bytes[..1000].to_vec()))
    };
    let (result, _, server) = fetch(&bench, trickles);
    assert!(matches!(result, Err(Error::Stalled { .. })), "{result:?}");
    assert_eq!(server.seen().len(), 2);
}

#[test]
fn a_document_that_trickles_has_a_deadline() {
    // Fast enough to be no standstill.
    let settings = Settings { stall_bytes: 0, ..Settings::default() };
    let bench = Bench::with(settings, Arc::new(NoCredentials));
    let server =
        Server::scripted(|_, _| Some(Reply::Trickle(head(200, &[], 4_000_000), vec![b' '; 4_000_000])));
    let result = bench.run(bench.repository(&server).manifest(Which::Tag("v1")));
    assert!(matches!(result, Err(Error::Deadline { .. })), "{result:?}");
}

#[test]
fn connections_that_end_badly_and_odd_answers_are_survived() {
    type Odd = fn(&[u8]) -> Reply;
    let cases: [(&str, Odd); 8] = [
        ("reset at once", |_| Reply::Reset(Vec::new())),
        ("reset in the head", |bytes| Reply::Reset(head(200, &[], bytes.len())[..30].to_vec())),
        ("reset in the body", |bytes| {
            Reply::Reset([head(200, &[], bytes.len()), bytes[..1000].to_vec()].concat())
        }),
        ("closed at once", |_| Reply::Bytes(Vec::new())),
        ("no HTTP", |_| Reply::Bytes(b"SSH-2.0-x\r\n".to_vec())),
        ("a request timeout", |_| answer(408, &[], b"")),
        ("chunks without end", |bytes| {
            let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n";
            Reply::Bytes([head, &bytes[..1000], b"\r\n"].concat())
        }),
        ("HTTP/1.0 that ends early", |bytes| {
            Reply::Bytes([b"HTTP/1.0 200 OK\r\n\r\n", &bytes[..1000]].concat())
        }),
    ];
    for (name, odd) in cases {
        let bench = Bench::new();
        let (result, out, server) = fetch(&bench, move |_, nth, bytes| (nth == 0).then(|| odd(bytes)));
        assert!(result.is_ok() && out == content(), "{name}: {result:?}");
        assert_eq!(server.seen().len(), 2, "{name}");
    }
    for status in [400, 403, 404, 405, 410, 416] {
        let bench = Bench::new();
        let (result, _, server) = fetch(&bench, move |_, _, _| Some(answer(status, &[], b"")));
        assert_eq!(result.unwrap_err().fault(), Fault::Network, "{status}");
        assert_eq!(server.seen().len(), 1, "{status}");
    }
}

#[test]
fn wrong_bytes_are_never_good() {
    type Wrong = fn(&[u8]) -> Reply;
    let cases: [(&str, Wrong); 5] = [
        ("a flipped bit", |bytes| {
            let mut bytes = bytes.to_vec();
            bytes[700_000] ^= 1;
            answer(200, &[], &bytes)
        }),
        ("a byte more", |bytes| answer(200, &[], &[bytes, b"x"].concat())),
        ("a byte less", |bytes| answer(200, &[], &bytes[1..])),
        ("no length and no end", |bytes| {
            let mut reply = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
            reply.extend_from_slice(bytes);
            reply.extend_from_slice(bytes);
            Reply::Bytes(reply)
        }),
        ("a login page", |_| answer(200, &[("Content-Type", "text/html")], b"<html>who are you?</html>")),
    ];
    for (name, wrong) in cases {
        let bench = Bench::new();
        let (result, _, server) = fetch(&bench, move |_, _, bytes| Some(wrong(bytes)));
        let error = result.expect_err(name);
        assert_eq!(error.fault(), Fault::Integrity, "{name}: {error}");
        assert_eq!(server.seen().len(), 1, "{name}");
    }
}

#[test]
fn a_range_that_was_not_asked_for_is_refused() {
    for range in ["bytes 0-999999/1000000", "bytes 500000-999999/2000000", ""] {
        let bench = Bench::new();
        let (result, _, _) = fetch(&bench, move |_, nth, bytes| {
            let mut reply = if nth == 0 {
                head(200, &[], bytes.len())
            } else {
                head(206, &[("Content-Range", range)], 500_000)
            };
            reply.extend_from_slice(&bytes[..500_000]);
            Some(Reply::Bytes(reply))
        });
        assert!(matches!(result, Err(Error::Protocol { .. })), "{range}: {result:?}");
    }
}

#[test]
fn content_that_was_packed_for_transport_is_taken_as_it_is() {
    let packed =
        |_: &Request, _: usize, bytes: &[u8]| Some(answer(200, &[("Content-Encoding", "gzip")], bytes));
    check_fetched(packed, 1);
}

#[test]
fn redirects_are_followed_to_their_end_and_not_everywhere() {
    let other = Server::new();
    let blob = other.blob(&content());
    let target = format!("http://localhost:{}/v2/x/blobs/{}", other.port, blob.digest);
    check_fetched(move |_, _, _| Some(answer(307, &[("Location", &target)], b"")), 1);
    assert_eq!(other.seen().len(), 1);

    let bench = Bench::new();
    let (result, _, server) =
        fetch(&bench, |request, _, _| Some(answer(302, &[("Location", &request.path)], b"")));
    assert!(matches!(result, Err(Error::Redirects { .. })), "{result:?}");
    assert_eq!(server.seen().len(), 11);
    for target in
        ["file:///etc/passwd", "ftp://h/x", "http://169.254.169.254/latest", "http://[::ffff:a9fe:a9fe]/"]
    {
        let bench = Bench::new();
        let (result, _, server) =
            fetch(&bench, move |_, _, _| Some(answer(302, &[("Location", target)], b"")));
        let error = result.expect_err(target);
        assert_eq!(error.fault(), Fault::Refused, "{target}: {error}");
        assert_eq!(server.seen().len(), 1);
    }
}

#[test]
fn signatures_in_redirects_are_in_no_message() {
    let bench = Bench::new();
    // Nobody listens on port 1.
    let (result, _, _) = fetch(&bench, |_, _, _| {
        Some(answer(307, &[("Location", "http://user:canary1@127.0.0.1:1/x?signature=canary2")], b""))
    });
    let said = text(&result.unwrap_err());
    assert!(said.contains("127.0.0.1:1") && !said.contains("canary"), "{said}");
}

#[test]
fn a_missing_blob_is_missing() {
    let (bench, server) = (Bench::new(), Server::new());
    let repository = bench.repository(&server);
    let absent = Digest::of(b"absent");
    assert_eq!(bench.run(repository.blob_size(&absent)).unwrap(), None);
    let blob = Descriptor::new("x", absent, 1);
    let error = bench.run(repository.fetch_blob(&blob, &mut Vec::new())).unwrap_err();
    assert!(matches!(&error, Error::NotFound { .. }) && text(&error).contains("not here"), "{error}");
    let there = server.blob(b"there");
    assert_eq!(bench.run(repository.blob_size(&there.digest)).unwrap(), Some(5));
    let empty = server.blob(b"");
    bench.run(repository.fetch_blob(&empty, &mut Vec::new())).unwrap();
}

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;

fn manifest(
    script: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
) -> Result<Digest, Error> {
    let (bench, server) = (Bench::new(), Server::scripted(script));
    server.manifest("v1", MANIFEST);
    let found = bench.run(bench.repository(&server).manifest(Which::Tag("v1")))?;
    assert_eq!(found.bytes, MANIFEST);
    Ok(found.digest)
}

#[test]
fn a_manifest_comes_by_tag_and_by_digest() {
    let (bench, server) = (Bench::new(), Server::new());
    let digest = server.manifest("v1", MANIFEST);
    let repository = bench.repository(&server);
    assert_eq!(bench.run(repository.resolve(Which::Tag("v1"))).unwrap().digest, digest);
    assert_eq!(server.lines(), ["HEAD /v2/team/app/manifests/v1"]);
    let found = bench.run(repository.manifest(Which::Digest(&digest))).unwrap();
    assert_eq!((found.digest, found.bytes.as_slice()), (digest, MANIFEST));
    let absent = bench.run(repository.manifest(Which::Tag("v2")));
    assert!(matches!(absent, Err(Error::NotFound { .. })));
    // The name of another one leads to this one.
    let other = Digest::of(b"other");
    let this = server.state.lock().unwrap().manifests["v1"].clone();
    server.state.lock().unwrap().manifests.insert(other.to_string(), this);
    let wrong = bench.run(repository.manifest(Which::Digest(&other)));
    assert!(matches!(wrong, Err(Error::Mismatch { .. })), "{wrong:?}");
    let wrong = bench.run(repository.resolve(Which::Digest(&other)));
    assert!(matches!(wrong, Err(Error::Misnamed { .. })), "{wrong:?}");
}

#[test]
fn a_manifest_that_is_none_is_refused() {
    manifest(|_, _| None).unwrap();
    // Old registries say nothing of its kind.
    let plain = |request: &Request, _: usize| {
        request
            .path
            .ends_with("/v1")
            .then(|| answer(200, &[("Content-Type", "text/plain; charset=utf-8")], MANIFEST))
    };
    manifest(plain).unwrap();
    let large = vec![b' '; (4 << 20) + 1];
    type Case<'a> = (&'a str, Vec<(&'a str, &'a str)>, Vec<u8>, Fault);
    let cases: [Case<'_>; 5] = [
        ("too large", vec![], large, Fault::Limit),
        ("a web page", vec![("Content-Type", "text/html")], b"<html>".to_vec(), Fault::Network),
        ("no JSON", vec![], b"nonsense".to_vec(), Fault::Integrity),
        (
            "schema 1",
            vec![],
            br#"{"schemaVersion":1,"mediaType":"application/vnd.docker.distribution.manifest.v1+json"}"#
                .to_vec(),
            Fault::Network,
        ),
        (
            "misnamed",
            vec![(
                "Docker-Content-Digest",
                "sha256:0000000000000000000000000000000000000000000000000000000000000000",
            )],
            MANIFEST.to_vec(),
            Fault::Integrity,
        ),
    ];
    for (name, headers, body, fault) in cases {
        let headers: Vec<(String, String)> =
            headers.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let result = manifest(move |request, _| {
            let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            request.path.ends_with("/v1").then(|| answer(200, &headers, &body))
        });
        let error = result.expect_err(name);
        assert_eq!(error.fault(), fault, "{name}: {}", text(&error));
    }
}

#[test]
fn answers_without_end_are_given_up_and_headers_are_bounded() {
    // A manifest that says nothing of its size and has no end.
    let endless = |request: &Request, _: usize| {
        let mut reply = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
        reply.resize(8 << 20, b' ');
        request.path.ends_with("/v1").then_some(Reply::Bytes(reply))
    };
    assert!(matches!(manifest(endless), Err(Error::TooLarge { .. })));
    let bomb = |request: &Request, _: usize| {
        let mut reply = b"HTTP/1.1 200 OK\r\n".to_vec();
        for n in 0..200_000 {
            reply.extend_from_slice(format!("X-{n}: y\r\n").as_bytes());
        }
        request.path.ends_with("/v1").then_some(Reply::Bytes(reply))
    };
    assert!(matches!(manifest(bomb), Err(Error::Transfer { .. })));
}

#[test]
fn tags_are_listed_over_all_pages_and_no_further() {
    let server = Server::scripted(|request, nth| {
        let link = |target: &str| format!("<{target}>; rel=\"next\"");
        let page = |tags: &str, target: &str| {
            Some(answer(200, &[("Link", &link(target))], format!("{{\"tags\":{tags}}}").as_bytes()))
        };
        match (request.path.as_str(), nth) {
            ("/v2/team/app/tags/list", 0) => page("[\"a\",\"b\"]", "/v2/team/app/tags/list?n=2&last=b"),
            ("/v2/team/app/tags/list", 1) => page("[\"c\\u001b\"]", "http://169.254.169.254/"),
            _ => None,
        }
    });
    let bench = Bench::new();
    assert_eq!(bench.run(bench.repository(&server).tags()).unwrap(), ["a", "b", "c"]);
    assert_eq!(server.seen()[1].query, "n=2&last=b");
}

#[test]
fn nobody_there_is_said_soon() {
    let bench = Bench::new();
    let reference = "127.0.0.1:1/x".parse().unwrap();
    let error = bench.run(bench.client.repository(&reference).manifest(Which::Tag("x"))).unwrap_err();
    assert_eq!(error.fault(), Fault::Network);
    assert!(text(&error).contains("127.0.0.1:1"), "{}", text(&error));
    assert_eq!(bench.pauses_ms().len(), 2);
}
