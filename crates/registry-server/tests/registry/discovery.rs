//! Content discovery.

use kiln_oci::Digest;
use serde_json::{Value, json};

use super::lab::Lab;
use crate::client::{Client, manifest};

#[track_caller]
fn tags(client: &mut Client, query: &str) -> (Vec<String>, Option<String>) {
    let reply = client.get(&format!("/v2/a/tags/list{query}")).expect(200);
    let list = reply.json();
    assert_eq!(list["name"], "a");
    let tags = list["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap().to_owned());
    (tags.collect(), reply.header("link").map(str::to_owned))
}

#[test]
fn get_request_to_list_tags_should_yield_200_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    assert_eq!(client.get("/v2/a/tags/list").expect(404).code(), "NAME_UNKNOWN");
    for tag in ["v2", "V3", "v10", "latest"] {
        client.push_image("a", tag, "x");
    }
    assert_eq!(tags(&mut client, ""), (["V3", "latest", "v10", "v2"].map(str::to_owned).to_vec(), None));
}

#[test]
fn get_number_of_tags_should_be_limitable_by_n_query_parameter() {
    let lab = Lab::new();
    let mut client = lab.client();
    for tag in ["a", "b", "c", "d", "e"] {
        client.push_image("a", tag, "x");
    }
    let (first, link) = tags(&mut client, "?n=2");
    assert_eq!(
        (first.as_slice(), link.as_deref()),
        (["a".to_owned(), "b".to_owned()].as_slice(), Some("</v2/a/tags/list?last=b&n=2>; rel=\"next\""))
    );
    assert_eq!(tags(&mut client, "?n=0"), (Vec::new(), None));
    assert_eq!(tags(&mut client, "?n=5").1, None);
    let reply = client.get("/v2/a/tags/list?n=-1").expect(400);
    assert_eq!(reply.code(), "PAGINATION_NUMBER_INVALID");
}

#[test]
fn get_start_of_tag_is_set_by_last_query_parameter() {
    let lab = Lab::new();
    let mut client = lab.client();
    for tag in ["a", "b", "c", "d", "e"] {
        client.push_image("a", tag, "x");
    }
    let (mut seen, mut query) = (Vec::new(), "?n=2".to_owned());
    loop {
        let (page, link) = tags(&mut client, &query);
        seen.extend(page);
        let Some(link) = link else { break };
        query = link[link.find('?').unwrap()..link.find('>').unwrap()].to_owned();
    }
    assert_eq!(seen.concat(), "abcde");
    assert_eq!(tags(&mut client, "?last=bb").0, ["c", "d", "e"]);
    assert_eq!(tags(&mut client, "?last=z").0, [""; 0]);
}

#[test]
fn the_catalog_has_what_has_a_manifest() {
    let lab = Lab::new();
    let mut client = lab.client();
    assert_eq!(client.get("/v2/_catalog").expect(200).json(), json!({ "repositories": [] }));
    for name in ["b", "a/b/c", "a"] {
        client.push_image(name, "v1", "x");
    }
    client.push_blob("only/blobs", b"x");
    let all = client.get("/v2/_catalog").expect(200).json();
    assert_eq!(all, json!({ "repositories": ["a", "a/b/c", "b"] }));
    let page = client.get("/v2/_catalog?n=1&last=a").expect(200);
    assert_eq!(page.json(), json!({ "repositories": ["a/b/c"] }));
    assert_eq!(page.header("link"), Some("</v2/_catalog?last=a%2Fb%2Fc&n=1>; rel=\"next\""));
}

#[track_caller]
fn referrers(client: &mut Client, subject: &Digest, query: &str) -> (Vec<Value>, Option<String>) {
    let reply = client.get(&format!("/v2/a/referrers/{subject}{query}")).expect(200);
    let index = "application/vnd.oci.image.index.v1+json";
    assert_eq!(reply.header("content-type"), Some(index));
    let list = reply.json();
    assert_eq!((list["mediaType"].as_str(), list["schemaVersion"].as_u64()), (Some(index), Some(2)));
    let all = list["manifests"].as_array().unwrap().clone();
    (all, reply.header("oci-filters-applied").map(str::to_owned))
}

fn descriptor(bytes: &[u8]) -> Value {
    let kind = "application/vnd.oci.image.manifest.v1+json";
    json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() })
}

#[test]
fn get_request_to_nonexistent_blob_should_result_in_empty_200_response() {
    let lab = Lab::new();
    assert_eq!(referrers(&mut lab.client(), &Digest::of(b"none"), ""), (Vec::new(), None));
    lab.client().get("/v2/a/referrers/sha256:12").expect(400);
}

