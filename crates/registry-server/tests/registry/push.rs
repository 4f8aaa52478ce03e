//! Push.

use kiln_oci::Digest;
use serde_json::{Value, json};

use super::lab::{Lab, files};
use crate::client::manifest;

const BLOB: &[u8] = b"0123456789abcdefghij";

#[test]
fn blob_upload_streamed_patch_request_with_blob_in_body_should_yield_202_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    let place = client.begin("a");
    let reply = client.send("PATCH", &place, &[], BLOB).expect(202);
    assert_eq!(reply.header("location"), Some(place.as_str()));
    assert_eq!(reply.header("range"), Some("0-19"));
}

#[test]
fn blob_upload_streamed_put_request_to_session_url_with_digest_should_yield_201_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    let place = client.begin("a");
    // Without a length, as who compresses while he sends does.
    client.head("PATCH", &place, &[("transfer-encoding", "chunked")], None);
    for piece in BLOB.chunks(7) {
        let piece = [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
        std::io::Write::write_all(client.raw(), &piece).unwrap();
    }
    std::io::Write::write_all(client.raw(), b"0\r\n\r\n").unwrap();
    client.read(false).expect(202);
    let digest = Digest::of(BLOB);
    let reply = client.send("PUT", &format!("{place}?digest={digest}"), &[], b"").expect(201);
    assert_eq!(reply.header("location"), Some(format!("/v2/a/blobs/{digest}").as_str()));
    assert_eq!(reply.header("docker-content-digest"), Some(digest.to_string().as_str()));
    assert_eq!(client.get(&format!("/v2/a/blobs/{digest}")).expect(200).body, BLOB);
    client.get(&place).expect(404);
}

#[test]
fn blob_upload_monolithic_post_request_with_digest_and_blob_should_yield_a_201() {
    let lab = Lab::new();
    let mut client = lab.client();
    let digest = Digest::of(BLOB);
    client.get(&format!("/v2/a/blobs/{digest}")).expect(404);
    let path = format!("/v2/a/blobs/uploads/?digest={}", digest.to_string().replace(':', "%3A"));
    let reply = client.send("POST", &path, &[("content-type", "application/octet-stream")], BLOB).expect(201);
    assert_eq!(client.get(reply.header("location").unwrap()).expect(200).body, BLOB);
    assert_eq!(files(&lab.at("uploads")), [""; 0]);
}

#[test]
fn blob_upload_monolithic_post_request_should_yield_a_session_id_and_put_a_201_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    let place = client.begin("a");
    let digest = Digest::of(BLOB);
    client.send("PUT", &format!("{place}?digest={digest}"), &[], BLOB).expect(201);
    assert_eq!(client.get(&format!("/v2/a/blobs/{digest}")).expect(200).body, BLOB);
    // The same again is the same.
    let place = client.begin("a");
    client.send("PUT", &format!("{place}?digest={digest}"), &[], BLOB).expect(201);
    assert_eq!(files(&lab.at("blobs")).len(), 1);
}

#[test]
fn blob_upload_chunked_out_of_order_blob_upload_should_return_416() {
    let lab = Lab::new();
    let mut client = lab.client();
    let place = client.begin("a");
    let reply = client.send("PATCH", &place, &[("content-range", "10-19")], &BLOB[10..]).expect(416);
    assert_eq!(reply.header("location"), Some(place.as_str()));
    let reply = client.send("PATCH", &place, &[("content-range", "x")], &BLOB[10..]).expect(400);
    assert_eq!(reply.code(), "BLOB_UPLOAD_INVALID");
    let reply = client.send("PATCH", &place, &[("content-range", "0-9")], &BLOB[..4]).expect(400);
    assert_eq!(reply.code(), "SIZE_INVALID");
    assert_eq!(client.get(&place).expect(204).header("range"), Some("0-0"));
}

