//! Attacks with links and names, ready before kiln looks.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use super::{MARKER, Sentinel, tampered};
use crate::harness::{Context, Outcome, Store, needs_root, text};

#[test]
fn a04_links_in_an_image_lead_no_mount_out() {
    needs_root!();
    let store = Store::with_busybox();
    let host = Sentinel::beside(&store);
    let places: [(&str, &[(&str, &str)]); 5] = [
        ("proc", &[("proc", "/tmp/x")]),
        ("etc", &[("etc", host.path())]),
        ("up", &[("proc", "../../../../../../proc"), ("sys", "../../../../../..")]),
        ("dev", &[("dev", host.path()), ("sys", host.path())]),
        ("loop", &[("proc", "sys"), ("sys", "proc")]),
    ];
    for (name, links) in places {
        tampered(&store, name, |root| {
            for (link, target) in links {
                let _ = fs::remove_dir_all(root.join(link));
                symlink(target, root.join(link)).expect("ours to make");
            }
            symlink(host.path(), root.join("link")).expect("ours to make");
        });
        let outcome = store.kiln(&[
            "run",
            "--rm",
            "--network",
            "none",
            name,
            "cat",
            "/marker",
            "/etc/marker",
            "/link/marker",
        ]);
        assert!(!outcome.stdout.contains(MARKER), "{name}: {outcome:?}");
        let dockerfile = format!(
            "FROM {name}\nRUN --mount=type=tmpfs,target=/link/sub --mount=type=cache,target=/link/../c \
             --mount=target=/link/b ls /link /c; touch /link/made /link/sub/made /etc/made 2>/dev/null; true\n"
        );
        let outcome = store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &["--no-cache"]);
        assert!(outcome.code.is_some_and(|code| code != 101), "{name}: {outcome:?}");
        host.check();
    }
}

#[test]
fn a06_what_kiln_made_for_a_mount_is_taken_out_and_nothing_else() {
    needs_root!();
    let store = Store::with_busybox();
    let host = Sentinel::beside(&store);
    // What kiln makes for a mount lies in a layer below, which is not the step's: it cannot be moved.
    // Should it, then to a place where the host has empty files of the same names.
    let attack = format!(
        "for dir in /fresh /made; do mv $dir $dir.old 2>/dev/null && ln -s {} $dir && echo moved $dir; done; \
         mkdir /own && : > /own/empty && mkdir /own/dir",
        host.path()
    );
    let dockerfile = format!(
        "FROM busybox\nRUN --mount=type=tmpfs,target=/fresh/empty --mount=type=secret,id=none,target=/made/b {attack}\n"
    );
    store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &["-t", "x"]).expect(0);
    host.check();
    assert_eq!(
        store.shell("x", "ls -A /own; ls -d /fresh /made 2>/dev/null; ls /etc/passwd"),
        "dir\nempty\n/etc/passwd"
    );
}

#[test]
fn a08_cache_names_and_mount_options_mean_nothing_but_themselves() {
    needs_root!();
    let store = Store::with_busybox();
    let host = Sentinel::beside(&store);
    let long = "x".repeat(4096);
    for id in ["../../../../sentinel", "..", "a/b", "/", ".", &long, "…ünïcode", "-rf", "$HOME"] {
        let dockerfile = format!(
            "FROM busybox\nRUN --mount=type=cache,id={id},target=/c ls /c/marker /c/.. 2>/dev/null; echo x > /c/made\n"
        );
        let outcome = store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &["--no-cache"]);
        assert!(!outcome.stderr.contains("/c/marker\n"), "{id}: {outcome:?}");
        host.check();
    }
    let run = |flags: &str, code: i32| -> Outcome {
        let dockerfile =
            format!("FROM busybox\nRUN --mount={flags} echo changed > /ctx/file; cat /ctx/file\n");
        let context = Context::new(&[("Dockerfile", &dockerfile), ("file", "as it was")]);
        let outcome = store.build_bounded(&context, &["--no-cache"]).expect(code);
        assert_eq!(fs::read_to_string(context.at("file")).expect("ours"), "as it was");
        outcome
    };
    run("type=bind,target=/ctx,bind-propagation=shared", 3).says(&["bind-propagation"]);
    run("type=bind,target=/ctx,rw", 0).says(&["changed"]);
    run("type=bind,target=/ctx", 0).says(&["as it was"]);
}

