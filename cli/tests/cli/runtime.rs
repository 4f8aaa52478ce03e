//! `--runtime`: what kiln describes, run by crun and runc.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::harness::needs_root;
use crate::harness::{Context, Running, Store, processes_left, test_as, text};
use crate::interop::needs;

/// The interface of a container.
fn link() -> &'static str {
    if test_as().is_some() { "tap0" } else { "eth0" }
}

/// Runs a test with each runtime.
fn each(check: impl Fn(&Store, &str)) {
    let store = Store::with_busybox();
    for runtime in ["crun", "runc"] {
        println!("{runtime}");
        check(&store, runtime);
        assert_eq!(store.active_snapshots(), [""; 0]);
        assert_eq!(store.mounts(), [""; 0]);
    }
    store.sound().expect("sound");
}

#[test]
fn processes_are_what_they_are_without_one() {
    needs!("crun", "runc");
    let script = "id -u; id -g; pwd; hostname; echo $SETTING $HOME; ls /sys/class/net; \
                  grep -E '^(CapBnd|CapEff|Seccomp|NoNewPrivs)' /proc/self/status; umask; \
                  ulimit -n; ulimit -c; cat /etc/hostname; grep -c localhost /etc/hosts; \
                  cat /v/file; touch /v/x || echo read-only; echo >> /etc/hosts || echo read-only; \
                  grep -c ' /v .*nodev' /proc/mounts; df -m /dev/shm | tail -1 | awk '{print $2}'; \
                  grep ' /t ' /proc/mounts | cut -d' ' -f3; cat /proc/sys/kernel/shmmni; ls /dev | sort | tr '\\n' ' '; \
                  cat /proc/keys || echo hidden; mount -t tmpfs x /mnt || echo forbidden";
    each(|store, runtime| {
        let volume = store.beside("volume");
        let _ = fs::create_dir(&volume);
        fs::write(volume.join("file"), "of the host\n").expect("ours");
        let bind = format!("{}:/v:ro", text(&volume));
        let flags = [
            "--hostname",
            "inside",
            "-e",
            "SETTING=value",
            "-w",
            "/tmp",
            "-v",
            &bind,
            "--tmpfs",
            "/t",
            "--shm-size",
            "32m",
            "--sysctl",
            "kernel.shmmni=77",
            "--cap-drop",
            "MKNOD",
            "--cap-add",
            "SYS_NICE",
            "--ulimit",
            "nofile=100:200",
            "--network",
            "none",
        ];
        for user in ["0", "1000:1001"] {
            let line = |more: &[&str]| {
                let args =
                    [&["run", "--rm", "--user", user], &flags[..], more, &["busybox", "sh", "-c", script]];
                store.ok(&args.concat()).stdout
            };
            let (own, theirs) = (line(&[]), line(&["--runtime", runtime]));
            // A runtime has names in /dev that kiln's sandbox leaves out.
            let without = |text: &str| text.replace("console ", "").replace("core ", "");
            assert_eq!(without(&own), without(&theirs), "{runtime} {user}");
        }
    });
}

