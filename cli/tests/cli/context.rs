//! What a build reads of its context, and what it never does.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_testkit::reads::after_each_read;
use rustix::fs::inotify;
use rustix::io::Errno;

use crate::harness::{Context, Outcome, Store, build_line, needs_root};

/// Tells which files of one directory were opened.
struct Watch(rustix::fd::OwnedFd);

impl Watch {
    fn on(directory: &std::path::Path) -> Watch {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let fd = inotify::init(flags).expect("inotify is there");
        inotify::add_watch(&fd, directory, inotify::WatchFlags::OPEN).expect("ours to watch");
        Watch(fd)
    }

    /// Names opened since the last call, each once, sorted.
    fn opened(&self) -> Vec<String> {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut names = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => names.extend(event.file_name().map(|name| name.to_string_lossy().into_owned())),
                Err(Errno::AGAIN) => break,
                Err(errno) => panic!("inotify: {errno}"),
            }
        }
        names.sort();
        names.dedup();
        names
    }
}

/// kiln without the power of root to read what its mode forbids, or `None` aloud.
fn bound_by_modes(store: &Store, context: &Context) -> Option<Command> {
    let kiln = store.command(&[]);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]);
    if !Command::new("setpriv").arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED ALOUD: needs setpriv");
        return None;
    }
    command.arg(kiln.get_program()).args(["build", "--progress", "plain", "-t", "x", context.path()]);
    command.env("KILN_ROOT", store.root()).stdin(std::process::Stdio::null());
    Some(command)
}

fn forbid(context: &Context, name: &str) {
    fs::set_permissions(context.at(name), fs::Permissions::from_mode(0o000)).expect("ours");
}

#[test]
fn copy_never_leaves_the_context() {
    needs_root!();
    let store = Store::with_busybox();
    // What a climbing path means is looked up at the context's root (D28).
    let outer = Context::new(&[("x", "outside"), ("in/Dockerfile", "FROM busybox\nCOPY ../x /x\n")]);
    let inner = outer.at("in");
    let build =
        |code| store.bounded(store.command(&["build", "-t", "x", crate::harness::text(&inner)])).expect(code);
    build(4).says(&["\"x\" does not exist in the build context", "Dockerfile:2:1"]);
    outer.write("in/x", "inside");
    build(0);
    assert_eq!(store.shell("x", "cat /x"), "inside");
    // Neither does one by way of a pattern or a directory link.
    symlink("..", inner.join("up")).expect("ours to write");
    for source in ["up/x", "up/*", "*/../../x", "in/../../../x"] {
        outer.write("in/Dockerfile", &format!("FROM busybox\nCOPY {source} /got/\n"));
        let args = ["build", "-t", "y", crate::harness::text(&inner)];
        let outcome = store.bounded(store.command(&args));
        if outcome.code == Some(0) {
            let found = store.shell("y", "cat /got/x 2>/dev/null || true");
            assert_eq!(found, "inside", "{source}");
        } else {
            outcome.expect(4).says(&["Dockerfile:2:1"]);
        }
    }
}

#[test]
fn absolute_copy_source_is_looked_up_in_the_context() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY /etc/passwd /got\n")]);
    let outcome = store.build_bounded(&context, &["-t", "x"]).expect(4);
    outcome.says(&["\"etc/passwd\" does not exist in the build context", "Dockerfile:2:1"]);
    context.write("etc/passwd", "the context's own");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cat /got"), "the context's own");
}

#[test]
fn symlink_loop_is_stored_as_a_link() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY . /all/\n")]);
    symlink("b", context.at("a")).expect("ours to write");
    symlink("a", context.at("b")).expect("ours to write");
    symlink(".", context.at("self")).expect("ours to write");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cd /all && for l in a b self; do readlink $l; done"), "b\na\n.");
    // Asked for by name it would have to be followed.
    context.write("Dockerfile", "FROM busybox\nCOPY a /a\n");
    store.build_bounded(&context, &[]).expect(4).says(&["\"a\"", "Dockerfile:2:1", "symbolic links"]);
}

