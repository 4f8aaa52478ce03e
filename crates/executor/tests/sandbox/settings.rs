//! What a process is given and held to beside its file system.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use kiln_executor::{
    Cancel, Capabilities, Device, ExecError, Exit, ProcessSpec, ResourceLimit, Resources, SystemPaths,
};

use crate::harness::{Sandbox, shell};

/// Exit, output and errors of a script with the spec changed.
fn run(
    sandbox: &Sandbox,
    script: &str,
    change: impl FnOnce(&mut ProcessSpec),
) -> (Result<Exit, ExecError>, String, String) {
    let mut spec = shell(script);
    change(&mut spec);
    sandbox.run_spec(&spec, &Cancel::new().unwrap())
}

/// Output of a script that must succeed.
#[track_caller]
fn output(sandbox: &Sandbox, script: &str, change: impl FnOnce(&mut ProcessSpec)) -> String {
    let (result, out, err) = run(sandbox, script, change);
    assert_eq!(result.unwrap(), Exit::Code(0), "{out}{err}");
    out
}

#[test]
fn limits_are_sane_unless_others_are_asked_for() {
    let Some(sandbox) = Sandbox::new() else { return };
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let (soft, hard) = (own.min(65_536), own.min(1_048_576));
    let script = "ulimit -Sc; ulimit -Hc; ulimit -Sn; ulimit -Hn";
    assert_eq!(output(&sandbox, script, |_| {}), format!("0\n0\n{soft}\n{hard}\n"));
    let limit = |name, soft, hard| {
        let resource = ResourceLimit::resource(name).unwrap();
        ResourceLimit { resource, soft: Some(soft), hard: Some(hard) }
    };
    let asked = vec![limit("nofile", 50, 60), limit("cpu", 100, 200)];
    let script = "ulimit -Sn; ulimit -Hn; ulimit -St; ulimit -Sc";
    assert_eq!(output(&sandbox, script, |spec| spec.rlimits = asked), "50\n60\n100\n0\n");
    let wrong = run(&sandbox, "true", |spec| spec.rlimits = vec![limit("nofile", 60, 50)]).0;
    assert!(matches!(wrong, Err(ExecError::BadSetting { .. })), "{wrong:?}");
}

#[test]
fn a_read_only_root_leaves_what_is_mounted_on_it() {
    let Some(sandbox) = Sandbox::new() else { return };
    let script = "touch /x 2>/dev/null || echo refused; echo > /dev/shm/x && echo > /dev/null && pwd";
    let out = output(&sandbox, script, |spec| {
        (spec.read_only, spec.create_cwd, spec.cwd) = (true, true, "/made/for/it".to_owned());
    });
    assert_eq!(out, "refused\n/made/for/it\n");
}

#[test]
fn shared_memory_has_the_size_asked_for() {
    let Some(sandbox) = Sandbox::new() else { return };
    let script = "df -k /dev/shm | while read -r _ size rest; do echo $size; done";
    assert_eq!(output(&sandbox, script, |_| {}), "1K-blocks\n65536\n");
    assert_eq!(output(&sandbox, script, |spec| spec.shm_size_bytes = 1 << 20), "1K-blocks\n1024\n");
}

#[test]
fn a_device_that_was_asked_for_works_where_it_was_asked_for() {
    let Some(sandbox) = Sandbox::new() else { return };
    let device = |path: &str| Device {
        path: path.to_owned(),
        block: false,
        number: (1, 5),
        mode: 0o640,
        owner: (0, 29),
    };
    let script =
        "stat -c '%a %g %t:%T' /dev/own/zero; head -c 3 /dev/own/zero | wc -c; head -c 2 /zero | wc -c";
    let devices = vec![device("/dev/own/zero"), device("/zero")];
    assert_eq!(output(&sandbox, script, |spec| spec.devices = devices), "640 29 1:5\n3\n2\n");
    assert!(!sandbox.path("zero").exists(), "the mount's target is taken out again");
}

#[test]
fn kernel_settings_of_its_own_are_set_and_the_hosts_are_not() {
    let Some(sandbox) = Sandbox::new() else { return };
    let host = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    let settings = vec![
        ("net.ipv4.ip_unprivileged_port_start".to_owned(), "77".to_owned()),
        ("kernel.shmmni".to_owned(), "123".to_owned()),
    ];
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni";
    assert_eq!(output(&sandbox, script, |spec| spec.sysctls = settings), "77\n123\n");
    assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap(), host);
    for name in ["kernel.core_pattern", "vm.swappiness", "net/../kernel/core_pattern"] {
        let result = run(&sandbox, "true", |spec| spec.sysctls = vec![(name.to_owned(), "1".to_owned())]).0;
        assert!(matches!(result, Err(ExecError::BadSetting { .. })), "{name}: {result:?}");
    }
}

