//! What is pushed goes to who keeps the images, and is given back as it came while its name leads there.

use std::sync::Arc;
use std::time::Duration;

use kiln_oci::Digest;
use kiln_registry_server::{Collection, Limits, follow_offline};
use serde_json::{Value, json};

use super::lab::{Keeper, Lab, files};
use crate::client::manifest;

const OCI: &str = "application/vnd.oci.image.manifest.v1+json";
const AT_ONCE: Collection = Collection { every: None, grace: Duration::ZERO, untagged: true };

fn config(content: &str) -> Digest {
    Digest::of(
        format!("{{\"architecture\":\"amd64\",\"os\":\"linux\",\"content\":\"{content}\"}}").as_bytes(),
    )
}

#[test]
fn a_tag_leads_to_what_was_pushed_while_its_name_leads_to_that_image() {
    let lab = Lab::new();
    let keeper = Keeper::of(&lab.dir());
    let mut client = lab.client();
    let (digest, bytes) = client.push_image("team/app", "v1", "one");
    assert_eq!(keeper.config("team/app", "v1"), Some(config("one")));
    assert_eq!(client.get("/v2/team/app/manifests/v1").expect(200).body, bytes);
    // Somebody builds another image of this name, and then this one has it again.
    keeper.name("team/app", "v1", &config("other"));
    client.get("/v2/team/app/manifests/v1").expect(404);
    keeper.name("team/app", "v1", &config("one"));
    assert_eq!(client.get("/v2/team/app/manifests/v1").expect(200).body, bytes);
    // Whoever gets the name by other means has not pushed anything under it.
    keeper.name("team/app", "v2", &config("one"));
    client.get("/v2/team/app/manifests/v2").expect(404);
    // What a tag does not lead to any more was deleted before.
    std::fs::remove_file(lab.dir().path().join("names/team@app:v1")).unwrap();
    client.send("DELETE", "/v2/team/app/manifests/v1", &[], b"").expect(404);
    keeper.name("team/app", "v1", &config("one"));
    let tags = client.get("/v2/team/app/tags/list").expect(200).json();
    assert_eq!(tags["tags"], json!(["v1", "v2"]));
    // By its digest nobody keeps it.
    client.push_blob("b", b"{}");
    client.push_manifest("b", "", &manifest(b"{}", &[], &Value::Null));
    assert_eq!(keeper.config("b", "latest"), None);
    client.get(&format!("/v2/team/app/manifests/{digest}")).expect(200);
}

#[test]
fn what_the_keeper_refuses_has_no_tag_and_the_one_before_stays() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (_, good) = client.push_image("a", "v1", "good");
    client.push_blob("a", b"{\"hostile\":true}");
    let bad = manifest(b"{\"hostile\":true}", &[b"layer of good"], &Value::Null);
    let reply = client.send("PUT", "/v2/a/manifests/v1", &[("content-type", OCI)], &bad).expect(400);
    assert_eq!(reply.code(), "MANIFEST_INVALID");
    assert!(String::from_utf8_lossy(&reply.body).contains("the layer leads outside"));
    assert_eq!(client.get("/v2/a/manifests/v1").expect(200).body, good);
    client.send("PUT", "/v2/a/manifests/v2", &[("content-type", OCI)], &bad).expect(400);
    client.get("/v2/a/manifests/v2").expect(404);
    // A size that is not the blob's.
    let text = String::from_utf8(good).unwrap().replace("\"size\":13", "\"size\":14");
    let reply =
        client.send("PUT", "/v2/a/manifests/v3", &[("content-type", OCI)], text.as_bytes()).expect(400);
    assert!(String::from_utf8_lossy(&reply.body).contains("13 bytes, not 14"), "{reply:?}");
}

