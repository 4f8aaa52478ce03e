//! What logs in at other machines: it reaches the server it is for, and nothing else ever has it.
//!
//! The rest of what builds bring from elsewhere is in the modules beside this one, whose names
//! begin in the same way.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::harness::{Context, Outcome, Store, needs_root};
use crate::repo::Origin;
use crate::web::{GitServer, Web, response};

/// A password.
const CANARY: &str = "hushhush-canary";
/// The password as a token for a web server.
const BEARER_HEADER: &str = "Bearer hushhush-canary";
/// `x-access-token:hushhush-canary` as HTTP has it.
const TOKEN_HEADER: &str = "Basic eC1hY2Nlc3MtdG9rZW46aHVzaGh1c2gtY2FuYXJ5";
/// `me:hushhush-canary`, the same.
const LOGIN_HEADER: &str = "Basic bWU6aHVzaGh1c2gtY2FuYXJ5";

/// Everything that gives the password away.
fn betrays(bytes: &[u8]) -> bool {
    let words = [CANARY, &TOKEN_HEADER[6..], &LOGIN_HEADER[6..]];
    words.iter().any(|word| bytes.windows(word.len()).any(|window| window == word.as_bytes()))
}

/// Files below `dir` that do.
fn files_that_betray(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (kind, path) = (entry.file_type().expect("ours"), entry.path());
        if betrays(path.as_os_str().as_encoded_bytes()) {
            found.push(path.display().to_string());
        }
        if kind.is_dir() {
            files_that_betray(&path, found);
        } else if kind.is_file() && betrays(&fs::read(&path).expect("ours to read")) {
            found.push(path.display().to_string());
        }
    }
}

/// Fails the test if any output or file of the store gives the password away.
#[track_caller]
fn kept_quiet(store: &Store, outcomes: &[Outcome]) {
    for Outcome { stdout, stderr, .. } in outcomes {
        assert!(!betrays(stdout.as_bytes()) && !betrays(stderr.as_bytes()), "{stdout}\n{stderr}");
    }
    let mut found = Vec::new();
    files_that_betray(&store.root(), &mut found);
    assert_eq!(found, [""; 0]);
}

/// A web server that wants this header for `Authorization`; it has a Dockerfile and files.
fn locked(header: &'static str) -> Web {
    Web::serve(move |request| {
        if request.header("authorization") != Some(header) {
            return response("401 Unauthorized", &[], b"");
        }
        match request.target.as_str() {
            "/Dockerfile" => response("200 OK", &[], b"FROM busybox\nLABEL of=locked\n"),
            "/absent" => response("404 Not Found", &[], b""),
            _ => response("200 OK", &[("ETag", "\"1\"")], b"opened"),
        }
    })
}

fn locked_repository(origin: &Origin, header: &'static str) -> String {
    let repo = origin.repo("a", &[]);
    repo.write("Dockerfile", "FROM busybox\nCOPY f /f\n");
    repo.write("f", "opened");
    repo.commit();
    origin.serve(GitServer::Token(header)).url("/a/.git")
}