#[test]
fn groups_and_the_oom_score_are_as_asked() {
    let Some(sandbox) = Sandbox::new() else { return };
    let out = output(&sandbox, "id -G; cat /proc/self/oom_score_adj", |spec| {
        spec.user = Some("app".to_owned());
        spec.more_groups = vec!["audio".to_owned(), "4711".to_owned()];
        spec.oom_score_adj = Some(500);
    });
    assert_eq!(out, "1001 29 4711\n500\n");
    let unknown = run(&sandbox, "true", |spec| spec.more_groups = vec!["nonsense".to_owned()]).0;
    assert!(matches!(unknown, Err(ExecError::BadUser { .. })), "{unknown:?}");
}

#[test]
fn capabilities_are_what_was_asked_for() {
    let Some(sandbox) = Sandbox::new() else { return };
    let script = "while read -r k v; do case $k in Cap*) echo $k$v;; esac; done < /proc/self/status";
    let caps = |capabilities| output(&sandbox, script, |spec| spec.capabilities = capabilities);
    let one = |name| Capabilities::parse(name).unwrap();
    let none = "0000000000000000";
    let expect =
        |mask: &str| format!("CapInh:{none}\nCapPrm:{mask}\nCapEff:{mask}\nCapBnd:{mask}\nCapAmb:{none}\n");
    assert_eq!(caps(Capabilities::changed(&[], &[Capabilities::ALL])), expect(none));
    let added = Capabilities::changed(&[one("SYS_PTRACE")], &[one("MKNOD"), one("NET_RAW")]);
    assert_eq!(caps(added), expect("00000000a00c05fb"));
}

#[test]
fn open_system_paths_are_open() {
    let Some(sandbox) = Sandbox::new() else { return };
    let script = "cat /proc/timer_list | wc -c";
    assert_eq!(output(&sandbox, script, |_| {}), "0\n");
    assert_ne!(output(&sandbox, script, |spec| spec.system_paths = SystemPaths::Open), "0\n");
}

#[test]
fn the_reaper_reaps_passes_signals_on_and_ends_as_its_child_does() {
    let Some(sandbox) = Sandbox::new() else { return };
    let reaper = |spec: &mut ProcessSpec| spec.reaper = true;
    // An orphan that ends is gone at once: nobody but process 1 could have reaped it.
    let script = "[ $$ != 1 ] || exit 1; (sh -c 'echo $$ > /tmp/orphan' &) ; \
                  while [ ! -s /tmp/orphan ] || [ -e /proc/$(cat /tmp/orphan) ]; do :; done; cat /proc/1/comm";
    assert_eq!(output(&sandbox, script, reaper), "kiln-init\n");
    assert_eq!(run(&sandbox, "exit 7", reaper).0.unwrap(), Exit::Code(7));
    assert_eq!(run(&sandbox, "kill -9 $$", reaper).0.unwrap(), Exit::Code(137));
    let (missing, ..) =
        run(&sandbox, "", |spec| (spec.reaper, spec.args) = (true, vec!["nonsense".to_owned()]));
    assert!(matches!(missing, Err(ExecError::NotFound { .. })), "{missing:?}");
    let out = output(&sandbox, "trap 'echo got; exit 0' USR1; kill -USR1 1; while :; do :; done", reaper);
    assert_eq!(out, "got\n");
}

#[test]
fn process_1_of_kilns_shows_nothing_of_itself() {
    let Some(sandbox) = Sandbox::new() else { return };
    let script = "ls -l /proc/1/fd /proc/1/exe 2>&1 | wc -l; cat /proc/1/environ 2>/dev/null | wc -c; \
                  readlink /proc/1/exe || echo hidden; (echo x > /proc/1/exe) 2>/dev/null || echo refused; \
                  cat /proc/1/maps 2>/dev/null | wc -c";
    let out = output(&sandbox, script, |spec| {
        spec.reaper = true;
        spec.env.push(("SECRET".to_owned(), "x".to_owned()));
    });
    assert!(out.ends_with("\n0\nhidden\nrefused\n0\n"), "{out}");
}

