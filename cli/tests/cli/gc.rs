//! Garbage collection: what goes, what stays, and who may work meanwhile.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{Context, Outcome, Running, Store, busybox_tar, needs_root, text};

const DOCKERFILE: &str = "FROM busybox\nRUN echo one > /one\nCOPY f /f\nRUN cat /f > /two\n";

fn built(store: &Store, name: &str, content: &str) -> Context {
    let context = Context::new(&[("Dockerfile", DOCKERFILE), ("f", content)]);
    store.build(&context, &["-t", name]).expect(0);
    context
}

#[track_caller]
fn in_order(store: &Store) {
    store.ok(&["fsck", "--deep"]);
}

/// Titles of the objects that a collection removed.
fn removed(outcome: &Outcome) -> Vec<(String, String)> {
    let told: Value = serde_json::from_str(&outcome.stdout).expect("gc prints JSON");
    let objects = told["objects"].as_array().expect("a list").iter();
    let word = |object: &Value, key: &str| object[key].as_str().unwrap_or_default().to_owned();
    let gone = objects.filter(|object| object["removed"] == true);
    gone.map(|object| (word(object, "title"), word(object, "reason"))).collect()
}

#[test]
fn what_a_name_leads_to_stays_and_old_cache_goes() {
    needs_root!();
    let store = Store::with_busybox();
    let context = built(&store, "app:1", "one");
    context.write("f", "two");
    store.build(&context, &["-t", "app:1"]).expect(0);
    let everything = store.holds();
    // Nothing is unreachable: the former image has no name, but it is there.
    assert_eq!(removed(&store.ok(&["gc", "--format", "json"])), []);
    assert_eq!(store.holds(), everything);

    let would = store.ok(&["gc", "--dry-run", "--keep-duration", "0s", "--format", "json"]);
    assert_eq!(store.holds(), everything, "a dry run changes nothing");
    let did = store.ok(&["gc", "--keep-duration", "0s", "--format", "json"]);
    // The second one may be a second later.
    let timeless = |told: Vec<(String, String)>| -> Vec<(String, String)> {
        let without = |reason: String| reason.split("last used").next().unwrap_or_default().to_owned();
        told.into_iter().map(|(title, reason)| (title, without(reason))).collect()
    };
    assert_eq!(timeless(removed(&would)), timeless(removed(&did)));
    let titles: Vec<String> = removed(&did).into_iter().map(|(title, _)| title).collect();
    for title in ["<none>", "[3/4] COPY f /f", "[4/4] RUN cat /f > /two"] {
        assert!(titles.contains(&title.to_owned()), "{titles:?}");
    }
    in_order(&store);
    // What the image needs is cache still.
    assert_eq!(store.build(&context, &["-t", "app:1"]).expect(0).ran(), [""; 0]);
    assert_eq!(store.shell("app:1", "cat /one /two"), "one\ntwo");
    context.write("f", "one");
    assert_eq!(store.build(&context, &[]).expect(0).ran().len(), 2, "that went");
}

#[test]
fn an_image_without_any_name_left_is_cache_until_it_is_collected() {
    needs_root!();
    let store = Store::with_busybox();
    let context = built(&store, "app:1", "one");
    store.ok(&["rmi", "app:1"]);
    store.ok(&["gc"]);
    assert_eq!(store.build(&context, &["-t", "app:1"]).expect(0).ran(), [""; 0]);
    store.ok(&["rmi", "app:1"]);
    store.ok(&["gc", "--max-store", "1kB"]).says(&["the limit does not hold"]);
    in_order(&store);
    assert_eq!(store.build(&context, &["-t", "app:1"]).expect(0).ran().len(), 3);
    assert_eq!(store.shell("busybox", "echo here"), "here");
}

