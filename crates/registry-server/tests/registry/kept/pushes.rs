//! What is pushed goes to who keeps the images, and is given back as it came while its name leads there.

use std::sync::Arc;
use std::time::Duration;

use kiln_oci::Digest;
use kiln_registry_server::{Collection, Limits, follow_offline};
use serde_json::{Value, json};

use super::lab::{Keeper, Lab, files};
use crate::client::{Client, manifest};

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
    let lab = Lab::with(|settings| settings.collection.grace = Duration::ZERO);
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
fn what_may_wait_for_long_waits_without_a_server_too() {
    let lab = Lab::with(|settings| settings.collection.grace = Duration::from_secs(3600));
    lab.client().push_blob("a", b"for a manifest to come");
    let (place, dir) = (lab.at(""), lab.dir());
    drop(lab);
    let collected = follow_offline(&place, Arc::new(Keeper::of(&dir)), &AT_ONCE).unwrap().unwrap();
    assert_eq!(collected.blobs, 0);
}

#[test]
fn so_much_waits_for_its_manifest_and_no_more() {
    let limits = || Limits { waiting_bytes: Some(100_000), ..Limits::default() };
    let lab = Lab::with(|settings| settings.limits = limits());
    let mut client = lab.client();
    let large = "x".repeat(60_000);
    let layer = client.push_blob("a", large.as_bytes());
    let path = |digest: &Digest| format!("/v2/a/blobs/uploads/?digest={digest}");
    let other = "y".repeat(60_000);
    let digest = Digest::of(other.as_bytes());
    let reply = client.send("POST", &path(&digest), &[], other.as_bytes()).expect(429);
    assert_eq!((reply.code(), reply.header("retry-after")), ("TOOMANYREQUESTS".to_owned(), Some("60")));
    let huge = "z".repeat(100_001);
    client.send("POST", &path(&Digest::of(huge.as_bytes())), &[], huge.as_bytes()).expect(413);
    // What is begun counts, too; also for who comes after a restart.
    let place = client.begin("a");
    client.send("PATCH", &place, &[], &other.as_bytes()[..30_000]).expect(202);
    let dir = lab.dir();
    drop((client, lab));
    let lab = Lab::on(dir, |settings| settings.limits = limits());
    let mut client = lab.client();
    client
        .send("POST", &path(&Digest::of(&huge.as_bytes()[..20_000])), &[], &huge.as_bytes()[..20_000])
        .expect(429);
    // What a manifest needs does not wait.
    client.push_blob("a", b"{}");
    let manifest = manifest(b"{}", &[large.as_bytes()], &Value::Null);
    let needing = client.push_manifest("a", "v1", &manifest);
    client.send("PATCH", &place, &[], &other.as_bytes()[30_000..]).expect(202);
    client.send("PUT", &format!("{place}?digest={digest}"), &[], b"").expect(201);
    client.get(&format!("/v2/a/blobs/{layer}")).expect(200);
    // It does again when the manifest is gone: 60,000 bytes of either.
    let small = |client: &mut Client| {
        let bytes = b"one more";
        client.send("POST", &path(&Digest::of(bytes)), &[], bytes).status
    };
    assert_eq!(small(&mut client), 201);
    client.send("DELETE", &format!("/v2/a/manifests/{needing}"), &[], b"").expect(202);
    assert_eq!(small(&mut client), 429);
}

#[test]
fn many_small_files_and_manifests_that_nothing_leads_to_are_bounded_too() {
    let lab = Lab::with(|settings| {
        settings.limits = Limits { waiting_bytes: Some(50_000), ..Limits::default() };
    });
    let mut client = lab.client();
    client.push_blob("a", b"{}");
    let of = |number: u32| manifest(b"{}", &[], &json!({ "annotations": { "number": number.to_string() } }));
    let put = |client: &mut Client, which: &str, bytes: &[u8]| {
        client.send("PUT", &format!("/v2/a/manifests/{which}"), &[("content-type", OCI)], bytes).status
    };
    let mut taken = 0;
    while put(&mut client, &Digest::of(&of(taken)).to_string(), &of(taken)) == 201 {
        taken += 1;
        assert!(taken < 50, "each takes a block of the disk");
    }
    assert!(taken > 5);
    // With a tag they do not wait, so this goes on.
    assert_eq!(put(&mut client, "first", &of(0)), 201);
    assert_eq!(put(&mut client, &Digest::of(&of(taken)).to_string(), &of(taken)), 201);
    let mut small = |byte: u8| {
        let path = format!("/v2/a/blobs/uploads/?digest={}", Digest::of(&[byte]));
        client.send("POST", &path, &[], &[byte]).status
    };
    assert_eq!((0..50).map(&mut small).find(|status| *status != 201), Some(429));
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
    // Others come between the two.
    keeper.be_slow("take", Duration::from_millis(5));
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

const A_MOMENT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_millis(600);
const OLD_ONLY: Collection = Collection { every: None, grace: Duration::from_secs(3600), untagged: true };

#[test]
fn what_is_pushed_while_another_manifest_is_deleted_stays() {
    let lab = Lab::new();
    let keeper = Keeper::of(&lab.dir());
    let (digest, _) = lab.client().push_image("a", "v1", "one");
    keeper.be_slow("forget", LONG);
    let mut client = lab.client();
    let path = format!("/v2/a/manifests/{digest}");
    let deleting = std::thread::spawn(move || client.send("DELETE", &path, &[], b"").status);
    std::thread::sleep(A_MOMENT);
    let (_, bytes) = lab.client().push_image("a", "v1", "two");
    assert_eq!(deleting.join().unwrap(), 202);
    assert_eq!(lab.client().get("/v2/a/manifests/v1").expect(200).body, bytes);
    assert_eq!(keeper.config("a", "v1"), Some(config("two")));
    lab.client().get(&format!("/v2/a/manifests/{digest}")).expect(404);
}

#[test]
fn a_manifest_that_is_needed_is_not_deleted_by_halves() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, _) = client.push_image("a", "first", "one");
    client.push_image("a", "needed", "one");
    let path = format!("/v2/a/manifests/{digest}");
    assert_eq!(client.send("DELETE", &path, &[], b"").expect(409).code(), "DENIED");
    for tag in ["first", "needed"] {
        client.get(&format!("/v2/a/manifests/{tag}")).expect(200);
    }
}

