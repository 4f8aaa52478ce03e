//! Output, input, terminals.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

use super::Docker;
use crate::harness::needs_root;

#[test]
fn logs_have_both_streams_and_follow_to_the_end() {
    needs_root!();
    Docker::each(|docker| {
        let script = "echo one; echo oops >&2; until [ -e /go ]; do sleep 0.02; done; echo two; exit 3";
        docker.start("web", &[], script);
        let logs =
            docker.until(&["logs", "web"], |outcome| outcome.stdout == "one\n" && !outcome.stderr.is_empty());
        assert_eq!(logs.stderr, "oops\n");
        // podman without its event log never sees the end.
        if let Docker::Podman(_) = docker {
            // It may go with the container, which ends at once.
            docker.run(&["exec", "web", "touch", "/go"]);
            docker.ok(&["wait", "web"]);
        } else {
            let mut follow = docker.command(&["logs", "-f", "--tail", "1", "web"]);
            let mut follow = follow.stdout(Stdio::piped()).spawn().expect("it starts");
            docker.run(&["exec", "web", "touch", "/go"]);
            let mut text = String::new();
            follow.stdout.take().expect("piped").read_to_string(&mut text).expect("text");
            assert!(follow.wait().expect("our child").success());
            assert!(text.ends_with("two\n"), "{text}");
        }
        assert_eq!(docker.ok(&["logs", "--tail", "1", "web"]), "two");
        let stamped = docker.ok(&["logs", "-t", "--tail", "1", "web"]);
        assert!(stamped.starts_with("20") && stamped.ends_with(" two"), "{stamped}");
        assert_eq!(docker.ok(&["logs", "--since", "1h", "--tail", "1", "web"]), "two");
        assert_eq!(docker.ok(&["logs", "--until", "2001-01-01T00:00:00Z", "web"]), "");
        docker.ok(&["rm", "web"]);
    });
}

#[test]
fn input_reaches_the_process_and_ends() {
    needs_root!();
    Docker::each(|docker| {
        for name in [&["--rm"][..], &["--name", "web"]] {
            let mut args = vec!["run", "-i", "--network", "none"];
            args.extend_from_slice(name);
            args.extend_from_slice(&["busybox", "wc", "-c"]);
            let mut command = docker.command(&args);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().expect("it starts");
            let mut stdin = child.stdin.take().expect("piped");
            stdin.write_all(&[b'x'; 1_000_000]).expect("it reads");
            drop(stdin);
            let output = child.wait_with_output().expect("our child");
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "1000000", "{name:?}");
        }
        docker.ok(&["rm", "web"]);
    });
}

#[test]
fn much_output_comes_whole_through_a_slow_reader() {
    needs_root!();
    let docker = Docker::kiln();
    let mut command =
        docker.command(&["run", "--name", "web", "--network", "none", "busybox", "seq", "200000"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("kiln starts");
    let mut reader = BufReader::with_capacity(512, child.stdout.take().expect("piped"));
    let (mut line, mut count) = (String::new(), 0);
    while reader.read_line(&mut line).expect("text") > 0 {
        count += 1;
        assert_eq!(line.trim(), count.to_string());
        line.clear();
    }
    assert!(child.wait().expect("our child").success());
    assert_eq!(count, 200_000);
    assert_eq!(docker.ok(&["logs", "--tail", "1", "web"]), "200000");
    docker.ok(&["rm", "web"]);
    docker.is_clean();
}

/// A command with a terminal of its own, by script(1); its keys are what we write.
struct OnTerminal {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
    seen: String,
}

impl OnTerminal {
    fn start(docker: &Docker, args: &[&str]) -> OnTerminal {
        let inner = docker.command(args);
        let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_str().expect("text"));
        let mut line = vec![quoted(inner.get_program())];
        line.extend(inner.get_args().map(quoted));
        let mut command = Command::new("script");
        command.args(["-qefc", &line.join(" "), "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let mut child = command.spawn().expect("script is part of util-linux");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        OnTerminal { child, out, seen: String::new() }
    }

    fn keys(&mut self, keys: &[u8]) {
        let stdin = self.child.stdin.as_mut().expect("piped");
        stdin.write_all(keys).and_then(|()| stdin.flush()).expect("script reads");
    }

    /// Reads until `mark` has come.
    #[track_caller]
    fn wait_for(&mut self, mark: &str) {
        while !self.seen.contains(mark) {
            let bytes = self.out.fill_buf().expect("readable").to_vec();
            assert!(!bytes.is_empty(), "`{mark}` has not come: {:?}", self.seen);
            self.out.consume(bytes.len());
            self.seen.push_str(&String::from_utf8_lossy(&bytes));
        }
    }

    fn end(mut self) -> Option<i32> {
        let _ = self.out.read_to_string(&mut self.seen);
        self.child.wait().expect("our child").code()
    }
}

#[test]
fn keys_leave_a_container_and_attach_comes_back() {
    needs_root!();
    // podman under script(1) does not take the keys: only kiln is asked.
    let docker = &Docker::kiln();
    {
        let args = ["run", "-it", "--name", "web", "--network", "none", "busybox", "sh"];
        let mut terminal = OnTerminal::start(docker, &args);
        terminal.wait_for("# ");
        terminal.keys(b"echo he''re; x=kept\n");
        terminal.wait_for("here");
        terminal.keys(b"\x10\x11");
        terminal.end();
        assert_eq!(docker.field("web", "{{.State.Running}}"), "true");
        let mut terminal = OnTerminal::start(docker, &["attach", "--detach-keys", "ctrl-a,d", "web"]);
        terminal.keys(b"echo =$x=; tty\n");
        terminal.wait_for("=kept=");
        terminal.wait_for("/dev/pts/0");
        terminal.keys(b"\x01d");
        terminal.end();
        assert_eq!(docker.field("web", "{{.State.Running}}"), "true");
        let mut terminal = OnTerminal::start(docker, &["attach", "web"]);
        terminal.keys(b"exit 5\n");
        assert_eq!(terminal.end(), Some(5));
        assert_eq!(docker.field("web", "{{.State.ExitCode}}"), "5");
        docker.ok(&["rm", "web"]);
    }
    docker.is_clean();
}

#[test]
fn exec_has_a_terminal_of_its_own() {
    needs_root!();
    Docker::each(|docker| {
        docker.start("web", &[], "exec sleep 31536120");
        let mut terminal = OnTerminal::start(docker, &["exec", "-it", "web", "sh"]);
        terminal.wait_for("# ");
        terminal.keys(b"tty; exit 6\n");
        terminal.wait_for("/dev/pts/0");
        assert_eq!(terminal.end(), Some(6));
        docker.ok(&["rm", "-f", "web"]);
    });
}
