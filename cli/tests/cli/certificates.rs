//! Extra certificates: a real TLS server, and clients in steps and containers that trust it by them only.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::{Context, Store, needs_root, text};

/// A context with an authority, a server's certificate of its own, and this machine's `openssl` with its
/// libraries, which runs in any image.
struct Corp {
    context: Context,
    authority: PathBuf,
}

const WRAPPER: &str =
    "#!/bin/sh\nOPENSSL_CONF=/dev/null exec /t/loader --library-path /t/lib /t/openssl.bin \"$@\"\n";
/// A server on loopback, and a client that says whether it trusts it.
const SERVE: &str = "#!/bin/sh\n\
    cd /t && ./openssl s_server -accept 4433 -cert server.pem -key server.key -HTTP > /dev/null 2>&1 &\n\
    until /t/openssl s_client -connect localhost:4433 < /dev/null > /dev/null 2>&1; do :; done\n";
const VERIFY: &str = "#!/bin/sh\n. /t/serve\n\
    /t/openssl s_client -connect localhost:4433 -verify_return_error -verify_hostname localhost < /dev/null 2>&1 \
    | grep -E 'Verify return code|verify error'\n";

impl Corp {
    /// `None`, aloud: there is no openssl here.
    fn new(dockerfile: &str) -> Option<Corp> {
        let which =
            Command::new("sh").args(["-c", "command -v openssl && ldd $(command -v openssl)"]).output();
        let listed = which.expect("there is a shell");
        if !listed.status.success() {
            eprintln!("SKIPPED ALOUD: needs openssl with shared libraries");
            return None;
        }
        let context = Context::new(&[("Dockerfile", dockerfile), ("serve", SERVE), ("verify", VERIFY)]);
        context.write("openssl", WRAPPER);
        context.write("lib/empty", "");
        // The server sends it as it is.
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 19\r\nConnection: close\r\n\r\n";
        context.write("word", &format!("{head}word of the server\n"));
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        for (number, line) in listed.lines().enumerate() {
            let paths = line.split_whitespace().filter(|word| word.starts_with('/'));
            for path in paths.map(Path::new) {
                let name = path.file_name().and_then(|name| name.to_str()).expect("a file");
                let to = match number {
                    0 => "openssl.bin".to_owned(),
                    _ if name.starts_with("ld-") => "loader".to_owned(),
                    _ => format!("lib/{name}"),
                };
                fs::copy(path, context.at(&to)).expect("ours to write");
            }
        }
        for program in ["openssl", "openssl.bin", "loader", "verify"] {
            fs::set_permissions(context.at(program), fs::Permissions::from_mode(0o755)).expect("ours");
        }
        let script = "set -e; new='req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj'; \
            openssl $new /CN=Corp -x509 -days 2 -keyout corp.key -out corp.pem; \
            openssl $new /CN=Other -x509 -days 2 -keyout other.key -out other.pem; \
            openssl $new /CN=localhost -keyout server.key -out server.csr; \
            echo subjectAltName=DNS:localhost > san; \
            openssl x509 -req -in server.csr -CA corp.pem -CAkey corp.key -CAcreateserial -days 2 -extfile san -out server.pem; \
            rm corp.key other.key server.csr san";
        let made =
            Command::new("sh").args(["-c", script]).current_dir(context.path()).output().expect("it starts");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        // Not where steps could find it.
        let authority = PathBuf::from(format!("{}.corp.pem", context.path()));
        fs::rename(context.at("corp.pem"), &authority).expect("ours");
        Some(Corp { context, authority })
    }

    /// A line of its certificate that nothing else has.
    fn line(&self) -> String {
        let pem = fs::read_to_string(&self.authority).expect("ours");
        pem.lines().nth(3).expect("certificates have more lines").to_owned()
    }

    /// Nothing that is kept has it.
    #[track_caller]
    fn is_nowhere(&self, store: &Store) {
        let found = Command::new("grep").args(["-rlF", "--", &self.line(), text(&store.root())]).output();
        assert_eq!(String::from_utf8_lossy(&found.expect("grep runs").stdout), "");
    }
}

impl Drop for Corp {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.authority);
    }
}

#[test]
fn a_step_trusts_a_server_by_an_extra_certificate_only() {
    needs_root!();
    let dockerfile = "FROM busybox\n\
        RUN --network=none --mount=target=/t /t/verify | tee /said\n";
    let Some(corp) = Corp::new(dockerfile) else { return };
    let store = Store::with_busybox();
    let ca = text(&corp.authority);
    store.build(&corp.context, &["-t", "x"]).expect(0).says(&["verify error"]);
    assert!(!store.shell("x", "cat /said").contains("Verify return code: 0 (ok)"));
    // It is no part of the key.
    assert_eq!(store.build(&corp.context, &["--ca-cert", ca]).expect(0).ran(), [""; 0]);
    store.build(&corp.context, &["-t", "x", "--no-cache", "--ca-cert", ca]).expect(0);
    assert!(store.shell("x", "cat /said").contains("Verify return code: 0 (ok)"));
    assert_eq!(store.shell("x", "ls -A /dev/kiln /etc/ssl 2>/dev/null; env | grep -i cert; true"), "");
    assert!(!store.inspect("x").to_string().to_lowercase().contains("ssl_cert"));
    corp.is_nowhere(&store);
    // For every build of this machine.
    let config = store.beside("config.toml");
    fs::write(&config, format!("ca-certificates = [{ca:?}]\n")).expect("ours");
    let line = ["build", "--progress", "plain", "--no-cache", "-t", "x", corp.context.path()];
    let built = store.command(&line).env("KILN_CONFIG", &config).output().expect("kiln starts");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    assert!(store.shell("x", "cat /said").contains("Verify return code: 0 (ok)"));
    store.sound().expect("sound");
}