#[test]
fn what_is_pushed_again_while_lost_names_are_followed_stays() {
    let lab = Lab::new();
    let keeper = Keeper::of(&lab.dir());
    let (_, bytes) = lab.client().push_image("a", "v1", "one");
    std::fs::remove_file(lab.dir().path().join("names/a:v1")).unwrap();
    keeper.be_slow("image", LONG);
    let control = lab.control.clone();
    let following = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(control.collect(&OLD_ONLY)).unwrap();
    });
    std::thread::sleep(A_MOMENT);
    lab.client().push_manifest("a", "v1", &bytes);
    following.join().unwrap();
    keeper.be_slow("image", Duration::ZERO);
    assert_eq!(lab.client().get("/v2/a/manifests/v1").expect(200).body, bytes);
    // While it is being pushed nobody decides, and nobody waits.
    std::fs::remove_file(lab.dir().path().join("names/a:v1")).unwrap();
    keeper.be_slow("before", LONG);
    let mut client = lab.client();
    let again = bytes.clone();
    let pushing = std::thread::spawn(move || client.push_manifest("a", "v1", &again));
    std::thread::sleep(A_MOMENT);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(lab.control.collect(&OLD_ONLY)).unwrap();
    pushing.join().unwrap();
    assert_eq!(lab.client().get("/v2/a/manifests/v1").expect(200).body, bytes);
}

#[test]
fn an_index_of_what_nobody_has_is_refused_at_its_first_child() {
    let lab = Lab::new();
    let keeper = Keeper::of(&lab.dir());
    let mut client = lab.client();
    let kind = "application/vnd.oci.image.index.v1+json";
    let mut put = |count: u32, which: &str| {
        let child =
            |number: u32| json!({ "mediaType": OCI, "digest": Digest::of(&number.to_le_bytes()), "size": 4 });
        let children: Vec<Value> = (0..count).map(child).collect();
        let index = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": children }).to_string();
        let which =
            if which.is_empty() { Digest::of(index.as_bytes()).to_string() } else { which.to_owned() };
        let path = format!("/v2/a/manifests/{which}");
        client.send("PUT", &path, &[("content-type", kind)], index.as_bytes()).expect(400).code()
    };
    for which in ["", "v1"] {
        assert_eq!(put(1000, which), "MANIFEST_BLOB_UNKNOWN");
        assert_eq!(put(20_000, which), "MANIFEST_INVALID");
    }
    assert_eq!(keeper.asked(), 2);
}

#[test]
fn an_index_that_leads_to_too_many_manifests_gets_no_tag() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.push_blob("a", b"{}");
    let kind = "application/vnd.oci.image.index.v1+json";
    let listing = |of: &[(Digest, usize, &str)]| {
        let of = of
            .iter()
            .map(|(digest, size, kind)| json!({ "mediaType": kind, "digest": digest, "size": size }));
        let of: Vec<Value> = of.collect();
        json!({ "schemaVersion": 2, "mediaType": kind, "manifests": of }).to_string().into_bytes()
    };
    let mut indexes = Vec::new();
    for half in 0..2 {
        let children: Vec<_> = (0..500)
            .map(|number| {
                let more = json!({ "annotations": { "number": format!("{half} {number}") } });
                let child = manifest(b"{}", &[], &more);
                (client.push_manifest("a", "", &child), child.len(), OCI)
            })
            .collect();
        let index = listing(&children);
        indexes.push((client.push_manifest("a", &format!("half{half}"), &index), index.len(), kind));
    }
    let whole = listing(&indexes);
    let reply = client.send("PUT", "/v2/a/manifests/whole", &[("content-type", kind)], &whole).expect(400);
    assert_eq!(reply.code(), "MANIFEST_INVALID");
    client.get("/v2/a/manifests/whole").expect(404);
    client.get("/v2/a/manifests/half1").expect(200);
}