#[test]
fn blob_upload_chunked_patch_request_with_chunks_should_return_202_and_retried_ones_416() {
    let lab = Lab::new();
    let mut client = lab.client();
    let place = client.begin("a");
    client.send("PATCH", &place, &[("content-range", "0-9")], &BLOB[..10]).expect(202);
    let again = client.send("PATCH", &place, &[("content-range", "0-9")], &BLOB[..10]).expect(416);
    assert_eq!(again.header("range"), Some("0-9"));
    // Get on stale blob upload should return 204 with a range and location.
    let stale = client.get(&place).expect(204);
    assert_eq!((stale.header("range"), stale.header("location")), (Some("0-9"), Some(place.as_str())));
    let second = client.send("PATCH", &place, &[("content-range", "10-14")], &BLOB[10..15]).expect(202);
    assert_eq!(second.header("range"), Some("0-14"));
    let digest = Digest::of(BLOB);
    // The last one has to come last as well, and what came before stays.
    let early = [("content-range", "16-19")];
    client.send("PUT", &format!("{place}?digest={digest}"), &early, &BLOB[16..]).expect(416);
    assert_eq!(client.get(&place).expect(204).header("range"), Some("0-14"));
    let last = [("content-range", "15-19")];
    client.send("PUT", &format!("{place}?digest={digest}"), &last, &BLOB[15..]).expect(201);
    assert_eq!(client.get(&format!("/v2/a/blobs/{digest}")).expect(200).body, BLOB);
}

#[test]
fn an_upload_whose_connection_broke_goes_on_where_it_was_also_after_a_restart() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    let place = client.begin("a");
    client.head("PATCH", &place, &[], Some(BLOB.len()));
    std::io::Write::write_all(client.raw(), &BLOB[..12]).unwrap();
    client.raw().shutdown(std::net::Shutdown::Write).unwrap();
    assert!(client.try_read(false).is_none_or(|reply| reply.status == 400));
    let mut client = lab.client();
    assert_eq!(client.get(&place).expect(204).header("range"), Some("0-11"));
    drop(client);
    lab.tell();
    lab.wait();
    let dir = lab.dir();
    drop(lab);
    let lab = Lab::on(dir, |_| {});
    let mut client = lab.client();
    assert_eq!(client.get(&place).expect(204).header("range"), Some("0-11"));
    client.send("PATCH", &place, &[("content-range", "12-19")], &BLOB[12..]).expect(202);
    let digest = Digest::of(BLOB);
    client.send("PUT", &format!("{place}?digest={digest}"), &[], b"").expect(201);
    assert_eq!(client.get(&format!("/v2/a/blobs/{digest}")).expect(200).body, BLOB);
}

#[test]
fn an_upload_that_is_cancelled_is_gone() {
    let lab = Lab::new();
    let mut client = lab.client();
    let place = client.begin("a");
    client.send("PATCH", &place, &[], BLOB).expect(202);
    client.send("DELETE", &place, &[], b"").expect(204);
    assert_eq!(client.get(&place).expect(404).code(), "BLOB_UPLOAD_UNKNOWN");
    assert_eq!(files(&lab.at("uploads")), [""; 0]);
}

#[test]
fn cross_repository_blob_mount_of_another_repositorys_blob_should_return_201() {
    let lab = Lab::new();
    let mut client = lab.client();
    let digest = client.push_blob("from/here", BLOB);
    client.get(&format!("/v2/to/blobs/{digest}")).expect(404);
    let path = format!("/v2/to/blobs/uploads/?mount={digest}&from=from%2Fhere");
    let reply = client.send("POST", &path, &[], b"").expect(201);
    assert_eq!(reply.header("location"), Some(format!("/v2/to/blobs/{digest}").as_str()));
    assert_eq!(client.get(&format!("/v2/to/blobs/{digest}")).expect(200).body, BLOB);
    assert_eq!(files(&lab.at("blobs")).len(), 1);
}

#[test]
fn cross_mounting_of_a_blob_without_the_from_argument_or_of_nonexistent_blob_should_yield_session_id() {
    let lab = Lab::new();
    let mut client = lab.client();
    let digest = client.push_blob("from", BLOB);
    for query in [
        format!("mount={digest}"),
        format!("mount={digest}&from=nowhere"),
        format!("mount={digest}&from=../from"),
        format!("mount={}&from=from", Digest::of(b"other")),
    ] {
        let reply = client.send("POST", &format!("/v2/to/blobs/uploads/?{query}"), &[], b"").expect(202);
        assert!(reply.header("location").unwrap().starts_with("/v2/to/blobs/uploads/"), "{query}");
    }
    let reply = client.send("POST", "/v2/to/blobs/uploads/?mount=sha512:00&from=from", &[], b"").expect(400);
    assert_eq!(reply.code(), "DIGEST_INVALID");
}

#[test]
fn put_should_accept_a_manifest_upload() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.get("/v2/a/manifests/undefined").expect(404);
    let (digest, bytes) = client.push_image("a", "v1", "x");
    assert_eq!(client.get(&format!("/v2/a/manifests/{digest}")).expect(200).body, bytes);
    let by_digest = client.push_manifest("a", "", &bytes);
    assert_eq!(by_digest, digest);
}