#[test]
fn credentials_come_from_secrets() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let web = locked(BEARER_HEADER);
    let git = locked_repository(&origin, TOKEN_HEADER);
    let file = store.beside("token");
    fs::write(&file, format!("{CANARY}\n")).expect("ours to write");
    let from_file = format!("src={}", file.display());
    let build = |context: &str, secrets: &[&str], args: &[&str]| {
        let mut all = vec!["build", "--progress", "plain", "-t", "x"];
        all.extend(secrets.iter().flat_map(|secret| ["--secret", secret]));
        all.extend(args);
        all.push(context);
        let mut command = store.command(&all);
        command.env("CANARY", CANARY).env("HEADER", BEARER_HEADER);
        store.bounded(command)
    };
    let added = |url: &str| Context::new(&[("Dockerfile", &format!("FROM busybox\nADD {url} /added/\n"))]);
    let mut outcomes = Vec::new();

    // A file of a web server: nothing opens without, nor with a secret for another host.
    let download = added(&web.url("/file"));
    for secrets in [&[][..], &["id=HTTP_AUTH_TOKEN_localhost,env=CANARY"], &["id=GIT_AUTH_TOKEN,env=CANARY"]]
    {
        outcomes.push(build(download.path(), secrets, &[]).expect(5).says(&["401", "Dockerfile:2:1"]));
    }
    let token = format!("id=HTTP_AUTH_TOKEN_127.0.0.1,{from_file}");
    for secret in
        ["id=HTTP_AUTH_TOKEN_127.0.0.1,env=CANARY", &token, "id=HTTP_AUTH_HEADER_127.0.0.1,env=HEADER"]
    {
        outcomes.push(build(download.path(), &[secret], &["--no-cache"]).expect(0));
        assert_eq!(store.shell("x", "cat /added/file"), "opened");
    }
    // The context, the Dockerfile, a named context.
    outcomes.push(build(&web.url("/Dockerfile"), &[&token], &[]).expect(0));
    outcomes.push(build(download.path(), &[&token], &["-f", &web.url("/Dockerfile")]).expect(0));
    assert_eq!(store.inspect("x")["Config"]["Labels"]["of"], "locked");
    let uses = Context::new(&[("Dockerfile", "FROM busybox\nCOPY --from=src / /d/\n")]);
    let (named_web, named_git) = (format!("src={}", web.url("/file")), format!("src={git}"));
    outcomes.push(build(uses.path(), &[&token], &["--build-context", &named_web]).expect(0));

    // The same of a repository.
    let checkout = added(&git);
    outcomes.push(
        build(checkout.path(), &[&token], &[]).expect(5).says(&["git could not list", "Dockerfile:2:1"]),
    );
    for name in ["GIT_AUTH_TOKEN", "GIT_AUTH_TOKEN.127.0.0.1"] {
        let secret = format!("id={name},env=CANARY");
        outcomes.push(build(checkout.path(), &[&secret], &["--no-cache"]).expect(0));
        assert_eq!(store.shell("x", "cat /added/f"), "opened");
    }
    let token = format!("id=GIT_AUTH_TOKEN,{from_file}");
    outcomes.push(build(&git, &[&token], &[]).expect(0));
    outcomes.push(build(&format!("{git}?keep-git-dir=1"), &[&token], &[]).expect(0));
    outcomes.push(build(uses.path(), &[&token], &["--build-context", &named_git]).expect(0));
    assert_eq!(store.shell("x", "cat /d/f"), "opened");

    outcomes.push(store.ok(&["history", "x"]));
    outcomes.push(store.ok(&["inspect", "x"]));
    kept_quiet(&store, &outcomes);
}

#[test]
fn a_secret_that_cannot_be_sent_is_named_and_not_shown() {
    needs_root!();
    let store = Store::with_busybox();
    let web = locked(LOGIN_HEADER);
    let context = Context::new(&[("Dockerfile", &format!("FROM busybox\nADD {} /f\n", web.url("/f")))]);
    let two_lines = format!("{CANARY}\r\nX-Other: 1");
    let mut command = store.command(&[
        "build",
        "--progress",
        "plain",
        "--secret",
        "id=HTTP_AUTH_TOKEN_127.0.0.1,env=S",
        context.path(),
    ]);
    command.env("S", two_lines);
    let outcome = store
        .bounded(command)
        .expect(4)
        .says(&["HTTP_AUTH_TOKEN_127.0.0.1 cannot be used", "Dockerfile:2:1"]);
    kept_quiet(&store, &[outcome]);
    assert_eq!(web.take_seen().len(), 0);
}

/// `url` with a name and the password in it.
fn login(url: &str) -> String {
    url.replace("http://", &format!("http://me:{CANARY}@"))
}

