//! `kiln cache-mount`: the directories of `RUN --mount=type=cache` outside of builds.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::harness::{Context, Outcome, Running, Store, needs_root, text};

/// Builds a step with these caches, which runs `script`.
#[track_caller]
fn step(store: &Store, mounts: &str, script: &str) -> Outcome {
    let dockerfile = format!("FROM busybox\nRUN {mounts} {script}\n");
    let context = Context::new(&[("Dockerfile", &dockerfile)]);
    store.build(&context, &["--network", "none"]).expect(0)
}

fn ids(store: &Store, args: &[&str]) -> Vec<String> {
    let lines = store.ok(&[&["cache-mount", "ls", "--format", "json"], args].concat()).stdout;
    let parse = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON");
    let id = |line: &str| parse(line)["ID"].as_str().expect("text").to_owned();
    let mut ids: Vec<String> = lines.lines().map(id).collect();
    ids.sort();
    ids
}

#[test]
fn cache_mounts_are_listed_and_removed() {
    needs_root!();
    let store = Store::with_busybox();
    assert_eq!(store.ok(&["cache-mount", "ls", "-q"]).stdout, "");
    step(&store, "--mount=type=cache,target=/c,id=npm", "dd if=/dev/zero of=/c/f bs=1M count=2");
    step(&store, "--mount=type=cache,target=/c,id=npm,uid=7", "touch /c/f");
    step(&store, "--mount=type=cache,target=/root/.cache", "touch /root/.cache/f");
    let table = store.ok(&["cache-mount", "ls"]).stdout;
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("CACHE MOUNT") && lines[0].contains("SHARED BY"), "{table}");
    assert_eq!(lines.len(), 4, "{table}");
    assert!(lines.iter().any(|line| line.contains("npm") && line.contains("2.1")), "{table}");
    assert_eq!(ids(&store, &[]), ["/root/.cache", "npm", "npm"]);
    assert_eq!(ids(&store, &["--filter", "id=n?m"]), ["npm", "npm"]);
    assert_eq!(ids(&store, &["--filter", "until=1h"]), [""; 0]);
    assert_eq!(ids(&store, &["--filter", "in-use=false"]).len(), 3);
    store.kiln(&["cache-mount", "ls", "--filter", "age=1"]).expect(2).says(&["id, until and in-use"]);
    // Two have this ID; each has a name.
    store.kiln(&["cache-mount", "export", "npm"]).expect(2).says(&["several cache mounts"]);
    let names = store.ok(&["cache-mount", "ls", "-q", "--filter", "id=npm"]).stdout;
    let first = names.lines().next().expect("two names");
    assert_eq!(first.len(), 12);
    store.ok(&["cache-mount", "rm", first]);
    assert_eq!(ids(&store, &[]), ["/root/.cache", "npm"]);
    store.kiln(&["cache-mount", "rm", "npm", "absent"]).expect(4).says(&["no cache mount \"absent\""]);
    assert_eq!(ids(&store, &[]).len(), 2, "nothing goes when a name is wrong");
    store.ok(&["cache-mount", "rm", "npm"]);
    store.kiln(&["cache-mount", "rm"]).expect(2);
    store.kiln(&["cache-mount", "rm", "--all", "npm"]).expect(2);
    store.ok(&["cache-mount", "rm", "--filter", "id=other"]);
    assert_eq!(ids(&store, &[]), ["/root/.cache"]);
    store.ok(&["cache-mount", "rm", "--all"]);
    assert_eq!(ids(&store, &[]), [""; 0]);
    store.sound().expect("sound");
}