#[test]
fn registry_should_accept_a_manifest_upload_with_no_layers() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.push_blob("a", b"{}");
    client.push_manifest("a", "empty", &manifest(b"{}", &[], &Value::Null));
    client.get("/v2/a/manifests/empty").expect(200);
}

#[test]
fn a_manifest_that_refers_to_nothing_here_is_refused() {
    let lab = Lab::new();
    let mut client = lab.client();
    let kind = [("content-type", "application/vnd.oci.image.manifest.v1+json")];
    let bytes = manifest(b"{}", &[b"layer"], &Value::Null);
    let refused = |client: &mut crate::client::Client| {
        let reply = client.send("PUT", "/v2/a/manifests/v1", &kind, &bytes).expect(400);
        assert_eq!(reply.code(), "MANIFEST_BLOB_UNKNOWN");
        client.get("/v2/a/manifests/v1").expect(404);
    };
    refused(&mut client);
    client.push_blob("a", b"{}");
    // In another repository is not here.
    client.push_blob("b", b"layer");
    refused(&mut client);
    client.push_blob("a", b"layer");
    client.send("PUT", "/v2/a/manifests/v1", &kind, &bytes).expect(201);
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{ "mediaType": kind[0].1, "size": 3, "digest": Digest::of(b"not") }],
    });
    let kind = [("content-type", "application/vnd.oci.image.index.v1+json")];
    let reply = client.send("PUT", "/v2/a/manifests/i", &kind, index.to_string().as_bytes()).expect(400);
    assert_eq!(reply.code(), "MANIFEST_BLOB_UNKNOWN");
}

#[test]
fn manifests_that_mean_two_things_are_refused() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.push_blob("a", b"{}");
    let oci = "application/vnd.oci.image.manifest.v1+json";
    let index = "application/vnd.oci.image.index.v1+json";
    let good = manifest(b"{}", &[], &Value::Null);
    let other = Digest::of(b"other");
    let reply = client.send("PUT", &format!("/v2/a/manifests/{other}"), &[("content-type", oci)], &good);
    assert_eq!(reply.expect(400).code(), "DIGEST_INVALID");
    for (kind, bytes) in [
        (index, good.clone()),
        (oci, manifest(b"{}", &[], &json!({ "schemaVersion": 1 }))),
        (
            oci,
            manifest(b"{}", &[], &json!({ "manifests": [{ "mediaType": oci, "size": 1, "digest": other }] })),
        ),
        (oci, manifest(b"{}", &[], &json!({ "config": null }))),
        (oci, manifest(b"{}", &[], &json!({ "mediaType": "application/json" }))),
        (oci, b"{\"schemaVersion\":2,\"schemaVersion\":2}".to_vec()),
        (oci, b"[".repeat(100_000)),
    ] {
        let reply = client.send("PUT", "/v2/a/manifests/v1", &[("content-type", kind)], &bytes);
        let text = String::from_utf8_lossy(&bytes).chars().take(200).collect::<String>();
        assert_eq!(reply.expect(400).code(), "MANIFEST_INVALID", "{text}");
    }
    let large = manifest(b"{}", &[], &json!({ "annotations": { "x": "y".repeat(5 << 20) } }));
    let reply = client.send("PUT", "/v2/a/manifests/v1", &[("content-type", oci)], &large).expect(413);
    assert_eq!(reply.code(), "SIZE_INVALID");
    lab.client().get("/v2/a/tags/list").expect(404);
}

#[test]
fn a_blob_that_is_not_its_digest_is_refused_and_gone() {
    let lab = Lab::new();
    let mut client = lab.client();
    let other = Digest::of(b"other");
    let place = client.begin("a");
    let reply = client.send("PUT", &format!("{place}?digest={other}"), &[], BLOB).expect(400);
    assert_eq!(reply.code(), "DIGEST_INVALID");
    client.get(&place).expect(404);
    let path = format!("/v2/a/blobs/uploads/?digest={other}");
    assert_eq!(client.send("POST", &path, &[], BLOB).expect(400).code(), "DIGEST_INVALID");
    client.get(&format!("/v2/a/blobs/{other}")).expect(404);
    let place = client.begin("a");
    assert_eq!(client.send("PUT", &place, &[], BLOB).expect(400).code(), "DIGEST_INVALID");
    client.send("DELETE", &place, &[], b"").expect(204);
    assert_eq!((files(&lab.at("uploads")), files(&lab.at("blobs"))), (Vec::new(), Vec::new()));
}
