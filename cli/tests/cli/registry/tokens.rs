//! Token servers: docker-registry believes what one signs, and kiln asks it for no more than it needs.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::server::{Bench, Registry, context, needs_programs};
use crate::harness::{Outcome, needs_root, text};
use crate::scripted::{Request, Server, answer};

/// `user:right-horse`
const BASIC: &str = "Basic dXNlcjpyaWdodC1ob3JzZQ==";
const REFRESH: &str = "canary-refresh";

/// RFC 4648, section 5, without padding.
fn base64_url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for part in bytes.chunks(3) {
        let word =
            part.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - part.len()));
        for nth in 0..=part.len() {
            text.push(ALPHABET[(word >> (18 - 6 * nth)) as usize & 63].into());
        }
    }
    text
}

/// A key and its certificate.
fn make_key() -> TempDir {
    let dir = tempfile::tempdir().expect("temporary directories can be made");
    let script = "openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=tokens -keyout tokens.key -out tokens.pem";
    Outcome::of(Command::new("sh").args(["-c", script]).current_dir(dir.path()).output().expect("sh starts"))
        .expect(0);
    dir
}

/// What openssl makes of `input`.
fn openssl(args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new("openssl");
    let mut child =
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("openssl starts");
    child.stdin.take().expect("piped above").write_all(input).expect("openssl reads");
    let output = child.wait_with_output().expect("our child");
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// A token for `access` (docker's specification: JSON Web Signature, the certificate in its head).
fn sign(dir: &Path, access: &Value) -> String {
    let pem = fs::read_to_string(dir.join("tokens.pem")).expect("made above");
    let certificate: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let head = json!({"typ": "JWT", "alg": "RS256", "x5c": [certificate]});
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let claims = json!({
        "iss": "tests", "sub": "", "aud": "test", "jti": "1", "iat": now - 10, "nbf": now - 10, "exp": now + 600,
        "access": access,
    });
    let signed = [head, claims].map(|part| base64_url(part.to_string().as_bytes())).join(".");
    let key = text(&dir.join("tokens.key")).to_owned();
    let signature = openssl(&["dgst", "-sha256", "-sign", &key, "-binary"], signed.as_bytes());
    format!("{signed}.{}", base64_url(&signature))
}

/// What a request asks for, in its query or in its form.
fn parameters(request: &Request) -> Vec<(String, String)> {
    let form = String::from_utf8(request.body.clone()).expect("a form");
    let query = if request.method == "POST" { &form } else { &request.query };
    let plain = |text: &str| {
        [("%3A", ":"), ("%2F", "/"), ("%2C", ","), ("+", " ")]
            .iter()
            .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
    };
    query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (plain(name), plain(value)))
        .collect()
}

