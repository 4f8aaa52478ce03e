//! Attacks with users, and on how much a step is held back.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{MARKER, Sentinel, tampered};
use crate::harness::{Context, Store, needs_root, test_as};

const STATUS: &str = "while read -r k v; do case $k in CapBnd:|CapEff:|Seccomp:|NoNewPrivs:) echo $k$v;; esac; done < /proc/self/status";

#[test]
fn a07_a_step_is_held_back_unless_it_was_allowed_not_to_be() {
    needs_root!();
    let store = Store::with_busybox();
    let build = |flag: &str, args: &[&str]| {
        let dockerfile = format!("FROM busybox\nRUN {flag} {STATUS}\n");
        store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &[&["--no-cache"], args].concat())
    };
    let held_back =
        ["CapBnd:00000000a80425fb\n", "CapEff:00000000a80425fb\n", "Seccomp:2\n", "NoNewPrivs:0\n"];
    build("", &[]).expect(0).says(&held_back);
    build("--security=sandbox", &["--allow", "security.insecure"]).expect(0).says(&held_back);
    build("--security=insecure", &[]).expect(7).says(&["security.insecure"]);
    build("--security=insecure", &["--allow", "network.host"]).expect(7);
    build("--security=insecure", &["--allow", "security.insecure"]).expect(0).says(&["Seccomp:0\n"]);
    build("--network=host", &[]).expect(7).says(&["network.host"]);
    for value in
        ["Insecure", "insecure ", "", "0", "255", "none", "unconfined", "sandbox,insecure", "\u{0}insecure"]
    {
        let outcome = build(&format!("--security={value}"), &["--allow", "security.insecure"]);
        // A blank ends the flag: that one is the flag as it should be.
        if value != "insecure " {
            assert_eq!(outcome.code, Some(3), "{value:?}: {outcome:?}");
        }
        let outcome = build(&format!("--network={value}"), &["--allow", "network.host"]);
        assert!(
            matches!(outcome.code, Some(0 | 3)) && !outcome.stderr.contains("Seccomp:0"),
            "{value:?}: {outcome:?}"
        );
    }
    for allow in ["security.Insecure", "all", "", "security.insecure,network.host"] {
        build("--security=insecure", &["--allow", allow]).expect(2);
    }
}

#[test]
fn a09_a_users_file_that_is_none_is_an_error_at_once() {
    needs_root!();
    let store = Store::with_busybox();
    let host = Sentinel::beside(&store);
    type Maker<'a> = &'a dyn Fn(&Path);
    let kinds: [(&str, Maker<'_>); 8] = [
        ("fifo", &|at| assert!(Command::new("mkfifo").arg(at).status().expect("mkfifo runs").success())),
        ("zero", &|at| symlink("/dev/zero", at).expect("ours to make")),
        ("endless", &|at| symlink("/dev/stdin", at).expect("ours to make")),
        // More than kiln may have in memory, below.
        ("sparse", &|at| {
            fs::File::create(at).and_then(|file| file.set_len(300 << 20)).expect("ours to make")
        }),
        ("shadow", &|at| {
            symlink(format!("../../../../../..{}/shadow", host.path()), at).expect("ours to make")
        }),
        ("loop", &|at| symlink("passwd", at).expect("ours to make")),
        ("dir", &|at| fs::create_dir(at).expect("ours to make")),
        ("line", &|at| {
            fs::write(at, format!("root:x:0:0:{}:/:/bin/sh\n", "x".repeat(100_000))).expect("ours to make")
        }),
    ];
    for (name, make) in kinds {
        tampered(&store, name, |root| {
            let _ = fs::remove_file(root.join("etc/passwd"));
            make(&root.join("etc/passwd"));
        });
        let started = Instant::now();
        let outcome =
            store.kiln(&["run", "--rm", "--network", "none", "-u", "somebody", name, "id"]).expect(125);
        assert!(!format!("{outcome:?}").contains(MARKER), "{outcome:?}");
        let dockerfile = format!("FROM {name}\nUSER somebody\nRUN id\n");
        let outcome = store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &[]).expect(1);
        assert!(!format!("{outcome:?}").contains(MARKER), "{outcome:?}");
        assert!(started.elapsed() < Duration::from_secs(60), "{name} took {:?}", started.elapsed());
    }
    host.check();
}

#[test]
fn a11_what_is_no_user_is_never_root() {
    needs_root!();
    let store = Store::with_busybox();
    for (user, expected) in [
        ("4294967296", None),
        ("4294967295", None),
        ("-1", None),
        ("0x0", None),
        ("root:", None),
        (":0", None),
        (" 0", None),
        ("0 ", None),
        ("1000:4294967295", None),
        ("nobody-at-all", None),
        ("../0", None),
        ("2147483648", Some("2147483648 0")),
        ("4294967294:4294967294", Some("4294967294 4294967294")),
        ("0", Some("0 0")),
        ("00", Some("0 0")),
    ] {
        let line = [
            "run",
            "--rm",
            "--network",
            "none",
            "--user",
            user,
            "busybox",
            "sh",
            "-c",
            "echo $(id -u) $(id -g)",
        ];
        let outcome = store.kiln(&line);
        let number = user.split(':').next().and_then(|number| number.parse::<u64>().ok());
        if expected.is_some() && test_as() == Some("range") && number.is_some_and(|number| number > 65536) {
            outcome.expect(125).says(&["beyond the range of ids"]);
            continue;
        }
        match expected {
            Some(ids) => assert_eq!(outcome.expect(0).stdout.trim(), ids, "{user:?}"),
            None => assert!(outcome.code != Some(0) && outcome.stdout.is_empty(), "{user:?}: {outcome:?}"),
        }
    }
    for user in ["4294967296", "-1", "0x0", "1000:4294967295", "root:", ":0"] {
        let dockerfile = format!("FROM busybox\nUSER {user}\nRUN id\n");
        let outcome = store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &[]);
        assert!(
            matches!(outcome.code, Some(1 | 3)) && !outcome.stderr.contains("uid=0"),
            "{user}: {outcome:?}"
        );
    }
}

#[test]
fn a15_no_process_of_the_host_is_within_reach() {
    needs_root!();
    let store = Store::with_busybox();
    let own = std::process::id();
    // kiln itself is the one that would be worth it: its number is the caller's child.
    let script = format!(
        "kill -0 {own} 2>/dev/null && echo reached; echo $(ls /proc | grep -c '^[0-9]'); \
         for pid in $(seq 2 400); do [ $pid = $$ ] || kill -0 $pid 2>/dev/null && [ ! -e /proc/$pid ] && echo hidden; done; \
         kill -9 -1; echo alive"
    );
    let out = store.shell("busybox", &script);
    let mut lines = out.lines();
    assert!(lines.next().is_some_and(|count| count.parse::<u32>().is_ok_and(|count| count < 6)), "{out}");
    assert_eq!(lines.collect::<Vec<_>>(), ["alive"]);
    let dockerfile = format!("FROM busybox\nRUN ! kill -0 {own} && [ $$ = 1 ] && [ ! -e /proc/{own} ]\n");
    store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &[]).expect(0);
}
