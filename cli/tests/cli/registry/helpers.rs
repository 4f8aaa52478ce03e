//! Programs that keep credentials, and token servers that take what they keep.

use std::fs;
use std::io::{Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use serde_json::json;

use super::replies::{Image, offer};
use super::server::Bench;
use crate::harness::{Outcome, needs_root, text};
use crate::scripted::{Server, answer};

const PASSWORD: &str = "canary-right-horse";
/// `user:canary-right-horse`
const BASIC: &str = "Basic dXNlcjpjYW5hcnktcmlnaHQtaG9yc2U=";
/// What stands for the password.
const REFRESH: &str = "canary-refresh";

/// A bench whose kiln finds helpers in a directory of its own.
struct Desk {
    bench: Bench,
}

impl Desk {
    fn new() -> Self {
        Self { bench: Bench::empty() }
    }

    /// `docker-credential-NAME`: keeps what it is given in files, and notes down what it is asked.
    fn helper(&self, name: &str) {
        let dir = text(&self.bench.at(name)).to_owned();
        let script = format!(
            "#!/bin/sh\n\
             mkdir -p {dir} && input=$(cat) || exit 1\n\
             server=$input\n\
             [ $1 = store ] && server=$(printf %s \"$input\" | sed 's/.*\"ServerURL\":\"\\([^\"]*\\)\".*/\\1/')\n\
             echo \"$1 $server\" >> {dir}/log\n\
             file={dir}/kept-$(printf %s \"$server\" | tr -c a-z0-9 _)\n\
             case $1 in\n\
             store) printf %s \"$input\" > $file;;\n\
             get) cat $file 2> /dev/null || {{ echo credentials not found in native keychain; exit 1; }};;\n\
             erase) rm $file 2> /dev/null || {{ echo credentials not found in native keychain; exit 1; }};;\n\
             esac\n"
        );
        self.program(name, &script);
    }

    fn program(&self, name: &str, script: &str) {
        let file = format!("bin/docker-credential-{name}");
        self.bench.write(&file, script);
        fs::set_permissions(self.bench.at(&file), fs::Permissions::from_mode(0o755)).expect("ours");
    }

    /// What the helper was asked, and forgets it.
    fn asked(&self, name: &str) -> Vec<String> {
        let log = self.bench.at(&format!("{name}/log"));
        let text = fs::read_to_string(&log).unwrap_or_default();
        let _ = fs::remove_file(log);
        text.lines().map(str::to_owned).collect()
    }

    /// All that it keeps.
    fn kept(&self, name: &str) -> String {
        let files = fs::read_dir(self.bench.at(name)).into_iter().flatten().flatten();
        let kept = files.filter(|file| file.file_name().to_string_lossy().starts_with("kept-"));
        kept.map(|file| fs::read_to_string(file.path()).expect("ours to read")).collect()
    }

    fn config(&self) -> String {
        fs::read_to_string(self.bench.at("docker/config.json")).expect("ours to read")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.bench.command(args);
        let usual = std::env::var("PATH").expect("there is one");
        command.env("PATH", format!("{}:{usual}", text(&self.bench.at("bin"))));
        command
    }

    /// Runs kiln, which says no secret.
    #[track_caller]
    fn kiln(&self, args: &[&str]) -> Outcome {
        quiet(Outcome::of(self.command(args).output().expect("kiln starts")))
    }

    #[track_caller]
    fn login(&self, host: &str) -> Outcome {
        let mut file = tempfile::tempfile().expect("temporary files can be made");
        file.write_all(PASSWORD.as_bytes()).and_then(|()| file.rewind()).expect("ours to write");
        let mut command = self.command(&["login", "-u", "user", "--password-stdin", host]);
        quiet(Outcome::of(command.stdin(file).output().expect("kiln starts")))
    }
}

#[track_caller]
fn quiet(outcome: Outcome) -> Outcome {
    let said = format!("{}{}", outcome.stdout, outcome.stderr);
    assert!(!said.contains("canary") && !said.contains(&BASIC[6..]), "{said}");
    outcome
}

/// A registry with an image, `team/app:v1`, that wants this header for `Authorization`, or says so in these words.
fn locked(wanted: &'static str, challenge: String) -> Server {
    let server = Server::scripted(move |request, _| {
        let good = request.header("authorization") == Some(wanted);
        (!good).then(|| answer(401, &[("WWW-Authenticate", &challenge)], b""))
    });
    offer(&server, &Image::new(b"content"));
    server
}

fn with_password() -> Server {
    locked(BASIC, "Basic realm=\"x\"".to_owned())
}

fn app(server: &Server) -> String {
    format!("{}/team/app:v1", server.domain())
}

#[test]
fn the_helper_of_a_registry_comes_before_the_one_of_all() {
    needs_root!();
    let (desk, special, usual) = (Desk::new(), with_password(), with_password());
    desk.helper("special");
    desk.helper("usual");
    let (at_special, at_usual) = (special.domain(), usual.domain());
    let config = json!({"credsStore": "usual", "credHelpers": {&at_special: "special"}, "other": "kept"});
    desk.bench.write("docker/config.json", config.to_string());
    for server in [&special, &usual] {
        desk.kiln(&["pull", &app(server)]).expect(5).says(&["hint: `kiln login"]);
        let login = desk.login(&server.domain()).expect(0);
        // Nothing to warn of: no file has it.
        assert_eq!(
            (login.stdout, login.stderr.as_str()),
            (format!("logged in at {}\n", server.domain()), "")
        );
    }
    assert_eq!(desk.asked("special"), [format!("get {at_special}"), format!("store {at_special}")]);
    assert_eq!(desk.asked("usual"), [format!("get {at_usual}"), format!("store {at_usual}")]);
    assert!(desk.kept("special").contains(PASSWORD) && desk.kept("usual").contains(PASSWORD));
    let written = desk.config();
    assert!(!written.contains("auths") && written.contains("\"other\""), "{written}");

    for server in [&special, &usual] {
        desk.kiln(&["pull", &app(server)]).expect(0);
    }
    assert!(desk.asked("special").iter().all(|asked| *asked == format!("get {at_special}")));
    assert!(desk.asked("usual").iter().all(|asked| *asked == format!("get {at_usual}")));
    // The one forgets, and the other does not.
    assert!(desk.kiln(&["logout", &at_special]).expect(0).stdout.contains("logged out of"));
    assert!(desk.kiln(&["logout", &at_special]).expect(0).stdout.contains("nothing left"));
    assert_eq!((desk.kept("special"), desk.asked("usual")), (String::new(), vec![]));
    desk.kiln(&["pull", &app(&special)]).expect(5).says(&["hint: `kiln login"]);
    desk.kiln(&["pull", &app(&usual)]).expect(0);
    // A wrong password replaces nothing.
    let before = desk.kept("usual");
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"canary-wrong").and_then(|()| file.rewind()).unwrap();
    let mut wrong = desk.command(&["login", "-u", "user", "--password-stdin", &at_usual]);
    quiet(Outcome::of(wrong.stdin(file).output().unwrap())).expect(5);
    assert_eq!(desk.kept("usual"), before);
}

