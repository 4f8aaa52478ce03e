//! A mirror has what another registry has.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kiln_oci::Digest;
use kiln_registry::{Client, NoCredentials, Settings};
use kiln_registry_server::MirrorOf;

use crate::lab::{Lab, files};

fn mirror(behind: &Lab, tag_life: Duration) -> Lab {
    let settings = Settings {
        tries: 2,
        first_pause: Duration::from_millis(1),
        insecure: BTreeSet::new(),
        cert_dirs: Vec::new(),
        ..Settings::default()
    };
    let client = Client::new(settings, Arc::new(NoCredentials));
    let domain = behind.address.to_string();
    Lab::with(|settings| settings.mirror = Some(MirrorOf { client, domain, tag_life }))
}

#[test]
fn what_is_not_there_is_fetched_once_and_stays() {
    let mut behind = Lab::new();
    let (digest, bytes) = behind.client().push_image("library/app", "v1", "x");
    let large: Vec<u8> = (0..500_000u32).flat_map(u32::to_le_bytes).collect();
    let blob = behind.client().push_blob("library/app", &large);
    let lab = mirror(&behind, Duration::from_secs(3600));
    let mut client = lab.client();
    assert_eq!(client.get("/v2/library/app/manifests/v1").expect(200).body, bytes);
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let mut client = lab.client();
            std::thread::spawn(move || client.get(&format!("/v2/library/app/blobs/{blob}")).expect(200).body)
        })
        .collect();
    for reader in readers {
        assert_eq!(Digest::of(&reader.join().unwrap()), blob);
    }
    client.get("/v2/library/app/manifests/none").expect(404);
    client.get(&format!("/v2/library/app/blobs/{}", Digest::of(b"none"))).expect(404);
    client.send("POST", "/v2/library/app/blobs/uploads/", &[], b"").expect(405);
    behind.tell();
    behind.wait();
    assert_eq!(client.get(&format!("/v2/library/app/manifests/{digest}")).expect(200).body, bytes);
    client.get("/v2/library/app/manifests/v1").expect(200);
    let part = [("range", "bytes=4-7")];
    let part = client.send("GET", &format!("/v2/library/app/blobs/{blob}"), &part, b"").expect(206);
    assert_eq!(part.body, 1u32.to_le_bytes());
    client.get("/v2/library/app/manifests/other").expect(502);
}

#[test]
fn a_tag_is_looked_up_again_and_the_old_one_is_good_when_nobody_answers() {
    let mut behind = Lab::new();
    let (_, old) = behind.client().push_image("a", "v1", "old");
    let lab = mirror(&behind, Duration::ZERO);
    let mut client = lab.client();
    assert_eq!(client.get("/v2/a/manifests/v1").expect(200).body, old);
    let (_, new) = behind.client().push_image("a", "v1", "new");
    assert_eq!(client.get("/v2/a/manifests/v1").expect(200).body, new);
    behind.tell();
    behind.wait();
    assert_eq!(client.get("/v2/a/manifests/v1").expect(200).body, new);
}

#[test]
fn a_blob_that_is_another_one_is_never_given_whole_nor_kept() {
    let behind = Lab::new();
    let bytes = vec![1; 300_000];
    let digest = behind.client().push_blob("a", &bytes);
    let hex = digest.hex();
    let path = behind.at(&format!("blobs/sha256/{}/{hex}", &hex[..2]));
    std::fs::write(&path, vec![2; 300_000]).unwrap();
    let lab = mirror(&behind, Duration::ZERO);
    let mut client = lab.client();
    client.head("GET", &format!("/v2/a/blobs/{digest}"), &[], None);
    assert!(client.try_read(false).is_none(), "less than the blob comes, and the connection ends");
    assert_eq!((files(&lab.at("blobs")), files(&lab.at("uploads"))), (Vec::new(), Vec::new()));
}