fn scopes(request: &Request) -> Vec<String> {
    let scopes = parameters(request).into_iter().filter(|(name, _)| name == "scope");
    scopes.flat_map(|(_, value)| value.split(' ').map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// Gives tokens: the user may do everything but in `closed/`, others may read `public/`. Logins get a token that
/// stands for their password.
fn tokens(dir: &Path) -> Server {
    let dir = dir.to_owned();
    Server::scripted(move |request, _| {
        let parameters = parameters(request);
        let has = |name: &str, value: &str| {
            parameters.iter().any(|(n, v)| (n.as_str(), v.as_str()) == (name, value))
        };
        let is_user = match request.header("authorization") {
            Some(BASIC) => true,
            Some(_) => return Some(answer(401, &[], br#"{"details":"wrong password"}"#)),
            None => has("grant_type", "refresh_token") && has("refresh_token", REFRESH),
        };
        let granted = scopes(request).into_iter().filter_map(|scope| {
            let (name, actions) = scope.strip_prefix("repository:")?.rsplit_once(':')?;
            let may = |action: &&str| match is_user {
                true => !name.starts_with("closed/"),
                false => name.starts_with("public/") && *action == "pull",
            };
            let actions: Vec<&str> = actions.split(',').filter(may).collect();
            Some(json!({"type": "repository", "name": name, "actions": actions}))
        });
        let token = sign(&dir, &granted.collect());
        let mut body = json!({"token": token, "expires_in": 300});
        if is_user && has("offline_token", "true") {
            body["refresh_token"] = json!(REFRESH);
        }
        Some(answer(200, &[], body.to_string().as_bytes()))
    })
}

fn login(bench: &Bench, registry: &Registry, password: &str) -> Outcome {
    let mut command = bench.command(&["login", "-u", "user", "--password-stdin", &registry.host()]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kiln starts");
    child.stdin.take().expect("piped above").write_all(password.as_bytes()).expect("kiln reads");
    Outcome::of(child.wait_with_output().expect("our child"))
}

#[test]
fn a_registry_with_a_token_server_gets_tokens_for_what_is_done_and_no_more() {
    needs_root!();
    needs_programs!("docker-registry", "openssl");
    let dir = make_key();
    let tokens = tokens(dir.path());
    let registry = Registry::with_tokens(dir, tokens.port);
    let (bench, name) = (Bench::new(), registry.name("team/app"));
    bench.build(&context(), &["-t", &name]).expect(0);
    bench.kiln(&["push", &name]).expect(5).says(&[&format!("`kiln login {}`", registry.host())]);
    login(&bench, &registry, "canary-wrong").expect(5).says(&["wrong password"]);
    // The password itself is kept nowhere where a token can stand for it.
    login(&bench, &registry, "right-horse").expect(0).says(&["a token that stands for the password is in"]);
    let kept = fs::read_to_string(bench.at("docker/config.json")).unwrap();
    assert!(kept.contains(REFRESH) && !kept.contains(&BASIC[6..]), "{kept}");

    let before = tokens.seen().len();
    let pushed = bench.build(&context(), &["--push", "-t", &name]).expect(0);
    assert!(pushed.stdout.contains("4 blobs sent"), "{pushed:?}");
    let asked: Vec<_> =
        tokens.seen()[before..].iter().map(|request| (request.method.clone(), scopes(request))).collect();
    // To look and to write, and for nobody a second time.
    let scope = |actions: &str| ("POST".to_owned(), vec![format!("repository:team/app:{actions}")]);
    assert_eq!(asked, [scope("pull"), scope("pull,push")]);
    // What another repository has is mounted with a token for both.
    let other = registry.name("team/other");
    bench.ok(&["tag", &name, &other]);
    let mounted = bench.ok(&["push", &other]);
    assert!(mounted.contains("nothing to send, 4 mounted"), "{mounted}");
    let both = vec!["repository:team/other:pull,push".to_owned(), "repository:team/app:pull".to_owned()];
    assert!(tokens.seen().iter().any(|request| scopes(request) == both));
    let closed = registry.name("closed/app");
    bench.ok(&["tag", &name, &closed]);
    let refused = bench.kiln(&["push", &closed]).expect(5).says(&["wrong or not enough"]);
    assert!(!refused.stderr.contains("canary"), "{refused:?}");

    // Who is nobody reads what is for everybody.
    let public = registry.name("public/app");
    bench.ok(&["tag", &name, &public]);
    bench.ok(&["push", &public]);
    let fresh = Bench::empty();
    fresh.ok(&["pull", &public]);
    assert_eq!(fresh.id(&public), bench.id(&public));
    fresh.kiln(&["pull", &name]).expect(5).says(&["hint: `kiln login"]);
    // A token that stands for the password may be withdrawn.
    fresh.write("docker/config.json", kept.replace(REFRESH, "canary-withdrawn"));
    let refused = fresh.kiln(&["pull", &name]).expect(5).says(&["wrong or not enough"]);
    assert!(!refused.stderr.contains("canary"), "{refused:?}");
}
