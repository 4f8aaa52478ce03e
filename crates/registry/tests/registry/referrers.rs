//! What refers to a manifest: listed by the registry, or by clients in its place.

use kiln_oci::document::{artifact_type, read_index};
use kiln_oci::image::{Descriptor, media_type};
use kiln_oci::{Digest, document};
use kiln_registry::{Error, Which};

use crate::bench::Bench;
use crate::server::{Server, answer};

fn index(entries: &[&Digest]) -> String {
    let entry = |digest: &&Digest| {
        format!(r#"{{"mediaType":"{}","digest":"{digest}","size":7}}"#, media_type::OCI_MANIFEST)
    };
    let entries: Vec<String> = entries.iter().map(entry).collect();
    let kind = media_type::OCI_INDEX;
    format!(r#"{{"schemaVersion":2,"mediaType":"{kind}","manifests":[{}]}}"#, entries.join(","))
}

/// A manifest of this kind that refers to `subject`.
fn referrer(subject: &Digest, kind: &str) -> Vec<u8> {
    let empty = Digest::of(b"{}");
    let manifest = media_type::OCI_MANIFEST;
    let blob = format!(r#"{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{empty}","size":2}}"#);
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{manifest}","artifactType":"{kind}","config":{blob},"layers":[{blob}],
        "subject":{{"mediaType":"{manifest}","digest":"{subject}","size":7}},"annotations":{{"by":"test"}}}}"#
    )
    .into_bytes()
}

fn kept_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

#[test]
fn they_come_from_the_list_or_from_the_tag_in_its_place() {
    let subject = Digest::of(b"subject");
    let (bench, server) = (Bench::new(), Server::new());
    let repository = bench.repository(&server);
    assert!(bench.run(repository.referrers(&subject)).unwrap().is_empty());
    server.manifest(&kept_tag(&subject), index(&[&subject]).as_bytes());
    assert_eq!(bench.run(repository.referrers(&subject)).unwrap()[0].size, 7);
    let listed = Server::scripted(move |request, _| {
        request.path.contains("/referrers/").then(|| answer(200, &[], index(&[&subject]).as_bytes()))
    });
    assert_eq!(bench.run(bench.repository(&listed).referrers(&subject)).unwrap().len(), 1);
    // Something else under that tag is no list.
    server.manifest(&kept_tag(&subject), &referrer(&subject, "x"));
    let wrong = bench.run(repository.referrers(&subject)).unwrap_err();
    assert!(matches!(wrong, Error::Document { .. }), "{wrong}");
}

#[test]
fn they_are_listed_over_all_pages_each_once_and_no_further() {
    let server = Server::scripted(|request, nth| {
        let page = |entries: &[&Digest], target: &str| {
            let link = format!("<{target}>; rel=\"next\"");
            Some(answer(200, &[("Link", &link)], index(entries).as_bytes()))
        };
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        match nth {
            _ if !request.path.contains("/referrers/") => None,
            0 => page(&[&one, &two], &format!("{}?last=x", request.path)),
            1 => page(&[&two, &Digest::of(b"3")], "http://169.254.169.254/"),
            _ => None,
        }
    });
    let bench = Bench::new();
    let found = bench.run(bench.repository(&server).referrers(&Digest::of(b"subject"))).unwrap();
    let found: Vec<Digest> = found.iter().map(|referrer| referrer.digest).collect();
    assert_eq!(found, [b"1", b"2", b"3"].map(|bytes| Digest::of(bytes)));
    assert_eq!(server.seen()[1].query, "last=x");
}

#[test]
fn a_registry_that_knows_nothing_of_subjects_gets_a_list_under_a_tag() {
    let subject = Digest::of(b"subject");
    let (bench, server) = (Bench::new(), Server::new());
    let repository = bench.repository(&server);
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        let put = repository.put_manifest(Which::Digest(&digest), media_type::OCI_MANIFEST, bytes);
        assert_eq!(bench.run(put).unwrap(), digest);
        digest
    };
    let (sbom, signature) = (referrer(&subject, "a/sbom"), referrer(&subject, "a/signature"));
    let expected = [put(&sbom), put(&signature)];
    // The same again changes nothing.
    put(&sbom);
    let found = bench.run(repository.referrers(&subject)).unwrap();
    assert_eq!(found.iter().map(|referrer| referrer.digest).collect::<Vec<_>>(), expected);
    assert_eq!(found.iter().map(artifact_type).collect::<Vec<_>>(), ["a/sbom", "a/signature"]);
    let Descriptor { size, annotations, .. } = &found[0];
    assert_eq!((*size, annotations["by"].as_str()), (sbom.len() as u64, "test"));
    let (kind, list) = server.state.lock().unwrap().manifests[&kept_tag(&subject)].clone();
    assert_eq!(kind, media_type::OCI_INDEX);
    read_index(&list, document::own_media_type(&list).unwrap().as_str()).unwrap();
    // What refers to nothing is in no list.
    let before = server.seen().len();
    put(index(&[]).as_bytes());
    assert_eq!(server.seen().len(), before + 1);
}

#[test]
fn a_registry_that_lists_them_itself_gets_no_tag() {
    let subject = Digest::of(b"subject");
    let server = Server::scripted(move |request, _| {
        let said = [("OCI-Subject", subject.to_string())];
        let said: Vec<(&str, &str)> = said.iter().map(|(name, value)| (*name, value.as_str())).collect();
        (request.method == "PUT").then(|| answer(201, &said, b""))
    });
    let bench = Bench::new();
    let bytes = referrer(&subject, "a/sbom");
    let digest = Digest::of(&bytes);
    let put = bench.repository(&server);
    let put = put.put_manifest(Which::Digest(&digest), media_type::OCI_MANIFEST, &bytes);
    bench.run(put).unwrap();
    assert_eq!(server.seen().len(), 1, "{:?}", server.lines());
}
