//! How it starts and how it ends.

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt;
use std::sync::mpsc;

use kiln_oci::Digest;
use rustix::process::Signal;

use super::super::server::HTPASSWD;
use super::client::Client;
use super::{Own, refused, write};
use crate::harness::text;

#[test]
fn one_command_is_a_registry_and_says_where() {
    let own = Own::start();
    assert_eq!(
        own.said,
        format!("registry at http://{}, in {}\n", own.address, own.at("").display()).replace("/\n", "\n")
    );
    own.client().get("/v2/").expect(200);
    let metrics = String::from_utf8(own.client().get("/metrics").expect(200).body).unwrap();
    assert!(metrics.contains("route=\"base\",status=\"200\"} 1\n"), "{metrics}");
    // A second one on the same directory, or on the same port.
    let dir = own.at("");
    refused(&["--dir", text(&dir), "--listen", "127.0.0.1:0"], 6).says(&["another process", "--dir"]);
    let other = tempfile::tempdir().unwrap();
    let address = own.address.to_string();
    refused(&["--dir", text(other.path()), "--listen", &address], 5).says(&[&address, "hint: `--listen"]);
    own.signal(Signal::INT);
    assert_eq!(own.wait().0.code(), Some(0));
}

#[test]
fn what_makes_no_sense_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str, content: &str| write(dir.path(), name, content);
    refused(&["--listen", "0.0.0.0:0"], 2).says(&["without a password", "--anyone"]);
    let passwords = at("htpasswd", HTPASSWD);
    refused(&["--listen", "0.0.0.0:0", "--htpasswd", &passwords], 2).says(&["--tls-cert"]);
    refused(&["--htpasswd", "/no/such"], 4).says(&["/no/such", "No such file"]);
    let sha = at("sha", "user:{SHA}x\n");
    refused(&["--htpasswd", &sha], 2).says(&["line 1", "htpasswd -B"]);
    let pem = at("pem", "nothing\n");
    refused(&["--tls-cert", &pem, "--tls-key", &pem], 4).says(&["no certificates as PEM"]);
    refused(&["--tls-cert", &pem], 2).says(&["--tls-key"]);
    let config = at("config.toml", "listen = \"127.0.0.1:0\"\nlisen = 1\n");
    refused(&["--config", &config], 2).says(&["config.toml", "line 2"]);
    at("photo", "");
    refused(&["--dir", text(dir.path()), "--listen", "127.0.0.1:0"], 6)
        .says(&["not the directory of a registry"]);
}

#[test]
fn a_push_under_way_is_taken_before_it_ends() {
    let own = Own::start();
    let mut client = own.client();
    let bytes = vec![5; 100_000];
    let digest = Digest::of(&bytes);
    client.head("POST", &format!("/v2/a/blobs/uploads/?digest={digest}"), &[], Some(bytes.len()));
    client.raw().write_all(&bytes[..50_000]).unwrap();
    // It has begun to read: the upload is there.
    while std::fs::read_dir(own.at("uploads")).unwrap().next().is_none() {}
    let idle = own.client();
    own.signal(Signal::TERM);
    while TcpStream::connect(own.address).is_ok() {}
    client.raw().write_all(&bytes[50_000..]).unwrap();
    client.read(false).expect(201);
    drop(idle);
    let (status, dir) = own.wait();
    assert_eq!(status.code(), Some(0));
    let own = Own::on(dir, &[]);
    own.client().get(&format!("/v2/a/blobs/{digest}")).expect(200);
}

/// What a tag leads to is there with all that it needs.
#[track_caller]
fn check(client: &mut Client, name: &str, tag: &str) {
    let manifest = client.get(&format!("/v2/{name}/manifests/{tag}")).expect(200);
    let digest = manifest.header("docker-content-digest").unwrap().to_owned();
    assert_eq!(Digest::of(&manifest.body).to_string(), digest);
    let manifest = manifest.json();
    let blobs = manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"]]);
    for blob in blobs {
        let expected = blob["digest"].as_str().unwrap();
        let bytes = client.get(&format!("/v2/{name}/blobs/{expected}")).expect(200).body;
        assert_eq!(Digest::of(&bytes).to_string(), expected);
    }
}

#[test]
fn killed_in_the_middle_nothing_is_half_there_and_what_was_promised_is() {
    let rounds = std::env::var("KILN_REGISTRY_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(3);
    let mut dir = tempfile::tempdir().unwrap();
    let mut promised: Vec<String> = Vec::new();
    let mut place = None;
    for round in 0..rounds {
        let own = Own::on(dir, &[]);
        let mut client = own.client();
        if place.is_none() {
            let begun = client.begin("r0");
            client.send("PATCH", &begun, &[], b"half of ").expect(202);
            place = Some(begun);
        }
        let (say, said) = mpsc::channel::<String>();
        let pushers: Vec<_> = (0..4)
            .map(|number| {
                let (say, address) = (say.clone(), own.address);
                std::thread::spawn(move || {
                    // Ends by a panic of the client when the registry is gone.
                    let mut client = Client::new(address);
                    for count in 0.. {
                        let tag = format!("t{round}-{number}-{count}");
                        client.push_image("r0", &tag, &format!("{tag} {}", "x".repeat(200_000)));
                        if say.send(tag).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        drop(say);
        // Another moment each time, while four of them push.
        promised.extend(said.iter().take(5 + 3 * round));
        own.signal(Signal::KILL);
        promised.extend(said.iter());
        for pusher in pushers {
            assert!(pusher.join().is_err(), "nothing but the end of the registry ends them");
        }
        let (status, left) = own.wait();
        assert_eq!(status.signal(), Some(9));
        dir = left;
    }
    let own = Own::on(dir, &[]);
    let mut client = own.client();
    let list = client.get("/v2/r0/tags/list").expect(200).json();
    let tags: Vec<String> = serde_json::from_value(list["tags"].clone()).unwrap();
    for tag in &promised {
        assert!(tags.contains(tag), "{tag} was promised");
    }
    for tag in &tags {
        check(&mut client, "r0", tag);
    }
    // The upload of before the first kill goes on.
    let place = place.unwrap();
    assert_eq!(client.get(&place).expect(204).header("range"), Some("0-7"));
    let digest = Digest::of(b"half of it");
    client.send("PUT", &format!("{place}?digest={digest}"), &[], b"it").expect(201);
    assert_eq!(client.get(&format!("/v2/r0/blobs/{digest}")).expect(200).body, b"half of it");
}
