//! A real registry on a port of its own, gone with its value, and a kiln that knows nothing but it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::harness::{Context, Outcome, Store, text};

/// bcrypt of `right-horse`.
pub(super) const HTPASSWD: &str = "user:$2b$04$om4aILnRDyIuTYtbc2RffejFJCYYpvVe9w3cNIv8pY1PXJ5jh3Qc6\n";

/// Returns from the test, aloud, unless this machine has these programs.
macro_rules! needs_programs {
    ($($name:literal),*) => {
        for name in [$($name),*] {
            if std::process::Command::new(name).arg("--version").output().is_err() {
                eprintln!("SKIPPED ALOUD: needs {name}");
                return;
            }
        }
    };
}
pub(super) use needs_programs;

/// Debian's docker-registry.
pub(super) struct Registry {
    child: Child,
    dir: TempDir,
    pub(super) port: u16,
    guard: Guard,
}

/// Whom a registry lets in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guard {
    Nobody,
    Password,
    Certificate,
    /// Whoever has a token of the server at this port, signed with the key of `tokens.pem`.
    Token(u16),
}

impl Registry {
    /// One that speaks plain http and asks nobody who he is.
    pub(super) fn open() -> Self {
        Self::start(Guard::Nobody)
    }

    /// One that speaks TLS, with a certificate of an authority of its own, and wants a password.
    pub(super) fn guarded() -> Self {
        Self::start(Guard::Password)
    }

    /// One that speaks TLS and wants a certificate of that authority.
    pub(super) fn certified() -> Self {
        Self::start(Guard::Certificate)
    }

    /// One that speaks plain http and wants tokens of the server at this port of loopback, signed with the key of
    /// the certificate in `dir`, `tokens.pem`.
    pub(super) fn with_tokens(dir: TempDir, port: u16) -> Self {
        Self::start_in(dir, Guard::Token(port))
    }

    fn start(guard: Guard) -> Self {
        Self::start_in(tempfile::tempdir().expect("temporary directories can be made"), guard)
    }

    fn start_in(dir: TempDir, guard: Guard) -> Self {
        let at = |name: &str| text(&dir.path().join(name)).to_owned();
        let mut config = format!(
            "version: 0.1\nlog: {{level: info, formatter: text}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n",
            at("data")
        );
        config.push_str("http:\n  addr: 127.0.0.1:0\n  secret: of-the-test\n");
        if let Guard::Token(port) = guard {
            config.push_str(&format!(
                "auth:\n  token:\n    realm: http://127.0.0.1:{port}/token\n    service: test\n    issuer: tests\n    \
                 rootcertbundle: {}\n",
                at("tokens.pem")
            ));
        } else if guard != Guard::Nobody {
            make_certificates(dir.path());
            let (pem, key, ca) = (at("server.pem"), at("server.key"), at("ca.pem"));
            config.push_str(&format!("  tls:\n    certificate: {pem}\n    key: {key}\n"));
            if guard == Guard::Certificate {
                config.push_str(&format!("    clientcas: [{ca}]\n"));
            } else {
                fs::write(at("htpasswd"), HTPASSWD).expect("ours to write");
                config.push_str(&format!("auth:\n  htpasswd: {{realm: test, path: {}}}\n", at("htpasswd")));
            }
        }
        fs::write(at("config.yml"), config).expect("ours to write");
        let mut child = Command::new("docker-registry")
            .args(["serve", &at("config.yml")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry starts");
        let mut log = BufReader::new(child.stderr.take().expect("piped above"));
        let mut seen = String::new();
        let port = loop {
            let from = seen.len();
            let read = log.read_line(&mut seen).expect("its log is text");
            assert!(read > 0, "docker-registry ended:\n{seen}");
            if let Some((_, rest)) = seen[from..].split_once("listening on 127.0.0.1:") {
                let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
                break digits.parse().expect("a port");
            }
        };
        // Somebody has to read what it says.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self { child, dir, port, guard }
    }

    /// `127.0.0.1:PORT`
    pub(super) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Where it keeps what it has.
    pub(super) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// `127.0.0.1:PORT/NAME`
    pub(super) fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.host())
    }

