//! What a container is told and held to, when it is made and later.

use std::fs;

use super::Docker;
use crate::harness::needs_root;

#[test]
fn proxies_are_those_of_dockers_config_file() {
    needs_root!();
    let docker = Docker::kiln();
    let dir = tempfile::tempdir().expect("a directory");
    let file = r#"{"proxies": {"default": {"httpProxy": "http://proxy.test:1", "noProxy": "theirs"}}}"#;
    fs::write(dir.path().join("config.json"), file).expect("a file");
    let env = |args: &[&str]| {
        let mut command = docker.command(args);
        let output = command
            .env("DOCKER_CONFIG", dir.path())
            .env("HTTPS_PROXY", "http://the-callers.test:1")
            .output()
            .expect("it starts");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let flags = ["-e", "NO_PROXY=mine", "busybox"];
    let line =
        [&["run", "-d", "--name", "web", "--network", "none"], &flags[..], &["sleep", "1000"]].concat();
    env(&line);
    for seen in [
        env(&[&["run", "--rm", "--network", "none"], &flags[..], &["env"]].concat()),
        env(&["exec", "web", "env"]),
        docker.ok(&["inspect", "-f", "{{range .Config.Env}}{{println .}}{{end}}", "web"]) + "\n",
    ] {
        for line in
            ["HTTP_PROXY=http://proxy.test:1\n", "http_proxy=http://proxy.test:1\n", "NO_PROXY=mine\n"]
        {
            assert!(seen.contains(line), "{line}{seen}");
        }
        assert!(!seen.contains("the-callers"), "{seen}");
    }
    docker.ok(&["rm", "-f", "web"]);
}

/// What the container's control group of a controller says in a file, as the host sees it.
fn limit(docker: &Docker, name: &str, controller: &str, version_1: &str, version_2: &str) -> String {
    let pid = docker.field(name, "{{.State.Pid}}");
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it runs");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    for line in groups.lines() {
        let parts: Vec<&str> = line.splitn(3, ':').collect();
        let (file, kind) = match parts[1] {
            "" => (version_2, "- cgroup2 "),
            names if names.split(',').any(|name| name == controller) => (version_1, "- cgroup "),
            _ => continue,
        };
        let option = |mount: &&str| {
            mount.contains(kind)
                && (kind == "- cgroup2 "
                    || mount
                        .rsplit(' ')
                        .next()
                        .is_some_and(|options| options.split(',').any(|name| name == controller)))
        };
        let Some(mount) = mounts.lines().find(option) else { continue };
        let fields: Vec<&str> = mount.split(' ').collect();
        let inside = parts[2].strip_prefix(fields[3]).unwrap_or(parts[2]).trim_start_matches('/');
        if let Ok(text) = fs::read_to_string(format!("{}/{inside}/{file}", fields[4])) {
            return text.trim().to_owned();
        }
    }
    panic!("{name} has no control group with {version_1} or {version_2}:\n{groups}");
}

#[test]
fn limits_change_while_it_runs_and_stay() {
    needs_root!();
    let docker = Docker::kiln();
    // One that has limits from the start, and one that gets its first later, with a child to move along.
    docker.start("tight", &["-m", "64m", "--memory-swap", "64m", "--pids-limit", "50"], "exec sleep 1000");
    docker.start("free", &[], "sleep 1000 & wait");
    for name in ["tight", "free"] {
        let flags =
            ["update", "--memory", "96m", "--memory-swap", "128m", "--cpus", "0.5", "--pids-limit", "80"];
        assert_eq!(docker.ok(&[&flags[..], &["--memory-reservation", "32m", name]].concat()), name);
        assert_eq!(
            limit(&docker, name, "memory", "memory.limit_in_bytes", "memory.max"),
            (96 << 20).to_string()
        );
        assert_eq!(limit(&docker, name, "pids", "pids.max", "pids.max"), "80");
        let quota = limit(&docker, name, "cpu", "cpu.cfs_quota_us", "cpu.max");
        assert_eq!(quota.split(' ').next(), Some("50000"));
        let fields = "{{.HostConfig.Memory}} {{.HostConfig.MemorySwap}} {{.HostConfig.MemoryReservation}} \
                      {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}";
        assert_eq!(docker.field(name, fields), "100663296 134217728 33554432 500000000 80");
        // Down again, and one that goes.
        docker.ok(&["update", "-m", "48m", "--memory-reservation", "16m", "--memory-swap", "48m", name]);
        docker.ok(&["update", "--pids-limit", "-1", "--cpu-quota", "20000", "--cpu-period", "50000", name]);
        assert_eq!(
            limit(&docker, name, "memory", "memory.limit_in_bytes", "memory.max"),
            (48 << 20).to_string()
        );
        assert_eq!(limit(&docker, name, "pids", "pids.max", "pids.max"), "max");
        assert_eq!(docker.field(name, "{{.HostConfig.CpuQuota}} {{.HostConfig.CpuPeriod}}"), "20000 50000");
        // All of its processes are where the first one is, and what joins goes there too.
        docker.ok(&["exec", "-d", name, "sleep", "1000"]);
        let count = if name == "tight" { 2 } else { 3 };
        let processes = || limit(&docker, name, "memory", "cgroup.procs", "cgroup.procs").lines().count();
        docker.until(&["ps", "-q"], |_| processes() == count);
    }
    // What cannot be is said, and nothing has changed.
    docker.run(&["update", "-m", "96m", "tight"]).expect(2).says(&["--memory-swap"]);
    docker.run(&["update", "--cpuset-cpus", "0-9999", "tight"]).expect(1).says(&["--cpuset-cpus"]);
    assert_eq!(docker.field("tight", "{{.HostConfig.Memory}} {{.HostConfig.CpusetCpus}}"), "50331648");
    docker.run(&["update", "tight"]).expect(2).says(&["nothing to change"]);
    // The next run begins with them.
    docker.ok(&["restart", "-t", "0", "tight"]);
    assert_eq!(
        limit(&docker, "tight", "memory", "memory.limit_in_bytes", "memory.max"),
        (48 << 20).to_string()
    );
    // Memory that was limited later runs out as any.
    docker.ok(&["update", "-m", "24m", "--memory-reservation", "8m", "--memory-swap", "24m", "free"]);
    docker
        .run(&["exec", "free", "sh", "-c", "x=$(head -c 100000000 /dev/zero | tr '\\0' a); echo ${#x}"])
        .expect(137);
    docker.ok(&["rm", "-f", "tight", "free"]);
    docker.is_clean();
}

