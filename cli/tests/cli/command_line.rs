//! The catalogue's cases of the command line, its environment and its files (C01 to C05, C10, C11, C19,
//! C20).

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Command;

use crate::harness::{Context, Store, needs_root, text};
use crate::universal::Watch;

const USAGE: i32 = 2;

/// Each of these command lines is refused with 2 and this text, and no store is made for it.
#[track_caller]
fn check(lines: &[(&[&str], &str)]) {
    let store = Store::empty();
    for (line, says) in lines {
        let outcome = store.bounded(store.command(line)).expect(USAGE).says(&[says]);
        assert_eq!(outcome.stderr.matches("error:").count(), 1, "{line:?}: {}", outcome.stderr);
        assert!(!store.root().exists(), "{line:?} made a store");
    }
}

#[test]
fn c01_and_c02_what_is_no_command_line_is_answered_with_one_that_is() {
    check(&[
        (&[], "Usage: kiln [OPTIONS] <COMMAND>"),
        (&["biuld", "."], "a similar subcommand exists: 'build'"),
        (&["build", "--no-chache", "."], "a similar argument exists: '--no-cache'"),
        (&["save", "--fromat", "oci", "x"], "'--format'"),
        (&["build", "a", "b"], "unexpected argument 'b'"),
        (&["build", "-t"], "a value is required for '--tag"),
        (&["tag", "only-one"], "required arguments were not provided"),
    ]);
}

#[test]
fn c03_a_name_is_a_name() {
    let (long_tag, long_name) = (format!("a:{}", "x".repeat(4096)), "a".repeat(4096));
    for name in
        ["", "UPPER/x", "UPPER", "x/UPPER", "a:b:c", &long_tag, &long_name, "a b", "a\nb", "../x", "a@b"]
    {
        check(&[
            (&["build", "-t", name, "."], "'--tag <NAME[:TAG]>'"),
            (&["tag", "x", name], "error: "),
            (&["import", "x.tar", name], "error: "),
        ]);
    }
    check(&[(&["build", "-t", "-rf", "."], "unexpected argument '-r'"), (&["build", "-t=-rf", "."], "-rf")]);
}

#[test]
fn c04_and_c05_arguments_have_names_and_platforms_two_words() {
    needs_root!();
    let store = Store::empty();
    for arg in ["=x", "", "="] {
        let outcome = store.kiln(&["build", "--build-arg", arg, "."]).expect(USAGE);
        outcome.says(&["--build-arg", "has no name in front of `=`"]);
    }
    for platform in ["foo", "", "/", "a/b/c/d", "../x/y", "linux/amd64\n"] {
        check(&[(&["load", "-i", "x.tar", "--platform", platform], "is not a platform")]);
    }
    for platform in ["foo/bar", "linux/foo", "linux/amd64,", "linux/amd64,foo"] {
        check(&[(&["build", "--platform", platform, "."], "is not a platform")]);
    }
    check(&[(&["build", "--platform", "linux/amd46", "."], "did you mean `linux/amd64`?")]);
}

#[test]
fn c10_without_a_home_a_user_is_asked_where_the_store_is() {
    needs_root!();
    let dir = tempfile::tempdir().expect("temporary directories can be made");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("ours");
    // Nobody may look into the directory where the tests are built.
    let program = dir.path().join("kiln");
    let built = env!("CARGO_BIN_EXE_kiln");
    fs::hard_link(built, &program).or_else(|_| fs::copy(built, &program).map(drop)).expect("ours");
    let home = dir.path().join("home");
    fs::create_dir(&home).expect("ours");
    chown(&home, Some(65534), Some(65534)).expect("root may");
    let as_nobody = |home: Option<&str>| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program).arg("images");
        for name in ["KILN_ROOT", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "HOME"] {
            command.env_remove(name);
        }
        home.map(|home| command.env("HOME", home));
        let output = command.output().expect("util-linux is installed");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for home in [None, Some("")] {
        let (code, stderr) = as_nobody(home);
        assert_eq!(code, Some(USAGE), "{stderr}");
        assert!(stderr.contains("error: HOME is not set") && stderr.contains("--root"), "{stderr}");
    }
    let (code, stderr) = as_nobody(Some(text(&home)));
    assert_eq!(code, Some(0), "{stderr}");
    let store = home.join(".local/share/kiln");
    assert_eq!(fs::metadata(&store).expect("made").permissions().mode() & 0o777, 0o700);
}