#[test]
fn symlink_out_of_the_context_never_gives_its_contents() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY . /all/\n"), ("d/f", "f")]);
    symlink("/etc/passwd", context.at("absolute")).expect("ours to write");
    symlink("../../../../../../etc/passwd", context.at("d/relative")).expect("ours to write");
    symlink("/etc", context.at("dir")).expect("ours to write");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    let links = store.shell("x", "cd /all && for l in absolute d/relative dir; do readlink $l; done");
    assert_eq!(links, "/etc/passwd\n../../../../../../etc/passwd\n/etc");
    for source in ["absolute", "d/relative", "dir", "dir/passwd", "dir/pass*"] {
        context.write("Dockerfile", &format!("FROM busybox\nCOPY {source} /got/\n"));
        store.build_bounded(&context, &[]).expect(4).says(&[source, "Dockerfile:2:1"]);
    }
}

#[test]
fn fifo_is_skipped() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY . /all/\n"), ("f", "f")]);
    assert!(Command::new("mkfifo").arg(context.at("pipe")).status().expect("mkfifo runs").success());
    let _socket = std::os::unix::net::UnixListener::bind(context.at("socket")).expect("ours to write");
    let outcome = store.build_bounded(&context, &["-t", "x"]).expect(0);
    outcome.says(&["warning: pipe is", "warning: socket is"]);
    assert_eq!(store.shell("x", "ls /all"), "Dockerfile\nf");
    // Asked for by name there is nothing to skip to.
    for instruction in ["COPY pipe /got", "ADD pipe /got", "COPY socket /got"] {
        context.write("Dockerfile", &format!("FROM busybox\n{instruction}\n"));
        store.build_bounded(&context, &[]).expect(4).says(&["cannot be copied", "Dockerfile:2:1"]);
    }
    // Nor is a Dockerfile or an ignore file read out of one.
    fs::remove_file(context.at("Dockerfile")).expect("ours");
    fs::rename(context.at("pipe"), context.at("Dockerfile")).expect("ours");
    store.build_bounded(&context, &[]).expect(4).says(&["Dockerfile", "not a regular file"]);
    fs::rename(context.at("Dockerfile"), context.at(".dockerignore")).expect("ours");
    context.write("Dockerfile", "FROM busybox\n");
    store.build_bounded(&context, &[]).expect(4).says(&[".dockerignore", "not a regular file"]);
}

#[test]
fn unreadable_directory_that_is_ignored_does_not_matter() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        // Without these powers nobody mounts an overlay: one layer alone needs none.
        ("Dockerfile", "FROM scratch\nCOPY . /all/\n"),
        (".dockerignore", "private\n"),
        ("private/key", "k"),
        ("f", "f"),
    ]);
    forbid(&context, "private");
    let Some(command) = bound_by_modes(&store, &context) else { return };
    store.bounded(command).expect(0);
    store.image("y", "FROM busybox\nCOPY --from=x / /\n");
    assert_eq!(store.shell("y", "ls /all"), "Dockerfile\nf");
}

#[test]
fn unreadable_directory_that_is_needed_is_an_error() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY . /all/\n"), ("private/key", "k")]);
    for name in ["private", "private/key"] {
        forbid(&context, name);
        let Some(command) = bound_by_modes(&store, &context) else { return };
        store.bounded(command).expect(4).says(&[name, "Permission denied", "Dockerfile:2:1"]);
        fs::set_permissions(context.at("private"), fs::Permissions::from_mode(0o755)).expect("ours");
    }
}

#[test]
fn unreadable_ignore_file_is_an_error() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("Dockerfile", "FROM busybox\nCOPY . /all/\n"),
        (".dockerignore", "secret\n"),
        ("secret", "s"),
    ]);
    forbid(&context, ".dockerignore");
    let Some(command) = bound_by_modes(&store, &context) else { return };
    store.bounded(command).expect(4).says(&["error: cannot read", ".dockerignore", "Permission denied"]);
}