#[test]
fn what_is_no_image_has_no_name_and_takes_none_away() {
    let lab = Lab::new();
    let keeper = Keeper::of(&lab.dir());
    let mut client = lab.client();
    client.push_image("a", "v1", "x");
    client.push_blob("a", b"{}");
    let chart = manifest(b"{}", &[], &json!({ "artifactType": "application/x.chart" }));
    client.push_manifest("a", "chart", &chart);
    assert_eq!(keeper.config("a", "chart"), None);
    assert_eq!(client.get("/v2/a/manifests/chart").expect(200).body, chart);
    let tags = client.get("/v2/a/tags/list").expect(200).json();
    assert_eq!(tags["tags"], json!(["chart", "v1"]));
    let reply = client.send("PUT", "/v2/a/manifests/v1", &[("content-type", OCI)], &chart).expect(409);
    assert_eq!(reply.code(), "DENIED");
    client.send("DELETE", "/v2/a/manifests/v1", &[], b"").expect(202);
    client.push_manifest("a", "v1", &chart);
    client.get("/v2/a/manifests/v1").expect(200);
    // An image of that name comes to be elsewhere: it is what the tag means.
    keeper.name("a", "chart", &config("x"));
    client.get("/v2/a/manifests/chart").expect(404);
}

#[test]
fn an_index_leads_to_the_image_of_one_of_its_children() {
    let lab = Lab::new();
    let keeper = Keeper::of(&lab.dir());
    let mut client = lab.client();
    let children: Vec<Value> = ["one", "two"]
        .map(|content| {
            let (digest, bytes) = client.push_image("a", "", content);
            json!({ "mediaType": OCI, "digest": digest, "size": bytes.len() })
        })
        .to_vec();
    assert_eq!(keeper.config("a", "many"), None);
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": children }).to_string();
    let digest = client.push_manifest("a", "many", index.as_bytes());
    assert_eq!(keeper.config("a", "many"), Some(config("one")));
    let reply = client.get("/v2/a/manifests/many").expect(200);
    assert_eq!((reply.header("content-type"), reply.body.as_slice()), (Some(kind), index.as_bytes()));
    // All of it goes with its name.
    client.send("DELETE", &format!("/v2/a/manifests/{digest}"), &[], b"").expect(202);
    assert_eq!(keeper.config("a", "many"), None);
    client.get("/v2/a/tags/list").expect(404);
}

#[test]
fn blobs_go_with_what_needs_them() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.push_image("a", "v1", "x");
    let path = format!("/v2/a/blobs/{}", Digest::of(b"layer of x"));
    assert_eq!(client.send("DELETE", &path, &[], b"").expect(405).code(), "UNSUPPORTED");
    client.get(&path).expect(200);
}

