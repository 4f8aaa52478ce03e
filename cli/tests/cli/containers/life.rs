//! From create to rm.

use super::Docker;
use crate::harness::{needs_root, processes_left, processes_with};

#[test]
fn data_in_a_volume_outlives_containers_that_share_it() {
    needs_root!();
    Docker::each(|docker| {
        docker.ok(&["volume", "create", "data"]);
        docker.start("web", &["-v", "data:/data"], "echo one > /data/x; exec sleep 31536100");
        docker.until(&["exec", "web", "cat", "/data/x"], |outcome| outcome.stdout == "one\n");
        docker.ok(&["exec", "web", "sh", "-c", "echo two >> /data/x"]);
        let args = ["run", "--rm", "--network", "none", "-v", "data:/d:ro", "busybox", "cat", "/d/x"];
        assert_eq!(docker.ok(&args), "one\ntwo");
        let write = ["run", "--rm", "--network", "none", "-v", "data:/d:ro", "busybox", "touch", "/d/y"];
        docker.run(&write).expect(1);
        assert!(docker.run(&["volume", "rm", "data"]).code != Some(0));
        docker.ok(&["rm", "-f", "web"]);
        assert_eq!(docker.ok(&["volume", "ls", "-q"]), "data");
        docker.ok(&["volume", "rm", "data"]);
        assert_eq!(docker.ok(&["volume", "ls", "-q"]), "");
    });
}

#[test]
fn exec_sees_the_container_and_answers_with_the_commands_code() {
    needs_root!();
    Docker::each(|docker| {
        docker.start("web", &["--hostname", "here", "-e", "A=1"], "exec sleep 31536101");
        assert_eq!(docker.ok(&["exec", "web", "hostname"]), "here");
        assert_eq!(docker.ok(&["exec", "-e", "B=2", "web", "sh", "-c", "echo $A $B"]), "1 2");
        assert_eq!(
            docker.ok(&["exec", "-w", "/bin", "-u", "12", "web", "sh", "-c", "pwd; id -u"]),
            "/bin\n12"
        );
        docker.run(&["exec", "web", "sh", "-c", "exit 9"]).expect(9);
        docker.run(&["exec", "web", "absent"]).expect(127);
        docker.run(&["exec", "web", "/etc/passwd"]).expect(126);
        docker.ok(&["exec", "-d", "web", "sh", "-c", "echo made > /made"]);
        docker.until(&["exec", "web", "cat", "/made"], |outcome| outcome.stdout == "made\n");
        docker.ok(&["stop", "-t", "0", "web"]);
        assert!(docker.run(&["exec", "web", "true"]).code != Some(0));
        docker.ok(&["rm", "web"]);
    });
    assert_eq!(processes_left("31536101"), [""; 0]);
}

#[test]
fn exit_codes_are_dockers() {
    needs_root!();
    Docker::each(|docker| {
        let run = |rest: &[&str]| docker.run(&[&["run", "--rm", "--network", "none"], rest].concat());
        run(&["busybox", "sh", "-c", "exit 7"]).expect(7);
        run(&["busybox", "absent"]).expect(127);
        run(&["busybox", "/etc/passwd"]).expect(126);
        run(&["--no-such-flag", "busybox", "true"]).expect(125);
        run(&["busybox", "sh", "-c", "sh -c 'kill -9 $$'; exit $?"]).expect(137);
        docker.run(&["run", "--name", "web", "--network", "none", "busybox", "absent"]).expect(127);
        assert_eq!(docker.field("web", "{{.State.Status}}"), "created");
        docker.run(&["run", "--name", "web", "--network", "none", "busybox", "true"]).expect(125);
        docker.ok(&["rm", "web"]);
    });
}

#[test]
fn stop_asks_first_and_ends_what_does_not_listen() {
    needs_root!();
    Docker::each(|docker| {
        let polite = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
        docker.start("polite", &[], polite);
        docker.until(&["logs", "polite"], |outcome| outcome.stdout == "ready\n");
        docker.ok(&["stop", "polite"]);
        assert_eq!(docker.field("polite", "{{.State.Status}} {{.State.ExitCode}}"), "exited 3");
        assert_eq!(docker.ok(&["logs", "polite"]), "ready\nbye");
        docker.start("deaf", &[], "trap '' TERM; echo ready; while :; do sleep 0.05; done");
        docker.until(&["logs", "deaf"], |outcome| outcome.stdout == "ready\n");
        docker.ok(&["stop", "-t", "1", "deaf"]);
        assert_eq!(docker.field("deaf", "{{.State.ExitCode}} {{.State.Running}}"), "137 false");
        docker.start("other", &["--stop-signal", "USR1"], &polite.replace("TERM", "USR1"));
        docker.until(&["logs", "other"], |outcome| outcome.stdout == "ready\n");
        docker.ok(&["stop", "other"]);
        assert_eq!(docker.ok(&["wait", "other"]), "3");
        // What it wrote is there when it starts again, and so is its log.
        docker.ok(&["start", "polite"]);
        docker.until(&["logs", "polite"], |outcome| outcome.stdout == "ready\nbye\nready\n");
        docker.ok(&["kill", "polite"]);
        assert_eq!(docker.ok(&["wait", "polite"]), "137");
        docker.ok(&["rm", "polite", "deaf", "other"]);
    });
}

