//! Attacks with programs: on kiln's own binary, on descriptors, on the machine's resources.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_oci::Digest;

use super::{MARKER, Sentinel, armed};
use crate::harness::{Context, Store, needs_root, processes_left};

/// Opens process 1's program, and its own, for writing, by every way there is; what it got.
const OVERWRITE: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int wrote;

static void try(const char *path)
{
	int fd = open(path, O_WRONLY);
	if (fd < 0)
		fd = open(path, O_RDWR | O_APPEND);
	if (fd >= 0 && write(fd, "overwritten", 11) == 11)
		wrote++;
	if (fd >= 0)
		close(fd);
}

int main(int argc, char **argv)
{
	char name[64], bytes[5] = "";
	int seen = 0;
	for (int turn = 0; turn < 1000; turn++) {
		int handle = open("/proc/1/exe", O_PATH);
		if (handle >= 0) {
			seen++;
			sprintf(name, "/proc/self/fd/%d", handle);
			try(name);
			close(handle);
		}
		try("/proc/1/exe");
		try("/proc/1/map_files");
		truncate("/proc/1/exe", 0);
	}
	int read_only = open("/proc/1/exe", O_RDONLY);
	if (read_only >= 0) {
		sprintf(name, "/proc/self/fd/%d", read_only);
		try(name);
		wrote += fchmod(read_only, 0777) == 0;
	}
	printf("seen %d wrote %d\n", seen, wrote);
	return 0;
}
"#;

fn kilns_digest() -> Digest {
    Digest::of(&fs::read(env!("CARGO_BIN_EXE_kiln")).expect("it was just built"))
}

#[test]
fn a01_kilns_binary_cannot_be_overwritten_from_inside() {
    needs_root!();
    let store = Store::with_busybox();
    // `/again` and the script make kiln execute itself inside, should it follow them.
    let dockerfile = "FROM busybox\nCOPY attack /attack\n\
                      RUN ln -s /proc/self/exe /again && printf '#!/proc/self/exe\\n' > /script && chmod +x /script\n";
    let Some(context) = armed(dockerfile, OVERWRITE) else { return };
    store.build(&context, &["-t", "x"]).expect(0);
    let (before, mode) =
        (kilns_digest(), fs::metadata(env!("CARGO_BIN_EXE_kiln")).expect("there").permissions());
    let run = |options: &[&str]| store.kiln(&[&["run", "--rm", "--network", "none"], options].concat());
    // Under kiln's init nobody inside sees process 1's program.
    let out = run(&["--init", "x", "/attack"]).expect(0).stdout;
    assert_eq!(out, "seen 0 wrote 0\n");
    // Who may trace sees it, and writes to it no more than anybody else.
    let out = run(&["--init", "--cap-add", "SYS_PTRACE", "x", "/attack"]).expect(0).stdout;
    assert_eq!(out, "seen 1000 wrote 0\n");
    let out = run(&["--init", "--cap-add", "ALL", "--security-opt", "seccomp=unconfined", "x", "/attack"]);
    assert_eq!(out.expect(0).stdout, "seen 1000 wrote 0\n");
    // Without it process 1 is the attacker's own program. It runs and cannot be written to; its mode
    // is the attacker's to change.
    assert_eq!(run(&["x", "/attack"]).expect(0).stdout, "seen 1000 wrote 1\n");
    for program in ["/again", "/script"] {
        let outcome = run(&["x", program]);
        assert_ne!(outcome.code, Some(0), "{outcome:?}");
        let outcome =
            run(&["--init", "--entrypoint", "/bin/sh", "x", "-c", &format!("{program} & /attack; wait")]);
        assert!(outcome.stdout.ends_with("seen 0 wrote 0\n"), "{outcome:?}");
    }
    let step = Context::new(&[(
        "Dockerfile",
        "FROM x\nRUN for i in $(seq 1000); do (echo x > /proc/1/exe) 2>/dev/null && exit 1; done; /attack\n",
    )]);
    store.build(&step, &["--no-cache"]).expect(0);
    assert_eq!(kilns_digest(), before);
    assert_eq!(fs::metadata(env!("CARGO_BIN_EXE_kiln")).expect("there").permissions(), mode);
}

#[test]
fn a02_no_descriptor_and_no_working_directory_leads_out() {
    needs_root!();
    let store = Store::with_busybox();
    for number in 0..=64 {
        let dir = format!("/proc/self/fd/{number}");
        let outcome =
            store.kiln(&["run", "--rm", "--network", "none", "-w", &dir, "busybox", "cat", "../marker"]);
        outcome.expect(125).says(&[&dir]);
    }
    for number in [3, 7, 8, 9, 10, 11] {
        let dockerfile = format!("FROM busybox\nWORKDIR /proc/self/fd/{number}\nRUN pwd; ls ../../..\n");
        let outcome = store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &[]);
        assert!(outcome.code.is_some_and(|code| code != 0), "{outcome:?}");
    }
    // `ls` itself opens the fourth, the directory.
    assert_eq!(store.shell("busybox", "ls /proc/self/fd"), "0\n1\n2\n3");
    let secret = store.beside("secret");
    fs::write(&secret, "x").expect("ours to write");
    let dockerfile = "FROM busybox\nRUN --mount=type=secret,id=s --mount=type=cache,target=/c --mount=target=/ctx \
                      --mount=type=tmpfs,target=/t echo open $(ls /proc/self/fd)\n";
    let secret = format!("id=s,src={}", secret.display());
    let outcome = store.build(&Context::new(&[("Dockerfile", dockerfile)]), &["--secret", &secret]).expect(0);
    outcome.says(&["open 0 1 2 3\n"]);
    for options in [&["--init"][..], &["-i"], &["--read-only"], &["--pids-limit", "50"]] {
        let line =
            [&["run", "--rm", "--network", "none"], options, &["busybox", "ls", "/proc/self/fd"]].concat();
        assert_eq!(store.ok(&line).stdout, "0\n1\n2\n3\n", "{options:?}");
    }
}