#[test]
fn exit_codes_and_output_are_the_programs() {
    needs!("crun", "runc");
    each(|store, runtime| {
        let run = |flags: &[&str], command: &[&str]| {
            store.kiln(
                &[&["run", "--rm", "--network", "none", "--runtime", runtime], flags, &["busybox"], command]
                    .concat(),
            )
        };
        let said = run(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"]).expect(7);
        assert_eq!((said.stdout.as_str(), said.stderr.as_str()), ("out\n", "err\n"));
        run(&[], &["sh", "-c", "sh -c 'kill -9 $$'; exit $?"]).expect(137);
        run(&[], &["absent"]).expect(127);
        run(&[], &["/etc/passwd"]).expect(126);
        // A device that is not its own does not open, made by itself or not. FUSE's asks for no rights.
        if test_as().is_none() {
            run(&[], &["sh", "-c", "mknod /fuse c 10 229 && ! true < /fuse"]).expect(0);
        }
        run(&["--device", "/dev/fuse"], &["sh", "-c", "true < /dev/fuse"]).expect(0);
        run(&["--init"], &["true"]).expect(125).says(&["--init"]);
        run(&["--user", "nobody-here"], &["true"]).expect(125).says(&["nobody-here"]);
        run(&["--read-only"], &["sh", "-c", "! touch /x"]).expect(0);
        let signals = run(&[], &["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]).expect(0).stdout;
        assert_eq!(signals, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n", "{runtime}");
        let limited = run(&["--memory", "64m", "--pids-limit", "20"], &["true"]);
        limited.expect(if test_as().is_none() { 0 } else { 125 });
        if test_as().is_none() {
            runs_out_of_memory(store, runtime);
        }
        // With a monitor, and another process beside its own.
        let name = format!("life-{runtime}");
        store.ok(&[
            "run",
            "-d",
            "--name",
            &name,
            "--runtime",
            runtime,
            "busybox",
            "sh",
            "-c",
            "trap 'exit 9' TERM; echo ready; sleep 31536031 & wait $!",
        ]);
        assert_eq!(store.ok(&["exec", &name, "cat", "/etc/hostname"]).stdout.len(), 13);
        let address = store.ok(&["exec", &name, "ip", "-4", "addr", "show", link()]).stdout;
        assert!(address.contains("inet "), "{address}");
        let begun = Instant::now();
        while !store.ok(&["logs", &name]).stdout.contains("ready") {
            assert!(begun.elapsed() < Duration::from_secs(60));
        }
        store.ok(&["stop", &name]);
        assert_eq!(store.ok(&["wait", &name]).stdout.trim(), "9");
        store.ok(&["rm", &name]);
        assert_eq!(processes_left("31536031"), [""; 0]);
    });
    let store = Store::with_busybox();
    store
        .kiln(&["run", "--rm", "--runtime", "absent", "busybox", "true"])
        .expect(125)
        .says(&["no such program"]);
    store
        .kiln(&["run", "--rm", "--runtime", "/bin/false", "busybox", "true"])
        .expect(125)
        .says(&["/bin/false"]);
}

#[test]
fn signals_reach_the_program_or_end_it() {
    needs!("crun", "runc");
    each(|store, runtime| {
        let line = ["run", "--rm", "--runtime", runtime, "busybox", "sh", "-c"];
        for (script, signal, code) in [
            ("trap 'exit 5' TERM; echo ready >&2; sleep 31536032 & wait $!", Signal::TERM, 5),
            ("echo ready >&2; exec sleep 31536032", Signal::INT, 130),
        ] {
            let mut run = Running::start(store.command(&[&line[..], &[script]].concat()));
            run.wait_for("ready");
            while store.ok(&["ps", "-q"]).stdout.is_empty() {}
            let sent = Instant::now();
            run.signal(signal);
            run.end().expect(code);
            // Otherwise it would sleep for a year.
            assert!(sent.elapsed() < Duration::from_secs(30), "{:?}", sent.elapsed());
            assert_eq!(processes_left("31536032"), [""; 0]);
        }
        // A kiln that is killed takes the container along.
        let script = "echo ready >&2; exec sleep 31536033";
        let mut run = Running::start(store.command(&[&line[..], &[script]].concat()));
        run.wait_for("ready");
        run.signal(Signal::KILL);
        run.end();
        assert_eq!(processes_left("31536033"), [""; 0]);
        assert_eq!(store.mounts(), [""; 0]);
        store.ok(&["ps", "-a"]);
    });
}

#[test]
fn a_terminal_is_the_programs() {
    needs!("crun", "runc");
    each(|store, runtime| {
        let line = format!(
            "{} run --rm -it --network none --runtime {runtime} busybox sh -c 'tty; stty size; exit 4'",
            env!("CARGO_BIN_EXE_kiln"),
        );
        let mut command = Command::new("script");
        command.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
        command.env("KILN_ROOT", store.root()).stdin(std::process::Stdio::null());
        let output = command.output().expect("script is part of util-linux");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("/dev/pts/0"), "{said}");
        assert_eq!(output.status.code(), Some(4), "{said}");
    });
}

#[test]
fn steps_of_a_build_are_run_by_it() {
    needs!("crun", "runc");
    each(|store, runtime| {
        let context = Context::new(&[]);
        let dockerfile = "FROM busybox\n\
             RUN --mount=type=cache,target=/c --mount=type=secret,id=key --mount=type=bind,target=/ctx \
                 --mount=type=tmpfs,target=/t --network=none \
                 cat /run/secrets/key /ctx/file > /made && echo x > /c/x && touch /t/t\n\
             RUN ip -4 addr show LINK | grep -q inet && echo fine >> /made\n";
        context.write("Dockerfile", &dockerfile.replace("LINK", link()));
        context.write("file", "file\n");
        context.write("key", "key\n");
        let key = format!("id=key,src={}", text(&context.at("key")));
        let args = ["--no-cache", "--runtime", runtime, "--secret", &key, "-t", "x"];
        let said = store.build(&context, &args).expect(0);
        assert!(!said.stderr.contains("warn"), "{}", said.stderr);
        assert_eq!(
            store.shell("x", "cat /made; ls /c /t /ctx 2>&1 | grep -c 'No such'"),
            "key\nfile\nfine\n3"
        );
        let context = Context::new(&[("Dockerfile", "FROM busybox\nRUN --network=none exit 3\n")]);
        store.build(&context, &["--runtime", runtime]).expect(1).says(&["exited with code 3"]);
    });
}

/// A process that uses up what it was given is told from one that somebody killed.
fn runs_out_of_memory(store: &Store, runtime: &str) {
    let greedy = "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}";
    let limits = ["--network", "none", "--memory", "32m", "--memory-swap", "32m", "--runtime", runtime];
    let command = ["busybox", "sh", "-c", greedy];
    let said = store.kiln(&[&["run", "--rm"], &limits[..], &command].concat());
    assert_ne!(said.code, Some(0), "{said:?}");
    said.says(&["ran out of memory"]);
    let format = ["inspect", "-f", "{{.State.OOMKilled}}", "greedy"];
    store.kiln(&[&["run", "--name", "greedy"], &limits[..], &command].concat()).says(&["ran out of memory"]);
    assert_eq!(store.ok(&format).stdout, "true\n");
    store.ok(&["rm", "greedy"]);
    let killed = ["busybox", "sh", "-c", "kill -9 $$; sleep 1 & kill -9 $!; exit 137"];
    let said = store.kiln(&[&["run", "--name", "greedy"], &limits[..], &killed].concat()).expect(137);
    assert!(!said.stderr.contains("memory"), "{}", said.stderr);
    assert_eq!(store.ok(&format).stdout, "false\n");
    store.ok(&["rm", "greedy"]);
}

/// Everything that a step may have.
const STEPS: &str = r#"FROM busybox
RUN echo 'app:x:1000:1000::/home/app:/bin/sh' >> /etc/passwd && mkdir /work && chown app /work
RUN --mount=type=cache,target=/c,uid=1000,mode=0750 --mount=type=secret,id=key,mode=0440,gid=7     --mount=type=bind,target=/ctx,rw --mount=type=tmpfs,target=/t,size=4m --network=none     stat -c '%n %a %u %g' /c /run/secrets/key /ctx/file > /mounts && touch /ctx/new /c/new /t/new &&     cat /run/secrets/key /ctx/file | sha256sum >> /mounts; head -c 8000000 /dev/zero > /t/big || echo full >> /mounts
RUN --mount=type=cache,target=/c,readonly ls /c > /cached; touch /c/x || echo ro >> /cached
RUN --mount=type=secret,id=key,env=KEY --mount=type=secret,id=missing printf %s "$KEY" | sha256sum > /env-sum; ls /run/secrets || true
RUN --mount=type=ssh [ -S "$SSH_AUTH_SOCK" ] && stat -c %a "$SSH_AUTH_SOCK" > /agent
RUN --mount=type=tmpfs,target=/new/deep/place --mount=type=bind,from=busybox,source=/bin,target=/also/new ls /also/new | wc -l > /count
RUN --mount=type=tmpfs,target=/dev/shm,size=64k df -k /dev/shm | awk 'END { print $2 }' > /shm
RUN --network=none ls /sys/class/net > /net && cat /etc/hostname >> /net && grep named /etc/hosts >> /net
RUN --network=default ip -4 -o addr show eth0 | grep -c 'inet ' > /net-default
RUN env | grep -v KEY | sort > /env; id > /id; umask > /limits; ulimit -n >> /limits; ulimit -c >> /limits
RUN grep -E '^(Cap|Seccomp:|NoNewPrivs)' /proc/self/status > /status; (mount -t tmpfs x /mnt; mknod /zero c 1 5; head -c 1 /zero) 2>&1 | grep -c not > /refused; rm -f /zero
RUN <<EOF
#!/bin/sh
echo script > /script
EOF
RUN mkfifo /fifo && ln /script /hard && ln -s /nowhere /soft && chmod 4755 /script && rm /etc/motd 2> /dev/null; mv /work /moved && mkdir /work && chown app /work
RUN --security=insecure grep CapEff /proc/self/status > /insecure
WORKDIR /made/by/workdir
RUN pwd > here
USER app
WORKDIR /work
RUN id > mine && umask 077 && mkdir d && touch d/f && grep CapEff /proc/self/status >> mine; touch /root/x || echo refused >> mine
"#;

#[test]
fn a_step_leaves_the_same_whoever_runs_it() {
    needs!("crun", "runc", "ssh-agent");
    let store = Store::with_busybox();
    let steps = STEPS.replace("eth0", link());
    let context =
        Context::new(&[("Dockerfile", &steps), ("file", "file\n"), (".dockerignore", "key\nagent\n")]);
    context.write("key", "hunter2hunter2\n");
    let (key, socket) = (format!("id=key,src={}", text(&context.at("key"))), context.at("agent"));
    let agent = Command::new("ssh-agent").args(["-D", "-a", text(&socket)]).spawn();
    let mut agent = Agent(agent.expect("needed above"));
    while !socket.exists() {
        assert!(agent.0.try_wait().expect("our child").is_none(), "the agent ended");
    }
    let ssh = format!("default={}", text(&socket));
    let layers: Vec<(&str, Vec<String>)> = ["", "crun", "runc"]
        .into_iter()
        .map(|runtime| {
            let mut args = vec!["--no-cache", "-t", "x", "--secret", &key, "--ssh", &ssh];
            args.extend(["--allow", "security.insecure", "--add-host", "named:192.0.2.7"]);
            if !runtime.is_empty() {
                args.extend(["--runtime", runtime]);
            }
            store.build(&context, &args).expect(0);
            (runtime, layers_of(&store, "x"))
        })
        .collect();
    drop(agent);
    assert!(layers[0].1.len() > 20, "{layers:#?}");
    for (runtime, listed) in &layers[1..] {
        for (own, theirs) in layers[0].1.iter().zip(listed) {
            assert_eq!(own, theirs, "{runtime}");
        }
        assert_eq!(listed.len(), layers[0].1.len(), "{runtime}");
    }
    assert_eq!(store.active_snapshots(), [""; 0]);
    assert_eq!(store.mounts(), [""; 0]);
    store.sound().expect("sound");
}

/// Ends with this value, whatever becomes of the test.
struct Agent(std::process::Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Each layer's entries without their times, and what its files hold.
fn layers_of(store: &Store, image: &str) -> Vec<String> {
    let (tar, dir) = (store.beside("layers.tar"), store.beside("layers"));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).expect("ours");
    store.ok(&["save", "-o", text(&tar), image]);
    let script = "cd $2 && tar -xf $1 && for layer in $(grep -o '\"Layers\":\\[[^]]*' manifest.json | cut -d[ -f2 | tr -d '\"' | tr , ' '); do \
        tar --numeric-owner -tvf $layer | awk '{ $4 = $5 = \"\"; print }' | tr '\\n' ';'; echo; \
        mkdir x; tar -C x -xf $layer; (cd x; find . -type f | sort | xargs -r sha256sum) | tr '\\n' ';'; rm -rf x; echo; done";
    let listed = Command::new("sh").args(["-ec", script, "sh", text(&tar), text(&dir)]).output();
    let listed = crate::harness::Outcome::of(listed.expect("sh starts")).expect(0);
    listed.stdout.lines().map(str::to_owned).collect()
}