#[test]
fn limits_of_a_stopped_container_are_for_its_next_start() {
    needs_root!();
    let docker = Docker::kiln();
    docker.ok(&["create", "--name", "web", "--network", "none", "busybox", "sleep", "1000"]);
    docker.ok(&["update", "--memory", "64m", "--restart", "on-failure:2", "web"]);
    let fields = "{{.HostConfig.Memory}} {{.HostConfig.RestartPolicy.Name}}";
    assert_eq!(docker.field("web", fields), "67108864 on-failure");
    docker.ok(&["start", "web"]);
    assert_eq!(limit(&docker, "web", "memory", "memory.limit_in_bytes", "memory.max"), "67108864");
    let stats = docker.ok(&["stats", "--no-stream", "--format", "{{.MemUsage}}", "web"]);
    assert!(stats.ends_with("/ 67.1MB"), "{stats}");
    docker.ok(&["rm", "-f", "web"]);
    docker.is_clean();
}

#[test]
fn sizes_are_what_was_written_and_all() {
    needs_root!();
    let docker = Docker::kiln();
    docker.start("web", &[], "head -c 1500000 /dev/zero > /made; exec sleep 1000");
    docker.until(&["exec", "web", "wc", "-c", "/made"], |outcome| outcome.stdout.starts_with("1500000 "));
    assert!(!docker.ok(&["inspect", "web"]).contains("SizeRw"));
    let sizes = docker.ok(&["inspect", "-s", "-f", "{{.SizeRw}} {{.SizeRootFs}}", "web"]);
    let (written, all) = sizes.split_once(' ').expect("two numbers");
    assert_eq!(written, "1500000");
    assert!(all.parse::<u64>().expect("a number") > 2_000_000, "{sizes}");
    let shown = docker.ok(&["ps", "-s", "--format", "{{.Size}}"]);
    assert!(shown.starts_with("1.50MB (virtual ") && shown.ends_with("MB)"), "{shown}");
    docker.ok(&["rm", "-f", "web"]);
}

#[test]
fn volumes_are_found_made_and_refused_as_by_docker() {
    needs_root!();
    let docker = Docker::kiln();
    assert_eq!(docker.ok(&["volume", "create", "-d", "local", "data"]), "data");
    docker.run(&["volume", "create", "-d", "nfs", "other"]).expect(2).says(&["`local`"]);
    docker.run(&["volume", "create", "-o", "type=tmpfs", "other"]).expect(2).says(&["type=tmpfs"]);
    docker.ok(&["volume", "rm", "data"]);
    // What is exposed and what is published are two things.
    let lines = docker.ok(&[
        "commit",
        "-c",
        "EXPOSE 80/tcp 53/udp",
        &{
            docker.ok(&["create", "--name", "base", "--network", "none", "busybox", "true"]);
            "base".to_owned()
        },
        "exposing",
    ]);
    assert!(lines.starts_with("sha256:"), "{lines}");
    docker.ok(&["create", "--name", "web", "--network", "none", "exposing", "true"]);
    for (filter, found) in
        [("expose=80", "web"), ("expose=50-60/udp", "web"), ("expose=53", ""), ("publish=80", "")]
    {
        assert_eq!(docker.ok(&["ps", "-a", "--format", "{{.Names}}", "--filter", filter]), found, "{filter}");
    }
    docker.run(&["ps", "--filter", "expose=x"]).expect(2);
    docker.ok(&["rm", "base", "web"]);
}
