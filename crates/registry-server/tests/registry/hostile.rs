//! Clients that mean no good.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use kiln_oci::Digest;

use crate::lab::{Lab, files};

/// Waits until the other side has ended the connection; what it said.
#[track_caller]
fn until_end(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
    String::from_utf8_lossy(&said).into_owned()
}

#[test]
fn paths_lead_to_nothing_but_what_they_name() {
    let lab = Lab::new();
    std::fs::create_dir_all(lab.at("blobs")).unwrap();
    std::fs::write(lab.at("blobs/secret"), "secret").unwrap();
    let before = files(&lab.at(""));
    for path in [
        "/v2/../../../etc/passwd",
        "/v2/a/manifests/..%2f..%2f..%2fformat",
        "/v2/a/manifests/../../format",
        "/v2/%2e%2e/%2e%2e/blobs/manifests/secret",
        "/v2/a/blobs/../../secret",
        "/v2/a/blobs/sha256:..%2f..%2fsecret",
        "/v2/a/blobs/uploads/..",
        "/v2/a/blobs/uploads/..%2f..%2fformat",
        "/v2/_blobs/tags/list",
        "/v2/a/_tags/manifests/x",
        "/v2/a%00b/tags/list",
        "/v2/a/tags/list/..",
        "//v2/",
    ] {
        let mut client = lab.client();
        for method in ["GET", "PUT", "POST", "PATCH", "DELETE"] {
            let reply = client.send(method, path, &[], b"x");
            assert!((400..500).contains(&reply.status), "{method} {path}: {}", reply.status);
        }
    }
    assert_eq!(files(&lab.at("")), before);
}

#[test]
fn heads_without_measure_are_cut_off() {
    let lab = Lab::new();
    let mut client = lab.client();
    let line = format!("x-filler: {}\r\n", "y".repeat(4000));
    let mut head = b"GET /v2/ HTTP/1.1\r\nhost: x\r\n".to_vec();
    for _ in 0..100 {
        head.extend_from_slice(line.as_bytes());
    }
    let _ = client.raw().write_all(&head);
    let said = until_end(client.raw());
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
    let mut client = lab.client();
    let many = "a: b\r\n".repeat(200);
    let _ = client.raw().write_all(format!("GET /v2/ HTTP/1.1\r\nhost: x\r\n{many}\r\n").as_bytes());
    let said = until_end(client.raw());
    assert!(said.starts_with("HTTP/1.1 431"), "{said}");
    lab.client().get("/v2/").expect(200);
}

#[test]
fn nobody_is_waited_for_who_asks_nothing() {
    let lab = Lab::with(|settings| settings.limits.head = Duration::from_millis(300));
    // Before a request, and after one.
    until_end(lab.client().raw());
    let mut client = lab.client();
    client.head("GET", "/v2/", &[], None);
    let said = until_end(client.raw());
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 200"), "{said}");
    // Half a head.
    let mut client = lab.client();
    let _ = client.raw().write_all(b"GET /v2/ HTTP/1.1\r\nhost: x\r\n");
    until_end(client.raw());
}

#[test]
fn whoever_is_too_slow_is_not_waited_for() {
    let lab = Lab::with(|settings| settings.limits.stall = Duration::from_secs(1));
    // Half a body.
    let mut client = lab.client();
    let place = lab.client().begin("a");
    client.head("PATCH", &place, &[], Some(1000));
    client.raw().write_all(b"some").unwrap();
    let said = until_end(client.raw());
    assert!(said.starts_with("HTTP/1.1 408"), "{said}");
    // What came stays, for whoever has a better line.
    assert_eq!(lab.client().get(&place).expect(204).header("range"), Some("0-3"));
    // Somebody who asks and does not read: more than all buffers hold.
    let bytes = vec![7; 64 << 20];
    let digest = lab.client().push_blob("a", &bytes);
    let mut client = lab.client();
    client.head("GET", &format!("/v2/a/blobs/{digest}"), &[], None);
    let stalled = || {
        let metrics = lab.client().get("/metrics").expect(200).body;
        String::from_utf8(metrics).unwrap().contains("stalled_connections_total 1\n")
    };
    let begun = std::time::Instant::now();
    while !stalled() {
        assert!(begun.elapsed() < Duration::from_secs(50), "it still waits");
    }
    assert!(until_end(client.raw()).len() < bytes.len());
}

#[test]
fn connections_and_uploads_have_a_number() {
    let lab = Lab::with(|settings| {
        settings.limits.uploads = 2;
        settings.limits.connections = 2;
    });
    let (mut one, mut two) = (lab.client(), lab.client());
    let place = one.begin("a");
    one.begin("a");
    let reply = two.send("POST", "/v2/a/blobs/uploads/", &[], b"").expect(429);
    assert_eq!((reply.code().as_str(), reply.header("retry-after")), ("TOOMANYREQUESTS", Some("10")));
    two.send("DELETE", &place, &[], b"").expect(204);
    two.begin("a");
    // A third waits until one ends.
    let mut three = lab.client();
    three.head("GET", "/v2/", &[], None);
    two.get("/v2/").expect(200);
    drop(one);
    three.read(false).expect(200);
}

#[test]
fn blobs_have_a_size() {
    let lab = Lab::with(|settings| settings.limits.blob_bytes = 1000);
    let mut client = lab.client();
    let place = client.begin("a");
    client.send("PATCH", &place, &[], &[0; 900]).expect(202);
    assert_eq!(client.send("PATCH", &place, &[], &[0; 101]).expect(413).code(), "SIZE_INVALID");
    assert_eq!(client.get(&place).expect(204).header("range"), Some("0-899"));
    let digest = Digest::of(&[0; 2_000_000]);
    let path = format!("/v2/a/blobs/uploads/?digest={digest}");
    client.send("POST", &path, &[], &[0; 2_000_000]).expect(413);
    assert_eq!(files(&lab.at("uploads")).len(), 2, "one upload: its bytes and whose it is");
}

#[test]
fn damage_is_not_given_out() {
    let lab = Lab::new();
    let mut client = lab.client();
    let (digest, bytes) = client.push_image("a", "v1", "x");
    let path = lab.at(&format!("repositories/a/_manifests/{}", digest.hex()));
    let text = String::from_utf8(std::fs::read(&path).unwrap()).unwrap();
    std::fs::write(&path, text.replace("amd64", "arm64").replace("gzip", "zstd")).unwrap();
    let reply = client.get("/v2/a/manifests/v1").expect(500);
    assert!(!String::from_utf8_lossy(&reply.body).contains(lab.at("").to_str().unwrap()));
    // Whoever has it mends it.
    client.push_manifest("a", "v1", &bytes);
    client.get("/v2/a/manifests/v1").expect(200);
}

#[test]
fn a_directory_that_is_something_else_or_anothers_is_left_alone() {
    use kiln_registry_server::{DirectoryError, Server, StartError};
    let lab = Lab::new();
    let start = |directory: std::path::PathBuf| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(Server::bind(crate::lab::settings(&directory))).err().unwrap()
    };
    assert!(matches!(start(lab.at("")), StartError::Directory(DirectoryError::Taken { .. })));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("photo"), "").unwrap();
    let error = start(dir.path().to_owned());
    assert!(error.to_string().contains("photo"), "{error}");
    std::fs::remove_file(dir.path().join("photo")).unwrap();
    std::fs::write(dir.path().join("format"), "kiln-registry 2\n").unwrap();
    assert!(matches!(start(dir.path().to_owned()), StartError::Directory(DirectoryError::Format { .. })));
    assert!(!dir.path().join("blobs").exists());
}