#[test]
fn a_policy_starts_it_again() {
    needs_root!();
    Docker::each(|docker| {
        docker.start("fails", &["--restart", "on-failure:2"], "echo run; exit 5");
        let logs = docker.until(&["logs", "fails"], |outcome| outcome.stdout.lines().count() == 3);
        assert_eq!(logs.stdout, "run\nrun\nrun\n");
        docker
            .until(&["inspect", "-f", "{{.State.Status}}", "fails"], |outcome| outcome.stdout == "exited\n");
        assert_eq!(docker.field("fails", "{{.State.ExitCode}} {{.RestartCount}}"), "5 2");
        docker.ok(&["rm", "fails"]);
        // podman may start it once more after the stop.
        if let Docker::Podman(_) = docker {
            return;
        }
        docker.start("always", &["--restart", "always"], "echo run; sleep 0.05");
        docker.until(&["logs", "always"], |outcome| outcome.stdout.lines().count() > 2);
        docker.ok(&["stop", "-t", "0", "always"]);
        docker
            .until(&["inspect", "-f", "{{.State.Running}}", "always"], |outcome| outcome.stdout == "false\n");
        docker.ok(&["rm", "always"]);
    });
}

#[test]
fn names_are_taken_changed_and_given_back() {
    needs_root!();
    Docker::each(|docker| {
        docker.ok(&["create", "--name", "web", "--network", "none", "--label", "a=1", "busybox", "true"]);
        assert!(docker.run(&["create", "--name", "web", "busybox"]).code != Some(0));
        docker.ok(&["rename", "web", "other"]);
        assert_eq!(
            docker
                .ok(&["ps", "-a", "--format", "{{.Names}} {{.Image}}", "--filter", "label=a=1"])
                .replace("docker.io/library/busybox:latest", "busybox")
                .replace("localhost/busybox:latest", "busybox"),
            "other busybox"
        );
        assert_eq!(docker.ok(&["ps", "-q"]), "");
        let id = docker.field("other", "{{.Id}}");
        assert_eq!(docker.field(&id[..12], "{{.State.Status}}"), "created");
        docker.ok(&["start", "other"]);
        assert_eq!(docker.ok(&["wait", "other"]), "0");
        docker.ok(&["rm", "other"]);
        assert!(docker.run(&["inspect", "other"]).code != Some(0));
        docker.start("gone", &["--rm"], "exit 0");
        docker.until(&["ps", "-aq"], |outcome| outcome.stdout.is_empty());
    });
}

#[test]
fn a_paused_container_does_nothing_until_it_goes_on() {
    needs_root!();
    let docker = Docker::kiln();
    docker.start("web", &[], "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done");
    docker.until(&["logs", "web"], |outcome| outcome.stdout.lines().count() > 2);
    docker.run(&["pause", "web"]).expect(0);
    assert_eq!(docker.field("web", "{{.State.Status}} {{.State.Paused}}"), "paused true");
    assert!(docker.run(&["exec", "web", "true"]).code != Some(0));
    assert!(docker.ok(&["ps"]).contains("(Paused)"));
    // The monitor may be behind with what was said before. Then nothing comes in a time that is long enough for a
    // few lines.
    let held = std::cell::Cell::new(0);
    docker.until(&["logs", "web"], |outcome| {
        let before = held.replace(outcome.stdout.lines().count());
        std::thread::sleep(std::time::Duration::from_millis(200));
        held.get() == before
    });
    let held = held.get();
    docker.ok(&["unpause", "web"]);
    docker.until(&["logs", "web"], |outcome| outcome.stdout.lines().count() > held + 2);
    docker.ok(&["rm", "-f", "web"]);
    docker.is_clean();
}