#[test]
fn a_cache_mount_travels_as_a_tar() {
    needs_root!();
    let store = Store::with_busybox();
    step(
        &store,
        "--mount=type=cache,target=/c",
        "mkdir -p /c/d && echo content > /c/d/f && chown 5:6 /c/d/f && chmod 640 /c/d/f && ln -s d/f /c/link \
         && touch /c/.wh.name",
    );
    let tar = store.beside("cache.tar");
    store.ok(&["cache-mount", "export", "/c", "-o", text(&tar)]);
    let stdout = store.beside("stdout.tar");
    let mut command = store.command(&["cache-mount", "export", "/c", "-o", "-"]);
    assert!(command.stdout(File::create(&stdout).expect("ours")).status().expect("kiln starts").success());
    assert_eq!(fs::read(&tar).expect("ours"), fs::read(&stdout).expect("ours"));
    let listed = Command::new("tar").arg("-tvf").arg(&tar).output().expect("tar runs").stdout;
    let listed = String::from_utf8_lossy(&listed);
    assert!(listed.contains("-rw-r----- 5/6"), "{listed}");

    let other = Store::with_busybox();
    other.ok(&["cache-mount", "import", "/c", text(&tar)]);
    let look = "test \"$(cat /c/link)\" = content && stat -c '%a %u %g' /c/d/f /c && ls -a /c";
    let seen = step(&other, "--mount=type=cache,target=/c", look);
    seen.says(&["640 5 6", "755 0 0", ".wh.name"]);
    // Not without being told.
    other.kiln(&["cache-mount", "import", "/c", text(&tar)]).expect(2).says(&["--force"]);
    step(&other, "--mount=type=cache,target=/c", "touch /c/more");
    // From standard input, packed, in the place of what is there.
    let packed = Command::new("gzip").arg("-k").arg(&tar).status().expect("gzip runs");
    assert!(packed.success());
    let mut command = other.command(&["cache-mount", "import", "--force", "/c", "-"]);
    command.stdin(File::open(store.beside("cache.tar.gz")).expect("made by gzip"));
    assert!(command.stdout(Stdio::null()).status().expect("kiln starts").success());
    step(&other, "--mount=type=cache,target=/c", "test -e /c/d/f && test ! -e /c/more");
    // One for another user is another one.
    other.ok(&["cache-mount", "import", "--uid", "7", "--gid", "8", "--mode", "0700", "/c", text(&tar)]);
    step(
        &other,
        "--mount=type=cache,target=/c,uid=7,gid=8,mode=0700",
        "stat -c '%a %u %g' /c && test -e /c/link",
    )
    .says(&["700 7 8"]);
    assert_eq!(ids(&other, &[]), ["/c", "/c"]);
    other.sound().expect("sound");
}

#[test]
fn a_cache_mount_that_a_build_uses_is_let_be() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = "FROM busybox\n\
        RUN --network=none --mount=type=cache,target=/c touch /c/kept; echo re\"\"ady; sleep 31536021\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    let mut build = Running::start(store.command(&["build", "--progress", "plain", context.path()]));
    build.wait_for("ready");
    assert_eq!(ids(&store, &["--filter", "in-use=true"]), ["/c"]);
    assert!(store.ok(&["cache-mount", "ls"]).stdout.contains("1 step"));
    let tar = store.beside("c.tar");
    fs::write(&tar, [0; 1024]).expect("ours");
    for line in [
        &["rm", "/c"][..],
        &["rm", "--all"],
        &["rm", "--filter", "id=*"],
        &["rm", "--filter", "in-use=true"],
        &["export", "/c", "-o", text(&store.beside("out.tar"))],
        &["import", "--force", "/c", text(&tar)],
    ] {
        let outcome = store.kiln(&[&["cache-mount"], line].concat());
        if line.contains(&"id=*") {
            // The pattern stops at a slash.
            outcome.expect(0);
        } else {
            outcome.expect(1).says(&["a build is using the cache mount \"/c\""]);
        }
    }
    assert!(!store.beside("out.tar").exists());
    build.signal(Signal::INT);
    build.end().expect(130);
    step(&store, "--mount=type=cache,target=/c", "test -e /c/kept");
    store.ok(&["cache-mount", "rm", "/c"]);
}

#[test]
fn a_hostile_tar_becomes_no_cache_mount() {
    needs_root!();
    let store = Store::with_busybox();
    step(&store, "--mount=type=cache,target=/c", "touch /c/kept");
    let (bomb, cut) = (store.beside("bomb.tar.gz"), store.beside("cut.tar"));
    let big = store.beside("big");
    File::create(&big).and_then(|file| file.set_len(64 << 20)).expect("ours");
    let packed =
        Command::new("tar").arg("-C").arg(store.beside("")).arg("-czf").arg(&bomb).arg("big").status();
    assert!(packed.expect("tar runs").success());
    fs::remove_file(&big).expect("ours");
    fs::write(&cut, b"no tar at all, but longer than a header ".repeat(40)).expect("ours");
    let refused = |id: &str, tar: &str, code: i32| {
        store.kiln(&["cache-mount", "import", "--force", "--max-layer", "1MB", id, tar]).expect(code)
    };
    for id in ["/c", "new"] {
        refused(id, text(&bomb), 8).says(&["--max-layer"]);
        refused(id, text(&cut), 6);
        refused(id, text(&store.beside("absent")), 4);
    }
    assert_eq!(ids(&store, &[]), ["/c"]);
    let left = fs::read_dir(store.root().join("cache-mounts")).expect("there").count();
    assert_eq!(left, 1, "half a cache mount is left");
    step(&store, "--mount=type=cache,target=/c", "test -e /c/kept");
    store.sound().expect("sound");
}
