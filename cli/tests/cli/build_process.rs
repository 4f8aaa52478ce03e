//! RUN as a process among others: its sandbox, its network, its neighbours.

use std::fs;
use std::process::Command;

use crate::harness::{Context, Running, Store, needs_root, text};

#[test]
fn a_run_sees_its_own_processes_and_host_name_and_no_more_privilege_than_it_needs() {
    needs_root!();
    let store = Store::with_busybox();
    store.image(
        "x",
        "FROM busybox\nRUN echo $$ > /pid && ls /proc | grep -c '^[0-9]' > /count \
         && ls /dev | sort > /dev-list && id -u > /uid && grep CapEff /proc/self/status > /caps\n\
         RUN ! mount -t tmpfs none /tmp\nRUN ! mknod /disk b 8 0 || ! cat /disk\nRUN test -s /etc/hosts\n",
    );
    let count: u32 = store.shell("x", "cat /count").parse().expect("a number");
    assert!(count < 10, "{count} processes are visible");
    let devices = store.shell("x", "cat /dev-list");
    assert!(devices.contains("null") && devices.contains("urandom"), "{devices}");
    let caps = store.shell("x", "cat /caps");
    let bits = caps.split_whitespace().nth(1).and_then(|hex| u64::from_str_radix(hex, 16).ok());
    const SYS_ADMIN: u64 = 1 << 21;
    assert!(bits.is_some_and(|bits| bits & SYS_ADMIN == 0), "{caps}");
}

#[test]
fn what_sandboxing_needs_does_not_show_in_the_layer() {
    needs_root!();
    let store = Store::with_busybox();
    store.image("x", "FROM busybox\nRUN echo x > /only\n");
    let tar = store.beside("x.tar");
    store.ok(&["save", "-o", text(&tar), "x"]);
    let json = store.inspect("x");
    let layers = json["RootFS"]["Layers"].as_array().expect("a list").len();
    assert_eq!(layers, 2, "{json}");
    let dir = store.beside("unpacked");
    fs::create_dir(&dir).expect("ours to write");
    let unpacked = Command::new("tar").args(["-C", text(&dir), "-xf", text(&tar)]).status();
    assert!(unpacked.expect("tar runs").success());
    let manifest = fs::read_to_string(dir.join("manifest.json")).expect("docker archives have one");
    let manifest: serde_json::Value = serde_json::from_str(&manifest).expect("JSON");
    let last = manifest[0]["Layers"][1].as_str().expect("the RUN's layer");
    let listed = Command::new("tar").arg("-tf").arg(dir.join(last)).output().expect("tar runs").stdout;
    let listed = String::from_utf8_lossy(&listed).into_owned();
    let names: Vec<&str> = listed.lines().map(|line| line.trim_start_matches("./")).collect();
    let others: Vec<&&str> = names.iter().filter(|name| !["only", ""].contains(name)).collect();
    assert!(names.contains(&"only") && others.is_empty(), "{names:?}");
}

#[test]
fn sandbox_has_its_own_hosts_and_leaves_no_stubs() {
    needs_root!();
    let store = Store::with_busybox();
    // A root with nothing but programs: all that a sandbox needs has to be put there and taken away.
    store.image(
        "x",
        "FROM scratch\nCOPY --from=busybox /bin /bin\n\
         RUN cat /etc/hosts > /hosts && hostname > /name && cat /etc/resolv.conf > /resolv && ls / > /seen\n\
         RUN ! touch /etc/hosts && mkdir /etc/kept && echo own > /etc/kept/file\n",
    );
    store.image("y", "FROM busybox\nCOPY --from=x / /x\n");
    let hosts = store.shell("y", "cat /x/hosts");
    let names = |line: &str| line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>();
    let all: Vec<String> = hosts.lines().flat_map(names).collect();
    for name in ["localhost", "buildkitsandbox"] {
        assert!(all.iter().any(|known| known == name), "{hosts}");
    }
    let host = fs::read_to_string("/proc/sys/kernel/hostname").expect("Linux has one");
    assert!(!all.iter().any(|known| known == host.trim()), "the host's own name is in {hosts}");
    assert_eq!(store.shell("y", "cat /x/name"), "buildkitsandbox");
    assert!(store.shell("y", "cat /x/resolv").contains("nameserver"));
    let seen = store.shell("y", "cat /x/seen");
    for dir in ["dev", "etc", "proc", "sys"] {
        assert!(seen.lines().any(|name| name == dir), "{seen}");
    }
    let left = store.shell("y", "cd /x && find . ! -path './bin/*' | sort");
    assert_eq!(left, ".\n./bin\n./etc\n./etc/kept\n./etc/kept/file\n./hosts\n./name\n./resolv\n./seen");
}

