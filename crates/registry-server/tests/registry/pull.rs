//! Pull.

use kiln_oci::Digest;

use super::lab::Lab;

const NONE: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const OCI: &str = "application/vnd.oci.image.manifest.v1+json";

#[test]
fn head_request_to_nonexistent_blob_should_result_in_404_response() {
    let lab = Lab::new();
    lab.client().send("HEAD", &format!("/v2/a/blobs/{NONE}"), &[], b"").expect(404);
}

#[test]
fn head_request_to_existing_blob_should_yield_200() {
    let lab = Lab::new();
    let mut client = lab.client();
    let digest = client.push_blob("a/b", b"some bytes");
    let reply = client.send("HEAD", &format!("/v2/a/b/blobs/{digest}"), &[], b"").expect(200);
    assert_eq!(reply.header("docker-content-digest"), Some(digest.to_string().as_str()));
    assert_eq!(reply.header("content-length"), Some("10"));
    assert_eq!(reply.header("accept-ranges"), Some("bytes"));
}

#[test]
fn get_nonexistent_blob_should_result_in_404_response() {
    let lab = Lab::new();
    let reply = lab.client().get(&format!("/v2/a/blobs/{NONE}")).expect(404);
    assert_eq!(reply.code(), "BLOB_UNKNOWN");
}

#[test]
fn get_request_to_existing_blob_url_should_yield_200() {
    let lab = Lab::new();
    let mut client = lab.client();
    // More than one piece of a file.
    let bytes: Vec<u8> = (0..700_000u32).flat_map(u32::to_le_bytes).collect();
    for bytes in [bytes.as_slice(), b""] {
        let digest = client.push_blob("a", bytes);
        let reply = client.get(&format!("/v2/a/blobs/{digest}")).expect(200);
        assert_eq!(Digest::of(&reply.body), digest);
        assert_eq!(reply.header("content-length"), Some(bytes.len().to_string().as_str()));
    }
}

#[test]
fn parts_of_a_blob_are_given_as_they_are_asked_for() {
    let lab = Lab::new();
    let mut client = lab.client();
    let digest = client.push_blob("a", b"0123456789");
    let path = format!("/v2/a/blobs/{digest}");
    for (range, status, body, said) in [
        ("bytes=2-4", 206, "234", "bytes 2-4/10"),
        ("bytes=7-", 206, "789", "bytes 7-9/10"),
        ("bytes=-2", 206, "89", "bytes 8-9/10"),
        ("bytes=9-99", 206, "9", "bytes 9-9/10"),
        ("bytes=0-1,3-4", 200, "0123456789", ""),
        ("nonsense", 200, "0123456789", ""),
    ] {
        let reply = client.send("GET", &path, &[("range", range)], b"").expect(status);
        assert_eq!(
            (String::from_utf8_lossy(&reply.body).as_ref(), reply.header("content-range").unwrap_or("")),
            (body, said)
        );
    }
    let reply = client.send("GET", &path, &[("range", "bytes=10-")], b"").expect(416);
    assert_eq!(reply.header("content-range"), Some("bytes */10"));
    let tag = client.get(&path).header("etag").unwrap().to_owned();
    client.send("GET", &path, &[("range", "bytes=2-4"), ("if-range", &tag)], b"").expect(206);
    client.send("GET", &path, &[("range", "bytes=2-4"), ("if-range", "\"other\"")], b"").expect(200);
    let head = client.send("HEAD", &path, &[("range", "bytes=2-4")], b"").expect(206);
    assert_eq!(head.header("content-length"), Some("3"));
}

#[test]
fn what_the_client_has_is_not_sent_again() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, _) = client.push_image("a", "v1", "x");
    let blob = client.push_blob("a", b"blob");
    for path in
        ["/v2/a/manifests/v1".to_owned(), format!("/v2/a/manifests/{digest}"), format!("/v2/a/blobs/{blob}")]
    {
        let tag = client.get(&path).expect(200).header("etag").unwrap().to_owned();
        let same = client.send("GET", &path, &[("if-none-match", &tag)], b"").expect(304);
        assert!(same.body.is_empty() && same.header("etag") == Some(&tag));
        client.send("GET", &path, &[("if-none-match", &format!("\"x\", {tag}"))], b"").expect(304);
        client.send("GET", &path, &[("if-none-match", "\"x\"")], b"").expect(200);
    }
}

#[test]
fn head_request_to_nonexistent_manifest_should_return_404() {
    let lab = Lab::new();
    for which in ["undefined", NONE] {
        lab.client().send("HEAD", &format!("/v2/a/manifests/{which}"), &[], b"").expect(404);
    }
}

