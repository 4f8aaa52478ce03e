//! Who may do what.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_oci::Digest;
use kiln_registry_server::Rule;

use crate::client::Client;
use crate::lab::{Lab, beside};

/// bcrypt of `right-horse`.
const HASH: &str = "$2b$04$om4aILnRDyIuTYtbc2RffejFJCYYpvVe9w3cNIv8pY1PXJ5jh3Qc6";

fn rule(repositories: &str, users: &str, allow: &str) -> Rule {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    Rule::parse(&words(repositories), &words(users), &words(allow)).unwrap()
}

fn guarded(rights: Vec<Rule>) -> Lab {
    Lab::with(|settings| {
        let path = beside(settings, "htpasswd");
        std::fs::write(&path, format!("ann:{HASH}\nbob:{HASH}\n")).unwrap();
        settings.accounts = Some(path);
        settings.rights = rights;
    })
}

fn login(lab: &Lab, account: &str) -> Client {
    Client::with_authorization(lab.address, &format!("Basic {}", STANDARD.encode(account)))
}

#[test]
fn nobody_does_anything_without_a_password() {
    let lab = guarded(Vec::new());
    for path in ["/v2/", "/v2/_catalog", "/metrics", "/v2/a/tags/list"] {
        let reply = lab.client().get(path).expect(401);
        assert_eq!(reply.code(), "UNAUTHORIZED");
        assert_eq!(reply.header("www-authenticate"), Some("Basic realm=\"kiln\""));
        login(&lab, "ann:wrong").get(path).expect(401);
        login(&lab, "eve:right-horse").get(path).expect(401);
    }
    let mut ann = login(&lab, "ann:right-horse");
    ann.get("/v2/").expect(200);
    ann.push_image("a", "v1", "x");
    login(&lab, "bob:right-horse").get("/v2/a/manifests/v1").expect(200);
    let metrics = String::from_utf8(ann.get("/metrics").expect(200).body).unwrap();
    assert!(metrics.contains("kiln_registry_refused_logins_total 8\n"), "{metrics}");
    let line = "kiln_registry_requests_total{method=\"PUT\",route=\"manifest\",status=\"201\"} 1\n";
    assert!(metrics.contains(line), "{metrics}");
}

#[test]
fn rights_are_per_repository() {
    let lab = guarded(vec![
        rule("public/*", "anonymous", "pull"),
        rule("public/* ann/*", "ann", "pull push delete"),
        rule("bob/*", "bob", "pull push"),
    ]);
    let (mut ann, mut bob) = (login(&lab, "ann:right-horse"), login(&lab, "bob:right-horse"));
    ann.push_image("public/app", "v1", "x");
    ann.push_image("ann/app", "v1", "secret");
    let secret = Digest::of(b"layer of secret");
    lab.client().get("/v2/public/app/manifests/v1").expect(200);
    lab.client().get("/v2/ann/app/manifests/v1").expect(401);
    bob.get("/v2/public/app/manifests/v1").expect(200);
    assert_eq!(bob.get("/v2/ann/app/manifests/v1").expect(403).code(), "DENIED");
    bob.get("/v2/ann/app/tags/list").expect(403);
    bob.get(&format!("/v2/ann/app/blobs/{secret}")).expect(403);
    bob.send("POST", "/v2/public/app/blobs/uploads/", &[], b"").expect(403);
    bob.send("DELETE", "/v2/public/app/manifests/v1", &[], b"").expect(403);
    lab.client().send("POST", "/v2/public/app/blobs/uploads/", &[], b"").expect(401);
    // A mount is a read: what he may not read becomes an upload, and its digest opens nothing.
    let path = format!("/v2/bob/app/blobs/uploads/?mount={secret}&from=ann%2Fapp");
    bob.send("POST", &path, &[], b"").expect(202);
    bob.get(&format!("/v2/bob/app/blobs/{secret}")).expect(404);
    ann.send("POST", &path, &[], b"").expect(403);
    // Each sees the names of what is theirs to read.
    let names =
        |client: &mut Client| client.get("/v2/_catalog").expect(200).json()["repositories"].to_string();
    assert_eq!(names(&mut ann), "[\"ann/app\",\"public/app\"]");
    assert_eq!(names(&mut bob), "[\"public/app\"]");
    // bob may push, not delete.
    bob.push_image("bob/app", "v1", "y");
    bob.send("DELETE", "/v2/bob/app/manifests/v1", &[], b"").expect(403);
}

#[test]
fn nobody_goes_on_with_somebody_elses_upload() {
    let lab = guarded(Vec::new());
    let (mut ann, mut bob) = (login(&lab, "ann:right-horse"), login(&lab, "bob:right-horse"));
    let place = ann.begin("a");
    for method in ["GET", "PATCH", "PUT", "DELETE"] {
        let path = format!("{place}?digest={}", Digest::of(b"x"));
        assert_eq!(bob.send(method, &path, &[], b"x").expect(404).code(), "BLOB_UPLOAD_UNKNOWN", "{method}");
    }
    // Nor with one's own in another repository.
    ann.get(&place.replace("/v2/a/", "/v2/b/")).expect(404);
    ann.send("PUT", &format!("{place}?digest={}", Digest::of(b"y")), &[], b"y").expect(201);
}

#[test]
fn rights_and_accounts_change_while_clients_are_connected() {
    let lab = guarded(vec![rule("a", "ann", "pull push")]);
    let (mut ann, mut bob) = (login(&lab, "ann:right-horse"), login(&lab, "bob:right-horse"));
    ann.push_image("a", "v1", "x");
    bob.get("/v2/a/manifests/v1").expect(403);
    lab.control.set_rights(vec![rule("a", "bob", "pull")]);
    bob.get("/v2/a/manifests/v1").expect(200);
    ann.get("/v2/a/manifests/v1").expect(403);
    // Nobody at all, by a file that is whole; then one that is not.
    let path = lab.at("").with_file_name("htpasswd");
    std::fs::write(&path, format!("ann:{HASH}\n")).unwrap();
    bob.get("/v2/a/manifests/v1").expect(401);
    std::fs::write(&path, "bob:").unwrap();
    lab.control.look_at_files();
    let said = lab.said.lock().unwrap().concat();
    assert!(said.contains("the accounts from before stay in use") && said.contains("line 1"), "{said}");
    bob.get("/v2/a/manifests/v1").expect(401);
    ann.get("/v2/a/manifests/v1").expect(403);
}
