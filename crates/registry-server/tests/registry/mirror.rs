//! A mirror has what another registry has.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use kiln_oci::Digest;
use kiln_registry::{Client, NoCredentials, Settings};
use kiln_registry_server::MirrorOf;

use crate::lab::{Lab, files};

fn mirror(behind: &Lab, tag_life: Duration) -> Lab {
    mirror_of(behind.address, tag_life)
}

fn mirror_of(behind: SocketAddr, tag_life: Duration) -> Lab {
    let settings = Settings {
        tries: 2,
        first_pause: Duration::from_millis(1),
        insecure: BTreeSet::new(),
        cert_dirs: Vec::new(),
        ..Settings::default()
    };
    let client = Client::new(settings, Arc::new(NoCredentials));
    let domain = behind.to_string();
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

/// A registry that gives these bytes for every blob; ours would not.
fn liar(bytes: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, bytes) = (BufReader::new(stream.unwrap()), bytes.clone());
            std::thread::spawn(move || {
                let mut head = Vec::new();
                let mut line = String::new();
                while stream.read_line(&mut line).is_ok_and(|read| read > 0) {
                    if !line.trim().is_empty() {
                        head.push(std::mem::take(&mut line));
                        continue;
                    }
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", bytes.len());
                    let is_head = head.first().is_some_and(|line| line.starts_with("HEAD"));
                    let body = if is_head { &[][..] } else { &bytes };
                    if stream.get_mut().write_all(&[answer.as_bytes(), body].concat()).is_err() {
                        return;
                    }
                    head.clear();
                    line.clear();
                }
            });
        }
    });
    address
}

#[test]
fn a_blob_that_is_another_one_is_never_given_whole_nor_kept() {
    let digest = Digest::of(&vec![1; 300_000]);
    let lab = mirror_of(liar(vec![2; 300_000]), Duration::ZERO);
    let mut client = lab.client();
    client.head("GET", &format!("/v2/a/blobs/{digest}"), &[], None);
    assert!(client.try_read(false).is_none(), "less than the blob comes, and the connection ends");
    assert_eq!((files(&lab.at("blobs")), files(&lab.at("uploads"))), (Vec::new(), Vec::new()));
}

#[test]
fn a_blob_that_rots_here_is_fetched_again() {
    let behind = Lab::new();
    let bytes = vec![1; 300_000];
    let digest = behind.client().push_blob("a", &bytes);
    let lab = mirror(&behind, Duration::ZERO);
    let path = format!("/v2/a/blobs/{digest}");
    assert!(lab.client().get(&path).expect(200).body == bytes);
    let hex = digest.hex();
    let file = lab.at(&format!("blobs/sha256/{}/{hex}", &hex[..2]));
    std::fs::write(&file, vec![2; 300_000]).unwrap();
    assert!(lab.client().get(&path).expect(200).body == bytes);
    assert!(std::fs::read(&file).unwrap() == bytes);
}
