//! Mirrors, and hosts that are left alone.

use std::sync::Arc;
use std::time::Duration;

use kiln_registry::{Clock as _, Error, Mirror, NoCredentials, Settings, Which};

use crate::bench::{Bench, password};
use crate::server::{Reply, Server, answer, head};

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;

fn content() -> Vec<u8> {
    (0..600_000u32).map(|n| (n ^ (n >> 6)) as u8).collect()
}

fn mirrored(server: &Server, mirrors: &[String]) -> Settings {
    let mirrors = mirrors.iter().map(|mirror| mirror.parse::<Mirror>().unwrap()).collect();
    Settings { mirrors: [(server.domain(), mirrors)].into(), ..Settings::default() }
}

fn bench(server: &Server, mirrors: &[String]) -> Bench {
    Bench::with(mirrored(server, mirrors), Arc::new(NoCredentials))
}

#[test]
fn a_mirror_that_has_it_is_enough() {
    let (server, mirror) = (Server::new(), Server::new());
    let digest = mirror.manifest("v1", MANIFEST);
    let blob = mirror.blob(&content());
    let bench = bench(&server, &[format!("http://{}/proxy", mirror.domain())]);
    let repository = bench.repository(&server);
    assert_eq!(bench.run(repository.manifest(Which::Tag("v1"))).unwrap().digest, digest);
    assert_eq!(bench.run(repository.resolve(Which::Digest(&digest))).unwrap().digest, digest);
    let mut out = Vec::new();
    bench.run(repository.fetch_blob(&blob, &mut out)).unwrap();
    assert_eq!(out, content());
    assert_eq!(server.lines(), [""; 0]);
    assert_eq!(mirror.lines()[0], "GET /v2/proxy/team/app/manifests/v1");
    // What is pushed goes to the registry itself, which is asked whether it has it.
    bench.run(repository.push_blob(&blob, &content(), &[])).unwrap();
    assert_eq!(server.lines()[0], format!("HEAD /v2/team/app/blobs/{}", blob.digest));
    assert_eq!(mirror.seen().len(), 3);
    assert_eq!(bench.client.take_notes(), [""; 0]);
}

#[test]
fn what_a_mirror_does_not_have_the_next_one_has() {
    let (server, first, second) = (Server::new(), Server::new(), Server::new());
    let digest = server.manifest("v1", MANIFEST);
    let blob = second.blob(&content());
    let bench = bench(&server, &[first.domain(), second.domain()]);
    let repository = bench.repository(&server);
    assert_eq!(bench.run(repository.manifest(Which::Tag("v1"))).unwrap().digest, digest);
    bench.run(repository.fetch_blob(&blob, &mut Vec::new())).unwrap();
    assert_eq!((first.seen().len(), second.seen().len(), server.seen().len()), (2, 2, 1));
    let absent = bench.run(repository.manifest(Which::Tag("v2"))).unwrap_err();
    assert!(matches!(&absent, Error::NotFound { host, .. } if *host == server.domain()), "{absent}");
    // That a mirror does not have everything deserves no word.
    assert_eq!(bench.client.take_notes(), [""; 0]);
}

#[test]
fn a_blob_goes_on_elsewhere_where_a_mirror_broke_off() {
    let bytes = content();
    let mirror = Server::scripted(move |request, _| {
        let part = [head(200, &[], bytes.len()), bytes[..400_000].to_vec()].concat();
        request.is_blob().then_some(Reply::Reset(part))
    });
    let server = Server::new();
    let blob = server.blob(&content());
    let bench = bench(&server, &[mirror.domain()]);
    let mut out = Vec::new();
    bench.run(bench.repository(&server).fetch_blob(&blob, &mut out)).unwrap();
    assert_eq!(out, content());
    let range = server.seen()[0].header("range").map(str::to_owned).unwrap();
    let from: usize = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap();
    assert!(from > 0 && from <= 400_000, "{range}");
    let notes = bench.client.take_notes().join("\n");
    assert!(notes.contains(&mirror.domain()) && notes.contains("passed over"), "{notes}");
}