#[test]
fn passwords_in_urls_log_in_and_do_not_show() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let web = locked(LOGIN_HEADER);
    let at = |path: &str| login(&web.url(path));
    let git = login(&locked_repository(&origin, LOGIN_HEADER));
    let context = |dockerfile: &str| Context::new(&[("Dockerfile", dockerfile), ("f", "f")]);
    let mut outcomes = Vec::new();

    let every_kind = format!(
        "FROM busybox\nADD {} /file\nADD --link {} /linked\nADD {git}#main /git\nADD {git}?keep-git-dir=1 /kept\n\
         ARG FROM_ARG={}\nADD $FROM_ARG /arg\nRUN --network=none : '{}' $PASSED\n",
        at("/f"),
        at("/l"),
        at("/arg"),
        at("/run")
    );
    let every_kind = every_kind.replacen("ARG ", "ARG PASSED\nARG ", 1);
    let passed = format!("PASSED={}", at("/passed"));
    let every_kind = context(&every_kind);
    for args in [&[][..], &[], &["--no-cache"]] {
        let args = [&["-t", "x", "--build-arg", &passed], args].concat();
        outcomes.push(store.build_bounded(&every_kind, &args).expect(0));
    }
    assert_eq!(store.shell("x", "cat /file /linked /git/f /kept/f /arg"), "opened".repeat(5));
    assert_eq!(store.shell("x", "grep -c '@' /kept/.git/config || true"), "0");
    let history = store.config("x")["history"].to_string();
    assert!(history.contains("@127.0.0.1") && history.contains("/f /file # buildkit"), "{history}");
    outcomes.push(store.ok(&["history", "x"]));

    // Contexts, Dockerfiles, named contexts.
    outcomes.push(store.build_from(&git, &["-t", "x"]).expect(0));
    outcomes.push(store.build_from(&at("/Dockerfile"), &["-t", "x"]).expect(0));
    outcomes.push(store.build_bounded(&every_kind, &["-f", &at("/Dockerfile")]).expect(0));
    let uses = context("FROM busybox\nCOPY --from=a / /a/\nCOPY --from=b / /b/\nFROM a\n");
    let (a, b) = (format!("a={git}"), format!("b={}", at("/f")));
    outcomes.push(store.build_bounded(&uses, &["--build-context", &a, "--build-context", &b]).expect(0));
    for method in ["check", "outline", "targets"] {
        outcomes.push(store.build_bounded(&every_kind, &["--call", method]).expect(0));
    }
    kept_quiet(&store, &outcomes);
    // The search finds what is there: an ENV is the image's own, and a user's decision.
    store.image("env", &format!("FROM busybox\nENV PLACE={}\n", at("/f")));
    let mut found = Vec::new();
    files_that_betray(&store.root(), &mut found);
    assert_eq!(found.len(), 1, "its config: {found:?}");
}

#[test]
fn passwords_in_urls_do_not_show_when_something_fails() {
    needs_root!();
    let (store, origin) = (Store::with_busybox(), Origin::new());
    let web = locked(LOGIN_HEADER);
    let at = |path: &str| login(&web.url(path));
    let git = login(&locked_repository(&origin, LOGIN_HEADER));
    let context = |dockerfile: &str| Context::new(&[("Dockerfile", dockerfile), ("f", "f")]);
    let mut outcomes = Vec::new();
    let fails: BTreeMap<String, i32> = [
        (format!("FROM busybox\nADD {} /f\n", at("/absent")), 5),
        (format!("FROM busybox\nADD --checksum=sha256:{} {} /f\n", "0".repeat(64), at("/f")), 6),
        (format!("FROM busybox\nADD --checksum=sha256:12 {} /f\n", at("/f")), 3),
        (format!("FROM busybox\nADD --checksum=00000000 {git} /f\n"), 6),
        (format!("FROM busybox\nADD {git}#absent /f\n"), 4),
        (format!("FROM busybox\nADD {git}#main:absent /f\n"), 4),
        (format!("FROM busybox\nADD {git}#--option /f\n"), 7),
        (format!("FROM busybox\nADD {git}?unknown=1 /f\n"), 3),
        (format!("FROM busybox\nCOPY {} /f\n", at("/f")), 3),
        (format!("FROM busybox\nADD {} /f extra\n", at("/f")), 3),
        (format!("FROM busybox\nRUN --network=none false '{}'\n", at("/f")), 1),
        (format!("FROM {}\n", at("/f")), 3),
        (format!("FROM busybox\nADD http://me:{CANARY}@/f /f\n"), 4),
    ]
    .into();
    for (dockerfile, code) in &fails {
        outcomes.push(store.build_bounded(&context(dockerfile), &[]).expect(*code));
    }
    for (place, code) in [
        (at("/absent"), 5),
        (format!("{git}#absent"), 4),
        (format!("{git}#--option"), 7),
        (format!("{git}?unknown=1"), 4),
        (format!("http://me:{CANARY}@"), 4),
    ] {
        outcomes.push(store.build_from(&place, &[]).expect(code));
        let (named, uses) = (format!("n={place}"), context("FROM busybox\nCOPY --from=n / /\n"));
        outcomes.push(store.build_bounded(&uses, &["--build-context", &named]).expect(code));
    }
    outcomes.push(store.build_bounded(&context(""), &["-f", &at("/absent")]).expect(5));
    // Nobody there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    let closed = login(&format!("http://{}", port.expect("loopback is there")));
    for place in [format!("{closed}/f"), format!("{closed}/a.git")] {
        outcomes.push(store.build_from(&place, &[]).expect(5));
        outcomes
            .push(store.build_bounded(&context(&format!("FROM busybox\nADD {place} /f\n")), &[]).expect(5));
    }
    kept_quiet(&store, &outcomes);
}
