//! Where a container meets its host: streams, volumes, mounts, names on a terminal.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::thread;

use super::Docker;
use crate::harness::{needs_root, processes_left, processes_with, text};

#[test]
fn input_and_output_do_not_wait_for_each_other() {
    needs_root!();
    Docker::each(|docker| {
        let args = ["run", "-i", "--name", "web", "--network", "none", "busybox", "cat"];
        let mut command = docker.command(&args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let (mut stdin, mut stdout) =
            (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        // Much more than all that lies between holds.
        let writer = thread::spawn(move || stdin.write_all(&vec![b'x'; 30 << 20]));
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).expect("output");
        writer.join().expect("no panic").expect("it reads");
        assert_eq!(bytes.len(), 30 << 20);
        assert_eq!(child.wait().expect("our child").code(), Some(0));
        docker.ok(&["rm", "web"]);
    });
}

#[test]
fn a_reader_that_comes_after_the_end_gets_everything() {
    needs_root!();
    let docker = Docker::kiln();
    let args = ["run", "--name", "web", "--network", "none", "busybox", "seq", "100000"];
    let mut child = docker.command(&args).stdout(Stdio::piped()).spawn().expect("it starts");
    docker.until(&["inspect", "-f", "{{.State.Status}}", "web"], |outcome| outcome.stdout == "exited\n");
    // It is over for everybody else: it can be removed, and another have its name.
    docker.ok(&["rm", "web"]);
    let mut lines = String::new();
    child.stdout.take().expect("piped").read_to_string(&mut lines).expect("text");
    assert_eq!((lines.lines().count(), lines.lines().last()), (100_000, Some("100000")));
    assert_eq!(child.wait().expect("our child").code(), Some(0));
}

#[test]
fn a_process_cannot_open_the_callers_files_anew() {
    needs_root!();
    let docker = Docker::kiln();
    let dir = tempfile::tempdir().expect("a directory");
    docker.start("web", &[], "exec sleep 1000");
    let script = "timeout 1 cat /proc/$$/fd/1 >&2; : >/proc/$$/fd/1; cd /proc/$$/fd/0 && pwd >&2; echo out";
    for args in [
        &["run", "--rm", "-i", "--network", "none", "busybox", "sh", "-c", script][..],
        &["run", "--name", "other", "-i", "--network", "none", "busybox", "sh", "-c", script],
        &["exec", "-i", "web", "sh", "-c", script],
    ] {
        let path = dir.path().join("log");
        fs::write(&path, "secret\n").expect("a file");
        let log = File::options().append(true).open(&path).expect("our file");
        let mut command = docker.command(args);
        command.stdin(OwnedFd::from(File::open("/etc").expect("a directory"))).stdout(log);
        let output = command.stderr(Stdio::piped()).output().expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("secret") && !said.contains("/etc\n"), "{args:?}: {said}");
        assert_eq!(fs::read_to_string(&path).expect("our file"), "secret\nout\n", "{args:?}: {said}");
    }
    docker.ok(&["rm", "-f", "web", "other"]);
}

#[test]
fn what_images_and_processes_say_does_not_reach_the_terminal_as_control() {
    needs_root!();
    let docker = Docker::kiln();
    docker.start("web", &["-l", "a=\u{1b}[31m"], "sleep 1000 # \u{1b}[31mred\u{7}\nnext");
    for args in [
        &["ps", "--no-trunc"][..],
        &["ps", "--no-trunc", "--format", "{{.Command}} {{.Labels}}"],
        &["top", "web"],
    ] {
        let shown = docker.ok(args);
        assert!(!shown.contains('\u{1b}') && !shown.contains('\u{7}'), "{args:?}: {shown:?}");
    }
    let rows = docker.ok(&["ps", "--no-trunc"]).lines().count();
    assert_eq!(rows, 2);
    docker.ok(&["rm", "-f", "web"]);
}

#[test]
fn empty_volumes_are_filled_from_the_image_unless_they_shall_not_be() {
    needs_root!();
    Docker::each(|docker| {
        let list = |volume: &str| {
            docker.ok(&["run", "--rm", "--network", "none", "-v", volume, "busybox", "ls", "/etc"])
        };
        docker.ok(&["volume", "create", "made"]);
        assert!(list("made:/etc").contains("passwd"));
        docker.ok(&["volume", "rm", "made"]);
    });
    let docker = Docker::kiln();
    let run = ["run", "--rm", "--network", "none"];
    let left = [&run[..], &["-v", "bare:/etc:nocopy", "busybox", "ls", "/etc"]].concat();
    // What kiln itself puts there.
    assert!(!docker.ok(&left).contains("passwd"));
    let left = [&run[..], &["--mount", "src=bare2,dst=/etc,volume-nocopy", "busybox", "ls", "/etc"]].concat();
    assert!(!docker.ok(&left).contains("passwd"));
    docker.ok(&["volume", "rm", "bare", "bare2"]);
}

