//! The catalogue's cases of what kiln runs in: streams, directories, limits, masks, clocks (C06 to C09,
//! C12, C14 to C18).

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::{Context, Outcome, Store, busybox_tar, needs_root, test_as, text};
use crate::universal::Watch;

const SOURCE: i32 = 4;
const POLICY: i32 = 7;
const LIMIT: i32 = 8;

/// Kiln's command line behind a shell that sets something first, and keeps its environment.
fn behind(script: &str, kiln: &Command) -> Command {
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", &format!("{script}; exec \"$@\""), "sh"])
        .arg(kiln.get_program())
        .args(kiln.get_args());
    for (name, value) in kiln.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// A store with busybox and `app`, which has a layer more; its context, and `app` as an archive.
fn with_app() -> (Store, Context, String) {
    let store = Store::with_busybox();
    let dockerfile = "FROM busybox\nRUN --network=none head -c 100000 /dev/urandom > /made\nCOPY f /f\n";
    let context = Context::new(&[("Dockerfile", dockerfile), ("f", "f")]);
    store.build(&context, &["-t", "app"]).expect(0);
    let saved = store.beside("saved.tar");
    store.ok(&["save", "-o", text(&saved), "app"]);
    let saved = text(&saved).to_owned();
    (store, context, saved)
}

#[test]
fn c06_a_closed_standard_input_is_an_error_of_the_source() {
    needs_root!();
    let store = Store::with_busybox();
    let watch = Watch::new(&store);
    let context = Context::new(&[]);
    for line in [&["build", "-f", "-", context.path()][..], &["build", "-"], &["import", "-", "x"], &["load"]]
    {
        for script in ["exec <&-", "exec < /dev/null"] {
            let says = if line == ["load"] { "not an image archive" } else { "nothing came" };
            watch.refuses(&behind(script, &store.command(line)), SOURCE, &[says]);
        }
    }
}

#[test]
fn c07_a_context_that_is_none_is_named() {
    needs_root!();
    let store = Store::with_busybox();
    let watch = Watch::new(&store);
    let context =
        Context::new(&[("Dockerfile", "FROM busybox\n"), ("file", ""), ("dir/Dockerfile", "FROM busybox\n")]);
    symlink("loop", context.at("loop")).expect("ours");
    for (place, says) in
        [("missing", "No such file"), ("file", "is not a directory"), ("loop", "symbolic links")]
    {
        let at = context.at(place);
        watch.refuses(&store.command(&["build", text(&at)]), SOURCE, &[place, says]);
    }
    if test_as().is_some() {
        // A user's kiln may read all that is the user's.
        return;
    }
    fs::set_permissions(context.at("dir"), fs::Permissions::from_mode(0o000)).expect("ours");
    let at = context.at("dir");
    let kiln = store.command(&["build", text(&at)]);
    let drop = "exec setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-all \"$@\"";
    watch.refuses(&behind(drop, &kiln), SOURCE, &["dir", "Permission denied"]);
}

#[test]
fn c08_and_c09_a_store_that_somebody_else_could_swap_is_not_used() {
    needs_root!();
    let at = |place: &Path| {
        let store = Store::empty();
        let mut command = store.command(&["images"]);
        command.env("KILN_ROOT", place);
        store.bounded(command)
    };
    let dir = tempfile::tempdir().expect("temporary directories can be made");
    let place = dir.path().join("store");
    at(&place).expect(0);
    chown(&place, Some(1000), Some(1000)).expect("root may");
    let says = ["error: the store at ", text(&place), "belongs to user 1000", "hint: "];
    at(&place).expect(POLICY).says(&says);
    // Nothing is made in the directory of another either.
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).expect("ours");
    chown(&empty, Some(1000), Some(1000)).expect("root may");
    at(&empty).expect(POLICY);
    assert_eq!(fs::read_dir(&empty).expect("ours").count(), 0);

    let public = dir.path().join("public");
    let real = dir.path().join("real");
    fs::create_dir(&public).expect("ours");
    fs::create_dir(&real).expect("ours");
    fs::set_permissions(&public, fs::Permissions::from_mode(0o1777)).expect("ours");
    symlink(&real, public.join("link")).expect("ours");
    let link = public.join("link");
    let refused = |place: &Path| {
        at(place).expect(POLICY).says(&["public/link is a link in a directory that anybody may write to"]);
        assert_eq!(fs::read_dir(&real).expect("ours").count(), 0);
    };
    refused(&link);
    // On the way there: one's own, where nobody else can replace it.
    lchown(&link, Some(1000), None).expect("root may");
    refused(&link.join("store"));
    refused(&link.join("a/b"));
    lchown(&link, Some(0), None).expect("root may");
    fs::set_permissions(&public, fs::Permissions::from_mode(0o777)).expect("ours");
    refused(&link.join("store"));
    fs::set_permissions(&public, fs::Permissions::from_mode(0o1777)).expect("ours");
    at(&link.join("store")).expect(0);
    // In a directory of one's own a link is one's own.
    symlink(&real, dir.path().join("link")).expect("ours");
    at(&dir.path().join("link/other")).expect(0);
    at(&public.join("store")).expect(0);
}