#[test]
fn two_builds_at_once_do_not_disturb_each_other() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = |who: &str| format!("FROM busybox\nRUN echo shared > /shared\nRUN echo {who} > /who\n");
    let contexts = ["a", "b", "c", "d"].map(|who| (who, Context::new(&[("Dockerfile", &dockerfile(who))])));
    let builds: Vec<Running> = contexts
        .iter()
        .map(|(who, context)| {
            Running::start(store.command(&["build", "--progress", "plain", "-t", who, context.path()]))
        })
        .collect();
    for build in builds {
        build.end().expect(0);
    }
    for (who, _) in &contexts {
        assert_eq!(store.shell(who, "cat /shared /who"), format!("shared\n{who}"));
    }
    assert_eq!(store.active_snapshots(), [""; 0]);
}

#[test]
fn output_comes_line_by_line_while_the_step_runs() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nRUN echo ea\"\"rly; sleep 31536025\n")]);
    let mut build = Running::start(store.command(&["build", "--progress", "plain", context.path()]));
    build.wait_for("early");
    build.signal(rustix::process::Signal::TERM);
    build.end().expect(130);
}

// A network of the test's own: kiln runs in a network namespace whose only neighbour is a web
// server that has no route back to containers, and where another engine has set FORWARD to DROP.
const NEIGHBOUR: &str = r#"
set -e
unshare --net sleep 600 & outside=$!
trap 'kill $outside' EXIT
until [ "$(readlink /proc/$outside/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
ip link set lo up
ip link add near type veth peer name far netns $outside
ip addr add 198.51.100.1/24 dev near
ip link set near up
nsenter --target $outside --net sh -c 'ip addr add 198.51.100.2/24 dev far && ip link set far up'
nsenter --target $outside --net /bin/busybox httpd -p 198.51.100.2:8080 -h "$1"
iptables -P FORWARD DROP
shift
"$@"
"#;

#[test]
fn a_run_reaches_the_network_through_nat_although_forward_is_dropped() {
    needs_root!();
    if ["ip", "iptables", "nsenter"].iter().any(|tool| Command::new(tool).arg("--version").output().is_err())
    {
        eprintln!("SKIPPED ALOUD: needs iproute2, iptables and nsenter");
        return;
    }
    let store = Store::with_busybox();
    let served = Context::new(&[("answer", "forty-two")]);
    let run = "FROM busybox\nRUN printf 'GET /answer HTTP/1.0\\r\\n\\r\\n' | nc -w 10 198.51.100.2 8080 | tail -n 1 > /answer\n";
    let context = Context::new(&[("Dockerfile", run)]);
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", NEIGHBOUR, "sh", served.path(), env!("CARGO_BIN_EXE_kiln")]);
    command.args(["build", "--progress", "plain", "-t", "x", context.path()]).env("KILN_ROOT", store.root());
    let output = command.output().expect("unshare is part of util-linux");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(store.shell("x", "cat /answer"), "forty-two");
}

#[test]
fn stages_that_are_copied_from_run_at_the_same_time() {
    needs_root!();
    let store = Store::with_busybox();
    // Each waits for the other: one after the other they would never end.
    let meet = |own: &str, other: &str| {
        format!("RUN --mount=type=cache,target=/c touch /c/{own}; until [ -e /c/{other} ]; do :; done")
    };
    let dockerfile = format!(
        "FROM busybox AS a\n{}\nFROM busybox AS b\n{}\nFROM busybox\nCOPY --from=a /bin/sh /a\nCOPY --from=b /bin/sh /b\n",
        meet("a", "b"),
        meet("b", "a"),
    );
    store.build_bounded(&Context::new(&[("Dockerfile", &dockerfile)]), &[]).expect(0);
}