#[test]
fn what_a_helper_does_not_know_the_file_may() {
    needs_root!();
    let (desk, server) = (Desk::new(), with_password());
    desk.helper("empty");
    let config = json!({"credsStore": "empty", "auths": {server.domain(): {"auth": &BASIC[6..]}}});
    desk.bench.write("docker/config.json", config.to_string());
    desk.kiln(&["pull", &app(&server)]).expect(0);
    assert_eq!(desk.asked("empty"), [format!("get {}", server.domain())]);
    // A logout leaves it nowhere.
    desk.kiln(&["logout", &server.domain()]).expect(0);
    assert!(!desk.config().contains(&BASIC[6..]));
    desk.kiln(&["pull", &app(&server)]).expect(5).says(&["hint: `kiln login"]);
}

/// Gives access for the refresh token, and the refresh token for the password, to who asks for one.
fn tokens() -> Server {
    Server::scripted(|request, _| {
        let form = String::from_utf8_lossy(&request.body).into_owned();
        let is_refresh = form.contains("grant_type=refresh_token") && form.contains(REFRESH);
        match request.header("authorization") {
            None if request.method == "POST" && is_refresh => {
                Some(answer(200, &[], br#"{"access_token":"canary-access","expires_in":300}"#))
            }
            Some(BASIC) if request.query.contains("offline_token=true") => {
                let both = format!(r#"{{"token":"canary-access","refresh_token":"{REFRESH}"}}"#);
                Some(answer(200, &[], both.as_bytes()))
            }
            Some(BASIC) => Some(answer(200, &[], br#"{"token":"canary-access"}"#)),
            _ => Some(answer(401, &[], br#"{"details":"who are you?"}"#)),
        }
    })
}

fn with_tokens(tokens: &Server) -> Server {
    locked("Bearer canary-access", format!("Bearer realm=\"http://{}/token\",service=\"s\"", tokens.domain()))
}

#[test]
fn an_identity_token_is_kept_by_a_helper_and_taken_by_its_token_server() {
    needs_root!();
    let (desk, tokens) = (Desk::new(), tokens());
    let server = with_tokens(&tokens);
    desk.helper("chain");
    desk.bench.write("docker/config.json", json!({"credsStore": "chain"}).to_string());
    let login = desk.login(&server.domain()).expect(0);
    assert_eq!(login.stderr, "");
    let kept: serde_json::Value = serde_json::from_str(&desk.kept("chain")).expect("one entry");
    let entry = json!({"ServerURL": server.domain(), "Username": "<token>", "Secret": REFRESH});
    assert_eq!(kept, entry);
    // From here on nobody sees the password, and the registry never the token that stands for it.
    let (before, greeted) = (tokens.seen().len(), server.seen().len());
    desk.kiln(&["pull", &app(&server)]).expect(0);
    let other = format!("{}/team/other:v2", server.domain());
    desk.kiln(&["tag", &app(&server), &other]).expect(0);
    desk.kiln(&["push", &other]).expect(0);
    let asked = &tokens.seen()[before..];
    assert!(!asked.is_empty() && asked.iter().all(|request| request.method == "POST"), "{asked:?}");
    assert!(asked.iter().all(|request| request.header("authorization").is_none()));
    let scopes: Vec<String> =
        asked.iter().map(|request| String::from_utf8_lossy(&request.body).into_owned()).collect();
    assert!(scopes.iter().any(|form| form.contains("team%2Fapp%3Apull")), "{scopes:?}");
    assert!(scopes.iter().any(|form| form.contains("team%2Fother%3Apull%2Cpush")), "{scopes:?}");
    for request in &server.seen()[greeted..] {
        assert!([None, Some("Bearer canary-access")].contains(&request.header("authorization")));
        assert!(
            !request.query.contains("canary") && !String::from_utf8_lossy(&request.body).contains(REFRESH)
        );
    }
    // Withdrawn, it is good for nothing.
    desk.kiln(&["logout", &server.domain()]).expect(0);
    assert_eq!(desk.kept("chain"), "");
    Bench::empty().kiln(&["pull", &app(&server)]).expect(5);
    let fresh = Desk::new();
    fresh.program(
        "old",
        "#!/bin/sh\ncat > /dev/null\necho '{\"ServerURL\":\"x\",\"Username\":\"<token>\",\"Secret\":\"canary-old\"}'\n",
    );
    fresh.bench.write("docker/config.json", json!({"credsStore": "old"}).to_string());
    fresh.kiln(&["pull", &app(&server)]).expect(5).says(&["wrong or not enough", "who are you?"]);
}

#[test]
fn an_identity_token_of_the_file_is_taken_as_docker_writes_it() {
    needs_root!();
    let (desk, tokens) = (Desk::new(), tokens());
    let server = with_tokens(&tokens);
    // The user that docker writes beside it is nobody.
    let entry = json!({"auth": "PHRva2VuPjo=", "identitytoken": REFRESH});
    desk.bench.write("docker/config.json", json!({"auths": {server.domain(): entry}}).to_string());
    desk.kiln(&["pull", &app(&server)]).expect(0);
    assert_eq!(tokens.lines(), ["POST /token"]);
    let form = String::from_utf8_lossy(&tokens.seen()[0].body).into_owned();
    assert!(form.contains("service=s") && form.contains("client_id=kiln"), "{form}");
    // A registry of another name gets none of it: it is not even asked for.
    let foreign = with_tokens(&tokens);
    desk.kiln(&["pull", &app(&foreign)]).expect(5);
    assert!(
        tokens.seen()[1..].iter().all(|request| !String::from_utf8_lossy(&request.body).contains(REFRESH))
    );
}

#[test]
fn a_helper_that_fails_is_named_and_shows_no_secret() {
    needs_root!();
    let server = with_password();
    let cases = [
        ("echo 'the keychain is locked'; exit 1", "failed: the keychain is locked"),
        ("echo not JSON, but canary-word", "failed: its answer is no JSON"),
        ("echo '{\"Username\": 7, \"Secret\": \"canary-word\"}'", "failed: its answer is no JSON"),
        ("printf '\\033[31mred\\033[0m'; exit 3", "failed: [31mred [0m"),
        ("kill -9 $$", "failed: "),
    ];
    for (script, said) in cases {
        let desk = Desk::new();
        desk.program("broken", &format!("#!/bin/sh\ncat > /dev/null\n{script}\n"));
        desk.bench.write("docker/config.json", json!({"credsStore": "broken"}).to_string());
        let failed = desk.kiln(&["pull", &app(&server)]).expect(2);
        failed.says(&["the credential helper `docker-credential-broken`", said]);
    }
    // Nothing that could be started.
    let desk = Desk::new();
    desk.program("broken", "nonsense");
    fs::set_permissions(desk.bench.at("bin/docker-credential-broken"), fs::Permissions::from_mode(0o644))
        .unwrap();
    desk.bench.write("docker/config.json", json!({"credsStore": "broken"}).to_string());
    desk.kiln(&["pull", &app(&server)]).expect(2).says(&["`docker-credential-broken` cannot be run"]);
    // It is asked by who needs it: a registry for everybody is no concern of it.
    let open = Server::new();
    offer(&open, &Image::new(b"content"));
    desk.kiln(&["pull", &app(&open)]).expect(0);
    // One that knows nobody, as some say it, is no failure.
    desk.program(
        "broken",
        "#!/bin/sh\ncat > /dev/null\necho '{\"ServerURL\":\"\",\"Username\":\"\",\"Secret\":\"\"}'\n",
    );
    desk.kiln(&["pull", &app(&server)]).expect(5).says(&["hint: `kiln login"]);
}