#[test]
fn c12_nobody_who_listens_is_no_panic() {
    needs_root!();
    let (store, context, _) = with_app();
    let lines: &[&[&str]] = &[
        &["images"],
        &["inspect", "app"],
        &["history", "app"],
        &["du"],
        &["fsck"],
        &["gc"],
        &["layer", "ls", "app"],
        &["diff", "app", "busybox"],
        &["save", "app"],
        &["export", "app"],
        &["cp", "app:/made", "-"],
        &["build", "--progress", "plain", "--no-cache", context.path()],
        &["build", "--call=check", context.path()],
        &["build", "-o", "-", context.path()],
        &["run", "--rm", "--network", "none", "app", "cat", "/made"],
        &["run", "--rm", "--network", "none", "app", "sh", "-c", "cat /made >&2"],
        &["inspect", "absent"],
        &["build", "/no/such/context"],
        &["--help"],
        &["build", "--no-such-flag"],
        &["--version"],
    ];
    let broken = || {
        let (reader, writer) = std::io::pipe().expect("pipes can be made");
        drop(reader);
        writer
    };
    for line in lines {
        for (out, err) in [(true, false), (false, true), (true, true)] {
            let mut command = store.command(line);
            command.stdout(if out { broken().into() } else { Stdio::piped() });
            command.stderr(if err { broken().into() } else { Stdio::piped() });
            let output = command.output().expect("kiln starts");
            let stderr = String::from_utf8_lossy(&output.stderr);
            let code = output.status.code();
            assert!(code.is_some_and(|code| code != 101), "{line:?} {out} {err}: {code:?} {stderr}");
            assert!(!stderr.contains("panicked"), "{line:?} {out} {err}: {stderr}");
        }
    }
    assert_eq!((store.active_snapshots(), store.mounts()), (vec![], vec![]));
    store.sound().expect("the store is sound");
}

/// Commands of every kind, on stores of their own where they bring something in.
fn every_command(limit: &str, mut check: impl FnMut(&str, Outcome)) {
    let (store, context, saved) = with_app();
    let tar = busybox_tar(&store.beside("scratch"));
    let out = store.beside("out.tar");
    let other = Store::empty();
    other.ok(&["images"]);
    for (of, line) in [
        (&store, &["build", "--progress", "plain", "--no-cache", "-t", "again", context.path()][..]),
        (&store, &["save", "-o", text(&out), "app"]),
        (&store, &["save", "--format", "oci", "-o", text(&out), "app"]),
        (&store, &["import", text(&tar), "imported"]),
        (&store, &["run", "--rm", "--network", "none", "app", "true"]),
        (&other, &["load", "-i", &saved]),
        (&store, &["fsck", "--deep"]),
        (&store, &["gc", "--max-store", "1kB"]),
        (&store, &["images"]),
    ] {
        let watch = Watch::new(of);
        let outcome = watch.run(&behind(limit, &of.command(line)));
        check(line[0], outcome);
    }
}