    /// The certificate of its authority.
    pub(super) fn authority(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// A certificate that it lets in, and its key.
    pub(super) fn client(&self) -> [PathBuf; 2] {
        ["client.pem", "client.key"].map(|name| self.dir.path().join(name))
    }

    /// Runs skopeo with this registry's rules.
    #[track_caller]
    pub(super) fn skopeo(&self, args: &[&str]) -> String {
        assert!(self.guard == Guard::Nobody, "skopeo gets no password here");
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", args[0]]);
        match args[0] {
            "copy" => command.args(["--src-tls-verify=false", "--dest-tls-verify=false"]),
            _ => command.arg("--tls-verify=false"),
        };
        let output = command.args(&args[1..]).output().expect("skopeo starts");
        Outcome::of(output).expect(0).stdout
    }

    /// The digest behind a name, as skopeo sees it.
    #[track_caller]
    pub(super) fn digest(&self, name: &str) -> String {
        let raw = self.skopeo(&["inspect", "--raw", &format!("docker://{}", self.name(name))]);
        kiln_oci::Digest::of(raw.as_bytes()).to_string()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn make_certificates(dir: &Path) {
    let script = "set -e\n\
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=test-ca \
          -addext basicConstraints=critical,CA:TRUE -keyout ca.key -out ca.pem\n\
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=registry -keyout server.key -out server.csr\n\
        printf 'subjectAltName=IP:127.0.0.1,DNS:localhost\\nextendedKeyUsage=serverAuth\\n' > extensions\n\
        openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 3000 -extfile extensions -out server.pem\n\
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=client -keyout client.key -out client.csr\n\
        printf 'extendedKeyUsage=clientAuth\\n' > extensions\n\
        openssl x509 -req -in client.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 3000 -extfile extensions -out client.pem\n";
    let made = Command::new("sh").args(["-c", script]).current_dir(dir).output().expect("sh starts");
    Outcome::of(made).expect(0);
}

/// A store and a user's configuration.
pub(super) struct Bench {
    pub(super) store: Store,
    home: TempDir,
}

impl Bench {
    /// With busybox in the store.
    pub(super) fn new() -> Self {
        Self::with(Store::with_busybox())
    }

    /// With nothing in the store.
    pub(super) fn empty() -> Self {
        Self::with(Store::empty())
    }

    fn with(store: Store) -> Self {
        Self { store, home: tempfile::tempdir().expect("temporary directories can be made") }
    }

    /// A file of the user's configuration: `docker/config.json`, `kiln.toml`.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    pub(super) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.at(name);
        fs::create_dir_all(path.parent().expect("below the home")).expect("ours to write");
        fs::write(path, content).expect("ours to write");
    }

    pub(super) fn command(&self, args: &[&str]) -> Command {
        let mut command = self.store.command(args);
        command.env("KILN_PULL", "missing").env("DOCKER_CONFIG", self.at("docker"));
        command.env("XDG_CONFIG_HOME", self.home.path());
        if self.at("kiln.toml").exists() {
            command.env("KILN_CONFIG", self.at("kiln.toml"));
        }
        command
    }

    pub(super) fn kiln(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args).output().expect("kiln starts"))
    }

    #[track_caller]
    pub(super) fn ok(&self, args: &[&str]) -> String {
        self.kiln(args).expect(0).stdout
    }

    pub(super) fn build(&self, context: &Context, args: &[&str]) -> Outcome {
        self.kiln(&[&["build", "--progress", "plain"], args, &[context.path()]].concat())
    }

    /// The image ID behind a name.
    #[track_caller]
    pub(super) fn id(&self, name: &str) -> String {
        self.store.inspect(name)["Id"].as_str().expect("a digest").to_owned()
    }
}

/// The digest that pull and push print.
#[track_caller]
pub(super) fn digest_in(stdout: &str) -> &str {
    stdout.lines().find_map(|line| line.strip_prefix("digest ")).expect("a digest is printed")
}

/// An image of two layers on busybox.
pub(super) fn context() -> Context {
    Context::new(&[
        ("Dockerfile", "FROM busybox\nRUN echo ran > /ran\nCOPY copied /\nLABEL of=test\n"),
        ("copied", "copied\n"),
    ])
}