#[test]
fn what_knows_only_the_distributions_file_finds_it_there() {
    needs_root!();
    let Some(debian) = crate::harness::base("debian-bookworm.tar") else {
        eprintln!("SKIPPED ALOUD: needs KILN_TEST_BASES with debian-bookworm.tar");
        return;
    };
    // apt has GnuTLS, and asks no variable. What writes the list anew does so by renaming.
    let dockerfile = "FROM debian:bookworm\n\
        COPY other.pem /etc/ssl/certs/ca-certificates.crt\n\
        RUN --network=none --mount=target=/t . /t/serve; /usr/lib/apt/apt-helper -o Acquire::Retries=0 download-file https://localhost:4433/word /got\n\
        RUN cp -p /etc/ssl/certs/ca-certificates.crt /copied && chown -R 0:0 /etc/ssl\n\
        RUN cd /etc/ssl/certs && cat ca-certificates.crt /etc/hostname > x.new && mv -f x.new ca-certificates.crt\n";
    let Some(corp) = Corp::new(dockerfile) else { return };
    let store = Store::empty();
    store.ok(&["import", text(&debian), "debian:bookworm"]);
    store.build(&corp.context, &["-t", "x"]).expect(1).says(&["ertificate"]);
    store.build(&corp.context, &["-t", "x", "--ca-cert", text(&corp.authority)]).expect(0);
    assert_eq!(store.shell("x", "cat /got"), "word of the server");
    let other = fs::read_to_string(corp.context.at("other.pem")).expect("ours");
    assert_eq!(store.shell("x", "cat /copied"), other.trim());
    let changed = store.shell("x", "cat /etc/ssl/certs/ca-certificates.crt");
    assert_eq!(changed, format!("{other}buildkitsandbox"));
    corp.is_nowhere(&store);
    store.sound().expect("sound");
}

#[test]
fn containers_trust_it_and_nothing_keeps_it() {
    needs_root!();
    let Some(corp) = Corp::new("FROM busybox\n") else { return };
    let store = Store::with_busybox();
    let (ca, volume) = (text(&corp.authority), format!("{}:/t:ro", corp.context.path()));
    let line = ["--network", "none", "-v", &volume, "busybox", "/t/verify"];
    let run = |flags: &[&str]| store.kiln(&[&["run"], flags, &line[..]].concat()).stdout;
    assert!(run(&["--rm"]).contains("verify error"));
    assert!(run(&["--rm", "--ca-cert", ca]).contains("Verify return code: 0 (ok)"));
    // With a monitor, and again by its name.
    assert!(run(&["--name", "web", "--ca-cert", ca]).contains("Verify return code: 0 (ok)"));
    assert!(store.kiln(&["start", "-a", "web"]).stdout.contains("verify error"));
    let config = store.beside("config.toml");
    fs::write(&config, format!("ca-certificates = [{ca:?}]\n")).expect("ours");
    let again =
        store.command(&["start", "-a", "web"]).env("KILN_CONFIG", &config).output().expect("it starts");
    assert!(String::from_utf8_lossy(&again.stdout).contains("Verify return code: 0 (ok)"), "{again:?}");
    assert!(!store.ok(&["inspect", "web"]).stdout.contains("SSL_CERT_FILE"));
    store.ok(&["commit", "web", "kept"]);
    assert_eq!(store.shell("kept", "env | grep -i cert; ls -A /dev/kiln 2>/dev/null; true"), "");
    corp.is_nowhere(&store);
    store.ok(&["rm", "web"]);
}

#[test]
fn what_is_no_certificate_is_refused_with_a_reason() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nRUN true\n"), ("der", "\u{30}\u{1}")]);
    context.write("key.pem", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    let at = |name: &str| text(&context.at(name)).to_owned();
    let (der, key) = (at("der"), at("key.pem"));
    store.build(&context, &["--ca-cert", "/no/such/file"]).expect(4).says(&["/no/such/file", "No such file"]);
    store.build(&context, &["--ca-cert", &der]).expect(2).says(&[&der, "no certificate", "-inform der"]);
    store.build(&context, &["--ca-cert", &key]).expect(2).says(&["private key"]);
    store.kiln(&["run", "--rm", "--ca-cert", &der, "busybox", "true"]).expect(125).says(&["no certificate"]);
    store.kiln(&["create", "--ca-cert", &der, "busybox", "true"]).expect(2).says(&["ca-certificates"]);
    let config = store.beside("config.toml");
    fs::write(&config, "ca-certificates = [\"corp.pem\"]\n").expect("ours");
    let line = ["build", context.path()];
    let refused = store.command(&line).env("KILN_CONFIG", &config).output().expect("kiln starts");
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no absolute path"), "{refused:?}");
    assert_eq!(store.ok(&["ps", "-aq"]).stdout, "");
}
