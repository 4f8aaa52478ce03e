//! Bad input: one clear error with place and hint, its exit code, and a store as it was before.

use crate::harness::{Context, Outcome, Store, needs_root};

/// Builds, expects this exit code and these words, and compares the store before and after.
#[track_caller]
fn check(files: &[(&str, &str)], code: i32, says: &[&str]) -> Outcome {
    let store = Store::with_busybox();
    let context = Context::new(files);
    let before = store.holds();
    let outcome = store.build(&context, &["-t", "bad"]).expect(code).says(says);
    assert_eq!(outcome.stderr.matches("error:").count(), 1, "not one error:\n{}", outcome.stderr);
    assert_eq!(store.holds(), before, "the store has changed");
    assert_eq!(store.active_snapshots(), [""; 0]);
    outcome
}

#[test]
fn a_missing_dockerfile_is_an_error_of_the_context() {
    needs_root!();
    check(&[("a.txt", "a")], 4, &["error:", "Dockerfile"]);
}

#[test]
fn an_unknown_instruction_is_marked_where_it_stands() {
    needs_root!();
    check(
        &[("Dockerfile", "FROM busybox\nRNU true\n")],
        3,
        &["error:", "Dockerfile:2", ">>> RNU true", "unknown instruction"],
    );
}

#[test]
fn a_copy_of_a_missing_file_names_file_and_line() {
    needs_root!();
    check(
        &[("Dockerfile", "FROM busybox\nCOPY nothing.txt /\n")],
        4,
        &["error:", "Dockerfile:2", ">>> COPY nothing.txt /", "nothing.txt"],
    );
}

#[test]
fn a_run_that_exits_with_3_names_code_and_line() {
    needs_root!();
    check(
        &[("Dockerfile", "FROM busybox\nRUN exit 3\n")],
        1,
        &["error: step `RUN exit 3` failed", "Dockerfile:2", ">>> RUN exit 3", "exited with code 3"],
    );
}

#[test]
fn a_base_image_that_is_not_there_hints_at_import_and_load() {
    needs_root!();
    check(
        &[("Dockerfile", "FROM nosuchimage:1\n")],
        4,
        &["error:", "nosuchimage:1", "Dockerfile:1", "hint:", "kiln import", "kiln load"],
    );
}

#[test]
fn a_context_that_is_not_there_is_named() {
    needs_root!();
    let store = Store::with_busybox();
    let before = store.holds();
    store.kiln(&["build", "/no/such/context"]).expect(4).says(&["error:", "/no/such/context"]);
    assert_eq!(store.holds(), before);
}

#[test]
fn a_store_that_cannot_be_written_is_named_and_nothing_is_made() {
    needs_root!();
    let place = Store::empty();
    let file = place.beside("file");
    std::fs::write(&file, "not a directory").expect("ours to write");
    let context = Context::new(&[("Dockerfile", "FROM busybox\n")]);
    let mut command = place.command(&["build", context.path()]);
    let output = command.env("KILN_ROOT", file.join("store")).output().expect("kiln starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(6), "{stderr}");
    assert!(stderr.contains("error:") && stderr.contains("file/store"), "{stderr}");
    assert_eq!(std::fs::read_to_string(&file).expect("still there"), "not a directory");
}

#[test]
fn an_unknown_flag_is_an_error_of_the_command_line() {
    let store = Store::empty();
    store.kiln(&["build", "--no-such-flag", "."]).expect(2).says(&["--no-such-flag"]);
    assert!(!store.root().exists(), "a store was made for nothing");
}

#[test]
fn an_archive_that_is_none_is_refused() {
    needs_root!();
    let store = Store::with_busybox();
    let before = store.holds();
    let file = store.beside("noise.tar");
    std::fs::write(&file, [0x5a; 4096]).expect("ours to write");
    let outcome = store.kiln(&["load", "-i", crate::harness::text(&file)]);
    assert!(outcome.code.is_some_and(|code| code != 0), "{outcome:?}");
    outcome.says(&["error:", "noise.tar"]);
    assert_eq!(store.holds(), before);
}

#[test]
fn an_error_ends_with_the_steps_that_were_done_still_cached() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nRUN echo one > /one\nRUN exit 3\n")]);
    store.build(&context, &[]).expect(1);
    context.write("Dockerfile", "FROM busybox\nRUN echo one > /one\nRUN exit 0\n");
    let outcome = store.build(&context, &[]).expect(0);
    assert_eq!(outcome.ran(), ["RUN exit 0"]);
}