#[test]
fn get_request_to_existing_blob_should_yield_200_and_its_referrers() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (subject, image) = client.push_image("a", "v1", "x");
    let subject_of = descriptor(&image);
    client.push_blob("a", b"{}");
    let artifact = |kind: Option<&str>, note: &str| {
        let mut more = json!({ "subject": subject_of, "annotations": { "note": note } });
        if let Some(kind) = kind {
            more["artifactType"] = kind.into();
        }
        manifest(b"{}", &[], &more)
    };
    let (one, two) = (artifact(Some("application/x.sbom"), "one"), artifact(None, "two"));
    let kind = [("content-type", "application/vnd.oci.image.manifest.v1+json")];
    for bytes in [&one, &two] {
        let path = format!("/v2/a/manifests/{}", Digest::of(bytes));
        let reply = client.send("PUT", &path, &kind, bytes).expect(201);
        assert_eq!(reply.header("oci-subject"), Some(subject.to_string().as_str()));
    }
    let (all, filters) = referrers(&mut client, &subject, "");
    assert_eq!((all.len(), filters), (2, None));
    let with_kind = |kind: &str| all.iter().find(|it| it["artifactType"] == kind).cloned();
    let found = with_kind("application/x.sbom").unwrap();
    assert_eq!((&found["annotations"]["note"], &found["digest"]), (&json!("one"), &json!(Digest::of(&one))));
    // Without a kind of its own it has that of its config.
    let found = with_kind("application/vnd.oci.image.config.v1+json").unwrap();
    assert_eq!(found["size"], json!(two.len()));

    // GET request to existing blob with filter should yield 200.
    let (some, filters) = referrers(&mut client, &subject, "?artifactType=application%2Fx.sbom");
    assert_eq!((some.len(), filters.as_deref()), (1, Some("artifactType")));
    let (none, filters) = referrers(&mut client, &subject, "?artifactType=x");
    assert_eq!((none.len(), filters.as_deref()), (0, Some("artifactType")));

    // What is deleted refers to nothing any more.
    client.send("DELETE", &format!("/v2/a/manifests/{}", Digest::of(&one)), &[], b"").expect(202);
    assert_eq!(referrers(&mut client, &subject, "").0.len(), 1);
}

#[test]
fn registry_should_accept_a_manifest_whose_subject_is_not_there() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.push_blob("a", b"{}");
    let bytes = manifest(b"{}", &[], &json!({ "subject": descriptor(b"later") }));
    client.push_manifest("a", "", &bytes);
    assert_eq!(referrers(&mut client, &Digest::of(b"later"), "").0.len(), 1);
}

#[test]
fn referrers_that_are_too_many_for_one_answer_come_page_by_page() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.push_blob("a", b"{}");
    let long = "x".repeat(400 << 10);
    for number in 0..5 {
        let more = json!({ "subject": descriptor(b"s"), "annotations": { "n": format!("{number}{long}") } });
        client.push_manifest("a", "", &manifest(b"{}", &[], &more));
    }
    let (mut seen, mut path) = (0, format!("/v2/a/referrers/{}", Digest::of(b"s")));
    let mut pages = 0;
    loop {
        let reply = client.get(&path).expect(200);
        assert!(reply.body.len() < 3 << 20);
        seen += reply.json()["manifests"].as_array().unwrap().len();
        pages += 1;
        let Some(link) = reply.header("link") else { break };
        path = link[1..link.find('>').unwrap()].to_owned();
    }
    assert_eq!((seen, pages), (5, 2));
}

#[test]
fn whatever_can_be_got_has_a_head() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, _) = client.push_image("a", "v1", "x");
    let blob = Digest::of(b"layer of x");
    for path in [
        "/v2/".to_owned(),
        "/v2/_catalog".to_owned(),
        "/v2/a/tags/list".to_owned(),
        "/v2/a/tags/list?n=1".to_owned(),
        "/v2/a/manifests/v1".to_owned(),
        format!("/v2/a/manifests/{digest}"),
        format!("/v2/a/blobs/{blob}"),
        format!("/v2/a/referrers/{digest}"),
        format!("/v2/a/referrers/{digest}?artifactType=x"),
        // What is not there, too.
        "/v2/none/tags/list".to_owned(),
        "/v2/a/manifests/none".to_owned(),
    ] {
        let whole = client.get(&path);
        let head = client.send("HEAD", &path, &[], b"").expect(whole.status);
        assert!(head.body.is_empty(), "{path}");
        for name in ["content-length", "content-type", "docker-content-digest", "oci-filters-applied", "link"]
        {
            assert_eq!(head.header(name), whole.header(name), "{name} of {path}");
        }
    }
}