#[test]
fn a_mirror_that_lies_is_found_out_and_left_alone() {
    let mut wrong = content();
    wrong[300_000] ^= 1;
    let mirror = Server::scripted(move |request, _| request.is_blob().then(|| answer(200, &[], &wrong)));
    let other = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json"}"#;
    let server = Server::new();
    let digest = server.manifest("v1", MANIFEST);
    mirror.manifest(&digest.to_string(), other);
    let blob = server.blob(&content());
    let bench = bench(&server, &[mirror.domain()]);
    let repository = bench.repository(&server);
    let error = bench.run(repository.fetch_blob(&blob, &mut Vec::new())).unwrap_err();
    assert!(matches!(&error, Error::Mismatch { host, .. } if *host == mirror.domain()), "{error}");
    // Somebody who asks again gets it from elsewhere.
    let mut out = Vec::new();
    bench.run(repository.fetch_blob(&blob, &mut out)).unwrap();
    assert_eq!((out, mirror.seen().len()), (content(), 1));
    // Where nothing was written yet, at once.
    let bench = self::bench(&server, &[mirror.domain()]);
    let found = bench.run(bench.repository(&server).manifest(Which::Digest(&digest))).unwrap();
    assert_eq!(found.bytes, MANIFEST);
}

#[test]
fn a_mirror_that_is_away_costs_little_and_that_once() {
    let server = Server::new();
    server.manifest("v1", MANIFEST);
    let bench = bench(&server, &["127.0.0.1:1".to_owned()]);
    let repository = bench.repository(&server);
    for _ in 0..5 {
        bench.run(repository.manifest(Which::Tag("v1"))).unwrap();
    }
    assert_eq!((bench.pauses_ms().len(), bench.client.take_notes().len()), (1, 1));
    // After a while it is asked again.
    bench.run(bench.pauses.pause(Duration::from_secs(31)));
    bench.run(repository.manifest(Which::Tag("v1"))).unwrap();
    assert_eq!(bench.pauses_ms().len(), 3);
}

#[test]
fn a_mirror_gets_no_credentials_of_its_registry() {
    let (server, mirror) = (
        Server::new(),
        Server::scripted(|request, _| {
            let challenge = ("WWW-Authenticate", "Basic realm=\"x\"");
            (request.header("authorization").is_none()).then(|| answer(401, &[challenge], b""))
        }),
    );
    server.manifest("v1", MANIFEST);
    struct Only(String);
    impl kiln_registry::CredentialSource for Only {
        fn credential(
            &self,
            key: &str,
        ) -> Result<Option<kiln_registry::Credential>, kiln_registry::CredentialError> {
            Ok((key == self.0).then(password))
        }
    }
    let bench = Bench::with(mirrored(&server, &[mirror.domain()]), Arc::new(Only(server.domain())));
    bench.run(bench.repository(&server).manifest(Which::Tag("v1"))).unwrap();
    assert!(mirror.seen().iter().all(|request| request.header("authorization").is_none()));
    assert_eq!(server.seen().len(), 1);
}

#[test]
fn a_registry_that_fails_again_and_again_is_left_alone_for_a_while() {
    let server = Server::scripted(|request, _| (request.path != "/v2/").then(|| answer(503, &[], b"")));
    let bench = Bench::new();
    let repository = bench.repository(&server);
    for _ in 0..3 {
        let error = bench.run(repository.manifest(Which::Tag("v1"))).unwrap_err();
        assert!(matches!(error, Error::Status { status: 503, .. }), "{error}");
    }
    let error = bench.run(repository.manifest(Which::Tag("v1"))).unwrap_err();
    assert!(matches!(error, Error::Tripped { failures: 3, .. }), "{error}");
    assert_eq!(server.seen().len(), 15);
    // Another registry is another registry.
    let healthy = Server::new();
    healthy.manifest("v1", MANIFEST);
    bench.run(bench.repository(&healthy).manifest(Which::Tag("v1"))).unwrap();
    // Past the rest one request tells.
    bench.run(bench.pauses.pause(Duration::from_secs(31)));
    bench.run(repository.manifest(Which::Tag("v1"))).unwrap_err();
    assert_eq!(server.seen().len(), 20);
    let error = bench.run(repository.manifest(Which::Tag("v1"))).unwrap_err();
    assert!(matches!(error, Error::Tripped { .. }), "{error}");
}