#[test]
fn file_replaced_during_the_build_is_consistent() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY f /f\nRUN cp /f /g\n")]);
    let contents = ["a".repeat(3 << 20), "b".repeat(2 << 20)];
    context.write("f", &contents[0]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for content in contents.iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                context.write("next", content);
                fs::rename(context.at("next"), context.at("f")).expect("ours");
            }
        });
        for _ in 0..4 {
            let outcome = store.build(&context, &["--no-cache", "-t", "x"]);
            if outcome.code == Some(0) {
                let counted = store.shell("x", "tr -d a < /f | wc -c; tr -d b < /f | wc -c; cmp /f /g");
                assert!(["0\n3145728", "2097152\n0"].contains(&counted.as_str()), "{counted}");
            } else {
                outcome.expect(4).says(&["\"f\"", "Dockerfile:2:1"]);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    // What was kept of those builds does not stand for other content.
    for content in &contents {
        context.write("f", content);
        store.build(&context, &["-t", "x"]).expect(0);
        assert_eq!(
            store.shell("x", "wc -c < /g; head -c 1 /f"),
            format!("{}\n{}", content.len(), &content[..1])
        );
    }
}

#[test]
fn large_context_stays_within_memory() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("Dockerfile", "FROM busybox\nCOPY few /few\nCOPY large /large\n"),
        (".dockerignore", "many/*/9*\n"),
        ("few/f", "f"),
    ]);
    for dir in 0..50 {
        let dir = context.at(&format!("many/{dir}"));
        fs::create_dir_all(&dir).expect("ours to write");
        for file in 0..100 {
            fs::write(dir.join(file.to_string()), "x").expect("ours to write");
        }
    }
    // More than the memory it may take.
    fs::File::create(context.at("large")).and_then(|file| file.set_len(320 << 20)).expect("ours to write");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "stat -c %s /large"), (320 << 20).to_string());
    context.write("Dockerfile", "FROM busybox\nCOPY many /many\n");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "find /many -type f | wc -l"), (50 * 89).to_string());
}

#[test]
fn names_that_are_not_utf8_are_kept() {
    needs_root!();
    let store = Store::with_busybox();
    let context =
        Context::new(&[("Dockerfile", "FROM busybox\nCOPY d /d/\nCOPY d/*.bin /e/\n"), ("d/f", "f")]);
    for name in [&b"\xff\xfe.bin"[..], b"new\nline", b"back\\slash"] {
        fs::write(context.at("d").join(std::ffi::OsStr::from_bytes(name)), "x").expect("ours to write");
    }
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    let hex = store.shell("x", "cd /d && printf '%s|' * | od -An -tx1 -v | tr -d ' \\n'");
    assert_eq!(hex, hex_of(b"back\\slash|f|new\nline|\xff\xfe.bin|"));
    assert_eq!(
        store.shell("x", "cd /e && printf %s * | od -An -tx1 | tr -d ' \\n'"),
        hex_of(b"\xff\xfe.bin")
    );
    assert_eq!(store.build(&context, &["-t", "x"]).expect(0).ran(), [""; 0]);
}

fn hex_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn mount_point_inside_the_context_is_crossed() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY . /all/\n"), ("m/below", "hidden")]);
    let mut command = Command::new("unshare");
    let script =
        "mount -t tmpfs kiln-test \"$1/m\" && echo mounted > \"$1/m/f\" && exec \"$2\" build -t x \"$1\"";
    command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh", context.path()]);
    command.arg(store.command(&[]).get_program()).env("KILN_ROOT", store.root());
    store.bounded(command).expect(0);
    assert_eq!(store.shell("x", "cd /all/m && ls && cat f"), "f\nmounted");
}

#[test]
fn hard_linked_pair_keeps_both_names() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("Dockerfile", "FROM busybox\nCOPY d /d/\nCOPY d/one d/two /e/\n"),
        ("d/one", "same"),
    ]);
    fs::hard_link(context.at("d/one"), context.at("d/two")).expect("ours to write");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    // One inode within one copied tree; sources of their own are files of their own.
    assert_eq!(store.shell("x", "stat -c %h /d/one /e/one && cat /d/two /e/two"), "2\n1\nsamesame");
}

