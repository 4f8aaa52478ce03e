//! Garbage is collected, and nothing else, while others push.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kiln_oci::Digest;
use kiln_registry_server::{Collection, DirectoryError, Judged, Kind, Server, collect_offline};
use serde_json::json;
use tokio::runtime::Runtime;

use crate::client::{Client, manifest};
use crate::lab::{Lab, files, settings};

const AT_ONCE: Collection = Collection { every: None, grace: Duration::ZERO, untagged: true };

#[test]
fn delete_request_to_blob_url_should_yield_202_response() {
    let lab = Lab::new();
    let mut client = lab.client();
    let digest = client.push_blob("a", b"bytes");
    client.push_blob("b", b"bytes");
    let path = format!("/v2/a/blobs/{digest}");
    client.send("DELETE", &path, &[], b"").expect(202);
    // GET request to deleted blob URL should yield 404 response.
    assert_eq!(client.get(&path).expect(404).code(), "BLOB_UNKNOWN");
    client.send("DELETE", &path, &[], b"").expect(404);
    // Of the other repository it is still.
    client.get(&format!("/v2/b/blobs/{digest}")).expect(200);
}

#[test]
fn what_no_manifest_needs_goes_and_the_rest_stays() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.push_blob("a", b"nobody needs this");
    client.push_image("a", "kept", "kept");
    let (gone, _) = client.push_image("b", "gone", "gone");
    client.send("DELETE", &format!("/v2/b/manifests/{gone}"), &[], b"").expect(202);
    let upload = client.begin("c");
    client.send("PATCH", &upload, &[], b"half").expect(202);
    drop(client);
    let (early, dir) = lab.collect(&Collection { untagged: true, ..Collection::default() });
    assert_eq!(early, Default::default(), "all of that is younger than a day");
    let (collected, dir) = Lab::on(dir, |_| {}).collect(&AT_ONCE);
    assert_eq!((collected.manifests, collected.blobs), (0, 3));
    let lab = Lab::on(dir, |_| {});
    let mut client = lab.client();
    client.get("/v2/a/manifests/kept").expect(200);
    client.get(&format!("/v2/a/blobs/{}", Digest::of(b"layer of kept"))).expect(200);
    client.get(&format!("/v2/a/blobs/{}", Digest::of(b"nobody needs this"))).expect(404);
    assert_eq!(client.get(&upload).expect(204).header("range"), Some("0-3"));
    assert!(!lab.at("repositories/b").exists());
}

#[test]
fn untagged_manifests_go_unless_something_leads_to_them() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (one, image) = client.push_image("a", "one", "one");
    client.push_image("a", "moved", "old");
    client.push_image("a", "moved", "new");
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let subject = json!({ "mediaType": kind, "digest": one, "size": image.len() });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [subject],
    });
    client.push_manifest("a", "index", index.to_string().as_bytes());
    client.send("DELETE", "/v2/a/manifests/one", &[], b"").expect(202);
    client.push_blob("a", b"{}");
    let signature = client.push_manifest("a", "", &manifest(b"{}", &[], &json!({ "subject": subject })));
    drop(client);
    let kept = Collection { untagged: false, ..AT_ONCE };
    let (collected, dir) = lab.collect(&kept);
    assert_eq!((collected.manifests, collected.blobs), (0, 0));
    let (collected, dir) = Lab::on(dir, |_| {}).collect(&AT_ONCE);
    assert_eq!((collected.manifests, collected.blobs), (1, 2));
    let lab = Lab::on(dir, |_| {});
    let mut client = lab.client();
    for digest in [one, signature] {
        client.get(&format!("/v2/a/manifests/{digest}")).expect(200);
    }
    client.get("/v2/a/manifests/moved").expect(200);
}

#[test]
fn nothing_that_is_being_pushed_is_collected() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = Runtime::new().unwrap();
    let server = runtime.block_on(Server::bind(settings(&dir.path().join("registry")))).unwrap();
    let address = server.address();
    let control = server.control();
    let (end, stop) = tokio::sync::oneshot::channel::<()>();
    let run = runtime.spawn(server.run(async move { drop(stop.await) }, |_| {}));
    let done = Arc::new(AtomicBool::new(false));
    let stop = done.clone();
    // What a push has sent so far is a minute old at the most.
    let policy = Collection { grace: Duration::from_secs(60), ..AT_ONCE };
    let collecting = runtime.spawn(async move {
        let mut times = 0;
        while !stop.load(Ordering::Relaxed) {
            control.collect(&policy).await.unwrap();
            times += 1;
        }
        times
    });
    let pushers: Vec<_> = (0..4)
        .map(|number| {
            std::thread::spawn(move || {
                let mut client = Client::new(address);
                for round in 0..15 {
                    let name = format!("r{}", (number + round) % 3);
                    client.push_image(&name, &format!("t{number}-{round}"), &format!("{round}"));
                }
            })
        })
        .collect();
    for pusher in pushers {
        pusher.join().unwrap();
    }
    done.store(true, Ordering::Relaxed);
    assert!(runtime.block_on(collecting).unwrap() > 1);
    let mut client = Client::new(address);
    for number in 0..4 {
        for round in 0..15 {
            let name = format!("r{}", (number + round) % 3);
            client.get(&format!("/v2/{name}/manifests/t{number}-{round}")).expect(200);
            let layer = Digest::of(format!("layer of {round}").as_bytes());
            client.get(&format!("/v2/{name}/blobs/{layer}")).expect(200);
        }
    }
    drop(end);
    drop(client);
    runtime.block_on(run).unwrap();
}