#[test]
fn a12_nothing_of_the_host_is_known_inside() {
    needs_root!();
    let store = Store::with_busybox();
    let source = r#"
        #include <errno.h>
        #include <stdio.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        int main(void)
        {
            int joined = syscall(SYS_keyctl, 1, 0) < 0 ? errno : 0, asked = syscall(SYS_keyctl, 0, -3, 0) < 0 ? errno : 0;
            int added = syscall(SYS_add_key, "user", "x", "y", 1, -3) < 0 ? errno : 0;
            printf("keys %d %d %d\n", joined, asked, added);
        }"#;
    let script = "/attack; echo env $(env | sort); echo sockets $(find / -xdev -type s 2>/dev/null); \
                  echo run $(ls -A /run 2>/dev/null); cat /proc/keys | wc -l; hostname";
    let dockerfile = format!("FROM busybox\nCOPY attack /attack\nRUN {script}\n");
    let Some(context) = armed(&dockerfile, source) else { return };
    let mut command = store.command(&["build", "--progress", "plain", "-t", "x", context.path()]);
    command.env("AWS_SECRET_ACCESS_KEY", MARKER).env("SSH_AUTH_SOCK", "/tmp/agent");
    let output = command.output().expect("kiln starts");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    // EPERM three times: the keys of the machine are one for all.
    for line in [
        "keys 1 1 1\n",
        "env HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PWD=/ SHLVL=1\n",
        "sockets\n",
        "run\n",
        " 0\n",
        "buildkitsandbox\n",
    ] {
        assert!(said.contains(line), "{line:?} is missing:\n{said}");
    }
    assert!(!said.contains(MARKER), "{said}");
    let mut command = store.command(&["run", "--rm", "--network", "none", "x", "env"]);
    let seen = command.env("AWS_SECRET_ACCESS_KEY", MARKER).output().expect("kiln starts").stdout;
    assert!(!String::from_utf8_lossy(&seen).contains(MARKER));
}

#[test]
fn a13_nothing_survives_its_step() {
    needs_root!();
    let store = Store::with_busybox();
    let mark = format!("31{}", std::process::id());
    let dockerfile = format!(
        "FROM busybox\nRUN setsid sleep {mark} & (setsid sh -c 'trap \"\" TERM HUP; sleep {mark}; :' &); exit 0\n"
    );
    let started = Instant::now();
    store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &[]).expect(0);
    assert_eq!(processes_left(&mark), [""; 0]);
    assert!(started.elapsed() < Duration::from_secs(60));
    store.ok(&[
        "run",
        "--rm",
        "--init",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        &format!("setsid sleep {mark} &"),
    ]);
    assert_eq!(processes_left(&mark), [""; 0]);
}

#[test]
fn a14_a_step_cannot_use_the_machine_up() {
    needs_root!();
    let store = Store::with_busybox();
    let host = Sentinel::beside(&store);
    let step = |run: &str| {
        store.build_bounded(
            &Context::new(&[("Dockerfile", &format!("FROM busybox\nRUN {run}\n"))]),
            &["--no-cache"],
        )
    };
    // Memory that no limit of processes bounds: as large as was said, and no more.
    step("! dd if=/dev/zero of=/dev/shm/x bs=1M count=100 2>/dev/null && stat -c 'size %s' /dev/shm/x")
        .expect(0)
        .says(&["size 67108864"]);
    step("i=0; while [ $i -lt 1000 ]; do mount -t tmpfs none /mnt 2>/dev/null && exit 1; i=$((i+1)); done")
        .expect(0);
    if task_limit_works() {
        // Starts processes until none starts any more.
        let bomb = "n=0; while sleep 60 & do n=$((n+1)); [ $n -lt 20000 ] || { echo endless; break; }; done 2>/dev/null; \
                    echo started $n";
        let started = Instant::now();
        let outcome = step(bomb);
        assert!(!outcome.stderr.contains("endless\n"), "{}", outcome.stderr);
        assert!(started.elapsed() < Duration::from_secs(60));
    } else {
        eprintln!("SKIPPED ALOUD: this kernel bounds a step's processes only in control groups");
    }
    let outcome = store.kiln(&[
        "run",
        "--rm",
        "--network",
        "none",
        "--memory",
        "32m",
        "--memory-swap",
        "32m",
        "busybox",
        "sh",
        "-c",
        "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}",
    ]);
    if outcome.stderr.contains("cannot be set") {
        eprintln!("SKIPPED ALOUD: {}", outcome.stderr);
    } else {
        assert!(!outcome.stdout.contains("200000000"), "{outcome:?}");
        outcome.says(&["ran out of memory"]);
    }
    // And then as if nothing had been.
    step("true").expect(0);
    host.check();
}

/// Linux 6.14, by what it gave to a namespace: a number of its own.
fn task_limit_works() -> bool {
    let script = "echo 1000 > /proc/sys/kernel/pid_max; cat /proc/sys/kernel/pid_max";
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "sh", "-c", script]);
    // Before, the host's own would change: what is asked first is the version.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    version >= (6, 14) && command.output().is_ok_and(|output| output.stdout == b"1000\n")
}
