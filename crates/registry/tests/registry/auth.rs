//! Who gets which credentials.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use base64::Engine as _;
use kiln_oci::Digest;
use kiln_oci::image::Descriptor;
use kiln_registry::{Clock, Credential, Error, Fault, Settings, Which};

use crate::bench::{Bench, Pauses, password, text};
use crate::server::{Reply, Request, Server, answer, head};

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;

fn basic() -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode("user:canary-password"))
}

/// A registry that wants a token of the server at `realm`, and takes `token-for-SCOPE`.
fn guarded(realm: String) -> Server {
    let guard = guard(realm);
    Server::scripted(move |request, _| guard(request))
}

fn guard(realm: String) -> impl Fn(&Request) -> Option<Reply> + Send + Sync {
    move |request| {
        let scope = if request.method == "GET" || request.method == "HEAD" { "pull" } else { "pull,push" };
        let good = format!("Bearer token-for-repository:team/app:{scope}");
        let wider = "Bearer token-for-repository:team/app:pull,push";
        let shown = request.header("authorization");
        if request.path == "/v2/" || shown == Some(&good) || shown == Some(wider) {
            return None;
        }
        let challenge = format!(r#"Bearer realm="{realm}",service="s",scope="repository:team/app:{scope}""#);
        Some(answer(401, &[("WWW-Authenticate", &challenge)], b""))
    }
}

fn tokens() -> Server {
    Server::scripted(|request, _| {
        let query = request.query.replace("%3A", ":").replace("%2F", "/").replace("%2C", ",");
        let scope =
            query.split('&').find_map(|pair| pair.strip_prefix("scope=")).unwrap_or_default().to_owned();
        Some(answer(200, &[], format!(r#"{{"token":"token-for-{scope}","expires_in":300}}"#).as_bytes()))
    })
}

fn bench() -> Bench {
    Bench::with_password()
}

#[test]
fn a_token_that_trickles_is_given_up() {
    let tokens =
        Server::scripted(|_, _| Some(Reply::Trickle(head(200, &[], 1_000_000), vec![b' '; 1_000_000])));
    let server = guarded(format!("http://127.0.0.1:{}/token", tokens.port));
    let settings = Settings { stall_bytes: 0, tries: 1, ..Settings::default() };
    let bench = Bench::with(settings, Arc::new(password()));
    tokens.keep_time(bench.pauses.clone());
    let result = bench.run(bench.repository(&server).manifest(Which::Tag("v1")));
    assert!(matches!(result, Err(Error::Stalled { .. })), "{result:?}");
    assert_eq!(tokens.seen().len(), 1);
}

#[test]
fn a_token_is_fetched_for_the_scope_and_used_again() {
    let tokens = tokens();
    let server = guarded(format!("http://127.0.0.1:{}/token?x=y", tokens.port));
    let digest = server.manifest("v1", MANIFEST);
    let blob = server.blob(b"blob");
    let bench = bench();
    let repository = bench.repository(&server);
    bench.run(repository.manifest(Which::Tag("v1"))).unwrap();
    bench.run(repository.manifest(Which::Digest(&digest))).unwrap();
    bench.run(repository.fetch_blob(&blob, &mut Vec::new())).unwrap();
    assert_eq!(tokens.seen().len(), 1);
    assert_eq!(tokens.seen()[0].header("authorization"), Some(basic().as_str()));
    assert_eq!(tokens.seen()[0].query, "x=y&service=s&scope=repository%3Ateam%2Fapp%3Apull&account=user");
    assert_eq!(server.seen().len(), 4);
    // The password is for the token server alone.
    assert!(server.seen().iter().all(|request| request.header("authorization") != Some(basic().as_str())));
    // To push takes another token.
    bench
        .run(repository.push_blob(&Descriptor::new("x", Digest::of(b"new"), 3), &b"new".to_vec(), &[]))
        .unwrap();
    assert_eq!(tokens.seen().len(), 2);
    // And when they run out, there are new ones.
    bench.run(bench.pauses.pause(Duration::from_secs(300)));
    bench.run(repository.manifest(Which::Tag("v1"))).unwrap();
    assert_eq!(tokens.seen().len(), 3);
}

#[test]
fn a_token_that_has_run_out_is_replaced_before_the_rest_of_a_blob_is_sent() {
    let (tokens, clock) = (tokens(), Arc::new(OnceLock::<Arc<Pauses>>::new()));
    let (known, guard) = (clock.clone(), guard(format!("http://127.0.0.1:{}/token", tokens.port)));
    let server = Server::scripted(move |request, _| {
        let refused = guard(request);
        if request.method == "PATCH" && refused.is_none() {
            // Each piece takes longer than a token lives.
            drop(known.get()?.pause(Duration::from_secs(400)));
        }
        refused
    });
    let settings = Settings { chunk_bytes: Some(1000), ..Settings::default() };
    let bench = Bench::with(settings, Arc::new(password()));
    clock.set(bench.pauses.clone()).ok().unwrap();
    let bytes = vec![7; 3000];
    let blob = Descriptor::new("x", Digest::of(&bytes), 3000);
    bench.run(bench.repository(&server).push_blob(&blob, &bytes, &[])).unwrap();
    assert_eq!(server.state.lock().unwrap().blobs[&blob.digest], bytes);
    // No body went in vain.
    let bodies = server.seen().into_iter().filter(|request| ["PATCH", "PUT"].contains(&&*request.method));
    let shown: Vec<Option<String>> =
        bodies.map(|request| request.header("authorization").map(str::to_owned)).collect();
    assert_eq!(shown, vec![Some("Bearer token-for-repository:team/app:pull,push".to_owned()); 4]);
    let pushes = tokens.seen().iter().filter(|request| request.query.contains("push")).count();
    assert_eq!(pushes, 4);
}

#[test]
fn a_token_that_the_registry_takes_no_more_is_replaced() {
    let (tokens, turn) = (tokens(), AtomicUsize::new(0));
    let guard = guard(format!("http://127.0.0.1:{}/token", tokens.port));
    let server = Server::scripted(move |request, _| {
        let refused = guard(request);
        // Before anything of the blob has arrived.
        let is_first = request.method == "PATCH" && turn.fetch_add(1, Ordering::SeqCst) == 0;
        if is_first { Some(answer(401, &[], b"")) } else { refused }
    });
    let bytes = vec![7; 300_000];
    let blob = Descriptor::new("x", Digest::of(&bytes), 300_000);
    let bench = bench();
    bench.run(bench.repository(&server).push_blob(&blob, &bytes, &[])).unwrap();
    assert_eq!(server.state.lock().unwrap().blobs[&blob.digest], bytes);
}

#[test]
fn a_token_that_lives_no_time_is_used_as_one_whose_server_does_not_say() {
    let tokens = Server::scripted(|_, _| {
        Some(answer(200, &[], br#"{"token":"token-for-repository:team/app:pull","expires_in":0}"#))
    });
    let server = guarded(format!("http://127.0.0.1:{}/token", tokens.port));
    let digest = server.manifest("v1", MANIFEST);
    let bench = bench();
    bench.run(bench.repository(&server).manifest(Which::Tag("v1"))).unwrap();
    bench.run(bench.repository(&server).manifest(Which::Digest(&digest))).unwrap();
    assert_eq!(tokens.seen().len(), 1);
}

#[test]
fn a_login_gets_a_token_in_the_place_of_the_password_where_there_are_such() {
    let tokens = |gives: bool| {
        Server::scripted(move |request, _| {
            let asked = request.query.contains("offline_token=true&client_id=kiln");
            let refresh = if gives && asked { r#","refresh_token":"canary-refresh""# } else { "" };
            Some(answer(200, &[], format!(r#"{{"token":"good"{refresh}}}"#).as_bytes()))
        })
    };
    for (gives, expected) in [(true, Some("canary-refresh")), (false, None)] {
        let tokens = tokens(gives);
        let realm = format!("http://127.0.0.1:{}/token", tokens.port);
        let server = Server::scripted(move |request, _| {
            let challenge = format!(r#"Bearer realm="{realm}",service="s""#);
            let good = request.header("authorization") == Some("Bearer good");
            (!good).then(|| answer(401, &[("WWW-Authenticate", &challenge)], b""))
        });
        let bench = bench();
        let kept = bench.run(bench.client.login(&server.domain())).unwrap();
        assert_eq!(kept, expected.map(|token| Credential::Identity(token.to_owned())));
        // Nobody asks for one who does not log in.
        bench.run(bench.pauses.pause(Duration::from_secs(300)));
        bench.run(bench.client.check(&server.domain())).unwrap();
        let queries: Vec<bool> =
            tokens.seen().iter().map(|request| request.query.contains("offline_token")).collect();
        assert_eq!(queries, [true, false]);
    }
}

#[test]
fn a_token_comes_for_nothing_where_there_are_no_credentials() {
    let tokens = tokens();
    let server = guarded(format!("http://127.0.0.1:{}/token", tokens.port));
    server.manifest("v1", MANIFEST);
    let bench = Bench::new();
    bench.run(bench.repository(&server).manifest(Which::Tag("v1"))).unwrap();
    assert_eq!(tokens.seen()[0].header("authorization"), None);
}

#[test]
fn an_identity_token_is_exchanged() {
    let tokens = Server::scripted(|request, _| {
        let body = String::from_utf8(request.body.clone()).unwrap();
        assert_eq!(request.method, "POST");
        assert!(body.contains("grant_type=refresh_token&refresh_token=iden%26tity"), "{body}");
        assert!(body.contains("scope=repository%3Ateam%2Fapp%3Apull"), "{body}");
        Some(answer(200, &[], br#"{"access_token":"token-for-repository:team/app:pull"}"#))
    });
    let server = guarded(format!("http://127.0.0.1:{}/token", tokens.port));
    server.manifest("v1", MANIFEST);
    let identity = Credential::Identity("iden&tity".to_owned());
    let bench = Bench::with(Settings::default(), Arc::new(identity));
    bench.run(bench.repository(&server).manifest(Which::Tag("v1"))).unwrap();
}

#[test]
fn a_foreign_token_server_gets_no_credentials() {
    let tokens = tokens();
    // Another name for the same machine is another host.
    let realm = format!("http://localhost:{}/token", tokens.port);
    let server = guarded(realm.clone());
    server.manifest("v1", MANIFEST);
    let bench = bench();
    bench.run(bench.repository(&server).manifest(Which::Tag("v1"))).unwrap();
    assert_eq!(tokens.seen()[0].header("authorization"), None);
    assert!(!tokens.seen()[0].query.contains("account"));
    // Unless it is named.
    let settings = Settings { token_hosts: ["localhost".to_owned()].into(), ..Settings::default() };
    let named = Bench::with(settings, Arc::new(password()));
    named.run(named.repository(&server).manifest(Which::Tag("v1"))).unwrap();
    assert_eq!(tokens.seen()[1].header("authorization"), Some(basic().as_str()));
}

#[test]
fn a_password_goes_to_the_registry_and_no_further() {
    let other = Server::new();
    let blob = other.blob(b"content");
    let target = format!("http://localhost:{}/v2/x/blobs/{}", other.port, blob.digest);
    let server = Server::scripted(move |request, _| {
        let good = request.header("authorization") == Some(&basic());
        match () {
            _ if request.path == "/v2/" => None,
            _ if !good => Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b"")),
            _ if request.is_blob() => Some(answer(307, &[("Location", &target)], b"")),
            _ => None,
        }
    });
    let bench = bench();
    bench.run(bench.repository(&server).fetch_blob(&blob, &mut Vec::new())).unwrap();
    assert_eq!(other.seen().len(), 1);
    assert_eq!(other.seen()[0].header("authorization"), None);
    // Shown from the beginning, once it was taken.
    assert_eq!(bench.run(bench.repository(&server).blob_size(&blob.digest)).unwrap(), None);
    assert_eq!(server.lines().len(), 3);
}

fn denied(script: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static) -> (Error, Server) {
    let server = Server::scripted(
        move |request, nth| if request.path == "/v2/" { None } else { script(request, nth) },
    );
    let bench = bench();
    let error = bench.run(bench.repository(&server).manifest(Which::Tag("v1"))).unwrap_err();
    let said = text(&error);
    assert!(!said.contains("canary"), "{said}");
    (error, server)
}

#[test]
fn a_registry_that_never_has_enough_is_given_up() {
    let (error, server) = denied(|_, _| Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b"")));
    assert!(matches!(error, Error::Denied { known: true, .. }), "{error}");
    assert_eq!(server.seen().len(), 2);
    let (error, server) = denied(|_, _| Some(answer(401, &[], b"")));
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert_eq!(server.seen().len(), 1);
    // What it says about the password is not passed on.
    let (error, _) = denied(|request, _| {
        let Some(shown) = request.header("authorization") else {
            return Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""));
        };
        let message = format!("bad password canary-password, {shown}");
        let body = format!(r#"{{"errors":[{{"code":"DENIED","message":"{message}"}}]}}"#);
        Some(answer(403, &[], body.as_bytes()))
    });
    assert!(text(&error).contains("DENIED: bad password ***"), "{}", text(&error));
}

#[test]
fn a_token_server_that_gives_none_is_said() {
    type Tokens = fn() -> Reply;
    let cases: [(Tokens, Fault, &str); 5] = [
        (|| answer(401, &[], br#"{"details":"wrong: canary-password"}"#), Fault::Network, "wrong: ***"),
        (|| answer(200, &[], b"nonsense"), Fault::Network, "something else than a token"),
        (|| answer(200, &[], b"{}"), Fault::Network, "without a token"),
        (|| answer(200, &[], &vec![b' '; (1 << 20) + 1]), Fault::Limit, "larger than"),
        (|| answer(200, &[], b"{\"token\":\"a\\r\\nX: y\"}"), Fault::Network, "token that is none"),
    ];
    for (reply, fault, said) in cases {
        let tokens = Server::scripted(move |_, _| Some(reply()));
        let realm = format!("http://127.0.0.1:{}/token", tokens.port);
        let (error, _) = denied(move |_, _| {
            let challenge = format!("Bearer realm=\"{realm}\"");
            Some(answer(401, &[("WWW-Authenticate", &challenge)], b""))
        });
        assert!(text(&error).contains(said), "{}", text(&error));
        assert_eq!(error.fault(), fault, "{error}");
    }
    let (error, _) = denied(|_, _| {
        Some(answer(401, &[("WWW-Authenticate", "Bearer realm=\"http://169.254.169.254/t\"")], b""))
    });
    assert_eq!(error.fault(), Fault::Refused, "{error}");
}

#[test]
fn a_check_of_credentials_says_whether_they_are_good() {
    let server = Server::scripted(|request, _| {
        let good = request.header("authorization") == Some(&basic());
        (!good).then(|| answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""))
    });
    bench().run(bench().client.check(&server.domain())).unwrap();
    let wrong = Credential::Password { user: "user".to_owned(), password: "wrong".to_owned() };
    let bench = Bench::with(Settings::default(), Arc::new(wrong));
    assert!(matches!(bench.run(bench.client.check(&server.domain())), Err(Error::Denied { .. })));
}