#[test]
fn the_signal_that_ends_it_is_the_one_asked_for() {
    let Some(sandbox) = Sandbox::new() else { return };
    let cancel = Cancel::new().unwrap();
    // It waits, so that a busy machine lets it go on at once: what does not end soon is killed.
    let mut spec = shell("trap 'echo int > /tmp/got; exit 0' INT; echo > /tmp/ready; sleep 1000 & wait");
    spec.stop_signal = libc_sigint();
    let (stopper, ready) = (cancel.clone(), sandbox.path("tmp/ready"));
    let watcher = std::thread::spawn(move || {
        let started = Instant::now();
        while !ready.exists() && started.elapsed() < Duration::from_secs(60) {
            std::thread::yield_now();
        }
        stopper.cancel();
    });
    let result = sandbox.run_spec(&spec, &cancel).0;
    watcher.join().unwrap();
    // It ended by itself, in time.
    assert_eq!(result.unwrap(), Exit::Code(0));
    assert_eq!(fs::read_to_string(sandbox.path("tmp/got")).unwrap(), "int\n");
}

fn libc_sigint() -> i32 {
    rustix::process::Signal::INT.as_raw()
}

/// A shell that starts itself over and over, a few at a time, and says how far it came.
const FORK_BOMB: &str =
    "n=0; while sleep 100 & do n=$((n+1)); [ $n -lt 2000 ] || break; done 2>/dev/null; echo $n";

#[test]
fn a_fork_bomb_comes_to_its_end() {
    let Some(sandbox) = Sandbox::new() else { return };
    if !kernel_is_at_least(6, 14) {
        eprintln!("SKIPPED ALOUD: this kernel counts processes only in control groups");
        return;
    }
    let host = fs::read_to_string("/proc/sys/kernel/pid_max").unwrap();
    let (result, out, err) = run(&sandbox, FORK_BOMB, |spec| spec.task_limit = Some(400));
    assert!(result.is_ok(), "{result:?}");
    // The shell ends with an error of its own, before it could say how far it came.
    assert!(out.is_empty() || out.trim().parse::<u32>().is_ok_and(|count| count < 400), "{out}{err}");
    assert_eq!(fs::read_to_string("/proc/sys/kernel/pid_max").unwrap(), host);
}

fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut parts = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (major, minor)
}

/// Names of the groups below every hierarchy's `kiln`.
fn groups() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut dirs = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                // Other tests make groups of their own beside this one.
                let own = format!("-{}-", std::process::id());
                if entry.file_name().to_string_lossy().contains(&own) {
                    found.insert(path.display().to_string());
                }
                dirs.push(path);
            }
        }
    }
    found
}

/// `None`, said aloud, where this machine has no group for what a test needs.
#[track_caller]
fn limited(sandbox: &Sandbox, script: &str, resources: Resources) -> Option<(Exit, String)> {
    let before = groups();
    let (result, out, err) = run(sandbox, script, |spec| spec.resources = Some(resources));
    assert!(groups().is_subset(&before) || before.is_empty(), "a control group is left");
    match result {
        Err(ExecError::BadSetting { setting, reason }) => {
            eprintln!("SKIPPED ALOUD: {setting}: {reason}");
            None
        }
        other => Some((other.unwrap(), format!("{out}{err}"))),
    }
}

#[test]
fn memory_beyond_the_limit_is_an_oom_kill_and_is_counted() {
    let Some(sandbox) = Sandbox::new() else { return };
    let resources = Resources { memory_bytes: Some(32 << 20), swap_bytes: Some(0), ..Resources::default() };
    let script = "head -c 200m /dev/zero | sh -c 'x=$(cat | tr \"\\0\" x); echo ${#x}'";
    let Some((_, out)) = limited(&sandbox, script, resources.clone()) else { return };
    let usage = *sandbox.usage.lock().unwrap();
    assert!(usage.oom_kills > 0 && !out.contains("209715200"), "{usage:?} {out}");
    assert!(usage.peak_memory_bytes <= 32 << 20 && usage.peak_memory_bytes > 16 << 20, "{usage:?}");
    let (exit, _) = limited(&sandbox, "true", resources).unwrap();
    assert_eq!((exit, sandbox.usage.lock().unwrap().oom_kills), (Exit::Code(0), 0));
}

