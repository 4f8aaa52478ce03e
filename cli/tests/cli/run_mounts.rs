//! `RUN --mount`, `--network`, `--security`: what a step gets besides its tree, and what it does not.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::harness::{Context, Running, Store, needs_root, text};

/// A context with a Dockerfile of these instructions on busybox.
fn on_busybox(instructions: &str, files: &[(&str, &str)]) -> Context {
    let dockerfile = format!("FROM busybox\n{instructions}\n");
    let context = Context::new(&[("Dockerfile", &dockerfile)]);
    for (name, content) in files {
        context.write(name, content);
    }
    context
}

/// Names in the top layer of `x`.
fn top_layer(store: &Store) -> Vec<String> {
    let (tar, dir) = (store.beside("x.tar"), store.beside("unpacked"));
    store.ok(&["save", "-o", text(&tar), "x"]);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).expect("ours to write");
    assert!(Command::new("tar").args(["-C", text(&dir), "-xf", text(&tar)]).status().expect("tar").success());
    let manifest = fs::read_to_string(dir.join("manifest.json")).expect("docker archives have one");
    let manifest: serde_json::Value = serde_json::from_str(&manifest).expect("JSON");
    let layers = manifest[0]["Layers"].as_array().expect("a list");
    let last = layers.last().and_then(|layer| layer.as_str()).expect("a layer");
    let listed = Command::new("tar").arg("-tf").arg(dir.join(last)).output().expect("tar runs").stdout;
    let names = String::from_utf8_lossy(&listed).into_owned();
    names
        .lines()
        .map(|name| name.trim_start_matches("./").to_owned())
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn a_context_is_mounted_without_what_is_ignored_and_stays_as_it_is() {
    needs_root!();
    let store = Store::with_busybox();
    let context = on_busybox(
        "WORKDIR /work\n\
         RUN --mount=target=src,rw cp -r src/. /seen && touch src/new && rm src/a\n\
         RUN --mount=type=bind,source=sub,target=/sub,readonly cat /sub/b > /b; ! touch /sub/new",
        &[(".dockerignore", "*.log\n"), ("a", "a"), ("drop.log", ""), ("sub/b", "b")],
    );
    store.build(&context, &["-t", "x"]).expect(0);
    assert_eq!(
        store.shell("x", "cd /seen && find . -type f | sort; ls /work; cat /b"),
        "./.dockerignore\n./Dockerfile\n./a\n./sub/b\nb"
    );
    let left = fs::read_dir(context.path()).expect("ours").map(|entry| entry.expect("ours").file_name());
    let mut left: Vec<_> = left.collect();
    left.sort();
    assert_eq!(left, [".dockerignore", "Dockerfile", "a", "drop.log", "sub"]);
    assert_eq!(top_layer(&store), ["b"]);
}

#[test]
fn a_stage_and_an_image_are_mounted() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[(
        "Dockerfile",
        "FROM busybox AS tools\nRUN mkdir /tools && printf '#!/bin/sh\\necho made' > /tools/make && chmod +x /tools/make\n\
         FROM busybox\n\
         RUN --mount=from=tools,source=/tools,target=/opt/tools --mount=from=busybox,target=/img \
             /opt/tools/make > /out && cat /img/etc/passwd | head -n 1 >> /out\n",
    )]);
    store.build(&context, &["-t", "x"]).expect(0);
    assert!(store.shell("x", "cat /out").starts_with("made\nroot:"));
    assert_eq!(top_layer(&store), ["out"]);
}

#[test]
fn a_cache_survives_builds_until_one_without_cache() {
    needs_root!();
    let store = Store::with_busybox();
    let build = |name: &str, flags: &[&str]| {
        let run = format!(
            "RUN --mount=type=cache,target=/cache : {name}; ls /cache > /before; echo {name} > /cache/{name}"
        );
        store.build(&on_busybox(&run, &[]), &[&["-t", "x"], flags].concat()).expect(0);
        store.shell("x", "cat /before")
    };
    assert_eq!(build("one", &[]), "");
    assert_eq!(build("two", &[]), "one");
    assert_eq!(build("three", &["--no-cache"]), "");
    assert_eq!(build("four", &[]), "three");
    assert_eq!(top_layer(&store), ["before"]);
}

