//! What a process sees of the world, and how it ends.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use kiln_executor::{Cancel, ExecError, Exit, Network, ProcessSpec};

use crate::harness::{Sandbox, shell};

#[test]
fn exit_codes_and_signals_come_back() {
    let Some(sandbox) = Sandbox::new() else { return };
    let run = |script| sandbox.run_spec(&shell(script), &Cancel::new().unwrap()).0.unwrap();
    assert_eq!(run("exit 3"), Exit::Code(3));
    // Process 1 ignores signals it does not handle, so a child shows how a signal looks.
    assert_eq!(run("sh -c 'kill -9 $$'; exit $?"), Exit::Code(137));
}

#[test]
fn output_comes_on_its_own_stream() {
    let Some(sandbox) = Sandbox::new() else { return };
    let (result, out, err) = sandbox.run_spec(&shell("echo a; echo b >&2; echo c"), &Cancel::new().unwrap());
    assert_eq!((result.unwrap(), out.as_str(), err.as_str()), (Exit::Code(0), "a\nc\n", "b\n"));
}

#[test]
fn process_sees_only_its_own_world() {
    let Some(sandbox) = Sandbox::new() else { return };
    assert_eq!(sandbox.sh("echo $$; hostname"), "1\nsandbox\n");
    let open = "for n in 0 1 2 3 4 5 6 7 8 9 10 11 12; do [ -e /proc/$$/fd/$n ] && echo $n; done; true";
    assert_eq!(sandbox.sh(open), "0\n1\n2\n");
    assert_eq!(sandbox.sh("ls /sys/class/net"), "lo\n");
    assert_eq!(
        sandbox.sh("cat /proc/keys /proc/timer_list; touch /proc/sys/kernel/x 2>/dev/null || echo refused"),
        "refused\n"
    );
    let mounts = sandbox.sh("cat /proc/self/mountinfo");
    let state = sandbox.dir.path().to_str().unwrap();
    assert!(
        !mounts.lines().any(|line| line.split(' ').nth(4).is_some_and(|at| at.starts_with(state))),
        "{mounts}"
    );
    let devices = sandbox.sh("ls /dev");
    assert_eq!(
        devices.split_whitespace().collect::<Vec<_>>(),
        [
            "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
            "tty", "urandom", "zero",
        ]
    );
}

#[test]
fn capabilities_are_the_default_set() {
    let Some(sandbox) = Sandbox::new() else { return };
    let caps = |user: Option<&str>| {
        let mut spec =
            shell("while read -r k v; do case $k in Cap*) echo $k$v;; esac; done < /proc/self/status");
        spec.user = user.map(str::to_owned);
        sandbox.run_spec(&spec, &Cancel::new().unwrap()).1
    };
    let default = "00000000a80425fb";
    let none = "0000000000000000";
    assert_eq!(
        caps(None),
        format!("CapInh:{none}\nCapPrm:{default}\nCapEff:{default}\nCapBnd:{default}\nCapAmb:{none}\n")
    );
    assert_eq!(
        caps(Some("app")),
        format!("CapInh:{none}\nCapPrm:{none}\nCapEff:{none}\nCapBnd:{default}\nCapAmb:{none}\n")
    );
}

#[test]
fn user_directory_and_environment_are_as_asked() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut spec = shell("id -u; id -G; pwd; echo $A $HOME");
    spec.user = Some("app".to_owned());
    spec.cwd = "/work/dir".to_owned();
    spec.create_cwd = true;
    spec.env.push(("A".to_owned(), "b=c".to_owned()));
    let (result, out, err) = sandbox.run_spec(&spec, &Cancel::new().unwrap());
    assert_eq!(result.unwrap(), Exit::Code(0), "{err}");
    assert_eq!(out, "1000\n1001 29\n/work/dir\nb=c /home/app\n");
    assert!(sandbox.path("work/dir").is_dir(), "a working directory stays");
}