#[test]
fn each_thing_is_told_with_a_reason_and_a_dry_run_changes_nothing() {
    let lab = Lab::new();
    let mut client = lab.client();
    client.push_image("a", "kept", "kept");
    let (old, _) = client.push_image("a", "moved", "old");
    client.push_image("a", "moved", "new");
    client.push_blob("b", b"nobody needs this");
    let collect = |dry_run, told: &mut Vec<Judged>| {
        collect_offline(&lab.at(""), &AT_ONCE, dry_run, &mut |judged| told.push(judged))
    };
    let (before, mut told) = (files(&lab.at("")), Vec::new());
    // Somebody serves it: one may look, not remove.
    let collected = collect(true, &mut told).unwrap();
    assert_eq!((collected.manifests, collected.blobs), (1, 3));
    assert!(matches!(collect(false, &mut Vec::new()), Err(DirectoryError::Taken { .. })));
    assert_eq!(files(&lab.at("")), before);
    let reason = |kind: Kind, repository: Option<&str>, digest: Digest| {
        let mut found = told.iter().filter(|judged| {
            judged.kind == kind && judged.repository.as_deref() == repository && judged.digest == digest
        });
        let judged = found.next().expect("everything is told");
        assert!(found.next().is_none(), "and once");
        (judged.removed, judged.reason)
    };
    assert_eq!(reason(Kind::Manifest, Some("a"), old), (true, "no tag, index or subject leads to it"));
    let layer = Digest::of(b"layer of old");
    assert_eq!(reason(Kind::Share, Some("a"), layer), (true, "no manifest of its repository needs it"));
    assert_eq!(reason(Kind::Blob, None, layer), (true, "no repository has it"));
    let kept = Digest::of(b"layer of kept");
    assert_eq!(reason(Kind::Share, Some("a"), kept), (false, "a manifest needs it"));
    assert_eq!(reason(Kind::Blob, None, kept), (false, "a repository has it"));
    let stray = Digest::of(b"nobody needs this");
    assert!(reason(Kind::Share, Some("b"), stray).0 && reason(Kind::Blob, None, stray).0);

    let (dir, root) = (lab.dir(), lab.at(""));
    drop(client);
    drop(lab);
    let mut really = Vec::new();
    let removed = collect_offline(&root, &AT_ONCE, false, &mut |judged| really.push(judged)).unwrap();
    assert_eq!((removed, &really), (collected, &told), "what was told before is what happens");
    let again = collect_offline(&root, &AT_ONCE, false, &mut |judged| assert!(!judged.removed)).unwrap();
    assert_eq!(again, Default::default());
    Lab::on(dir, |_| {}).client().get("/v2/a/manifests/moved").expect(200);
}

#[test]
fn what_is_no_registry_is_not_made_one() {
    let dir = tempfile::tempdir().unwrap();
    let collect = |dry_run| collect_offline(&dir.path().join("none"), &AT_ONCE, dry_run, &mut |_| {});
    assert!(matches!(collect(true), Err(DirectoryError::Missing { .. })));
    assert!(matches!(collect(false), Err(DirectoryError::Missing { .. })));
    assert!(!dir.path().join("none").exists());
}

#[test]
fn uploads_that_nobody_goes_on_with_end_by_themselves() {
    let lab = Lab::with(|settings| settings.limits.upload_life = Duration::from_secs(5));
    let mut client = lab.client();
    let place = client.begin("a");
    client.send("PATCH", &place, &[], b"half").expect(202);
    assert_eq!(files(&lab.at("uploads")).len(), 2);
    // Whoever asks how far it is does not go on with it.
    let begun = std::time::Instant::now();
    while client.get(&place).status == 204 {
        assert!(begun.elapsed() < Duration::from_secs(50), "it is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
    client.send("PATCH", &place, &[], b"more").expect(404);
    // It is counted when its files are gone, too.
    let metrics = || String::from_utf8(lab.client().get("/metrics").expect(200).body).unwrap();
    while !metrics().contains("kiln_registry_expired_uploads_total 1\n") {
        assert!(begun.elapsed() < Duration::from_secs(50), "it is not counted");
    }
    assert_eq!(files(&lab.at("uploads")), [""; 0]);
    assert!(metrics().contains("kiln_registry_uploads 0\n"));
}
