//! Passwords, helpers, certificates.

use std::fs;
use std::io::{Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::server::{Bench, Registry, context, needs_programs};
use crate::harness::{Outcome, needs_root, text};

fn login(bench: &Bench, registry: &Registry, password: &str) -> Outcome {
    typed(bench.command(&["login", "-u", "user", "--password-stdin", &registry.host()]), password)
}

fn typed(mut command: Command, password: &str) -> Outcome {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(format!("{password}\n").as_bytes()).and_then(|()| file.rewind()).unwrap();
    Outcome::of(command.stdin(file).output().unwrap())
}

/// Trusts the registry's authority from now on.
fn trust(bench: &Bench, registry: &Registry) {
    let config = format!("ca-certificates = [\"{}\"]\n", text(&registry.authority()));
    bench.write("kiln.toml", config);
}

#[test]
fn a_registry_behind_tls_and_a_password_is_reached_with_both() {
    needs_root!();
    needs_programs!("docker-registry", "openssl");
    let (registry, bench) = (Registry::guarded(), Bench::new());
    let name = registry.name("team/app");
    bench.build(&context(), &["-t", &name]).expect(0);
    let unknown = bench.kiln(&["push", &name]).expect(5);
    unknown.says(&["certificate", &format!("certs.d/{}/ca.crt", registry.host())]);
    // As docker has it, in a directory for the host.
    let place = format!("docker/certs.d/{}/ca.crt", registry.host());
    bench.write(&place, fs::read(registry.authority()).unwrap());
    let denied = bench.kiln(&["push", &name]).expect(5);
    denied.says(&[&format!("`kiln login {}`", registry.host())]);
    fs::remove_file(bench.at(&place)).unwrap();

    trust(&bench, &registry);
    let wrong = login(&bench, &registry, "canary-wrong").expect(5).says(&["refuses"]);
    assert!(!bench.at("docker/config.json").exists() && !wrong.stderr.contains("canary"), "{wrong:?}");
    let good = login(&bench, &registry, "right-horse").expect(0).says(&["warning: the password is in"]);
    assert!(good.stdout.contains("logged in"), "{good:?}");
    let file = bench.at("docker/config.json");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let pushed = bench.kiln(&["push", &name]).expect(0);
    assert!(pushed.stdout.contains("4 blobs sent") && pushed.stderr.is_empty(), "{pushed:?}");

    let fresh = Bench::empty();
    trust(&fresh, &registry);
    fresh.kiln(&["pull", &name]).expect(5).says(&["hint: `kiln login"]);
    fresh.write("docker/config.json", fs::read(&file).unwrap());
    // Readable for others: it is used, and said.
    fs::set_permissions(fresh.at("docker/config.json"), fs::Permissions::from_mode(0o644)).unwrap();
    fresh.kiln(&["pull", &name]).expect(0).says(&["others can read the credentials"]);
    assert_eq!(fresh.id(&name), bench.id(&name));
    bench.ok(&["logout", &registry.host()]);
    bench.kiln(&["push", &name]).expect(5).says(&["hint: `kiln login"]);
    assert!(bench.ok(&["logout", &registry.host()]).contains("nothing left"));
}

#[test]
fn a_helper_keeps_credentials_and_only_one_from_the_system_is_asked() {
    needs_root!();
    needs_programs!("docker-registry", "openssl");
    let (registry, bench) = (Registry::guarded(), Bench::new());
    trust(&bench, &registry);
    let name = registry.name("team/app");
    bench.build(&context(), &["-t", &name]).expect(0);
    bench.write("docker/config.json", r#"{"credsStore":"test"}"#);
    let kept = bench.at("kept");
    let helper = format!(
        "#!/bin/sh\ncase $1 in\nstore) cat > {kept};;\nget) cat > /dev/null; cat {kept} 2>/dev/null || \
         {{ echo credentials not found in native keychain; exit 1; }};;\nerase) cat > /dev/null; rm {kept};;\nesac\n",
        kept = text(&kept)
    );
    bench.write("bin/docker-credential-test", &helper);
    fs::set_permissions(bench.at("bin/docker-credential-test"), fs::Permissions::from_mode(0o755)).unwrap();
    let usual = std::env::var("PATH").unwrap();
    let with_path = |path: &str, args: &[&str]| {
        let mut command = bench.command(args);
        command.env("PATH", format!("{path}:{usual}"));
        command
    };
    let run = |path: &str, args: &[&str]| Outcome::of(with_path(path, args).output().unwrap());
    let bin = text(&bench.at("bin")).to_owned();
    run(&bin, &["push", &name]).expect(5).says(&["hint: `kiln login"]);
    let args = ["login", "-u", "user", "--password-stdin", &registry.host()];
    let stored = typed(with_path(&bin, &args), "right-horse").expect(0);
    assert!(stored.stderr.is_empty(), "{stored:?}");
    assert!(fs::read_to_string(&kept).unwrap().contains("right-horse"));
    assert!(!fs::read_to_string(bench.at("docker/config.json")).unwrap().contains("auths"));
    run(&bin, &["push", &name]).expect(0);
    // Where a build happens to be, nobody's helper is started.
    let mut here = with_path("bin:.", &["push", &name]);
    let outcome = Outcome::of(here.current_dir(bench.at("")).output().unwrap()).expect(2);
    outcome.says(&["docker-credential-test` is not there"]);
    run(&bin, &["logout", &registry.host()]).expect(0);
    assert!(!kept.exists());
}

#[test]
fn a_broken_file_of_credentials_is_named() {
    needs_root!();
    needs_programs!("docker-registry", "openssl");
    let (registry, bench) = (Registry::guarded(), Bench::empty());
    trust(&bench, &registry);
    bench.write("docker/config.json", "{\n\"auths\": nonsense\n}");
    bench.kiln(&["pull", &registry.name("x")]).expect(2).says(&["config.json, line 2"]);
    bench.kiln(&["login", "-u", "user", &registry.host()]).expect(2).says(&["--password-stdin"]);
    bench.kiln(&["login", "-u", "user", "--password-stdin", "no host"]).expect(2);
}

#[test]
fn a_registry_that_wants_a_certificate_is_shown_the_one_for_it() {
    needs_root!();
    needs_programs!("docker-registry", "openssl");
    let (registry, bench) = (Registry::certified(), Bench::new());
    trust(&bench, &registry);
    let name = registry.name("team/app");
    bench.build(&context(), &["-t", &name]).expect(0);
    bench.kiln(&["push", &name]).expect(5).says(&["NAME.cert"]);
    let place = |file: &str| format!("docker/certs.d/{}/{file}", registry.host());
    let [certificate, key] = registry.client();
    bench.write(&place("client.cert"), fs::read(certificate).unwrap());
    bench.kiln(&["push", &name]).expect(2).says(&["client.key"]);
    bench.write(&place("client.key"), fs::read(key).unwrap());
    assert!(bench.ok(&["push", &name]).contains("4 blobs sent"));
}

#[test]
fn a_registry_that_hangs_up_may_want_a_certificate() {
    needs_root!();
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = server.local_addr().unwrap();
    // Until this test's process ends.
    std::thread::spawn(move || server.incoming().for_each(drop));
    let name = format!("{host}/app");
    Bench::empty().kiln(&["pull", &name]).expect(5).says(&["hung up", "NAME.cert"]);
}