#[test]
fn what_cannot_start_says_why() {
    let Some(sandbox) = Sandbox::new() else { return };
    let start = |change: &dyn Fn(&mut ProcessSpec)| {
        let mut spec = shell("");
        change(&mut spec);
        sandbox.run_spec(&spec, &Cancel::new().unwrap()).0.unwrap_err()
    };
    assert!(matches!(start(&|s| s.args = vec!["nonsense".into()]), ExecError::NotFound { .. }));
    assert!(matches!(start(&|s| s.args = vec!["/etc/passwd".into()]), ExecError::NotExecutable { .. }));
    assert!(matches!(start(&|s| s.user = Some("nobody".into())), ExecError::BadUser { .. }));
    assert!(matches!(start(&|s| s.user = Some("4294967296".into())), ExecError::BadUser { .. }));
    assert!(matches!(start(&|s| s.cwd = "/missing".into()), ExecError::BadCwd { .. }));
    assert!(matches!(start(&|s| s.cwd = "/proc/self/fd/4".into()), ExecError::BadCwd { .. }));
}

#[test]
fn cancelling_ends_everything() {
    let Some(sandbox) = Sandbox::new() else { return };
    check_cancelling(&sandbox);
    // Once more, with a helper that was forked.
    check_cancelling(&sandbox);
}

#[track_caller]
fn check_cancelling(sandbox: &Sandbox) {
    let cancel = Cancel::new().unwrap();
    let mark = format!("98{}", std::process::id());
    let script = format!("setsid sleep {mark} & sleep {mark}; sleep {mark}");
    let stopper = cancel.clone();
    let watcher = std::thread::spawn({
        let mark = mark.clone();
        move || {
            let deadline = Instant::now() + Duration::from_secs(60);
            while processes_with(&mark) < 2 && Instant::now() < deadline {
                std::thread::yield_now();
            }
            stopper.cancel();
            Instant::now()
        }
    });
    let result = sandbox.run_spec(&shell(&script), &cancel).0;
    let cancelled = watcher.join().unwrap();
    assert!(matches!(result, Err(ExecError::Cancelled)), "{result:?}");
    assert!(cancelled.elapsed() < Duration::from_secs(10));
    assert_eq!(processes_with(&mark), 0);
}

/// Children of this process that are helpers or their nursery.
fn helpers() -> Vec<i32> {
    let own = format!("PPid:\t{}\n", std::process::id());
    let pids =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|dir| dir.file_name().to_str()?.parse().ok());
    let read = |pid: i32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    pids.filter(|&pid| read(pid, "status").contains(&own) && read(pid, "cmdline") == "kiln-init\0").collect()
}

#[test]
fn one_process_forks_the_helpers_from_the_second_on_and_goes_with_the_executor() {
    let Some(sandbox) = Sandbox::new() else { return };
    assert_eq!(sandbox.sh("echo first"), "first\n");
    assert_eq!(helpers(), [0; 0]);
    for _ in 0..3 {
        assert_eq!(sandbox.sh("echo again; exit 0"), "again\n");
        let code = sandbox.run_spec(&shell("exit 4"), &Cancel::new().unwrap()).0.unwrap();
        assert_eq!(code, Exit::Code(4));
    }
    let nursery = helpers();
    assert_eq!(nursery.len(), 1);
    let at_once = || sandbox.sh("echo $$");
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..8).map(|_| scope.spawn(at_once)).collect();
        all.into_iter().for_each(|one| assert_eq!(one.join().unwrap(), "1\n"));
    });
    assert_eq!(helpers(), nursery);
    // What it has forked is buried, as soon as the kernel has taken its namespaces down.
    let children = || fs::read_to_string(format!("/proc/{0}/task/{0}/children", nursery[0])).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !children().is_empty() && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(children(), "");
    drop(sandbox);
    assert_eq!(helpers(), [0; 0]);
}

