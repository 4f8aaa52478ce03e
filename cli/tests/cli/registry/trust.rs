//! Which certificates are read, and when: the system's not before a server has shown one; and downloads of a build
//! trust whom registries' connections do.

use std::os::fd::OwnedFd;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

use super::own::Own;
use super::server::{Bench, Registry, context, make_certificates, needs_programs};
use crate::harness::{Context, Outcome, needs_root, text};

/// Whether a file is opened from now on.
struct Watch(OwnedFd);

impl Watch {
    fn on(path: &std::path::Path) -> Self {
        let watch = inotify::init(CreateFlags::NONBLOCK).expect("the kernel watches files");
        inotify::add_watch(&watch, path, WatchFlags::OPEN).expect("it is there");
        Self(watch)
    }

    /// Whether it was, since this was asked last.
    fn was_opened(&self) -> bool {
        match rustix::io::read(&self.0, &mut [0_u8; 4096]) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error, Errno::AGAIN);
                false
            }
        }
    }
}

#[test]
fn certificates_of_the_system_are_read_when_a_server_shows_one() {
    needs_root!();
    needs_programs!("docker-registry", "openssl");
    let (open, guarded, bench) = (Registry::open(), Registry::guarded(), Bench::new());
    let authority = guarded.authority();
    let watch = Watch::on(&authority);
    let kiln = |args: &[&str]| {
        let mut command = bench.command(args);
        command.env("SSL_CERT_FILE", text(&authority)).env("SSL_CERT_DIR", "/absent:/dev/null");
        Outcome::of(command.output().expect("kiln starts"))
    };
    let (plain, encrypted) = (open.name("team/app"), guarded.name("team/app"));
    bench.build(&context(), &["-t", &plain, "-t", &encrypted]).expect(0);
    // https is tried there, too, and comes to nothing.
    kiln(&["push", &plain]).expect(0);
    kiln(&["pull", &plain]).expect(0);
    assert!(!watch.was_opened());
    // It is known by the system's authorities, and wants a password.
    kiln(&["push", &encrypted]).expect(5).says(&["hint: `kiln login"]);
    assert!(watch.was_opened());
    // Without them it is not.
    bench.kiln(&["push", &encrypted]).expect(5).says(&["UnknownIssuer"]);

    let absent = text(&authority).replace("ca.pem", "absent.pem");
    let mut command = bench.command(&["push", &encrypted]);
    let unreadable = Outcome::of(command.env("SSL_CERT_FILE", &absent).output().expect("kiln starts"));
    unreadable.expect(5).says(&["the certificates in", "absent.pem cannot be read"]);
}

#[test]
fn authorities_in_a_directory_are_found_behind_those_of_the_file() {
    needs_root!();
    needs_programs!("docker-registry", "openssl");
    let (registry, bench) = (Registry::guarded(), Bench::new());
    let name = registry.name("team/app");
    bench.build(&context(), &["-t", &name]).expect(0);
    bench.write("certificates/ours.pem", std::fs::read(registry.authority()).unwrap());
    let other = Registry::guarded();
    let mut command = bench.command(&["push", &name]);
    // The file has an authority of the same name, which is another one.
    command.env("SSL_CERT_FILE", text(&other.authority()));
    command.env("SSL_CERT_DIR", format!("/absent:{}", text(&bench.at("certificates"))));
    let refused = Outcome::of(command.output().expect("kiln starts")).expect(5);
    refused.says(&["hint: `kiln login"]);
}

#[test]
fn a_download_trusts_whom_a_pull_does() {
    needs_root!();
    needs_programs!("openssl");
    let dir = tempfile::tempdir().unwrap();
    make_certificates(dir.path());
    let at = |name: &str| text(&dir.path().join(name)).to_owned();
    let own = Own::with(&["--tls-cert", &at("server.pem"), "--tls-key", &at("server.key")]);
    let (base, ca) = (own.name("base:1"), at("ca.pem"));
    let maker = Bench::empty();
    let made = Context::new(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    maker.build(&made, &["--push", "-t", &base, "--ca-cert", &ca]).expect(0);

    let url = format!("https://{}/v2/_catalog", own.address);
    let download = Context::new(&[("Dockerfile", &format!("FROM scratch\nADD {url} /list\n"))]);
    let both = Context::new(&[("Dockerfile", &format!("FROM {base}\nADD {url} /list\n"))]);
    let build = |bench: &Bench, context: &Context, args: &[&str], variable: Option<&str>| {
        let out = bench.at("out");
        let line = ["build", "--progress", "plain", "--no-cache", "-o", text(&out), context.path()];
        let mut command = bench.command(&[&line[..], args].concat());
        command.env_remove("SSL_CERT_DIR").env_remove("SSL_CERT_FILE");
        if let Some(file) = variable {
            command.env("SSL_CERT_FILE", file);
        }
        let outcome = Outcome::of(command.output().expect("kiln starts"));
        if outcome.code == Some(0) {
            let list = std::fs::read_to_string(out.join("list")).unwrap();
            assert!(list.contains("\"base\""), "{list}");
        }
        outcome
    };
    let bench = Bench::empty();
    build(&bench, &download, &[], None).expect(5).says(&["127.0.0.1", "ertificate"]);
    build(&bench, &download, &["--ca-cert", &ca], None).expect(0);
    build(&bench, &download, &[], Some(&ca)).expect(0);
    // Another authority of the same name is another one.
    let other = tempfile::tempdir().unwrap();
    make_certificates(other.path());
    let other = text(&other.path().join("ca.pem")).to_owned();
    build(&bench, &download, &["--ca-cert", &other], None).expect(5).says(&["ertificate"]);
    // The system's stay beside it.
    build(&bench, &download, &["--ca-cert", &other], Some(&ca)).expect(0);
    // Base image and download by one word.
    build(&Bench::empty(), &both, &["--ca-cert", &ca], None).expect(0);
    build(&Bench::empty(), &both, &[], Some(&ca)).expect(0);
    let configured = Bench::empty();
    configured.write("kiln.toml", format!("ca-certificates = [{ca:?}]\n"));
    build(&configured, &both, &[], None).expect(0);
    configured.store.sound().unwrap();
}
