//! Content management.

use super::lab::{Lab, files};

#[test]
fn delete_request_to_manifest_tag_should_return_202() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, _) = client.push_image("a", "v1", "x");
    client.push_image("a", "v2", "x");
    client.send("DELETE", "/v2/a/manifests/v1", &[], b"").expect(202);
    client.get("/v2/a/manifests/v1").expect(404);
    // The tag alone.
    client.get("/v2/a/manifests/v2").expect(200);
    client.get(&format!("/v2/a/manifests/{digest}")).expect(200);
    let again = client.send("DELETE", "/v2/a/manifests/v1", &[], b"").expect(404);
    assert_eq!(again.code(), "MANIFEST_UNKNOWN");
}

#[test]
fn delete_request_to_manifest_digest_should_yield_202_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, _) = client.push_image("a", "v1", "x");
    client.push_image("a", "v2", "x");
    client.push_image("a", "other", "y");
    client.send("DELETE", &format!("/v2/a/manifests/{digest}"), &[], b"").expect(202);
    // GET request to deleted manifest URL should yield 404 response, unless delete is disallowed.
    client.get(&format!("/v2/a/manifests/{digest}")).expect(404);
    // GET request to tags list should reflect manifest deletion.
    assert_eq!(client.get("/v2/a/tags/list").expect(200).json()["tags"], serde_json::json!(["other"]));
    client.send("DELETE", &format!("/v2/a/manifests/{digest}"), &[], b"").expect(404);
}

#[test]
fn a_registry_for_pulling_changes_nothing() {
    let lab = Lab::new();
    let (digest, bytes) = lab.client().push_image("a", "v1", "x");
    let dir = lab.dir();
    drop(lab);
    let lab = Lab::on(dir, |settings| settings.read_only = true);
    let before = files(&lab.at(""));
    let mut client = lab.client();
    assert_eq!(client.get("/v2/a/manifests/v1").expect(200).body, bytes);
    let kind = [("content-type", "application/vnd.oci.image.manifest.v1+json")];
    for (method, path) in [
        ("POST", "/v2/a/blobs/uploads/".to_owned()),
        ("PUT", "/v2/a/manifests/v2".to_owned()),
        ("DELETE", format!("/v2/a/manifests/{digest}")),
        ("DELETE", format!("/v2/a/blobs/{digest}")),
    ] {
        assert_eq!(client.send(method, &path, &kind, &bytes).expect(405).code(), "UNSUPPORTED");
    }
    assert_eq!(files(&lab.at("")), before);
}
