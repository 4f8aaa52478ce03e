//! `kiln shell`: a command where a step of the last build failed, or where another one has been.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::harness::{Context, Store, needs_root, text};

fn on_busybox(instructions: &str) -> Context {
    Context::new(&[("Dockerfile", &format!("FROM busybox\n{instructions}\n"))])
}

/// stdout of a command in a shell, without the line end.
#[track_caller]
fn shell(store: &Store, args: &[&str]) -> String {
    store.ok(&[&["shell"], args].concat()).stdout.trim_end().to_owned()
}

#[test]
fn a_failed_step_is_as_it_was() {
    needs_root!();
    let store = Store::with_busybox();
    let context = on_busybox(
        "ENV SETTING=value\n\
         RUN adduser -D builder || echo 'builder:x:1000:1000::/home/builder:/bin/sh' >> /etc/passwd\n\
         RUN echo before > /state && mkdir /work && chmod 777 /work\n\
         USER builder\nWORKDIR /work\n\
         RUN --network=none --mount=type=cache,target=/c,uid=1000 --mount=type=tmpfs,target=/t \
             --mount=type=secret,id=key,uid=1000 --mount=type=bind,target=/ctx \
             echo after > /work/made && echo cached > /c/f && false",
    );
    context.write("secret", "s3cret");
    context.write("file", "of the context");
    store.kiln(&["shell", "true"]).expect(125).says(&["no build has failed"]);
    let key = format!("id=key,src={}", text(&context.at("secret")));
    store.build(&context, &["--secret", &key]).expect(1);
    // The state it left, and the state before it.
    assert_eq!(shell(&store, &["cat", "/state", "/work/made"]), "before\nafter");
    assert_eq!(shell(&store, &["--before", "--", "ls", "-A", "/work"]), "");
    // The same process in everything but its command.
    let script = "pwd; id -u; echo $SETTING; cat /c/f /run/secrets/key /ctx/file; \
                  grep -c ' /t tmpfs' /proc/mounts; ls /sys/class/net";
    let seen = shell(&store, &["--", "sh", "-c", script]);
    assert_eq!(seen, "/work\n1000\nvalue\ncached\ns3cretof the context1\nlo");
    // Its exit code, and those of what cannot be started.
    store.kiln(&["shell", "sh", "-c", "exit 7"]).expect(7);
    store.kiln(&["shell", "absent"]).expect(127);
    store.kiln(&["shell", "/etc/passwd"]).expect(126);
    // A shell on standard input that is no terminal reads a script there.
    let script = store.beside("script");
    fs::write(&script, "echo $((6 * 7)) > /work/answer; cat /work/answer\n").expect("ours");
    let mut command = store.command(&["shell"]);
    command.stdin(fs::File::open(&script).expect("ours"));
    let output = command.output().expect("kiln starts");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "42\n");
    // Nothing that it does stays.
    assert_eq!(shell(&store, &["ls", "/work"]), "made");
    assert_eq!(store.active_snapshots(), [""; 0]);
    assert_eq!(store.mounts(), [""; 0]);
    store.sound().expect("sound");
}

#[test]
fn one_failed_step_is_kept_shown_and_collected() {
    needs_root!();
    let store = Store::with_busybox();
    let fail = |nth: u32| {
        let script = format!("RUN --network=none dd if=/dev/zero of=/f{nth} bs=1M count=3 && false");
        let context = on_busybox(&script);
        store.build(&context, &[]).expect(1);
        context
    };
    let none = store.snapshots();
    let _first = fail(1);
    let one = store.snapshots();
    assert_eq!(one, none + 1);
    let second = fail(2);
    assert_eq!(store.snapshots(), one, "one at most is kept");
    assert_eq!(shell(&store, &["ls", "/", "-d", "/f2"]), "/\n/f2");
    assert!(store.ok(&["du", "--verbose"]).stdout.contains("failed: [2/2] RUN"));
    store.sound().expect("sound");
    store.ok(&["gc"]);
    assert_eq!(store.snapshots(), none);
    let gone = store.ok(&["shell", "ls", "/"]);
    assert!(!gone.stdout.contains("f2"), "{}", gone.stdout);
    gone.says(&["was removed"]);
    // Builds that end well leave nothing, and the last one that failed is still that one.
    second.write("Dockerfile", "FROM busybox\n");
    store.build(&second, &[]).expect(0);
    store
        .kiln(&["shell", "true"])
        .expect(125)
        .says(&["no step `[2/2] RUN", "[1/1] FROM docker.io/library/busybox"]);
}