#[test]
fn what_has_lost_its_name_is_garbage() {
    let lab = Lab::new();
    let keeper = Keeper::of(&lab.dir());
    let mut client = lab.client();
    client.push_image("a", "v1", "x");
    let (_, kept) = client.push_image("a", "v2", "y");
    client.push_blob("a", b"never needed");
    drop(client);
    // While somebody serves it, it is his.
    let place = lab.at("");
    let keepers = || Arc::new(Keeper::of(&lab.dir()));
    assert_eq!(follow_offline(&place, keepers(), &AT_ONCE).unwrap(), None);
    std::fs::remove_file(lab.dir().path().join("names/a:v1")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let collected = runtime.block_on(lab.control.collect(&AT_ONCE)).unwrap();
    assert_eq!((collected.manifests, collected.blobs), (1, 3));
    assert_eq!(lab.client().get("/v2/a/manifests/v2").expect(200).body, kept);
    keeper.name("a", "v2", &config("z"));
    let dir = lab.dir();
    drop(lab);
    let images = || Arc::new(Keeper::of(&dir));
    let collected = follow_offline(&place, images(), &AT_ONCE).unwrap().unwrap();
    assert_eq!((collected.manifests, collected.blobs), (1, 2));
    assert_eq!(files(&place.join("blobs")), [""; 0]);
    let none = dir.path().join("none");
    assert_eq!(follow_offline(&none, images(), &AT_ONCE).unwrap(), None);
    assert!(!none.exists());
}

#[test]
fn so_much_waits_for_its_manifest_and_no_more() {
    let limits = || Limits { waiting_bytes: Some(1000), ..Limits::default() };
    let lab = Lab::with(|settings| settings.limits = limits());
    let mut client = lab.client();
    let large = "x".repeat(600);
    let layer = client.push_blob("a", large.as_bytes());
    let path = |digest: &Digest| format!("/v2/a/blobs/uploads/?digest={digest}");
    let other = "y".repeat(600);
    let digest = Digest::of(other.as_bytes());
    let reply = client.send("POST", &path(&digest), &[], other.as_bytes()).expect(429);
    assert_eq!((reply.code(), reply.header("retry-after")), ("TOOMANYREQUESTS".to_owned(), Some("60")));
    let huge = "z".repeat(1001);
    client.send("POST", &path(&Digest::of(huge.as_bytes())), &[], huge.as_bytes()).expect(413);
    // What is begun counts, too; also for who comes after a restart.
    let place = client.begin("a");
    client.send("PATCH", &place, &[], &other.as_bytes()[..300]).expect(202);
    let dir = lab.dir();
    drop((client, lab));
    let lab = Lab::on(dir, |settings| settings.limits = limits());
    let mut client = lab.client();
    client
        .send("POST", &path(&Digest::of(&huge.as_bytes()[..200])), &[], &huge.as_bytes()[..200])
        .expect(429);
    // What a manifest needs does not wait.
    client.push_blob("a", b"{}");
    client.push_manifest("a", "v1", &manifest(b"{}", &[large.as_bytes()], &Value::Null));
    client.send("PATCH", &place, &[], &other.as_bytes()[300..]).expect(202);
    client.send("PUT", &format!("{place}?digest={digest}"), &[], b"").expect(201);
    client.get(&format!("/v2/a/blobs/{layer}")).expect(200);
}

#[test]
fn what_the_keeper_has_need_not_be_sent() {
    let lab = Lab::new();
    let bytes = b"a layer that was never pushed";
    std::fs::write(lab.dir().path().join("shelf"), bytes).unwrap();
    let digest = Digest::of(bytes);
    let mut client = lab.client();
    client.send("HEAD", &format!("/v2/shelf/blobs/{digest}"), &[], b"").expect(200);
    client.push_blob("shelf", b"{}");
    client.push_manifest("shelf", "v1", &manifest(b"{}", &[bytes], &Value::Null));
    // It is this one's now.
    std::fs::remove_file(lab.dir().path().join("shelf")).unwrap();
    assert_eq!(client.get(&format!("/v2/shelf/blobs/{digest}")).expect(200).body, bytes);
    // From another repository.
    let other = b"another one";
    std::fs::write(lab.dir().path().join("shelf"), other).unwrap();
    let digest = Digest::of(other);
    client.send("POST", &format!("/v2/b/blobs/uploads/?mount={digest}&from=shelf"), &[], b"").expect(201);
    assert_eq!(client.get(&format!("/v2/b/blobs/{digest}")).expect(200).body, other);
    assert_eq!(files(&lab.at("uploads")), [""; 0]);
}

#[test]
fn name_and_tag_are_set_together_however_many_push() {
    let lab = Lab::new();
    let keeper = Keeper::of(&lab.dir());
    let clients: Vec<_> = (0..16)
        .map(|number| {
            let mut client = lab.client();
            std::thread::spawn(move || {
                for round in 0..8 {
                    client.push_image("a", "v1", &format!("{number} {round}"));
                    // Between name and tag nobody sees one without the other for long; never an error.
                    let reply = client.get("/v2/a/manifests/v1");
                    assert!(matches!(reply.status, 200 | 404), "{reply:?}");
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    let last = lab.client().get("/v2/a/manifests/v1").expect(200).json();
    let config = keeper.config("a", "v1").unwrap().to_string();
    assert_eq!(last["config"]["digest"], config.as_str());
}