#[test]
fn what_is_read_only_is_so_for_cp_too() {
    needs_root!();
    let docker = Docker::kiln();
    let dir = tempfile::tempdir().expect("a directory");
    let (host, new) = (dir.path().join("host"), dir.path().join("new"));
    fs::create_dir(&host).expect("a directory");
    fs::write(host.join("f"), "kept").expect("a file");
    fs::write(&new, "changed").expect("a file");
    let (volume, new) = (format!("{}:/data:ro", text(&host)), text(&new));
    docker.ok(&["create", "--name", "web", "--network", "none", "-v", &volume, "busybox", "true"]);
    let refused = docker.run(&["cp", new, "web:/data/f"]).expect(4);
    assert!(refused.stderr.contains("mounted read-only"), "{}", refused.stderr);
    assert_eq!(fs::read_to_string(host.join("f")).expect("our file"), "kept");
    // Out of it, with a slash in front or without, and by way of a link.
    assert_eq!(docker.ok(&["cp", "web:data/f", text(&dir.path().join("out"))]), "");
    assert_eq!(fs::read_to_string(dir.path().join("out")).expect("a copy"), "kept");
    docker.ok(&["create", "--name", "fixed", "--network", "none", "--read-only", "busybox", "true"]);
    let refused = docker.run(&["cp", new, "fixed:/f"]).expect(4);
    assert!(refused.stderr.contains("read-only"), "{}", refused.stderr);
    docker.ok(&["rm", "web", "fixed"]);
}

#[test]
fn names_are_found_by_regular_expressions() {
    needs_root!();
    Docker::each(|docker| {
        for name in ["web", "web2"] {
            docker.ok(&["create", "--name", name, "--network", "none", "busybox", "true"]);
        }
        let names = |filter: &str| {
            let listed = docker.ok(&["ps", "-a", "--format", "{{.Names}}", "--filter", filter]);
            let mut names: Vec<String> = listed.lines().map(str::to_owned).collect();
            names.sort();
            names.join(" ")
        };
        assert_eq!(names("name=^web$"), "web");
        assert_eq!(names("name=we.2"), "web2");
        assert_eq!(names("name=web"), "web web2");
        docker.ok(&["rm", "web", "web2"]);
    });
}

#[test]
fn one_that_goes_with_its_end_survives_a_restart() {
    needs_root!();
    let docker = Docker::kiln();
    docker.start("web", &["--rm", "-v", "/data"], "date +%N > /data/x; exec sleep 1000");
    let first = docker.field("web", "{{.State.Pid}}");
    docker.ok(&["restart", "-t", "0", "web"]);
    assert_eq!(docker.field("web", "{{.State.Status}} {{.RestartCount}}"), "running 0");
    assert_ne!(docker.field("web", "{{.State.Pid}}"), first);
    docker.ok(&["stop", "-t", "0", "web"]);
    docker.until(&["ps", "-aq"], |outcome| outcome.stdout.is_empty());
    assert_eq!(docker.ok(&["volume", "ls", "-q"]), "");
}

#[test]
fn a_damaged_record_does_not_keep_a_container_alive() {
    needs_root!();
    let docker = Docker::kiln();
    for (file, content) in
        [("state.json", Some("{")), ("state.json", None), ("config.json", Some("{\"version\":99}"))]
    {
        docker.start("web", &[], "exec sleep 31536777");
        let id = docker.field("web", "{{.Id}}");
        let Docker::Kiln(store) = &docker else { unreachable!("it is kiln") };
        let path = store.root().join("containers").join(&id).join(file);
        match content {
            Some(text) => fs::write(&path, text).expect("its record"),
            None => fs::remove_file(&path).expect("its record"),
        }
        docker.ok(&["rm", "-f", "web"]);
        assert_eq!(docker.ok(&["ps", "-aq"]), "", "{file} {content:?}");
    }
}