#[test]
fn leftovers_of_killed_commands_are_swept() {
    needs_root!();
    let store = Store::with_busybox();
    let root = store.root();
    fs::write(root.join("ingest/dead"), vec![0; 100_000]).expect("ours");
    fs::write(root.join("locks/lease-00aa"), "").expect("ours");
    fs::create_dir_all(root.join("snapshots/trash/s.1.0/fs/dir")).expect("ours");
    fs::create_dir_all(root.join("snapshots/committed/orphan/fs")).expect("ours");
    fs::write(root.join("snapshots/committed/orphan/meta"), r#"{"version":1,"parent":null}"#).expect("ours");
    let hex = "aa".repeat(32);
    fs::create_dir_all(root.join("blobs/sha256/aa")).expect("ours");
    fs::write(root.join("blobs/sha256/aa").join(&hex), "half").expect("ours");
    let gone = removed(&store.ok(&["gc", "--format", "json"]));
    assert_eq!(gone, vec![(String::new(), "nothing refers to it".to_owned()); 2]);
    for left in [
        "ingest/dead",
        "locks/lease-00aa",
        "snapshots/trash/s.1.0",
        "snapshots/committed/orphan",
        &format!("blobs/sha256/aa/{hex}"),
    ] {
        assert!(!root.join(left).exists(), "{left}");
    }
    in_order(&store);
    assert_eq!(store.shell("busybox", "echo here"), "here");
}

#[test]
fn prune_asks_first() {
    needs_root!();
    let store = Store::with_busybox();
    built(&store, "app:1", "one");
    store.ok(&["rmi", "app:1"]);
    let before = store.holds();
    let answer = |text: &str| {
        let mut child = store
            .command(&["prune"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("kiln starts");
        child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("our child");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    store.kiln(&["prune"]).expect(2).says(&["--force"]);
    let (code, said) = answer("n\n");
    assert_eq!(code, Some(0));
    assert!(said.contains("Are you sure") && said.contains("nothing was removed"), "{said}");
    assert_eq!(store.holds(), before);
    let (code, said) = answer("y\n");
    assert_eq!(code, Some(0));
    assert!(said.contains("Total reclaimed space"), "{said}");
    assert_ne!(store.holds(), before);
    in_order(&store);
    assert_eq!(store.ok(&["images"]).stdout.lines().count(), 2, "busybox has a name");
    store.ok(&["prune", "--all", "--force"]);
    assert_eq!(store.holds().0, "");
    assert_eq!(fs::read_dir(store.root().join("snapshots/committed")).expect("ours").count(), 0);
}

#[test]
fn container_keeps_its_image_through_prune() {
    needs_root!();
    let store = Store::with_busybox();
    built(&store, "app:1", "one");
    let script = "echo ready >&2; until [ -e /out/go ]; do sleep 0.05; done; cat /one /two";
    let dir = tempfile::tempdir().expect("temporary directories can be made");
    let volume = format!("{}:/out", text(dir.path()));
    let args = ["run", "--rm", "--network", "none", "-v", &volume, "app:1", "sh", "-c", script];
    let mut container = Running::start(store.command(&args));
    container.wait_for("ready");
    let said = store.ok(&["prune", "--all", "--force"]).stdout;
    assert!(said.contains("removed image busybox:latest") && !said.contains("app:1"), "{said}");
    fs::write(dir.path().join("go"), "").expect("ours");
    assert_eq!(container.end().expect(0).stdout, "one\none");
    assert_eq!(store.shell("app:1", "cat /one"), "one");
    in_order(&store);
    store.ok(&["prune", "--all", "--force"]);
    assert_eq!(store.holds().0, "");
}

/// Ends the process that sleeps so long, once it does.
#[track_caller]
fn wake(seconds: &str) {
    let begun = Instant::now();
    let line = format!("sleep\0{seconds}\0");
    loop {
        let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
        let sleeps = |entry: &fs::DirEntry| {
            fs::read(entry.path().join("cmdline")).is_ok_and(|words| words == line.as_bytes())
        };
        let number = |entry: fs::DirEntry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?);
        if let Some(sleeper) = entries.filter(sleeps).find_map(number) {
            return kill_process(sleeper, Signal::KILL).expect("it sleeps");
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "nobody sleeps for {seconds}");
    }
}

#[test]
fn build_keeps_what_it_found_and_made_through_prune() {
    needs_root!();
    let store = Store::with_busybox();
    // Nobody else sleeps so long.
    let seconds = format!("31536037.{}", std::process::id());
    let dockerfile = format!(
        "FROM busybox AS one\nRUN echo cached > /cached\nFROM one\nRUN echo made > /made\n\
         RUN echo ready; sleep {seconds} || true\nCOPY --from=one /cached /again\n"
    );
    let context = Context::new(&[("Dockerfile", &dockerfile)]);
    store.build(&context, &["--target", "one"]).expect(0);
    let mut build =
        Running::start(store.command(&["build", "--progress", "plain", "-t", "app:1", context.path()]));
    build.wait_for("ready");
    for _ in 0..3 {
        store.ok(&["prune", "--all", "--force"]);
    }
    // However long that took, the build is where it was.
    wake(&seconds);
    build.end().expect(0);
    assert_eq!(store.shell("app:1", "cat /cached /made /again"), "cached\nmade\ncached");
    in_order(&store);
}

#[test]
fn builds_loads_and_containers_race_with_collection_and_lose_nothing() {
    needs_root!();
    let store = Store::with_busybox();
    let archive = store.beside("base.tar");
    store.ok(&["save", "-o", text(&archive), "busybox"]);
    let stop = store.beside("stop");
    let rounds = 6;
    std::thread::scope(|scope| {
        let (store, archive, stop) = (&store, &archive, &stop);
        let collector = scope.spawn(move || {
            let mut runs = 0;
            while !stop.exists() {
                store.ok(&["gc", "--keep-duration", "0s"]);
                runs += 1;
            }
            runs
        });
        let workers: Vec<_> = (0..3)
            .map(|worker| {
                scope.spawn(move || {
                    for round in 0..rounds {
                        // Shared by all, then its own.
                        let dockerfile = format!(
                            "FROM busybox\nRUN echo {round} > /round\nRUN echo {worker} > /worker\nFROM busybox\nCOPY --from=0 /round /worker /\n"
                        );
                        let context = Context::new(&[("Dockerfile", &dockerfile)]);
                        let name = format!("app:{worker}");
                        store.build(&context, &["-t", &name]).expect(0);
                        assert_eq!(store.shell(&name, "cat /round /worker"), format!("{round}\n{worker}"));
                        store.build(&context, &[]).expect(0);
                        if worker == 0 {
                            store.ok(&["load", "-q", "-i", text(archive)]);
                        } else {
                            store.ok(&["rmi", &name]);
                        }
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().expect("a worker's assertion");
        }
        fs::write(stop, "").expect("ours");
        assert!(collector.join().expect("the collector's assertion") > 0);
    });
    in_order(&store);
    assert_eq!(store.shell("app:0", "cat /round /worker"), format!("{}\n0", rounds - 1));
}

#[test]
fn policy_in_the_configuration_is_kept_after_builds() {
    needs_root!();
    let store = Store::with_busybox();
    let context = built(&store, "app:1", "one");
    context.write("f", "two");
    let config = store.beside("config.toml");
    fs::write(&config, "[gc]\nkeep-duration = \"0s\"\n").expect("ours");
    let build = |config: &std::path::Path| {
        let mut command = store.command(&["build", "--progress", "plain", "-t", "app:1", context.path()]);
        command.env("KILN_CONFIG", config);
        Running::start(command).end()
    };
    let images = || store.ok(&["images", "--quiet"]).stdout.lines().count();
    let begun = Instant::now();
    build(&config).expect(0);
    assert_eq!(images(), 2, "the former app:1 has gone by itself");
    in_order(&store);
    // Not after a build that made nothing, and not twice a minute.
    context.write("f", "three");
    build(&config).expect(0);
    // Unless it has become another minute.
    let is_busy = begun.elapsed() > Duration::from_secs(59);
    assert!(images() == 3 || is_busy, "{}", images());
    // Without a flag, `gc` keeps to the same policy.
    let mut gc = store.command(&["gc"]);
    gc.env("KILN_CONFIG", &config);
    Running::start(gc).end().expect(0);
    assert_eq!(images(), 2);

    fs::write(&config, "[gc]\nmax-store = 7\n").expect("ours");
    build(&config).expect(2).says(&["config.toml", "line 2"]);
    build(&store.beside("absent.toml")).expect(2).says(&["absent.toml"]);
    for wrong in [["--max-store", "much"], ["--keep-duration", "7"], ["--min-free", "101%"]] {
        store.kiln(&["gc", wrong[0], wrong[1]]).expect(2).says(&[wrong[1]]);
    }
}

#[test]
fn cache_mounts_go_with_the_cache_unless_a_step_uses_them() {
    needs_root!();
    let store = Store::with_busybox();
    let step = |script: &str| format!("FROM busybox\nRUN --mount=type=cache,id=things,target=/c {script}\n");
    let busy = Context::new(&[("Dockerfile", &step("echo x > /c/x; echo ready; sleep 600"))]);
    let mut build = Running::start(store.command(&["build", "--progress", "plain", busy.path()]));
    build.wait_for("ready");
    let mounts = || fs::read_dir(store.root().join("cache-mounts")).expect("ours").count();
    store.ok(&["prune", "--force"]);
    assert_eq!(mounts(), 1);
    build.signal(Signal::TERM);
    build.end().expect(130);
    store.ok(&["gc"]);
    assert_eq!(mounts(), 1);
    let said = store.ok(&["prune", "--force"]).stdout;
    assert!(said.contains("removed cache mount things"), "{said}");
    assert_eq!(mounts(), 0);
}

// In a mount namespace of its own: a store of 48 MiB, full to the last byte.
const FULL: &str = r#"
set -e
kiln=$1 tar=$2 context=$3
mkdir -p "$KILN_ROOT"
mount -t tmpfs -o size=48m,mode=700 tmpfs "$KILN_ROOT"
"$kiln" import "$tar" busybox:latest -c 'ENV PATH=/bin' > /dev/null
"$kiln" build --quiet -t app:1 "$context" > /dev/null
"$kiln" rmi app:1 > /dev/null
cat /dev/zero > "$KILN_ROOT/filler" 2> /dev/null || true
"$kiln" prune --force
rm "$KILN_ROOT/filler"
"$kiln" fsck --deep
"$kiln" build --quiet -t app:1 "$context" > /dev/null
"$kiln" run --network none app:1 cat /made
"#;

#[test]
fn a_disk_that_is_full_to_the_last_byte_can_be_cleared() {
    needs_root!();
    let store = Store::empty();
    let tar = busybox_tar(&store.beside(""));
    let script = "dd if=/dev/zero of=/large bs=1k count=3000 2> /dev/null; echo made > /made";
    let context = Context::new(&[("Dockerfile", &format!("FROM busybox\nRUN {script}\n"))]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", FULL, "sh", env!("CARGO_BIN_EXE_kiln"), text(&tar), context.path()]);
    command.env("KILN_ROOT", store.root());
    let output = Running::start(command).end().expect(0);
    assert!(output.stdout.contains("Total reclaimed space: 3."), "{}", output.stdout);
    assert!(output.stdout.ends_with("made\n"), "{}", output.stdout);
}

#[test]
fn space_is_set_aside_again_when_a_collection_stops_early() {
    needs_root!();
    let store = Store::with_busybox();
    let reserve = store.root().join("db/reserve");
    // As a collection leaves it that found the disk full.
    let _ = fs::remove_file(&reserve);
    let pins = store.root().join("locks/pins");
    let _ = fs::remove_file(&pins);
    fs::create_dir(&pins).unwrap();
    let stopped = store.kiln(&["gc"]);
    assert_ne!(stopped.code, Some(0));
    assert!(stopped.stderr.contains("locks/pins"), "{}", stopped.stderr);
    assert!(reserve.exists());
}