#[test]
fn c14_few_descriptors_are_enough_or_said() {
    needs_root!();
    every_command("ulimit -n 64", |_, outcome| drop(outcome.expect(0)));
    // With fewer than these the program itself cannot be loaded.
    for files in [8, 10, 12, 14, 16, 20] {
        every_command(&format!("ulimit -n {files}"), |line, outcome| match outcome.code {
            Some(0) => {}
            Some(1) if line == "run" => {}
            Some(125) if line == "run" => drop(outcome.says(&["error:"])),
            _ => drop(outcome.expect(LIMIT).says(&["error:", "hint: ", "ulimit -n"])),
        });
    }
}

#[test]
fn c15_a_limit_on_files_is_an_error_and_no_death() {
    needs_root!();
    let mut refused = 0;
    // Blocks of 512 bytes.
    for blocks in [0, 8, 64, 200, 1000, 100_000] {
        every_command(&format!("ulimit -f {blocks}"), |line, outcome| match outcome.code {
            Some(0) => {}
            Some(125) if line == "run" => {}
            // What kiln says goes into a file.
            Some(LIMIT) if blocks == 0 => refused += 1,
            // The step's own command meets the limit, and says what it likes.
            Some(1) if outcome.stderr.contains("process exited with code") => refused += 1,
            Some(1) if outcome.stderr.contains("process was killed by signal") => refused += 1,
            _ => {
                drop(outcome.expect(LIMIT).says(&["error:", "hint: ", "ulimit -f"]));
                refused += 1;
            }
        });
    }
    assert!(refused > 10, "{refused} commands met a limit");
}

#[test]
fn c16_a_mask_changes_no_mode() {
    needs_root!();
    let context = Context::new(&[
        (
            "Dockerfile",
            "FROM busybox\nCOPY . /all/\nRUN --network=none mkdir /d && touch /d/f\nWORKDIR /work/dir\nADD a.tar /added/\nCOPY <<EOF /here/doc\ntext\nEOF\n",
        ),
        ("sub/file", "x"),
    ]);
    fs::copy(busybox_tar(&context.at("")), context.at("a.tar")).expect("ours");
    let tree = |mask: &str| {
        let store = Store::with_busybox();
        let line =
            ["build", "--progress", "plain", "--build-arg", "SOURCE_DATE_EPOCH=0", "-t", "x", context.path()];
        let watch = Watch::new(&store);
        watch.run(&behind(mask, &store.command(&line))).expect(0);
        let saved = store.beside("saved.tar");
        watch.run(&behind(mask, &store.command(&["save", "-o", text(&saved), "x"]))).expect(0);
        let other = Store::empty();
        Watch::new(&other).run(&behind(mask, &other.command(&["load", "-i", text(&saved)]))).expect(0);
        for of in [&store, &other] {
            let mode = |path: &str| fs::metadata(of.root().join(path)).expect("made").mode() & 0o7777;
            for dir in ["", "blobs", "db", "ingest", "locks", "snapshots", "snapshots/committed", "state"] {
                assert_eq!(mode(dir) & 0o077, 0, "{mask}: others may enter {dir:?}");
                assert_eq!(mode(dir) & 0o700, 0o700, "{mask}: the owner may not enter {dir:?}");
            }
            assert_eq!(mode("db/meta.sqlite") & 0o600, 0o600, "{mask}");
        }
        let list = "find / -xdev \\( -path /proc -o -path /sys -o -path /dev \\) -prune -o -exec stat -c '%n %a %u' {} + | sort";
        let listed = store.shell("x", list);
        assert_eq!(other.shell("x", list), listed, "{mask}");
        let mode = fs::metadata(&saved).expect("saved").mode() & 0o777;
        (listed, mode)
    };
    let (usual, mode) = tree("umask 022");
    assert_eq!(mode, 0o644);
    for (mask, mode) in [("umask 0777", 0o600), ("umask 000", 0o666), ("umask 077", 0o600)] {
        assert_eq!(tree(mask), (usual.clone(), mode), "{mask}");
    }
}

