//! `kiln run`: one process in a layer of its own.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::harness::{Context, Outcome, Store, needs_root, text};

/// `kiln run --rm --network none ARGS`.
fn run(store: &Store, args: &[&str]) -> Outcome {
    let mut all = vec!["run", "--rm", "--network", "none"];
    all.extend(args);
    store.kiln(&all)
}

#[test]
fn exit_codes_are_passed_on() {
    needs_root!();
    let store = Store::with_busybox();
    run(&store, &["busybox", "sh", "-c", "exit 42"]).expect(42);
    run(&store, &["busybox", "true"]).expect(0);
    run(&store, &["busybox", "sh", "-c", "sleep 100 & kill -KILL $!; wait $!"]).expect(137);
}

#[test]
fn a_program_that_is_not_there_is_127_and_one_that_cannot_run_126() {
    needs_root!();
    let store = Store::with_busybox();
    run(&store, &["busybox", "nosuchprogram"]).expect(127).says(&["nosuchprogram"]);
    run(&store, &["busybox", "/etc/passwd"]).expect(126).says(&["/etc/passwd"]);
}

#[test]
fn a_file_that_is_no_program_says_what_it_is() {
    needs_root!();
    let store = Store::with_busybox();
    let none = "is neither a program nor a script: ";
    let shell = "hint: begin the script with a line such as `#!/bin/sh`";
    let files: [(&str, &str, [&str; 2]); 6] = [
        ("plain", "echo hello\n", ["it does not begin with `#!`", shell]),
        ("bare", "#!\necho hello\n", ["nothing stands behind its `#!`", shell]),
        (
            "marked",
            "\u{feff}#!/bin/sh\n",
            ["a byte order mark stands in front of its `#!`", "hint: save the script"],
        ),
        ("empty", "", ["it is empty", none]),
        (
            "windows",
            "#!/bin/sh\r\necho\n",
            [r#"is run by "/bin/sh\r", which is not in the image"#, "sed -i 's/"],
        ),
        (
            "absent",
            "#!/usr/bin/env-of-nobody sh\n",
            [r#"is run by "/usr/bin/env-of-nobody""#, "not in the image"],
        ),
    ];
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY --chmod=755 files /files\n")]);
    fs::create_dir(context.at("files")).expect("ours");
    files.iter().for_each(|(name, bytes, _)| context.write(&format!("files/{name}"), bytes));
    store.build(&context, &["-t", "x"]).expect(0);
    for (name, _, says) in &files {
        let program = format!("/files/{name}");
        let cannot = format!("{program:?} cannot be executed");
        run(&store, &["x", &program]).expect(126).says(&[&cannot, says[0], says[1]]);
        context.write("Dockerfile", &format!("FROM x\nRUN [{program:?}]\n"));
        store.build(&context, &[]).expect(1).says(&["Dockerfile:2", &cannot, says[0], says[1]]);
    }
    // A shell takes a text for a script of its own, as it does everywhere.
    assert_eq!(run(&store, &["x", "sh", "-c", "/files/plain"]).expect(0).stdout, "hello\n");
}

#[test]
fn an_image_that_is_not_there_is_125() {
    needs_root!();
    let store = Store::with_busybox();
    run(&store, &["nosuchimage:1", "true"]).expect(125).says(&["nosuchimage:1"]);
}

#[test]
fn flags_set_environment_directory_user_and_entry_point() {
    needs_root!();
    let store = Store::with_busybox();
    store.image(
        "x",
        "FROM busybox\nENV A=1 B=2\nWORKDIR /srv\nENTRYPOINT [\"/bin/echo\", \"entry\"]\nCMD [\"cmd\"]\n",
    );
    assert_eq!(run(&store, &["x"]).expect(0).stdout, "entry cmd\n");
    assert_eq!(run(&store, &["x", "other"]).expect(0).stdout, "entry other\n");
    let sh = |flags: &[&str], script: &str| {
        let mut args = flags.to_vec();
        args.extend(["--entrypoint", "/bin/sh", "x", "-c", script]);
        run(&store, &args).expect(0).stdout.trim_end().to_owned()
    };
    assert_eq!(sh(&["-e", "B=3", "-e", "C=4"], "echo $A $B $C"), "1 3 4");
    assert_eq!(sh(&[], "pwd"), "/srv");
    assert_eq!(sh(&["-w", "/tmp"], "pwd"), "/tmp");
    assert_eq!(sh(&["-u", "12:34"], "id -u; id -g"), "12\n34");
}

#[test]
fn a_volume_is_the_hosts_directory_and_ro_keeps_it_as_it_is() {
    needs_root!();
    let store = Store::with_busybox();
    let dir = store.beside("volume");
    fs::create_dir(&dir).expect("ours to write");
    fs::write(dir.join("in"), "from the host").expect("ours to write");
    let volume = format!("{}:/data", text(&dir));
    let script = "cat /data/in; echo back > /data/out";
    let outcome = run(&store, &["-v", &volume, "busybox", "sh", "-c", script]).expect(0);
    assert_eq!(outcome.stdout, "from the host");
    assert_eq!(fs::read_to_string(dir.join("out")).expect("written inside"), "back\n");
    let read_only = format!("{volume}:ro");
    run(&store, &["-v", &read_only, "busybox", "sh", "-c", "echo no > /data/never"]).expect(1);
    assert!(!dir.join("never").exists());
}

#[test]
fn writes_do_not_reach_the_image() {
    needs_root!();
    let store = Store::with_busybox();
    let script = "echo x > /written && rm /etc/group && cat /written";
    assert_eq!(run(&store, &["busybox", "sh", "-c", script]).expect(0).stdout, "x\n");
    let script = "ls /written 2>/dev/null; ls /etc/group";
    assert_eq!(run(&store, &["busybox", "sh", "-c", script]).expect(0).stdout, "/etc/group\n");
    assert_eq!(store.active_snapshots(), [""; 0]);
    assert_eq!(store.mounts(), [""; 0]);
}

#[test]
fn standard_input_is_passed_on_with_i() {
    needs_root!();
    let store = Store::with_busybox();
    let file = store.beside("input");
    fs::write(&file, "one\ntwo\n").expect("ours to write");
    let mut command = store.command(&["run", "--rm", "-i", "--network", "none", "busybox", "wc", "-l"]);
    let output = command.stdin(fs::File::open(&file).expect("just written")).output().expect("kiln starts");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "2");
}

#[test]
fn a_terminal_works_and_the_shells_exit_code_comes_back() {
    needs_root!();
    if Command::new("tmux").arg("-V").output().is_err() {
        eprintln!("SKIPPED ALOUD: needs tmux");
        return;
    }
    let store = Store::with_busybox();
    let screen = Tmux { socket: store.beside("tmux.sock") };
    let kiln = format!(
        "KILN_ROOT='{}' '{}' run --rm -it --network none busybox sh; echo code=$?; exec sleep 600",
        text(&store.root()),
        env!("CARGO_BIN_EXE_kiln")
    );
    screen.tmux(&["new-session", "-d", "-x", "100", "-y", "30", &kiln]);
    screen.wait_for("/ #");
    screen.tmux(&["send-keys", "tty; stty size", "Enter"]);
    screen.wait_for("/dev/pts/0");
    screen.wait_for("30 100");
    // Ctrl-C belongs to the program inside, not to kiln.
    screen.tmux(&["send-keys", "echo run''ning; sleep 500", "Enter"]);
    // From here on the shell does not read, so that the terminal makes a signal of it.
    screen.wait_for("running");
    screen.tmux(&["send-keys", "C-c"]);
    screen.tmux(&["send-keys", "echo still''here", "Enter"]);
    screen.wait_for("stillhere");
    screen.tmux(&["send-keys", "exit 7", "Enter"]);
    screen.wait_for("code=7");
}

/// A tmux server of the test's own, gone with this value.
struct Tmux {
    socket: std::path::PathBuf,
}

impl Tmux {
    fn tmux(&self, args: &[&str]) -> String {
        let mut command = Command::new("tmux");
        command.arg("-f").arg("/dev/null").arg("-S").arg(&self.socket).args(args);
        let output =
            command.env("TERM", "xterm").env("LC_ALL", "C.UTF-8").output().expect("tmux is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    // tmux has no way to tell us that its screen changed, so this asks until it has.
    #[track_caller]
    fn wait_for(&self, mark: &str) {
        let start = Instant::now();
        loop {
            let screen = self.tmux(&["capture-pane", "-p"]);
            if screen.contains(mark) {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "`{mark}` does not appear:\n{screen}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}