#[test]
fn a_locked_cache_is_used_by_one_step_at_a_time() {
    needs_root!();
    let store = Store::with_busybox();
    let stage = |name: &str| {
        format!(
            "FROM busybox AS {name}\nRUN --mount=type=cache,id=shared,target=/c,sharing=locked : {name}; \
             [ ! -e /c/busy ] && touch /c/busy && i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; rm /c/busy\n"
        )
    };
    let dockerfile = format!(
        "{}{}{}FROM busybox\nCOPY --from=a /etc/passwd /a\nCOPY --from=b /etc/passwd /b\nCOPY --from=c /etc/passwd /c\n",
        stage("a"),
        stage("b"),
        stage("c")
    );
    store.build(&Context::new(&[("Dockerfile", &dockerfile)]), &[]).expect(0);
}

#[test]
fn a_cancelled_build_does_not_wait_for_a_locked_cache() {
    needs_root!();
    let store = Store::with_busybox();
    let run = |word: &str| {
        format!("RUN --mount=type=cache,target=/c,sharing=locked echo {word}-runs; sleep 31536030")
    };
    let (first, second) = (on_busybox(&run("first"), &[]), on_busybox(&run("second"), &[]));
    let start =
        |context: &Context| Running::start(store.command(&["build", "--progress", "plain", context.path()]));
    let mut holds = start(&first);
    holds.wait_for("first-runs");
    let mut waits = start(&second);
    waits.wait_for("waiting for another step");
    waits.signal(rustix::process::Signal::TERM);
    waits.end().expect(130);
    holds.signal(rustix::process::Signal::TERM);
    holds.end().expect(130);
}