#[test]
fn any_step_of_the_last_build_has_a_shell() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        (
            "Dockerfile",
            "FROM busybox AS tools\nRUN --network=none echo tool > /tool\nFROM busybox\n\
             COPY --from=tools /tool /a\nCOPY file /b\nRUN --network=none cat /a /b > /c\n",
        ),
        ("file", "content\n"),
    ]);
    store.kiln(&["shell", "--step", "2", "true"]).expect(125).says(&["nothing was built"]);
    // Also of one that ran every step anew.
    store.build(&context, &["--no-cache", "-t", "x"]).expect(0);
    assert_eq!(shell(&store, &["--step", "4", "cat", "/c"]), "tool\ncontent");
    assert_eq!(shell(&store, &["--step", "4", "--before", "ls", "/a", "/b"]), "/a\n/b");
    assert_eq!(shell(&store, &["--step", "3", "cat", "/b"]), "content");
    assert_eq!(shell(&store, &["--step", "3", "--before", "--", "sh", "-c", "cat /b || cat /a"]), "tool");
    assert_eq!(shell(&store, &["--step", "tools:2", "cat", "/tool"]), "tool");
    store.kiln(&["shell", "--step", "9", "true"]).expect(125).says(&["no step 9", "COPY file /b"]);
    store.kiln(&["shell", "--step", "x", "true"]).expect(125).says(&["STAGE:2"]);
    store.kiln(&["shell", "--step", "tools:1", "--before", "true"]).expect(125).says(&["stands on nothing"]);
    // What it is asked for by is nobody else's to read.
    let record = store.root().join("state/last-build.json");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(record).expect("written").permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn an_image_without_a_shell_is_lent_one() {
    needs_root!();
    let store = Store::with_busybox();
    let context =
        Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /file\nRUN --network=none [\"/absent\"]\n")]);
    context.write("file", "content\n");
    store.build(&context, &[]).expect(1);
    let script = store.beside("script");
    fs::write(&script, "cat /file; ls /; touch /.kiln/x || echo read-only\n").expect("ours");
    let run = |path: &Path| {
        let mut command = store.command(&["shell"]);
        command.stdin(fs::File::open(&script).expect("ours")).env("PATH", path);
        crate::harness::Outcome::of(command.output().expect("kiln starts"))
    };
    let host = std::env::var_os("PATH").unwrap_or_default();
    let seen = run(Path::new(&host)).expect(0).says(&["had written nothing"]);
    assert!(seen.stdout.starts_with("content\n") && seen.stdout.ends_with("read-only\n"), "{}", seen.stdout);
    assert!(!store.build(&context, &[]).expect(1).stderr.contains(".kiln"));
    // Somewhere without one; a program of the image still runs, or is missed.
    let empty = store.beside("empty");
    for dir in ["empty", "empty/bin", "empty/usr"] {
        fs::create_dir_all(store.beside(dir)).expect("ours");
    }
    let hidden = format!(
        "mount --bind {0} $(dirname $(readlink -f /bin/busybox))/busybox && exec \"$@\"",
        text(&script)
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &hidden, "sh", env!("CARGO_BIN_EXE_kiln"), "shell"]);
    command.env("KILN_ROOT", store.root()).stdin(fs::File::open(&script).expect("ours"));
    let outcome = crate::harness::Outcome::of(command.output().expect("unshare is part of util-linux"));
    outcome.expect(125).says(&["no static busybox", "busybox-static"]);
    drop(empty);
}

#[test]
fn a_build_opens_the_shell_itself_on_a_terminal() {
    needs_root!();
    let store = Store::with_busybox();
    let context = on_busybox("RUN --network=none echo left > /left && false");
    let refused = store.build(&context, &["--on-error=shell"]).expect(1);
    refused.says(&["standard input is no terminal", "kiln shell"]);
    // script(1) gives it one.
    let line =
        format!("{} build --on-error=shell --progress plain {}", env!("CARGO_BIN_EXE_kiln"), context.path());
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--command", &line, "/dev/null"]).env("KILN_ROOT", store.root());
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().expect("script is part of util-linux");
    let mut stdin = child.stdin.take().expect("piped above");
    std::io::Write::write_all(&mut stdin, b"echo it was $(cat /left)\nexit 3\n").expect("it reads");
    let output = child.wait_with_output().expect("our child");
    drop(stdin);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("it was left"), "{said}");
    assert_eq!(output.status.code(), Some(1), "the build's own code: {said}");
    assert_eq!(store.active_snapshots(), [""; 0]);
}

#[test]
fn a_build_from_standard_input_cannot_be_asked_for_again() {
    needs_root!();
    let store = Store::with_busybox();
    store.build_piped(b"FROM busybox\nRUN --network=none false\n", "-", &[]).expect(1);
    store.kiln(&["shell", "true"]).expect(125).says(&["standard input, which is gone"]);
    // Nor one whose words are not to be kept.
    let context = on_busybox("ARG FROM\nRUN --network=none false");
    store.build(&context, &["--build-arg", "FROM=https://user:password@host/"]).expect(1);
    store.kiln(&["shell", "true"]).expect(125).says(&["a password in it"]);
    for name in ["last-build.json", "failed-build.json"] {
        let record = fs::read_to_string(store.root().join("state").join(name)).expect("written");
        assert!(!record.contains("password"), "{record}");
    }
}

#[test]
fn a_shell_cannot_open_the_callers_files_anew() {
    needs_root!();
    let store = Store::with_busybox();
    let context = on_busybox("RUN --network=none false");
    store.build(&context, &[]).expect(1);
    let path = store.beside("log");
    fs::write(&path, "secret\n").expect("ours");
    let log = fs::File::options().append(true).open(&path).expect("ours");
    let script = "timeout 1 cat /proc/$$/fd/1 >&2; : >/proc/$$/fd/1; cd /proc/$$/fd/0 && pwd >&2; echo out";
    let mut command = store.command(&["shell", "--", "sh", "-c", script]);
    command.stdin(fs::File::open("/etc").expect("a directory")).stdout(log);
    let output = command.stderr(std::process::Stdio::piped()).output().expect("kiln starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!said.contains("secret") && !said.contains("/etc\n"), "{said}");
    assert_eq!(fs::read_to_string(&path).expect("ours"), "secret\nout\n", "{said}");
}