#[test]
fn c11_garbage_in_the_environment_is_named() {
    needs_root!();
    let store = Store::empty();
    store.ok(&["images"]);
    let watch = Watch::new(&store);
    let garbage = store.beside("garbage.toml");
    fs::write(&garbage, [0xff, 0, 1]).expect("ours");
    let missing = store.beside("missing.toml");
    for (name, value, line, says) in [
        ("KILN_SNAPSHOTTER", OsStr::new("btrfs"), "images", "'--snapshotter <NAME>'"),
        ("KILN_SNAPSHOTTER", OsStr::new(""), "images", "'--snapshotter <NAME>'"),
        ("KILN_SNAPSHOTTER", OsStr::from_bytes(b"\xff\xfe"), "images", "UTF-8"),
        ("KILN_ROOT", OsStr::new(""), "images", "'--root <DIR>'"),
        ("KILN_CONFIG", missing.as_os_str(), "gc", "missing.toml"),
        ("KILN_CONFIG", garbage.as_os_str(), "gc", "garbage.toml"),
        ("KILN_CONFIG", store.beside("").as_os_str(), "gc", "directory"),
    ] {
        let mut command = store.command(&[line]);
        command.env(name, value);
        watch.refuses(&command, USAGE, &[says]);
    }
    // Others are not kiln's.
    let mut command = store.command(&["images"]);
    watch.run(command.env("KILN_NO_SUCH_VARIABLE", "x")).expect(0);
}

#[test]
fn c19_a_broken_configuration_is_named_with_its_line() {
    needs_root!();
    // kiln's own file; docker's `config.json` is read for registries, in `registry/login.rs`.
    let store = Store::empty();
    store.ok(&["images"]);
    let watch = Watch::new(&store);
    let config = store.beside("config.toml");
    for (content, line) in [
        ("[gc]\nmax-store = \"10GB\n", "line 2"),
        ("[gc]\n\nmax-sotre = \"10GB\"\n", "line 3"),
        ("[gc]\nmax-store = 1e99\n", "line 2"),
        ("[gc\n", "line 1"),
        ("{\"gc\": {}}\n", "line 1"),
    ] {
        fs::write(&config, content).expect("ours");
        let mut command = store.command(&["gc"]);
        command.env("KILN_CONFIG", &config);
        watch.refuses(&command, USAGE, &["config.toml", line]);
    }
}

#[test]
fn c20_flags_that_contradict_each_other_are_refused() {
    needs_root!();
    // `--offline` with `--pull=always`: in `registry/bases.rs`.
    check(&[
        (&["build", "--check", "--call=outline", "."], "'--check' cannot be used with '--call"),
        (&["build", "--check", "--call=check,format=json", "."], "cannot be used with"),
    ]);
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\n")]);
    store.build(&context, &["-o", "-", "-o", "type=oci"]).expect(USAGE).says(&["standard output"]);
    let watch = Watch::new(&store);
    let twice = store.command(&["build", "-f", "-", "-"]);
    watch.refuses(&twice, USAGE, &["standard input cannot be both"]);
}

#[test]
fn the_help_of_a_command_begins_with_what_the_list_of_commands_says() {
    let store = Store::empty();
    let list = store.ok(&["--help"]).stdout;
    let commands = list.lines().skip_while(|line| *line != "Commands:").skip(1);
    let mut seen = 0;
    for line in commands.take_while(|line| !line.is_empty()) {
        // A description goes on where names do not stand.
        let Some((name, said)) = line.strip_prefix("  ").and_then(|line| line.split_once(' ')) else {
            continue;
        };
        if name.is_empty() || name == "help" {
            continue;
        }
        let help = store.ok(&[name, "--help"]).stdout;
        let first = help.lines().next().unwrap_or_default();
        assert!(first.starts_with(said.trim()), "{name}: {first:?} and not {:?}", said.trim());
        seen += 1;
    }
    assert!(seen > 30, "{list}");
}