#[test]
fn every_kind_of_context() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY f /f\n"), ("f", "f"), ("sub/f", "sub")]);
    symlink("sub", context.at("link")).expect("ours to write");
    let built = |from: &str, args: &[&str]| {
        let mut all = vec!["build", "-t", "x"];
        all.extend(args);
        let mut command = store.command(&all);
        command.current_dir(context.at(from));
        store.bounded(command).expect(0);
        store.shell("x", "cat /f")
    };
    assert_eq!(built(".", &["."]), "f");
    assert_eq!(built(".", &[]), "f", "the working directory");
    assert_eq!(built("sub", &[".."]), "f");
    assert_eq!(built("/", &[context.path()]), "f");
    assert_eq!(built("/", &[&format!("{}/", context.path())]), "f");
    // `-f` is relative to the working directory, not to the context.
    assert_eq!(built(".", &["-f", "Dockerfile", "sub"]), "sub");
    assert_eq!(built(".", &["-f", "Dockerfile", "link"]), "sub", "a link to a directory");
    let refused = |argument: &str, code, says: &[&str]| {
        let mut command = store.command(&["build", argument]);
        command.current_dir(context.at("."));
        store.bounded(command).expect(code).says(says);
    };
    refused("f", 4, &["error: the build context f is not a directory"]);
    refused("nosuch", 4, &["error: cannot read nosuch", "No such file or directory"]);
}

#[test]
fn standard_input_is_a_dockerfile_or_a_context() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY f /f\n"), ("f", "f")]);
    let piped = |args: &[&str], input: &std::path::Path| {
        let mut all = vec!["build", "-t", "x"];
        all.extend(args);
        let mut command = store.command(&all);
        command.stdin(fs::File::open(input).expect("ours to read"));
        store.bounded(command)
    };
    let outside =
        Context::new(&[("text", "FROM busybox\nLABEL of=stdin\n"), ("copies", "FROM busybox\nCOPY f /g\n")]);
    piped(&["-"], &outside.at("text")).expect(0);
    assert_eq!(store.inspect("x")["Config"]["Labels"]["of"], "stdin");
    piped(&["-f", "-", context.path()], &outside.at("copies")).expect(0);
    assert_eq!(store.shell("x", "cat /g"), "f");
    for flags in ["-cf", "-czf"] {
        let tar = outside.at("context.tar");
        let packed = Command::new("tar").arg("-C").arg(context.path()).arg(flags).arg(&tar).arg(".").status();
        assert!(packed.expect("tar runs").success());
        piped(&["-"], &tar).expect(0);
        assert_eq!(store.shell("x", "cat /f"), "f");
    }
    // A Dockerfile alone has no files to copy; nothing at all is nobody's Dockerfile.
    piped(&["-"], &outside.at("copies")).expect(4).says(&["\"f\"", ":2:1"]);
    outside.write("empty", "");
    piped(&["-"], &outside.at("empty")).expect(4).says(&["nothing came: standard input is empty"]);
}

#[test]
fn dockerfile_is_found_by_either_name() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Containerfile", "FROM busybox\nLABEL of=Containerfile\n")]);
    for name in ["Containerfile", "dockerfile", "Dockerfile"] {
        // The one asked for first wins over those that are there already.
        context.write(name, &format!("FROM busybox\nLABEL of={name}\n"));
        store.build_bounded(&context, &["-t", "x"]).expect(0);
        assert_eq!(store.inspect("x")["Config"]["Labels"]["of"], name);
    }
}

#[test]
fn ignore_file_beside_the_dockerfile_comes_first() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("Dockerfile", "FROM busybox\nCOPY . /all/\n"),
        (".dockerignore", "a\n"),
        ("other/Dockerfile", "FROM busybox\nCOPY . /all/\n"),
        ("other/Dockerfile.dockerignore", "b\n"),
        ("a", "a"),
        ("b", "b"),
    ]);
    let other = context.at("other/Dockerfile");
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cd /all && ls a b 2>/dev/null || true"), "b");
    store.build_bounded(&context, &["-f", crate::harness::text(&other), "-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cd /all && ls a b 2>/dev/null || true"), "a");
    // A file that is left out is told with the rule that did it.
    context.write("other/Dockerfile", "FROM busybox\nCOPY b /all/\n");
    let outcome = store.build_bounded(&context, &["-f", crate::harness::text(&other)]).expect(4);
    let rule = format!("line 1 of {}.dockerignore", other.display());
    outcome.says(&[&format!("excluded by {rule}"), &format!("hint: {rule} excludes it")]);
    // A rule that cannot be read is named by file and line.
    context.write("other/Dockerfile.dockerignore", "b\n!\n");
    let outcome = store.build_bounded(&context, &["-f", crate::harness::text(&other)]).expect(4);
    outcome.says(&["other/Dockerfile.dockerignore:2: ", "exclusion pattern"]);
}