#[test]
fn a_private_cache_in_use_is_a_second_one() {
    needs_root!();
    let store = Store::with_busybox();
    let holds =
        on_busybox("RUN --mount=type=cache,target=/c touch /c/held; echo hol\"\"ding; sleep 31536040", &[]);
    let mut holder = Running::start(store.command(&["build", "--progress", "plain", holds.path()]));
    holder.wait_for("holding");
    let run = "RUN --mount=type=cache,target=/c,sharing=private ls /c > /private\n\
               RUN --mount=type=cache,target=/c ls /c > /shared";
    store.build(&on_busybox(run, &[]), &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cat /private; echo; cat /shared"), "\nheld");
    holder.signal(rustix::process::Signal::TERM);
    holder.end().expect(130);
}

#[test]
fn a_cache_of_another_user_is_that_users() {
    needs_root!();
    let store = Store::with_busybox();
    let run = "RUN echo 'app:x:1000:1000::/:/bin/sh' >> /etc/passwd\nUSER app\n\
               RUN --mount=type=cache,target=/c,uid=1000,gid=1000,mode=0700 touch /c/mine && stat -c '%a %u' /c > /tmp/out";
    store.build(&on_busybox(run, &[]), &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cat /tmp/out"), "700 1000");
}

#[test]
fn tmpfs_is_empty_and_gone_afterwards() {
    needs_root!();
    let store = Store::with_busybox();
    let run = "RUN --mount=type=tmpfs,target=/t,size=1m ls /t > /before && ! head -c 2000000 /dev/zero > /t/big\n\
               RUN --mount=type=tmpfs,target=/dev/shm,size=4k df -k /dev/shm | awk 'END { print $2 }' > /shm";
    store.build(&on_busybox(run, &[]), &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cat /before; ls -d /t 2>/dev/null; cat /shm"), "4");
}

const SECRET: &str = "hunter2hunter2";

fn secret_file(store: &Store) -> String {
    let path = store.beside("token");
    fs::write(&path, format!("{SECRET}\n")).expect("ours to write");
    format!("id=token,src={}", path.display())
}

/// Files below `dir` that hold the secret.
fn files_with_secret(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let kind = entry.file_type().expect("ours");
        if kind.is_dir() {
            files_with_secret(&entry.path(), found);
        } else if kind.is_file()
            && let Ok(bytes) = fs::read(entry.path())
            && bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes())
        {
            found.push(entry.path().display().to_string());
        }
    }
}

#[test]
fn a_secret_is_read_by_its_step_and_held_by_nothing_else() {
    needs_root!();
    let store = Store::with_busybox();
    let secret = secret_file(&store);
    let run = "RUN --mount=type=secret,id=token sha256sum < /run/secrets/token > /sum && cat /run/secrets/token\n\
               RUN --mount=type=secret,id=token,env=TOKEN printf %s \"$TOKEN\" | sha256sum > /env-sum && env\n\
               RUN --mount=type=secret,id=token,target=/root/.npmrc,mode=0440,gid=7 stat -c '%a %u %g' /root/.npmrc > /stat\n\
               RUN --mount=type=secret,id=other [ ! -e /run/secrets ] && [ -z \"$TOKEN\" ]";
    let outcome = store.build(&on_busybox(run, &[]), &["-t", "x", "--secret", &secret]).expect(0);
    assert!(!outcome.stderr.contains(SECRET), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("TOKEN=***"), "{}", outcome.stderr);
    let sum = |data: &str| store.shell("busybox", &format!("printf '{data}' | sha256sum"));
    let line = format!("{SECRET}\\n");
    assert_eq!(store.shell("x", "cat /sum /env-sum"), format!("{}\n{}", sum(&line), sum(&line)));
    assert_eq!(store.shell("x", "cat /stat; ls /run /root/.npmrc 2>/dev/null; true"), "440 0 7");
    assert!(!store.inspect("x").to_string().contains(SECRET));
    let mut found = Vec::new();
    files_with_secret(&store.root(), &mut found);
    assert_eq!(found, [""; 0]);
}

#[test]
fn a_changed_secret_runs_nothing_again() {
    needs_root!();
    let store = Store::with_busybox();
    let context =
        on_busybox("RUN --mount=type=secret,id=TOKEN,required cat /run/secrets/TOKEN > /dev/null", &[]);
    let build = |value: &str| {
        let mut command =
            store.command(&["build", "--progress", "plain", "--secret", "id=TOKEN", context.path()]);
        Running::start({
            command.env("TOKEN", value);
            command
        })
        .end()
        .expect(0)
    };
    assert_eq!(build("one").ran().len(), 1);
    assert_eq!(build("two").ran(), [""; 0]);
}

#[test]
fn a_missing_required_secret_is_named_with_what_to_pass() {
    // "M14" of the catalogue.
    needs_root!();
    let store = Store::with_busybox();
    let run = "RUN --mount=type=secret,id=token,required=true cat /run/secrets/token";
    store.build(&on_busybox(run, &[]), &[]).expect(1).says(&[
        "Dockerfile:2",
        "\"token\"",
        "--secret id=token",
    ]);
    let ssh = "RUN --mount=type=ssh,required ssh-add -l";
    store.build(&on_busybox(ssh, &[]), &[]).expect(1).says(&["\"default\"", "--ssh default"]);
}

#[test]
fn a_bad_flag_is_named() {
    needs_root!();
    let store = Store::empty();
    let context = on_busybox("RUN true", &[]);
    let fails = |flags: &[&str], code: i32, texts: &[&str]| {
        store.build(&context, flags).expect(code).says(texts);
    };
    fails(&["--secret", "src=/x"], 2, &["no id"]);
    fails(&["--secret", "id=a,sorce=/x"], 2, &["sorce", "source"]);
    fails(&["--secret", "id=a,src=/no/such/file"], 4, &["/no/such/file"]);
    fails(&["--ssh", "default=/no/such/file"], 2, &["/no/such/file"]);
    fails(&["--ssh", &format!("default={}/Dockerfile", context.path())], 2, &["start an agent"]);
    fails(&["--allow", "everything"], 2, &["everything", "network.host"]);
}

#[test]
fn an_agent_lists_and_signs_for_a_step_and_does_nothing_else() {
    needs_root!();
    let tools = ["ssh-agent", "ssh-add", "ssh-keygen"];
    if tools.iter().any(|tool| Command::new(tool).arg("-?").output().is_err()) {
        eprintln!("SKIPPED ALOUD: needs openssh-client");
        return;
    }
    let Some(debian) = crate::harness::base("debian-bookworm.tar") else {
        eprintln!("SKIPPED ALOUD: needs KILN_TEST_BASES with debian-bookworm.tar");
        return;
    };
    let store = Store::empty();
    store.ok(&["import", text(&debian), "debian:bookworm"]);
    let socket = store.beside("agent");
    let mut agent =
        Command::new("ssh-agent").args(["-D", "-a", text(&socket)]).spawn().expect("checked above");
    let key = store.beside("key");
    let keygen =
        Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", text(&key)]).status();
    assert!(keygen.expect("checked above").success());
    // `ssh-add` fails until the agent listens.
    let add =
        || Command::new("ssh-add").arg(&key).env("SSH_AUTH_SOCK", &socket).output().expect("checked above");
    while !add().status.success() {
        assert!(agent.try_wait().expect("our child").is_none(), "the agent ended");
    }
    // perl speaks to the socket: first a list of keys (11), then an order to forget them all (19).
    let ask = "perl -MIO::Socket::UNIX -e '$s = IO::Socket::UNIX->new(Peer => $ENV{SSH_AUTH_SOCK}) || die $!; \
               for $kind (11, 19) { syswrite $s, pack(\"NC\", 1, $kind); sysread $s, $a, 4; \
               sysread $s, $b, unpack(\"N\", $a); print unpack(\"C\", $b), \" \" }' > /answers";
    let dockerfile =
        format!("FROM debian:bookworm\nRUN --mount=type=ssh {ask}\nRUN [ ! -e /run/buildkit ]\n");
    let context = Context::new(&[("Dockerfile", &dockerfile)]);
    let outcome = store.build(&context, &["-t", "x", "--ssh", &format!("default={}", socket.display())]);
    let left =
        Command::new("ssh-add").arg("-l").env("SSH_AUTH_SOCK", &socket).output().expect("checked above");
    agent.kill().expect("our child");
    agent.wait().expect("our child");
    outcome.expect(0);
    assert_eq!(store.shell("x", "cat /answers"), "12 5");
    assert!(left.status.success(), "the key is still there");
}

#[test]
fn a_step_that_asks_for_too_much_is_refused_with_the_flag_that_allows_it() {
    needs_root!();
    let store = Store::with_busybox();
    let host = on_busybox("RUN touch /marker\nRUN --network=host ls /sys/class/net > /net", &[]);
    let outcome = store.build(&host, &[]).expect(7).says(&["Dockerfile:3", "--allow network.host"]);
    assert_eq!(outcome.ran(), [""; 0], "nothing runs before the refusal");
    store.build(&host, &["-t", "x", "--allow", "network.host"]).expect(0);
    store.build(&host, &["--network", "host"]).expect(0);
    let insecure = on_busybox(
        "RUN --security=insecure grep CapEff /proc/self/status > /caps && mount -t tmpfs none /mnt2 2>/dev/null \
         || mount -t tmpfs none /tmp",
        &[],
    );
    store.build(&insecure, &[]).expect(7).says(&["--allow security.insecure"]);
    store.build(&insecure, &["--allow", "security.insecure"]).expect(0);
}

#[test]
fn odd_mounts_stay_inside() {
    needs_root!();
    let store = Store::with_busybox();
    let host = store.beside("host");
    fs::create_dir(&host).expect("ours to write");
    let links = format!("RUN ln -s {} /out && ln -s /proc /innocent\n", host.display());
    // "M05", "M06", "M07" of the catalogue, and a cache below a link.
    let run = "RUN --mount=type=tmpfs,target=../../x [ -d /x ]\n\
               RUN --mount=type=cache,id=../../../root,target=/c touch /c/mark\n\
               RUN --mount=type=bind,source=/../..,target=/x [ -f /x/Dockerfile ] && [ ! -d /x/etc ]\n\
               RUN --mount=type=cache,target=/out/deep touch /out/deep/mark";
    let context = on_busybox(&format!("{links}{run}"), &[]);
    symlink("/etc", Path::new(context.path()).join("link")).expect("ours to write");
    store.build(&context, &[]).expect(0);
    assert_eq!(fs::read_dir(&host).expect("ours").count(), 0);
    assert!(!Path::new("/root/mark").exists());
    let refused = on_busybox(&format!("{links}RUN --mount=type=tmpfs,target=/innocent true"), &[]);
    store.build(&refused, &[]).expect(7).says(&["/innocent"]);
    let missing = on_busybox("RUN --mount=type=bind,source=link,target=/x true", &[]);
    symlink("/etc", Path::new(missing.path()).join("link")).expect("ours to write");
    // The link is followed inside the context, where there is no /etc.
    store.build(&missing, &[]).expect(4).says(&["link"]);
}

#[test]
fn a_script_in_a_heredoc_runs_by_its_interpreter() {
    needs_root!();
    let store = Store::with_busybox();
    store
        .build(
            &on_busybox(
                "RUN <<EOF\n#!/bin/cat\nhello\nEOF\nRUN ls /dev/pipes 2>/dev/null || echo gone > /gone",
                &[],
            ),
            &["-t", "x"],
        )
        .expect(0);
    assert_eq!(store.shell("x", "cat /gone"), "gone");
}

#[test]
fn devices_made_by_a_step_do_not_open() {
    needs_root!();
    let store = Store::with_busybox();
    let run = "RUN mknod /zero c 1 5 && ! head -c 1 /zero\nRUN mknod /dev/zero2 c 1 5 && ! head -c 1 /dev/zero2\n\
               RUN --mount=type=cache,target=/c mknod /c/zero c 1 5 && ! head -c 1 /c/zero\n\
               RUN ! head -c 1 /zero && head -c 1 /dev/zero > /dev/null";
    store.build(&on_busybox(run, &[]), &[]).expect(0);
}