#[test]
fn head_request_to_manifest_path_digest_should_yield_200_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, manifest) = client.push_image("a", "v1", "x");
    let reply = client.send("HEAD", &format!("/v2/a/manifests/{digest}"), &[], b"").expect(200);
    assert_eq!(reply.header("docker-content-digest"), Some(digest.to_string().as_str()));
    assert_eq!(reply.header("content-length"), Some(manifest.len().to_string().as_str()));
    assert_eq!(reply.header("content-type"), Some(OCI));
}

#[test]
fn head_request_to_manifest_path_tag_should_yield_200_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, _) = client.push_image("a", "v1", "x");
    let reply = client.send("HEAD", "/v2/a/manifests/v1", &[], b"").expect(200);
    assert_eq!(reply.header("docker-content-digest"), Some(digest.to_string().as_str()));
}

#[test]
fn get_nonexistent_manifest_should_return_404() {
    let lab = Lab::new();
    assert_eq!(lab.client().get(&format!("/v2/a/manifests/{NONE}")).expect(404).code(), "MANIFEST_UNKNOWN");
}

#[test]
fn get_request_to_manifest_path_digest_should_yield_200_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, manifest) = client.push_image("a", "v1", "x");
    let reply = client.get(&format!("/v2/a/manifests/{digest}")).expect(200);
    assert_eq!((reply.body.as_slice(), reply.header("content-type")), (manifest.as_slice(), Some(OCI)));
    // A digest opens nothing in another repository.
    client.get(&format!("/v2/b/manifests/{digest}")).expect(404);
}

#[test]
fn get_request_to_manifest_path_tag_should_yield_200_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (_, first) = client.push_image("a", "v1", "x");
    assert_eq!(client.get("/v2/a/manifests/v1").expect(200).body, first);
    let (_, second) = client.push_image("a", "v1", "y");
    assert_eq!(client.get("/v2/a/manifests/v1").expect(200).body, second);
}

#[test]
fn error_400_response_body_should_contain_oci_conforming_json_message() {
    let lab = Lab::new();
    let mut client = lab.client();
    let kind = [("content-type", OCI)];
    let reply = client.send("PUT", "/v2/a/manifests/v1", &kind, b"blablabla").expect(400);
    assert_eq!(reply.code(), "MANIFEST_INVALID");
    assert_eq!(reply.header("content-type"), Some("application/json"));
    let reply = client.send("PUT", "/v2/UPPER/manifests/v1", &kind, b"{}").expect(400);
    assert_eq!(reply.code(), "NAME_INVALID");
}

#[test]
fn end_1_says_that_this_is_a_registry() {
    let lab = Lab::new();
    let reply = lab.client().get("/v2/").expect(200);
    assert_eq!(reply.header("docker-distribution-api-version"), Some("registry/2.0"));
    lab.client().send("HEAD", "/v2/", &[], b"").expect(200);
    assert_eq!(lab.client().get("/v1/").expect(404).code(), "UNSUPPORTED");
    lab.client().send("BREW", "/v2/", &[], b"").expect(405);
}

#[test]
fn a_blob_that_the_disk_has_damaged_is_not_given_out_and_comes_again_with_a_push() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.push_image("a", "v1", "x");
    let bytes = b"layer of x";
    let digest = Digest::of(bytes);
    let path = format!("/v2/a/blobs/{digest}");
    assert_eq!(client.get(&path).expect(200).body, bytes);
    let file = lab.at(&format!("blobs/sha256/{}/{}", &digest.hex()[..2], digest.hex()));
    let flip = || {
        let mut damaged = std::fs::read(&file).unwrap();
        damaged[3] ^= 1;
        std::fs::write(&file, damaged).unwrap();
    };
    flip();
    assert_eq!(client.get(&path).expect(404).code(), "BLOB_UNKNOWN");
    // Not in parts, and nobody is told that it need not be sent.
    client.send("GET", &path, &[("range", "bytes=5-7")], b"").expect(404);
    client.send("HEAD", &path, &[], b"").expect(404);
    let said = lab.said.lock().unwrap().clone();
    assert!(said.len() == 1 && said[0].contains(&digest.to_string()), "{said:?}");
    client.push_image("a", "v1", "x");
    assert_eq!(client.get(&path).expect(200).body, bytes);
    // A process that has never seen it whole.
    flip();
    let dir = lab.dir();
    drop((client, lab));
    let lab = Lab::on(dir, |_| {});
    lab.client().get(&path).expect(404);
    lab.client().get("/v2/a/manifests/v1").expect(200);
}