#[test]
fn a10_a_working_directory_is_made_inside() {
    needs_root!();
    let store = Store::with_busybox();
    let host = Sentinel::beside(&store);
    tampered(&store, "linked", |root| {
        symlink(format!("/../../../../..{}", host.path()), root.join("a")).expect("ours to make");
        symlink("../../../../../../..", root.join("up")).expect("ours to make");
    });
    let dockerfile = "FROM linked\nWORKDIR /a/b\nWORKDIR /a/new\nRUN pwd && touch here && cat ../marker || true\n\
                      USER 1000\nWORKDIR /up/tmp/other\nRUN pwd\n";
    let outcome = store.build_bounded(&Context::new(&[("Dockerfile", dockerfile)]), &[]);
    assert!(!outcome.stderr.contains(MARKER), "{outcome:?}");
    let outcome =
        store.kiln(&["run", "--rm", "--network", "none", "-w", "/a/made/by/run", "linked", "pwd"]).expect(0);
    assert!(outcome.stdout.ends_with("/made/by/run\n"), "{outcome:?}");
    host.check();
    assert!(!std::path::Path::new("/tmp/other").exists());
}

#[test]
fn a16_devices_that_come_with_an_image_do_not_open() {
    needs_root!();
    let store = Store::with_busybox();
    let tree = store.beside("devices");
    fs::create_dir_all(tree.join("made")).expect("ours to make");
    // The host's zeroes by another name: harmless, and easy to tell from nothing.
    let made = |args: &[&str]| Command::new("mknod").args(args).status().is_ok_and(|status| status.success());
    let (zero, disk) = (tree.join("made/zero"), tree.join("made/disk"));
    if !made(&[text(&zero), "c", "1", "5"]) || !made(&[text(&disk), "b", "254", "0"]) {
        eprintln!("SKIPPED ALOUD: devices cannot be made here");
        return;
    }
    fs::set_permissions(&zero, PermissionsExt::from_mode(0o666)).expect("ours");
    tampered(&store, "noded", |root| {
        for device in ["made/zero", "made/disk"] {
            let copied = Command::new("cp").arg("-a").arg(tree.join(device)).arg(root).status();
            assert!(copied.expect("cp runs").success());
        }
    });
    let script = "for device in /zero /disk; do [ -e $device ] && echo there $device; \
                  head -c 1 $device >/dev/null 2>&1 && echo opened $device; done; true";
    assert!(!store.shell("noded", script).contains("opened"), "{}", store.shell("noded", script));
    let step = format!("FROM noded\nRUN {script}\nRUN mknod /own c 1 5 && ! head -c 1 /own\n");
    let outcome = store.build_bounded(&Context::new(&[("Dockerfile", &step)]), &[]).expect(0);
    assert!(
        !outcome.stderr.contains("opened /zero\n") && !outcome.stderr.contains("opened /disk\n"),
        "{outcome:?}"
    );
}

#[test]
fn a17_nobody_else_on_the_host_reaches_what_is_stored() {
    needs_root!();
    use std::os::unix::process::CommandExt;
    let store = Store::with_busybox();
    let dockerfile =
        "FROM busybox\nRUN cp /bin/busybox /own && chmod 4755 /own && mkdir /open && chmod 777 /open\n";
    store.build(&Context::new(&[("Dockerfile", dockerfile)]), &["-t", "x"]).expect(0);
    // The store may lie in a directory that others can enter: it is its own modes that count.
    fs::set_permissions(store.root().parent().expect("it has one"), PermissionsExt::from_mode(0o755))
        .expect("ours");
    let look = |path: &std::path::Path| {
        let mut command = Command::new("find");
        let output = command.arg(path).current_dir("/").uid(65534).gid(65534).output().expect("find runs");
        String::from_utf8_lossy(&output.stdout).lines().count()
    };
    assert!(look(&store.root()) <= 1, "others see into the store");
    for command in
        [&["fsck"][..], &["run", "--rm", "--network", "none", "x", "true"], &["gc"], &["prune", "-f"]]
    {
        store.kiln(command);
        let mode = fs::metadata(store.root()).expect("there").permissions().mode() & 0o7777;
        assert_eq!(mode & 0o077, 0, "after {command:?} the store has mode {mode:o}");
    }
}