#[test]
fn a_nursery_that_was_killed_takes_its_helpers_along_and_is_replaced() {
    let Some(sandbox) = Sandbox::new() else { return };
    assert_eq!(sandbox.sh("echo 1") + &sandbox.sh("echo 2"), "1\n2\n");
    let kill = |pid: i32| {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    };
    let mark = format!("97{}", std::process::id());
    std::thread::scope(|scope| {
        let running =
            scope.spawn(|| sandbox.run_spec(&shell(&format!("sleep {mark}")), &Cancel::new().unwrap()).0);
        while processes_with(&mark) == 0 {
            std::thread::yield_now();
        }
        helpers().into_iter().for_each(kill);
        let ended = running.join().unwrap();
        assert!(matches!(ended, Err(ExecError::HelperDied)), "{ended:?}");
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    while processes_with(&mark) > 0 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(processes_with(&mark), 0);
    for text in ["3", "4", "5"] {
        assert_eq!(sandbox.sh(&format!("echo {text}")), format!("{text}\n"));
    }
    assert_eq!(helpers().len(), 1);
}

/// Processes of this machine with `word` among their arguments.
pub(crate) fn processes_with(word: &str) -> usize {
    let dirs = fs::read_dir("/proc").unwrap().flatten();
    dirs.filter(|dir| {
        let command = fs::read(dir.path().join("cmdline")).unwrap_or_default();
        command.split(|&b| b == 0).any(|arg| arg == word.as_bytes())
    })
    .count()
}

#[test]
fn links_in_the_image_lead_no_mount_outside() {
    let Some(sandbox) = Sandbox::new() else { return };
    let outside = sandbox.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::remove_dir(sandbox.path("sys")).unwrap();
    symlink(&outside, sandbox.path("sys")).unwrap();
    // The link's target does not exist inside, so it is an error, and never the host's directory.
    let result = sandbox.run_spec(&shell("true"), &Cancel::new().unwrap()).0;
    assert!(result.is_err() || fs::read_dir(&outside).unwrap().next().is_none());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(outside.to_str().unwrap()));
}

#[test]
fn missing_mount_targets_are_taken_out_again() {
    let Some(sandbox) = Sandbox::new() else { return };
    for file in ["resolv.conf", "hosts", "hostname"] {
        fs::remove_file(sandbox.path("etc").join(file)).unwrap();
    }
    fs::remove_dir(sandbox.path("proc")).unwrap();
    let before = fs::metadata(sandbox.path("etc")).unwrap().modified().unwrap();
    assert!(sandbox.sh("cat /etc/hosts").contains("localhost"));
    assert!(!sandbox.path("proc").exists());
    assert!(!sandbox.path("etc/hosts").exists());
    assert_eq!(fs::metadata(sandbox.path("etc")).unwrap().modified().unwrap(), before);
}

#[test]
fn start_to_end_is_a_matter_of_milliseconds() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mut times: Vec<Duration> = (0..11)
        .map(|_| {
            let started = Instant::now();
            sandbox.sh("true");
            started.elapsed()
        })
        .collect();
    times.sort();
    // Measured, not asserted: `cargo xtask bench` is where speed is judged.
    println!("median of 11 runs: {:?}", times[5]);
}

/// Needs a network namespace of its own, so that the host's rules stay as they are.
#[test]
fn default_network_reaches_out_even_when_forwarding_is_dropped() {
    if Sandbox::new().is_none() {
        return;
    }
    let script = r#"
set -e
mount -t tmpfs tmpfs /run
ip link set lo up
ip netns add outside
ip link add up0 type veth peer name eth0 netns outside
ip addr add 192.0.2.1/24 dev up0; ip link set up0 up
ip -n outside addr add 192.0.2.2/24 dev eth0; ip -n outside link set eth0 up
iptables -P FORWARD DROP
nft add table inet strict
nft 'add chain inet strict forward { type filter hook forward priority 0; policy drop; }'
ip netns exec outside busybox nc -l -p 7000 -e /bin/echo reached </dev/null >/dev/null 2>&1 &
tries=0
until ip netns exec outside cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q ':1B58 .* 0A '; do
    tries=$((tries+1)); [ $tries -lt 600 ]; sleep 0.05
done
exec "$PROBE" --exact process::network_probe --nocapture --ignored
"#;
    let output = std::process::Command::new("unshare")
        .args(["--net", "--mount", "sh", "-c", script])
        .env("PROBE", std::env::current_exe().unwrap())
        .output()
        .unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("container got: reached"), "{text}");
}

/// Runs inside the namespace that the test above makes.
#[test]
#[ignore = "started by default_network_reaches_out_even_when_forwarding_is_dropped"]
fn network_probe() {
    let sandbox = Sandbox::new().expect("the caller checked");
    let mut spec = shell("nc -w 30 192.0.2.2 7000 </dev/null; ip route");
    spec.network = Network::Default;
    let (result, out, err) = sandbox.run_spec(&spec, &Cancel::new().unwrap());
    println!("container got: {out}{err}{result:?}");
    assert_eq!(result.unwrap(), Exit::Code(0));
}