#[test]
fn a_file_named_like_a_whiteout_is_the_fault_of_the_step_that_made_it() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = "FROM busybox\nRUN touch /fine\nRUN touch /etc/.wh.motd\nRUN true\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    // Once made, once out of the cache.
    for _ in 0..2 {
        let outcome = store.build(&context, &["-t", "bad"]).expect(6);
        outcome.says(&["error: step `RUN touch /etc/.wh.motd` failed", "Dockerfile:3", "etc/.wh.motd"]);
    }
}

#[test]
fn several_files_onto_one_name_are_refused_with_a_hint() {
    needs_root!();
    check(
        &[("Dockerfile", "FROM busybox\nCOPY *.txt /new\n"), ("a.txt", "a"), ("b.txt", "b")],
        3,
        &[
            "error: step `COPY *.txt /new` failed",
            "Dockerfile:2",
            "\"/new\" is not a directory",
            "hint:",
            "/new/",
        ],
    );
}

#[test]
fn a_link_to_a_host_file_never_shows_the_hosts_content() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY link /stolen\n")]);
    std::os::unix::fs::symlink("/etc/hostname", std::path::Path::new(context.path()).join("link"))
        .expect("ours to write");
    store.build(&context, &["-t", "bad"]).expect(4).says(&["Dockerfile:2"]);
    context.write("etc/hostname", "the context's own");
    store.build(&context, &["-t", "fine"]).expect(0);
    assert_eq!(store.shell("fine", "cat /stolen"), "the context's own");
}

#[test]
fn a_dockerfile_of_one_gibibyte_is_refused_unread() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[]);
    let file = std::fs::File::create(context.at("Dockerfile")).expect("ours to write");
    file.set_len(1 << 30).expect("a file with a hole takes no room");
    let before = store.holds();
    let outcome = store.build_bounded(&context, &["-t", "bad"]).expect(3);
    outcome.says(&["error: the Dockerfile has 1073741824 bytes, 1 MiB is the limit", "Dockerfile"]);
    assert_eq!(store.holds(), before);
}

#[test]
fn user_ids_beyond_32_bits_never_become_root() {
    needs_root!();
    for user in ["4294967296", "4294967295", "0:4294967296", "99999999999999999999"] {
        let shapes = [
            (format!("FROM busybox\nUSER {user}\nRUN id -u > /who\n"), "Dockerfile:2:6"),
            (format!("FROM busybox\nARG U={user}\nUSER $U\nRUN id -u > /who\n"), "Dockerfile:3:6"),
            (format!("FROM busybox\nCOPY --chown={user} a /a\n"), "Dockerfile:2:"),
        ];
        for (dockerfile, place) in &shapes {
            check(&[("Dockerfile", dockerfile.as_str()), ("a", "a")], 3, &["error:", place]);
        }
    }
}

#[test]
fn an_answer_that_cannot_be_written_is_no_success() {
    needs_root!();
    let store = Store::with_busybox();
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").expect("it is always there");
    for line in [&["images"][..], &["inspect", "busybox"], &["history", "busybox"]] {
        let output = store.command(line).stdout(full()).output().expect("kiln starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(8), "{line:?}: {stderr}");
        assert!(stderr.contains("cannot write to standard output"), "{line:?}: {stderr}");
    }
}