#[test]
fn health_is_checked_and_told() {
    needs_root!();
    let docker = Docker::kiln();
    let flags = ["--health-cmd", "test -e /well", "--health-interval", "50ms", "--health-retries", "2"];
    docker.start("web", &flags, "exec sleep 31536102");
    let health = ["inspect", "-f", "{{.State.Health.Status}}", "web"];
    docker.until(&health, |outcome| outcome.stdout == "unhealthy\n");
    assert!(docker.ok(&["ps", "--filter", "health=unhealthy"]).contains("(unhealthy)"));
    docker.ok(&["exec", "web", "touch", "/well"]);
    docker.until(&health, |outcome| outcome.stdout == "healthy\n");
    assert_eq!(docker.field("web", "{{.State.Health.FailingStreak}}"), "0");
    docker.ok(&["rm", "-f", "web"]);
    docker.is_clean();
}

#[test]
fn a_container_ends_with_its_monitor_and_the_next_look_tells() {
    needs_root!();
    let docker = Docker::kiln();
    let script = "[ -e /kept ] || echo kept > /kept; exec sleep 31536103";
    docker.start("web", &["--restart", "always"], script);
    docker.until(&["exec", "web", "cat", "/kept"], |outcome| outcome.stdout == "kept\n");
    let id = docker.field("web", "{{.Id}}");
    let monitor = std::fs::read_dir("/proc")
        .expect("/proc is mounted")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .find(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(b"kiln-monitor") && String::from_utf8_lossy(&line).contains(&id)
        })
        .expect("it has a monitor");
    let monitor = rustix::process::Pid::from_raw(monitor).expect("no zero");
    rustix::process::kill_process(monitor, rustix::process::Signal::KILL).expect("it lives");
    docker.until(&["inspect", "-f", "{{.State.Status}}", "web"], |outcome| outcome.stdout == "exited\n");
    assert_eq!(docker.field("web", "{{.State.ExitCode}} {{.State.Error}}"), "137 its monitor died");
    docker.until(&["ps", "-q"], |_| processes_with("31536103").is_empty());
    docker.ok(&["start", "web"]);
    assert_eq!(docker.ok(&["exec", "web", "cat", "/kept"]), "kept");
    docker.ok(&["rm", "-f", "web"]);
    docker.is_clean();
}

#[test]
fn a_container_whose_records_are_damaged_can_be_seen_and_removed() {
    needs_root!();
    for record in ["state.json", "config.json"] {
        let docker = Docker::kiln();
        docker.ok(&["create", "--name", "web", "--network", "none", "busybox", "true"]);
        let id = docker.field("web", "{{.Id}}");
        let Docker::Kiln(store) = &docker else { return };
        let path = store.root().join("containers").join(&id).join(record);
        std::fs::write(path, "{}").expect("ours to write");
        assert_eq!(docker.ok(&["ps", "-aq", "--no-trunc"]), id);
        // Of its config the monitor tells, which is a container that does not start.
        let code = if record == "state.json" { 6 } else { 1 };
        docker.run(&["start", &id]).expect(code).says(&[record]);
        docker.ok(&["rm", "-f", &id]);
        docker.is_clean();
    }
}

#[test]
fn images_stay_while_containers_need_them() {
    needs_root!();
    let docker = Docker::kiln();
    docker.start("web", &[], "exec sleep 31536104");
    docker.run(&["rmi", "busybox"]).expect(1).says(&["conflict: image busybox", "container web"]);
    docker.ok(&["stop", "-t", "0", "web"]);
    docker.ok(&["prune", "--all", "--force"]);
    docker.ok(&["start", "web"]);
    docker.ok(&["rmi", "-f", "busybox"]);
    docker.ok(&["prune", "--all", "--force"]);
    docker.ok(&["restart", "-t", "0", "web"]);
    assert_eq!(docker.ok(&["exec", "web", "sh", "-c", "echo $((6*7))"]), "42");
    docker.ok(&["stop", "-t", "0", "web"]);
    assert!(docker.ok(&["container", "prune", "--force"]).contains("Deleted Containers"));
    docker.is_clean();
}

#[test]
fn top_and_stats_tell_of_what_runs() {
    needs_root!();
    let docker = Docker::kiln();
    // Without a network there is nowhere that ports could lead.
    docker.start("web", &["-p", "127.0.0.1:8080:80", "-p", "53/udp"], "exec sleep 31536105");
    assert!(docker.ok(&["top", "web"]).contains("sleep 31536105"));
    assert_eq!(docker.ok(&["port", "web"]), "");
    docker.run(&["port", "web", "81"]).expect(1);
    let format =
        "{{range $p, $c := .NetworkSettings.Ports}}{{$p}}={{if $c}}{{(index $c 0).HostPort}}{{end}} {{end}}";
    assert_eq!(docker.field("web", format), "53/udp= 80/tcp=");
    let stats = docker.ok(&["stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", "web"]);
    assert_eq!(stats, "web 1");
    docker.ok(&["rm", "-f", "web"]);
    docker.run(&["top", "web"]).expect(1).says(&["there is no container \"web\""]);
    docker.is_clean();
}