/// Changes a byte of a blob, as disks do.
fn rot(lab: &crate::lab::Lab, digest: &Digest) {
    let hex = digest.hex();
    let path = lab.at("blobs/sha256").join(&hex[..2]).join(&hex);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[0] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn a_damaged_blob_is_not_mounted_and_a_push_mends_it() {
    let lab = Lab::new();
    let mut client = lab.client();
    let digest = client.push_blob("a", b"a layer");
    let mount = format!("/v2/b/blobs/uploads/?mount={digest}&from=a");
    client.send("POST", &mount, &[], b"").expect(201);
    rot(&lab, &digest);
    for name in ["b", "c"] {
        let mount = format!("/v2/{name}/blobs/uploads/?mount={digest}&from=a");
        let begun = client.send("POST", &mount, &[], b"").expect(202);
        let place = begun.header("location").unwrap();
        if name == "c" {
            client.send("PUT", &format!("{place}?digest={digest}"), &[], b"a layer").expect(201);
        }
    }
    for name in ["a", "b", "c"] {
        assert_eq!(client.get(&format!("/v2/{name}/blobs/{digest}")).expect(200).body, b"a layer");
    }
    client.send("POST", &mount, &[], b"").expect(201);
}

#[test]
fn a_damaged_manifest_takes_nothing_else_down() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, bytes) = client.push_image("a", "bad", "one");
    client.push_image("a", "good", "two");
    client.push_image("b", "good", "three");
    let place = lab.at("repositories/a/_manifests").join(digest.hex());
    std::fs::write(&place, b"text/plain\nsomething else").unwrap();
    // What was known before a restart is not any more.
    let dir = lab.dir();
    drop((client, lab));
    let lab = Lab::on(dir, |_| {});
    let mut client = lab.client();
    client.get("/v2/a/manifests/bad").expect(404);
    client.get("/v2/a/manifests/good").expect(200);
    client.get("/v2/a/tags/list").expect(200);
    client.get("/v2/_catalog").expect(200);
    assert!(lab.said.lock().unwrap().iter().any(|said| said.contains("damaged")));
    client.push_manifest("a", "bad", &bytes);
    assert_eq!(client.get("/v2/a/manifests/bad").expect(200).body, bytes);
}

#[test]
fn who_only_reads_sees_what_is_pushed_later() {
    let reader = Lab::with(|settings| settings.read_only = true);
    reader.client().get("/v2/a/manifests/v1").expect(404);
    assert!(!reader.at("").exists());
    let lab = Lab::on(reader.dir(), |_| {});
    let (digest, bytes) = lab.client().push_image("a", "v1", "one");
    let mut client = reader.client();
    assert_eq!(client.get("/v2/a/manifests/v1").expect(200).body, bytes);
    client.get(&format!("/v2/a/manifests/{digest}")).expect(200);
    client.get(&format!("/v2/a/blobs/{}", Digest::of(b"layer of one"))).expect(200);
    client.send("DELETE", "/v2/a/manifests/v1", &[], b"").expect(405);
}

#[test]
fn who_collects_for_a_moment_does_not_keep_a_registry_from_starting() {
    let lab = Lab::new();
    let dir = lab.dir();
    let ending = std::thread::spawn(move || {
        std::thread::sleep(LONG);
        drop(lab);
    });
    Lab::on(dir, |_| {}).client().get("/v2/").expect(200);
    ending.join().unwrap();
}

#[test]
fn manifests_that_wait_for_their_turn_are_bounded() {
    let lab = Lab::new();
    Keeper::of(&lab.dir()).be_slow("before", Duration::from_secs(3));
    lab.client().push_blob("a", b"{}");
    let large = "x".repeat(3_900_000);
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let pushing: Vec<_> = (0..8)
            .map(|number| {
                let more = json!({ "annotations": { "large": large, "number": number.to_string() } });
                let (mut client, bytes) = (lab.client(), manifest(b"{}", &[], &more));
                scope.spawn(move || {
                    client.send("PUT", "/v2/a/manifests/v1", &[("content-type", OCI)], &bytes).status
                })
            })
            .collect();
        pushing.into_iter().map(|pushing| pushing.join().unwrap()).collect()
    });
    assert!(statuses.contains(&201) && statuses.contains(&429), "{statuses:?}");
    // Not with the one from before, which has been silent for long.
    lab.client().get("/v2/a/manifests/v1").expect(200);
}