#[test]
fn c17_a_directory_that_is_gone_is_an_error_of_the_source() {
    needs_root!();
    let store = Store::with_busybox();
    let watch = Watch::new(&store);
    let gone = store.beside("gone");
    let script = format!("mkdir {0} && cd {0} && rmdir {0}", text(&gone));
    for line in [&["build", "."][..], &["build"], &["import", ".", "x"], &["load", "-i", "x.tar"]] {
        watch.refuses(&behind(&script, &store.command(line)), SOURCE, &["error: "]);
    }
    // What needs no directory works.
    watch.run(&behind(&script, &store.command(&["images"]))).expect(0);
}

/// A library that shifts clocks, if Debian's package of it is installed.
fn clock_library() -> Option<std::path::PathBuf> {
    let dirs = fs::read_dir("/usr/lib")
        .ok()?
        .flatten()
        .map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    let mut found = dirs.filter(|library| library.is_file());
    found.next()
}

#[test]
fn c18_clocks_of_1970_and_2106_are_clocks() {
    needs_root!();
    let (year_old, year_new) = ("1970-01-01 00:00:01", "2106-02-07 06:28:17");
    let Some(library) = clock_library() else {
        eprintln!("NOT TESTED: clocks of 1970 and 2106: libfaketime is not installed; file times are");
        return file_times();
    };
    for now in [year_old, year_new] {
        let store = Store::empty();
        store.ok(&["images"]);
        let clock = |line: &[&str]| {
            let mut command = store.command(line);
            // The clock stands; files keep the times they have.
            command
                .env("LD_PRELOAD", &library)
                .env("FAKETIME", now)
                .env("NO_FAKE_STAT", "1")
                .env("TZ", "UTC");
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            let output = command.output().expect("kiln starts");
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(0), "{now}: {line:?}: {stderr}");
            String::from_utf8_lossy(&output.stdout).into_owned() + &stderr
        };
        let tar = busybox_tar(&store.beside("scratch"));
        clock(&["import", text(&tar), "busybox"]);
        let context = Context::new(&[
            ("Dockerfile", "FROM busybox\nCOPY . /\nRUN --network=none echo x > /made\n"),
            ("f", "f"),
        ]);
        let build = ["build", "--progress", "plain", "-t", "app", context.path()];
        clock(&build);
        let created = store.config("app")["created"].as_str().expect("a time").to_owned();
        if !created.starts_with(&now[..4]) {
            eprintln!("NOT TESTED: clocks of 1970 and 2106: this kiln takes no library (a static binary)");
            return file_times();
        }
        assert!(clock(&build).contains("everything from the cache"), "{now}");
        let saved = store.beside("saved.tar");
        clock(&["save", "-o", text(&saved), "app"]);
        clock(&["history", "app"]);
        clock(&["images"]);
        clock(&["du"]);
        clock(&["run", "--rm", "--network", "none", "app", "true"]);
        clock(&["fsck", "--deep"]);
        // A store of tomorrow, or of long ago, is a store today.
        store.ok(&["images"]);
        store.build(&context, &["-t", "app"]).expect(0);
        clock(&["gc", "--max-store", "1kB"]);
        store.ok(&["fsck", "--deep"]);
        Store::empty().ok(&["load", "-i", text(&saved)]);
    }
    file_times();
}

/// Files of a context as old, and as young, as clocks go.
fn file_times() {
    let store = Store::with_busybox();
    let context =
        Context::new(&[("Dockerfile", "FROM busybox\nCOPY old new /\n"), ("old", "o"), ("new", "n")]);
    let touch = |date: &str, name: &str| {
        let status = Command::new("touch").args(["-d", date]).arg(context.at(name)).status();
        assert!(status.expect("coreutils are installed").success());
    };
    touch("@0", "old");
    touch("@4294967297", "new");
    store.build(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "stat -c %Y /old /new"), "0\n4294967297");
    let saved = store.beside("saved.tar");
    store.ok(&["save", "-o", text(&saved), "x"]);
    let other = Store::empty();
    other.ok(&["load", "-i", text(&saved)]);
    assert_eq!(other.shell("x", "stat -c %Y /old /new"), "0\n4294967297");
    other.sound().expect("the store is sound");
}
