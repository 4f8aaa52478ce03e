//! What `kiln run` is told a container may and gets, under docker's names.

use std::fs;

use crate::harness::{Outcome, Store, needs_root, test_as, text};

fn run(store: &Store, options: &[&str], script: &str) -> Outcome {
    store.kiln(&[&["run", "--rm", "--network", "none"], options, &["busybox", "sh", "-c", script]].concat())
}

#[test]
fn options_do_what_they_say() {
    needs_root!();
    let store = Store::with_busybox();
    let caps = "while read -r k v; do [ $k = CapEff: ] && echo $v; done < /proc/self/status";
    let table: [(&[&str], &str, &str); 21] = [
        (&["--cap-drop", "ALL"], caps, "0000000000000000\n"),
        (&["--cap-drop", "ALL", "--cap-add", "CAP_CHOWN"], caps, "0000000000000001\n"),
        (&["--cap-add", "sys_ptrace"], caps, "00000000a80c25fb\n"),
        (&["--read-only"], "touch /x 2>/dev/null || echo refused", "refused\n"),
        (&["--read-only", "--tmpfs", "/w"], "echo ok > /w/x; cat /w/x", "ok\n"),
        (
            &["--tmpfs", "/w:size=1m,mode=700"],
            "stat -c %a /w; df -k /w | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2",
            "700\n1024\n",
        ),
        (&["--tmpfs", "/w"], "cp /bin/busybox /w/true; /w/true || echo $?; stat -c %a /w", "126\n1777\n"),
        (&["--tmpfs", "/w:exec"], "cp /bin/busybox /w/true; /w/true; echo $?", "0\n"),
        (&["--shm-size", "2m"], "df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2", "2048\n"),
        (&["--ulimit", "nofile=100:200", "--ulimit", "core=-1:-1"], "ulimit -Sn; ulimit -Hn", "100\n200\n"),
        (&["--device", "/dev/zero:/dev/mine"], "head -c 2 /dev/mine | wc -c", "2\n"),
        (&["--hostname", "somewhere"], "hostname; cat /etc/hostname", "somewhere\nsomewhere\n"),
        (&["--group-add", "4711", "--group-add", "root"], "id -G", "0 4711\n"),
        (&["--sysctl", "net.ipv4.ip_default_ttl=44"], "cat /proc/sys/net/ipv4/ip_default_ttl", "44\n"),
        (&["--oom-score-adj", "300"], "cat /proc/self/oom_score_adj", "300\n"),
        (&["--init"], "echo $(cat /proc/1/comm)", "kiln-init\n"),
        (&["--security-opt", "no-new-privileges"], "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1\n"),
        (&["--security-opt", "seccomp=unconfined"], "grep Seccomp: /proc/self/status", "Seccomp:\t0\n"),
        (
            &["--security-opt", "systempaths=unconfined"],
            "[ $(wc -c < /proc/timer_list) -gt 0 ] && echo open",
            "open\n",
        ),
        (&["--security-opt", "apparmor=unconfined", "--security-opt", "label=disable"], "echo ok", "ok\n"),
        (&["--privileged"], "mount -t tmpfs none /tmp && grep Seccomp: /proc/self/status", "Seccomp:\t0\n"),
    ];
    let mut wrong = String::new();
    for (options, script, expected) in table {
        // The host's own settings stay the host's for a user, whatever is unmasked.
        if test_as().is_some() && options.contains(&"systempaths=unconfined") {
            continue;
        }
        let outcome = run(&store, options, script);
        if outcome.stdout != expected {
            wrong.push_str(&format!("{options:?}: {outcome:?}\n"));
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
    assert_eq!(store.active_snapshots(), [""; 0]);
}

#[test]
fn options_that_make_no_sense_are_refused_with_a_reason() {
    needs_root!();
    let store = Store::with_busybox();
    let table: [(&[&str], i32, &str); 20] = [
        (&["--cap-add", "NONSENSE"], 125, "NONSENSE"),
        (&["--ulimit", "nofile=2:1"], 125, "above the hard one"),
        (&["--ulimit", "files=1"], 125, "files"),
        (&["--ulimit", "nofile=999999999"], 125, "nofile"),
        (&["--tmpfs", "relative"], 125, "absolute"),
        (&["--tmpfs", "/"], 125, "absolute"),
        (&["--tmpfs", "/x:bogus=1"], 125, "bogus"),
        (&["--tmpfs", "/proc"], 125, "/proc"),
        (&["--device", "/etc/passwd"], 125, "no device"),
        (&["--device", "/dev/nosuch"], 125, "nosuch"),
        (&["--device", "/dev/zero:/dev/z:m"], 125, "rwm"),
        (&["--sysctl", "kernel.core_pattern=x"], 125, "whole host's"),
        (&["--sysctl", "net/../kernel/core_pattern=x"], 125, "no name of a setting"),
        (&["--security-opt", "seccomp=/nosuch.json"], 125, "nosuch"),
        (&["--security-opt", "nonsense"], 125, "nonsense"),
        (&["--security-opt", "apparmor=docker-default"], 125, "AppArmor"),
        (&["--stop-signal", "SIGNONSENSE"], 125, "SIGNONSENSE"),
        (&["--memory", "64q"], 125, "64q"),
        (&["--memory", "64m", "--memory-swap", "32m"], 125, "--memory-swap"),
        (&["--group-add", "nosuch"], 125, "nosuch"),
    ];
    for (options, code, part) in table {
        run(&store, options, "echo ran").expect(code).says(&[part]);
    }
}

#[test]
fn a_profile_of_ones_own_is_used() {
    needs_root!();
    let store = Store::with_busybox();
    let file = store.beside("profile.json");
    let profile = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#;
    fs::write(&file, profile).expect("ours to write");
    let option = format!("seccomp={}", text(&file));
    run(&store, &["--security-opt", &option], "mkdir /x").expect(1).says(&["No space left on device"]);
    fs::write(&file, "{}").expect("ours to write");
    run(&store, &["--security-opt", &option], "true").expect(125).says(&["defaultAction"]);
}

#[test]
fn limits_of_a_container_hold_and_are_gone_with_it() {
    needs_root!();
    let store = Store::with_busybox();
    let mut all =
        run(&store, &["--memory", "64m", "--cpus", "0.5", "--pids-limit", "30"], "cat /proc/self/cgroup");
    if all.code == Some(125) && all.stderr.contains("cannot be set") {
        eprintln!("SKIPPED ALOUD: {}", all.stderr);
        return;
    }
    all = all.expect(0);
    // What was joined is all that there is to be seen.
    for name in ["memory", "pids"] {
        let mut lines =
            all.stdout.lines().filter(|line| line.contains(&format!(":{name}:")) || line.starts_with("0::"));
        assert!(lines.any(|line| line.ends_with(":/")), "{name}: {all:?}");
    }
    let bomb =
        "n=0; while sleep 50 & do n=$((n+1)); [ $n -lt 200 ] || { echo endless; break; }; done 2>/dev/null";
    let outcome = run(&store, &["--pids-limit", "30"], bomb);
    assert!(!outcome.stdout.contains("endless"), "{outcome:?}");
    let register = fs::read_to_string(store.root().join("state/executor/cgroups")).expect("groups were made");
    for parent in register.lines() {
        let own: Vec<_> = fs::read_dir(parent)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("kiln-"))
            .filter(|entry| {
                fs::read_to_string(entry.path().join("cgroup.procs")).is_ok_and(|procs| procs.is_empty())
            })
            .collect();
        assert!(own.len() < 4, "{own:?} are left");
    }
}

#[test]
fn a_killed_kilns_group_is_removed_by_the_next() {
    needs_root!();
    let store = Store::with_busybox();
    let line = [
        "run",
        "--rm",
        "--network",
        "none",
        "--pids-limit",
        "50",
        "busybox",
        "sh",
        "-c",
        "echo up >&2; sleep 600",
    ];
    let mut running = crate::harness::Running::start(store.command(&line));
    running.wait_for("up");
    let parents = fs::read_to_string(store.root().join("state/executor/cgroups")).expect("a group was made");
    let pid = running.id();
    let left = || -> Vec<std::path::PathBuf> {
        let entries = parents.lines().flat_map(|parent| fs::read_dir(parent).into_iter().flatten().flatten());
        let own = format!("-{pid}-");
        entries.map(|entry| entry.path()).filter(|path| path.to_string_lossy().contains(&own)).collect()
    };
    assert!(!left().is_empty());
    running.signal(rustix::process::Signal::KILL);
    running.end();
    store.ok(&["run", "--rm", "--network", "none", "--pids-limit", "50", "busybox", "true"]);
    assert_eq!(left(), [""; 0].map(std::path::PathBuf::from));
}
