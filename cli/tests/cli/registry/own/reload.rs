//! Files that change while the registry runs.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use super::super::server::{HTPASSWD, make_certificates, needs_programs};
use super::client::Client;
use super::{Own, write};
use crate::harness::text;

/// A connection that speaks TLS, by way of openssl.
struct Secure(Child);

impl Secure {
    fn to(own: &Own) -> Self {
        let mut command = Command::new("openssl");
        command.args(["s_client", "-quiet", "-connect", &own.address.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        Self(command.spawn().expect("openssl starts"))
    }

    /// Asks, and waits for the answer.
    fn ask(&mut self) {
        let head = b"GET /v2/ HTTP/1.1\r\nhost: x\r\n\r\n";
        self.0.stdin.as_mut().expect("piped above").write_all(head).expect("it is connected");
        let (mut said, mut byte) = (Vec::new(), [0]);
        let stdout = self.0.stdout.as_mut().expect("piped above");
        while !said.ends_with(b"\r\n\r\n{}") {
            stdout.read_exact(&mut byte).expect("there is an answer");
            said.push(byte[0]);
        }
        assert!(said.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&said));
    }
}

impl Drop for Secure {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The certificate that a new connection is shown.
fn shown(own: &Own) -> String {
    let output = Command::new("openssl")
        .args(["s_client", "-connect", &own.address.to_string()])
        .stdin(Stdio::null())
        .output()
        .expect("openssl starts");
    pem(&String::from_utf8_lossy(&output.stdout)).expect("a certificate is shown")
}

fn pem(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("-----BEGIN CERTIFICATE-----")?;
    Some(rest.split_once("-----END CERTIFICATE-----")?.0.trim().to_owned())
}

#[test]
fn a_new_certificate_is_shown_to_who_comes_next_and_nobody_is_sent_away() {
    needs_programs!("openssl");
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    dirs.iter().for_each(|dir| make_certificates(dir.path()));
    let at = |number: usize, name: &str| dirs[number].path().join(name);
    let certificate = |number: usize| pem(&fs::read_to_string(at(number, "server.pem")).unwrap()).unwrap();
    let (first, second) = (certificate(0), certificate(1));
    assert_ne!(first, second);
    let (cert, key) = (at(0, "server.pem"), at(0, "server.key"));
    let own = Own::logged(&["--tls-cert", text(&cert), "--tls-key", text(&key)]);
    let mut connected = Secure::to(&own);
    connected.ask();
    assert_eq!(shown(&own), first);
    // The one without the other is no use yet, and is told.
    fs::copy(at(1, "server.pem"), &cert).unwrap();
    assert_eq!(shown(&own), first);
    own.until(true, || own.log().contains("warning: the certificate from before stays in use"));
    fs::copy(at(1, "server.key"), &key).unwrap();
    assert_eq!(shown(&own), second);
    connected.ask();
    fs::write(&cert, "nothing\n").unwrap();
    assert_eq!(shown(&own), second);
    own.until(true, || own.log().contains("no certificates as PEM"));
    // Looking again changes nothing while they are as they are.
    own.signal(Signal::HUP);
    own.until(true, || own.log().contains("were read again"));
    assert_eq!(shown(&own), second);
    connected.ask();
}

/// `user:right-horse` and `robert:right-horse`, in base64.
const USER: &str = "dXNlcjpyaWdodC1ob3JzZQ==";
const ROBERT: &str = "cm9iZXJ0OnJpZ2h0LWhvcnNl";

fn login(own: &Own, account: &str) -> Client {
    Client::with_authorization(own.address, &format!("Basic {account}"))
}

fn config(dir: &Path, passwords: &str, allow: &str) -> String {
    let text = format!(
        "htpasswd = {passwords:?}\n[[rights]]\nrepositories = [\"*\"]\nusers = [\"user\"]\nallow = [{allow}]\n"
    );
    write(dir, "registry.toml", &text)
}

#[test]
fn rights_and_accounts_are_read_again_at_a_signal_and_bad_ones_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let passwords = write(dir.path(), "htpasswd", HTPASSWD);
    let config_file = config(dir.path(), &passwords, "\"pull\"");
    let own = Own::logged(&["--config", &config_file]);
    let mut user = login(&own, USER);
    let begin = || login(&own, USER).send("POST", "/v2/a/blobs/uploads/", &[], b"").status;
    assert_eq!(begin(), 403);
    // A change alone does nothing, and a file that is none at the signal neither.
    config(dir.path(), &passwords, "\"pull\", \"write\"");
    own.signal(Signal::HUP);
    own.until(true, || own.log().contains("the rights from before stay in use"));
    own.until(true, || own.log().contains("\"write\" is none of pull, push, delete"));
    assert_eq!(begin(), 403);
    config(dir.path(), &passwords, "\"pull\", \"push\"");
    assert_eq!(begin(), 403);
    own.signal(Signal::HUP);
    own.until(202, begin);
    // Accounts need no signal.
    write(dir.path(), "htpasswd", "user:x\n");
    user.get("/v2/").expect(200);
    own.until(true, || own.log().contains("the accounts from before stay in use"));
    write(dir.path(), "htpasswd", &HTPASSWD.replacen("user", "robert", 1));
    user.get("/v2/").expect(401);
    login(&own, ROBERT).get("/v2/").expect(200);
    own.signal(Signal::TERM);
    assert_eq!(own.wait().0.code(), Some(0));
}
