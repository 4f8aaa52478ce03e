//! What is damaged, what is garbage and what waits, where images are pushed to who keeps them.

use std::time::{Duration, Instant};

use kiln_oci::Digest;
use kiln_registry_server::{Collected, Collection, Limits};
use serde_json::{Value, json};

use super::lab::{Keeper, Lab};
use crate::client::{Client, manifest};

const OCI: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const AT_ONCE: Collection = Collection { every: None, grace: Duration::ZERO, untagged: true };

fn collect(lab: &crate::lab::Lab) -> Collected {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(lab.control.collect(&AT_ONCE)).unwrap()
}

/// Pushes two images without a tag; an index of them, and their digests.
fn index_of_two(client: &mut Client) -> (String, [Digest; 2]) {
    let pushed = ["one", "two"].map(|content| client.push_image("a", "", content));
    let child = |(digest, bytes): &(Digest, Vec<u8>)| json!({ "mediaType": OCI, "digest": digest, "size": bytes.len() });
    let children: Vec<Value> = pushed.iter().map(child).collect();
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": children }).to_string();
    (index, pushed.map(|(digest, _)| digest))
}

#[test]
fn what_is_being_unpacked_is_no_garbage_however_long_that_takes() {
    let lab = Lab::new();
    let keeper = Keeper::of(&lab.dir());
    let mut client = lab.client();
    let (index, children) = index_of_two(&mut client);
    keeper.be_slow("before", Duration::from_secs(2));
    let (mut pusher, bytes) = (lab.client(), index.clone());
    let pushing = std::thread::spawn(move || pusher.push_manifest("a", "v1", bytes.as_bytes()));
    let path = format!("/v2/a/manifests/{}", Digest::of(index.as_bytes()));
    let deadline = Instant::now() + Duration::from_secs(30);
    while client.send("HEAD", &path, &[], b"").status != 200 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    let collected = collect(&lab);
    assert_eq!((collected.manifests, collected.blobs), (0, 0));
    pushing.join().unwrap();
    client.get("/v2/a/manifests/v1").expect(200);
    for (digest, content) in children.iter().zip(["one", "two"]) {
        client.get(&format!("/v2/a/manifests/{digest}")).expect(200);
        client
            .get(&format!("/v2/a/blobs/{}", Digest::of(format!("layer of {content}").as_bytes())))
            .expect(200);
    }
}

#[test]
fn a_damaged_manifest_is_as_good_as_not_there_and_a_push_mends_it() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (index, [bad, good]) = index_of_two(&mut client);
    let put = |client: &mut Client| {
        client.send("PUT", "/v2/a/manifests/v1", &[("content-type", INDEX)], index.as_bytes())
    };
    put(&mut client).expect(201);
    let subject = json!({ "subject": { "mediaType": OCI, "digest": good, "size": 1 } });
    let signatures = [&b"{}"[..], b"{\"b\":1}"].map(|config| {
        client.push_blob("a", config);
        client.push_manifest("a", "", &manifest(config, &[], &subject))
    });
    client.push_image("b", "v1", "three");
    client.push_blob("b", b"never needed");
    let place = |digest: &Digest| lab.at("repositories/a/_manifests").join(digest.hex());
    let was = std::fs::read(place(&bad)).unwrap();
    for digest in [&bad, &signatures[0]] {
        std::fs::write(place(digest), b"text/plain\nsomething else").unwrap();
    }
    client.get(&format!("/v2/a/manifests/{bad}")).expect(404);
    client.get(&format!("/v2/a/manifests/{good}")).expect(200);
    let list = client.get(&format!("/v2/a/referrers/{good}")).expect(200).json();
    let listed: Vec<&Value> = list["manifests"].as_array().unwrap().iter().map(|it| &it["digest"]).collect();
    assert_eq!(listed, [&json!(signatures[1])]);
    assert_eq!(put(&mut client).expect(400).code(), "MANIFEST_BLOB_UNKNOWN");
    // Nobody knows what it needed, and others are collected nevertheless.
    let collected = collect(&lab);
    assert_eq!((collected.manifests, collected.blobs, collected.damaged), (0, 1, 1));
    assert!(lab.said.lock().unwrap().iter().any(|said| said.contains("took nothing from")));
    let start = was.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    assert_eq!(client.push_manifest("a", "", &was[start..]), bad);
    put(&mut client).expect(201);
    client.get(&format!("/v2/a/manifests/{bad}")).expect(200);
}

#[test]
fn only_what_a_tag_leads_to_waits_for_nothing() {
    let limits = || Limits { waiting_bytes: Some(100_000), ..Limits::default() };
    let lab = Lab::with(|settings| settings.limits = limits());
    let mut client = lab.client();
    let large = "x".repeat(60_000);
    let fits = |client: &mut Client| {
        let other = "y".repeat(60_000);
        let path = format!("/v2/c/blobs/uploads/?digest={}", Digest::of(other.as_bytes()));
        let status = client.send("POST", &path, &[], other.as_bytes()).status;
        if status == 201 {
            // It waits itself now.
            assert_eq!(collect_all(&lab).blobs, 1);
        }
        status
    };
    client.push_blob("a", large.as_bytes());
    client.push_blob("a", b"{}");
    let needs = manifest(b"{}", &[large.as_bytes()], &Value::Null);
    let digest = client.push_manifest("a", "", &needs);
    assert_eq!(fits(&mut client), 429);
    let child = json!({ "mediaType": OCI, "digest": digest, "size": needs.len() });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [child] }).to_string();
    let index = client.push_manifest("a", "many", index.as_bytes());
    assert_eq!(fits(&mut client), 201);
    // Another repository has it as well: it does not wait when this one lets it go.
    for bytes in [large.as_bytes(), b"{}"] {
        let mount = format!("/v2/b/blobs/uploads/?mount={}&from=a", Digest::of(bytes));
        client.send("POST", &mount, &[], b"").expect(201);
    }
    client.push_manifest("b", "v1", &needs);
    for gone in [index, digest] {
        client.send("DELETE", &format!("/v2/a/manifests/{gone}"), &[], b"").expect(202);
    }
    assert_eq!(fits(&mut client), 201);
    // Also for who comes after a restart.
    let dir = lab.dir();
    drop((client, lab));
    let lab = Lab::on(dir, |settings| settings.limits = limits());
    let mut client = lab.client();
    let huge = "z".repeat(90_000);
    let path = format!("/v2/c/blobs/uploads/?digest={}", Digest::of(huge.as_bytes()));
    client.send("POST", &path, &[], huge.as_bytes()).expect(201);
}

fn collect_all(lab: &crate::lab::Lab) -> Collected {
    // What was shared a moment ago is not older than nothing yet.
    std::thread::sleep(Duration::from_millis(20));
    collect(lab)
}