#[test]
fn exec_takes_as_many_arguments_as_the_kernel() {
    needs_root!();
    let docker = Docker::kiln();
    docker.start("web", &["--oom-score-adj", "300"], "exec sleep 1000");
    let long = "a".repeat(120_000);
    let said = docker.ok(&["exec", "web", "sh", "-c", "echo ${#1} ${#2} ${#3}", "sh", &long, &long, &long]);
    assert_eq!(said, "120000 120000 120000");
    assert_eq!(docker.ok(&["exec", "web", "cat", "/proc/self/oom_score_adj"]), "300");
    docker.run(&["exec", "absent", "true"]).expect(1);
    docker.ok(&["rm", "-f", "web"]);
}

#[test]
fn many_starts_at_once_are_one() {
    needs_root!();
    let docker = Docker::kiln();
    for round in 0..3 {
        docker.ok(&["create", "--name", "web", "--network", "none", "busybox", "sleep", "31536888"]);
        let starts: Vec<_> =
            (0..5).map(|_| docker.command(&["start", "web"]).stdout(Stdio::null()).spawn()).collect();
        for start in starts {
            assert!(start.expect("it starts").wait().expect("our child").success(), "{round}");
        }
        // Not at once: a process that is just executing another program has no arguments.
        docker.until(&["ps", "-q"], |_| processes_with("31536888").len() == 1);
        docker.ok(&["rm", "-f", "web"]);
        assert_eq!(processes_left("31536888"), [""; 0], "{round}");
        assert_eq!(docker.ok(&["ps", "-aq"]), "", "{round}");
    }
}

#[test]
fn starts_stops_and_removals_cross_each_other() {
    needs_root!();
    let docker = Docker::kiln();
    // Nobody else's: another run of this test may be under way.
    let mark = format!("31536889.{}", std::process::id());
    docker.ok(&["create", "--name", "web", "--network", "none", "busybox", "sleep", &mark]);
    let lines: [&[&str]; 4] = [
        &["start", "web"],
        &["stop", "-t", "0", "web"],
        &["restart", "-t", "0", "web"],
        &["inspect", "-f", "{{.State.Status}}", "web"],
    ];
    let many = (0..6).flat_map(|_| lines);
    let children: Vec<_> =
        many.map(|line| docker.command(line).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()).collect();
    for child in children {
        let output = child.expect("it starts").wait_with_output().expect("our child");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    docker.ok(&["stop", "-t", "0", "web"]);
    assert_eq!(docker.field("web", "{{.State.Status}}"), "exited");
    assert_eq!(processes_left(&mark), [""; 0]);
    docker.ok(&["rm", "web"]);
    docker.is_clean();
}

#[test]
fn what_nobody_reads_ends_the_command_and_not_the_container() {
    needs_root!();
    let docker = Docker::kiln();
    let mut command = docker.command(&["run", "--name", "web", "--network", "none", "busybox", "yes"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut first = [0; 2];
    let mut stdout = child.stdout.take().expect("piped");
    stdout.read_exact(&mut first).expect("output");
    drop(stdout);
    assert_eq!(child.wait().expect("our child").code(), Some(141));
    assert_eq!(docker.field("web", "{{.State.Status}}"), "running");
    docker.ok(&["rm", "-f", "web"]);
}

#[test]
fn a_monitor_keeps_nothing_of_its_caller() {
    needs_root!();
    let docker = Docker::kiln();
    let dir = tempfile::tempdir().expect("a directory");
    let lock = dir.path().join("lock");
    let Docker::Kiln(store) = &docker else { unreachable!("it is kiln") };
    let kiln = store.command(&[]);
    let script = format!(
        "exec 9>{}; flock 9; exec {} --root {} run -d --name web --network none busybox sleep 31536107",
        text(&lock),
        kiln.get_program().display(),
        text(&store.root()),
    );
    assert!(std::process::Command::new("sh").args(["-c", &script]).status().expect("a shell").success());
    File::open(&lock).expect("our lock").try_lock().expect("nobody has it any more");
    docker.ok(&["rm", "-f", "web"]);
}

#[test]
fn an_image_has_no_say_over_what_kiln_mounts() {
    needs_root!();
    let docker = Docker::kiln();
    docker.ok(&["create", "--name", "web", "--network", "none", "busybox", "true"]);
    for target in ["/proc", "/sys", "/dev", "/../x"] {
        docker.ok(&["commit", "-c", &format!("VOLUME [\"{target}\"]"), "web", "hostile"]);
        let run = ["run", "--rm", "--network", "none", "hostile", "true"];
        docker.run(&run).expect(125).says(&["VOLUME"]);
    }
    docker.ok(&["rm", "web"]);
    assert_eq!(docker.ok(&["volume", "ls", "-q"]), "");
}