#[test]
fn ignore_file_may_begin_with_a_byte_order_mark() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("Dockerfile", "FROM busybox\nCOPY . /all/\n"),
        (".dockerignore", "\u{feff}secret\n# no rule\n#no-rule\r\n  trimmed  \n/rooted\n"),
        ("secret", "s"),
        ("#no-rule", "kept"),
        ("trimmed", "t"),
        ("rooted", "r"),
    ]);
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cd /all && ls"), "#no-rule\nDockerfile");
}

#[test]
fn ignored_dockerfile_is_still_used() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("Dockerfile", "FROM busybox\nCOPY . /all/\n"),
        (".dockerignore", "Dockerfile\n.dockerignore\n"),
        ("f", "f"),
    ]);
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "ls -A /all"), "f");
    // To copy one by name is to ask for what the rules leave out.
    context.write("Dockerfile", "FROM busybox\nCOPY Dockerfile /\n");
    store.build_bounded(&context, &[]).expect(4).says(&["hint: line 1 of .dockerignore excludes it"]);
}

#[test]
fn only_needed_paths_are_read() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        (
            "Dockerfile",
            "FROM busybox AS unused\nCOPY for-nobody /\nFROM busybox\nCOPY needed link *.txt /got/\n",
        ),
        ("needed", "n"),
        ("behind", "b"),
        ("a.txt", "a"),
        ("other", "o"),
        ("for-nobody", "f"),
        ("dir/f", "f"),
    ]);
    symlink("behind", context.at("link")).expect("ours to write");
    let watch = Watch::on(&context.at("."));
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    let mut opened = watch.opened();
    opened.retain(|name| !name.is_empty() && name != "Dockerfile");
    assert_eq!(opened, ["a.txt", "behind", "needed"]);
    assert_eq!(store.shell("x", "cat /got/link"), "b");
}

#[test]
fn unchanged_context_is_not_read_again() {
    needs_root!();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY d /d\n"), ("d/a", "a"), ("d/b", "b")]);
    // The files are older than a tick of the clock when they are first read: younger ones may
    // change again without its showing.
    let store = Store::with_busybox();
    let watch = Watch::on(&context.at("d"));
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert_eq!(watch.opened(), ["a", "b"], "what is watched for is seen");
    assert_eq!(store.build_bounded(&context, &["-t", "x"]).expect(0).ran(), [""; 0]);
    assert_eq!(watch.opened(), [""; 0]);
    context.write("d/b", "another b");
    watch.opened();
    store.build_bounded(&context, &["-t", "x"]).expect(0);
    assert!(watch.opened().contains(&"b".to_owned()));
    assert_eq!(store.shell("x", "cat /d/a /d/b"), "aanother b");
}

#[test]
fn a_file_that_never_rests_is_named_and_not_built() {
    needs_root!();
    let store = Store::empty();
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY busy.log /\n"), ("busy.log", "line\n")]);
    let mut log = fs::OpenOptions::new().append(true).open(context.at("busy.log")).expect("ours to write");
    let mut lines = 0;
    let command = store.command(&build_line(context.path(), &["-t", "x"]));
    let build = after_each_read(&command, &context.at("busy.log"), || {
        log.write_all(b"line\n").expect("ours to write");
        lines += 1;
    });
    Outcome::of_traced(build.expect("kiln can be traced")).expect(4).says(&[
        "busy.log\" changed while it was read",
        "Dockerfile:2",
        "hint: something writes to",
    ]);
    assert!(lines > 1, "it gave up at once");
    store.build(&context, &["-t", "x"]).expect(0);
}