#[test]
fn processes_and_processor_time_are_bounded() {
    let Some(sandbox) = Sandbox::new() else { return };
    let resources = Resources { pids: Some(20), ..Resources::default() };
    if let Some((exit, out)) = limited(&sandbox, FORK_BOMB, resources) {
        assert!(exit != Exit::Code(0) || out.trim().parse::<u32>().is_ok_and(|n| n < 20), "{exit:?} {out}");
    }
    let resources = Resources { cpu_millionths: Some(200_000), ..Resources::default() };
    let script = "n=0; while [ $n -lt 20000 ]; do n=$((n+1)); done";
    let started = Instant::now();
    if limited(&sandbox, script, resources).is_some() {
        let (cpu, took) = (sandbox.usage.lock().unwrap().cpu, started.elapsed());
        // A fifth of a processor; the first period's part may come at once.
        assert!(cpu < took / 4 + Duration::from_millis(60), "{cpu:?} of processor time in {took:?}");
        assert!(cpu > Duration::ZERO);
    }
}

#[test]
fn a_container_sees_its_own_group_as_the_root() {
    let Some(sandbox) = Sandbox::new() else { return };
    let resources = Resources { pids: Some(20), ..Resources::default() };
    let Some((_, out)) = limited(&sandbox, "cat /proc/self/cgroup", resources) else { return };
    let pids = out.lines().find(|line| line.contains(":pids:") || line.starts_with("0::"));
    assert!(pids.is_some_and(|line| line.ends_with(":/")), "{out}");
}

#[test]
fn what_a_process_used_is_told_without_any_group() {
    let Some(sandbox) = Sandbox::new() else { return };
    sandbox.sh("n=0; while [ $n -lt 100000 ]; do n=$((n+1)); done");
    let usage = *sandbox.usage.lock().unwrap();
    assert!(usage.cpu > Duration::from_millis(1) && usage.cpu < Duration::from_secs(20), "{usage:?}");
    assert!(usage.peak_memory_bytes > 100 << 10 && usage.oom_kills == 0, "{usage:?}");
}

#[test]
fn the_memory_of_several_processes_is_that_of_all_together() {
    let Some(sandbox) = Sandbox::new() else { return };
    // Each has read all of it when it says the first of it, and holds it until nobody is left who could want the rest.
    // That is when all have held it for a while, in which somebody looks.
    let script = "rm -f /tmp/*; for n in 1 2 3 4; do dd if=/dev/zero bs=24M count=1 2>/dev/null | \
                  { head -c 1 > /tmp/$n; \
                  until [ -s /tmp/1 ] && [ -s /tmp/2 ] && [ -s /tmp/3 ] && [ -s /tmp/4 ]; do sleep 0.02; done; \
                  sleep 3; } & done; wait";
    let peak_mib = |adds_up_memory| {
        output(&sandbox, script, |spec| spec.adds_up_memory = adds_up_memory);
        sandbox.usage.lock().unwrap().peak_memory_bytes >> 20
    };
    let (largest, all) = (peak_mib(false), peak_mib(true));
    assert!((24..48).contains(&largest) && (96..144).contains(&all), "{largest} MiB and {all} MiB");
}

#[test]
fn nothing_survives_its_step() {
    let Some(sandbox) = Sandbox::new() else { return };
    let mark = format!("97{}", std::process::id());
    for reaper in [false, true] {
        output(&sandbox, &format!("setsid sleep {mark} & (setsid sleep {mark} &) ; exit 0"), |spec| {
            spec.reaper = reaper;
        });
        assert_eq!(crate::process::processes_with(&mark), 0);
    }
    assert!(fs::metadata(sandbox.path("")).is_ok_and(|root| root.dev() != 0));
}

#[test]
fn a_working_directory_by_way_of_a_descriptor_is_none() {
    let Some(sandbox) = Sandbox::new() else { return };
    for number in 0..=64 {
        for base in ["/proc/self/fd", "/proc/1/fd", "/dev/fd"] {
            for create_cwd in [true, false] {
                let change = |spec: &mut ProcessSpec| {
                    (spec.cwd, spec.create_cwd) = (format!("{base}/{number}"), create_cwd);
                };
                let (result, out, _) = run(&sandbox, "pwd", change);
                assert!(matches!(result, Err(ExecError::BadCwd { .. })), "{base}/{number}: {result:?} {out}");
            }
        }
    }
}
