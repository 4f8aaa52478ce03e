//! Attacks that race with kiln, for a few seconds each.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{MARKER, Sentinel, armed};
use crate::harness::{Context, Running, Store, needs_root};

/// How long a race goes on.
const BOUND: Duration = Duration::from_secs(4);

/// Swaps a directory and a link for one another as fast as the kernel can, in a directory that other
/// steps mount from and below, until a file appears there.
const SWAP: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	chdir("/c");
	unlink("stop");
	mkdir("dir", 0777);
	mkdir("dir/sub", 0777);
	for (int at = 1; at < argc; at++) {
		unlink("link");
		symlink(argv[at], "link");
	}
	printf("swapping\n");
	fflush(stdout);
	time_t end = time(0) + 20;
	while (access("stop", F_OK) && time(0) < end)
		syscall(SYS_renameat2, AT_FDCWD, "dir", AT_FDCWD, "link", 2);
	return 0;
}
"#;

#[test]
fn a03_a_step_that_shares_a_cache_sends_no_mount_elsewhere() {
    needs_root!();
    let store = Store::with_busybox();
    let host = Sentinel::beside(&store);
    for target in ["/proc/sys/kernel", host.path(), "/dev", "/proc"] {
        let swap = format!(
            "FROM busybox\nCOPY attack /attack\nRUN --mount=type=cache,id=shared,target=/c /attack {target}\n"
        );
        let Some(attacker) = armed(&swap, SWAP) else { return };
        let mut attack = Running::start(store.command(&["build", "--progress", "plain", attacker.path()]));
        attack.wait_for("swapping");
        // A build without cache would get caches of its own, too: each step is a new one by number.
        let step = |number: u32| {
            format!(
                "RUN --mount=type=cache,id=shared,target=/c --mount=type=tmpfs,target=/c/dir/sub \
                 --mount=type=cache,id=other,target=/c/dir/other --mount=target=/c/dir/b : {number} {target}; \
                 cat /c/dir/sub/marker /c/dir/marker; echo attack > /c/dir/sub/core_pattern; true\n"
            )
        };
        let started = Instant::now();
        let mut starts = 0;
        while started.elapsed() < BOUND / 4 {
            let steps: String = (starts..starts + 3).map(step).collect();
            let victim = Context::new(&[("Dockerfile", &format!("FROM busybox\n{steps}"))]);
            let outcome = store.build(&victim, &[]);
            // Refused or not found, as it came; never a panic, and never the host's files.
            assert!(matches!(outcome.code, Some(0 | 1 | 6 | 7)), "{outcome:?}");
            assert!(!outcome.stderr.contains(MARKER), "{outcome:?}");
            starts += 3;
        }
        let stop =
            format!("FROM busybox\nRUN --mount=type=cache,id=shared,target=/c touch /c/stop # {target}\n");
        store.build(&Context::new(&[("Dockerfile", &stop)]), &[]).expect(0);
        attack.end().expect(0);
        println!("{starts} starts against {target}");
        host.check();
    }
    for target in ["/dev", "/proc", "/sys", "/proc/sys", "/dev/null"] {
        let dockerfile = format!("FROM busybox\nRUN --mount=type=cache,target={target} true\n");
        store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &[]).expect(7);
    }
    assert_eq!(store.mounts(), [""; 0]);
}

/// Runs `change` over and over while `builds` does its work.
fn race(change: impl Fn() + Sync, builds: impl FnOnce()) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                change();
            }
        });
        // A failed assertion must not leave the other thread running for ever.
        let _stop = Stop(&over);
        builds();
    });
}

struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a05_a_source_that_becomes_a_link_shows_nothing_of_the_host() {
    needs_root!();
    let store = Store::with_busybox();
    let host = Sentinel::beside(&store);
    let dockerfile = "FROM busybox\nRUN --mount=type=bind,source=dir,target=/s cat /s/marker /s/sub/marker 2>&1; true\n\
                      RUN --mount=type=cache,id=c,target=/s --mount=type=bind,source=dir/sub,target=/s/b cat /s/b/marker 2>&1; true\n\
                      COPY dir /copied\nRUN cat /copied/marker 2>&1; true\n";
    let context =
        Context::new(&[("Dockerfile", dockerfile), ("dir/sub/harmless", "x"), ("dir/marker", "harmless")]);
    symlink(host.path(), context.at("link")).expect("ours to make");
    let (dir, link, spare) = (context.at("dir"), context.at("link"), context.at("spare"));
    let started = Instant::now();
    let mut builds = 0;
    let swap = || {
        // The same in three steps: what is between them is one more state to be met.
        for (from, to) in [(&dir, &spare), (&link, &dir), (&dir, &link), (&spare, &dir)] {
            let _ = fs::rename(from, to);
        }
    };
    race(swap, || {
        while started.elapsed() < BOUND {
            let outcome = store.build(&context, &["--no-cache"]);
            assert!(outcome.code.is_some_and(|code| code != 101), "{outcome:?}");
            assert!(!outcome.stderr.contains(MARKER), "{outcome:?}");
            builds += 1;
        }
    });
    println!("{builds} builds");
    host.check();
}
