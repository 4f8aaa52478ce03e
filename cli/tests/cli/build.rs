//! What a Dockerfile makes, and what a second build does not do again.

use std::process::Command;

use crate::harness::{Context, Outcome, Store, needs_root, text};

const TWO_FILES: &str = "FROM busybox\n\
    RUN echo first > /first\n\
    COPY a.txt /a\n\
    RUN cat /a > /seen-a\n\
    COPY b.txt /b\n\
    RUN cat /b > /seen-b\n";

fn two_files() -> Context {
    Context::new(&[("Dockerfile", TWO_FILES), ("a.txt", "a"), ("b.txt", "b")])
}

#[test]
fn an_unchanged_build_runs_nothing_and_gives_the_same_image() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), two_files());
    let first = store.build(&context, &["-t", "x"]).expect(0);
    assert_eq!(first.ran().len(), 5, "{:?}", first.steps());
    let id = store.inspect("x")["Id"].clone();
    let second = store.build(&context, &["-t", "x"]).expect(0);
    assert_eq!(second.ran(), [""; 0]);
    assert_eq!(store.inspect("x")["Id"], id);
}

#[test]
fn a_changed_file_runs_again_exactly_what_depends_on_it() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), two_files());
    store.build(&context, &["-t", "x"]).expect(0);
    context.write("b.txt", "another b");
    let outcome = store.build(&context, &["-t", "x"]).expect(0);
    assert_eq!(outcome.ran(), ["COPY b.txt /b", "RUN cat /b > /seen-b"]);
    assert_eq!(store.shell("x", "cat /seen-a /seen-b"), "aanother b");
}

#[test]
fn a_file_written_again_with_the_same_content_changes_nothing() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), two_files());
    store.build(&context, &[]).expect(0);
    context.write("a.txt", "a");
    assert_eq!(store.build(&context, &[]).expect(0).ran(), [""; 0]);
}

#[test]
fn no_cache_runs_everything_again() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), two_files());
    store.build(&context, &[]).expect(0);
    assert_eq!(store.build(&context, &["--no-cache"]).expect(0).ran().len(), 5);
}

#[test]
fn ignored_files_are_not_copied_and_change_nothing() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("Dockerfile", "FROM busybox\nCOPY . /all\n"),
        (".dockerignore", "*.log\nsecret\n!keep.log\n"),
        ("a.txt", "a"),
        ("drop.log", "drop"),
        ("keep.log", "keep"),
        ("secret/key", "k"),
    ]);
    store.build(&context, &["-t", "x"]).expect(0);
    let listed = store.shell("x", "cd /all && find . -type f | sort");
    assert!(listed.contains("./a.txt\n") && listed.contains("./keep.log"), "{listed}");
    assert!(!listed.contains("drop.log") && !listed.contains("secret"), "{listed}");
    context.write("drop.log", "changed");
    assert_eq!(store.build(&context, &["-t", "x"]).expect(0).ran(), [""; 0]);
}

#[test]
fn a_stage_takes_files_of_another_and_an_unreachable_one_is_skipped() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[(
        "Dockerfile",
        "FROM busybox AS make\nRUN mkdir /out && echo made > /out/file\n\
         FROM busybox AS unused\nRUN exit 9\n\
         FROM busybox AS test\nRUN echo tested > /tested\n\
         FROM busybox\nCOPY --from=make /out/file /file\n",
    )]);
    let outcome = store.build(&context, &["-t", "x"]).expect(0);
    assert_eq!(
        outcome.ran(),
        ["RUN mkdir /out && echo made > /out/file", "COPY --from=make /out/file /file"]
    );
    assert_eq!(store.shell("x", "cat /file; ls -d /out /tested 2>/dev/null || true"), "made");

    let target = store.build(&context, &["-t", "y", "--target", "test"]).expect(0);
    assert_eq!(target.ran(), ["RUN echo tested > /tested"]);
    assert_eq!(store.shell("y", "cat /tested"), "tested");
}

#[test]
fn build_arguments_reach_run_and_change_only_what_follows_them() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[(
        "Dockerfile",
        "ARG BASE=busybox\nFROM $BASE\nRUN echo before > /before\nARG WHO=nobody\nRUN echo \"$WHO\" > /who\n",
    )]);
    store.build(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cat /who"), "nobody");
    let outcome = store.build(&context, &["-t", "x", "--build-arg", "WHO=me"]).expect(0);
    assert_eq!(outcome.ran().len(), 1, "{:?}", outcome.steps());
    assert_eq!(store.shell("x", "cat /who"), "me");
    let unknown = store.build(&context, &["--build-arg", "BASE=nosuch"]);
    unknown.expect(4).says(&["nosuch"]);
}

#[test]
fn copied_files_have_the_owner_mode_and_name_that_was_asked_for() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        (
            "Dockerfile",
            "FROM busybox\nCOPY --chown=12:34 one.txt /owned\nCOPY *.txt /many/\nCOPY dir /copied\n",
        ),
        ("one.txt", "1"),
        ("two.txt", "2"),
        ("three.md", "3"),
        ("dir/deep/file", "4"),
    ]);
    store.build(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "stat -c '%u:%g' /owned /many/one.txt"), "12:34\n0:0");
    assert_eq!(store.shell("x", "ls /many; cat /copied/deep/file"), "one.txt\ntwo.txt\n4");
}

#[test]
fn add_unpacks_a_local_tar_and_copy_does_not() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("Dockerfile", "FROM busybox\nADD files.tar.gz /added/\nCOPY files.tar.gz /copied/\n"),
        ("inside/file", "packed\n"),
    ]);
    let mut tar = Command::new("tar");
    tar.args(["-C", context.path(), "-czf"]).arg(format!("{}/files.tar.gz", context.path())).arg("inside");
    assert!(tar.status().expect("tar runs").success());
    store.build(&context, &["-t", "x"]).expect(0);
    assert_eq!(store.shell("x", "cat /added/inside/file; ls /copied"), "packed\nfiles.tar.gz");
}

#[test]
fn the_image_config_says_what_the_dockerfile_says() {
    needs_root!();
    let store = Store::with_busybox();
    store.image(
        "x",
        "FROM busybox\nENV GREETING=\"hello you\" OTHER=1\nWORKDIR /srv\nWORKDIR app\nUSER 1000:1000\n\
         LABEL org.example.kind=test\nEXPOSE 80 53/udp\nENTRYPOINT [\"/bin/echo\", \"a b\"]\nCMD [\"c\"]\n",
    );
    let image = store.inspect("x");
    let config = &image["Config"];
    assert_eq!(config["Entrypoint"], serde_json::json!(["/bin/echo", "a b"]));
    assert_eq!(config["Cmd"], serde_json::json!(["c"]));
    assert_eq!(config["WorkingDir"], "/srv/app");
    assert_eq!(config["User"], "1000:1000");
    assert_eq!(config["Labels"]["org.example.kind"], "test");
    assert_eq!(config["ExposedPorts"], serde_json::json!({"80/tcp": {}, "53/udp": {}}));
    let env = config["Env"].as_array().expect("a list").iter().filter_map(|word| word.as_str());
    let env: Vec<&str> = env.collect();
    assert!(env.contains(&"GREETING=hello you") && env.contains(&"OTHER=1"), "{env:?}");
    assert!(env.iter().any(|word| word.starts_with("PATH=")), "{env:?}");
    assert_eq!(image["Os"], "linux");
    assert!(image["Id"].as_str().is_some_and(|id| id.starts_with("sha256:")), "{image}");
    let layers = image["RootFS"]["Layers"].as_array().expect("a list");
    assert!(layers.len() >= 2, "the base and WORKDIR: {layers:?}");
}

#[test]
fn names_are_given_taken_and_listed() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("other.Dockerfile", "FROM busybox\nRUN echo x > /x\n")]);
    let file = format!("{}/other.Dockerfile", context.path());
    store.build(&context, &["-f", &file, "-t", "one:1", "-t", "two:2"]).expect(0);
    store.ok(&["tag", "one:1", "three:3"]);
    let listed = store.ok(&["images"]).stdout;
    for name in ["one", "two", "three", "busybox"] {
        assert!(listed.contains(name), "{listed}");
    }
    assert_eq!(store.inspect("one:1")["Id"], store.inspect("three:3")["Id"]);
    let history = store.ok(&["history", "one:1"]).stdout;
    assert!(history.contains("echo x > /x"), "{history}");
    store.ok(&["rmi", "one:1", "two:2"]);
    assert_eq!(store.shell("three:3", "cat /x"), "x");
    store.ok(&["rmi", "three:3"]);
    let left = store.ok(&["images"]).stdout;
    assert!(!left.contains("three") && left.contains("busybox"), "{left}");
}

#[test]
fn a_directory_and_standard_input_can_be_imported_too() {
    needs_root!();
    let store = Store::empty();
    let tree = Context::new(&[("etc/motd", "from a directory")]);
    store.ok(&["import", tree.path(), "tree:1", "-c", "LABEL made=here"]);
    assert_eq!(store.inspect("tree:1")["Config"]["Labels"]["made"], "here");

    let tar = store.beside("base.tar.gz");
    let packed = Command::new("tar").args(["-C", tree.path(), "-czf", text(&tar), "."]).status();
    assert!(packed.expect("tar runs").success());
    let mut command = store.command(&["import", "-", "piped:1"]);
    command.stdin(std::fs::File::open(&tar).expect("just written"));
    assert!(command.status().expect("kiln starts").success());
    assert!(store.ok(&["images"]).stdout.contains("piped"));
    // Packed in any way it is the same tree.
    let layers = store.inspect("piped:1")["RootFS"].clone();
    for packer in ["bzip2", "xz", "zstd"] {
        if Command::new(packer).arg("--version").stdin(std::process::Stdio::null()).output().is_err() {
            eprintln!("SKIPPED ALOUD: needs {packer}");
            continue;
        }
        let packed = store.beside(&format!("base.tar.{packer}"));
        let line = format!("gzip -dc '{}' | {packer} -c > '{}'", text(&tar), text(&packed));
        assert!(Command::new("sh").args(["-c", &line]).status().expect("sh runs").success(), "{packer}");
        let name = format!("{packer}:1");
        store.ok(&["import", text(&packed), &name]);
        assert_eq!(store.inspect(&name)["RootFS"], layers, "{packer}");
    }
    let told = store.ok(&["import", "--help"]).stdout;
    assert!(told.contains("plain, gzip, zstd, bzip2 or xz"), "{told}");
}

#[test]
fn a_working_directory_is_as_old_as_the_build_says() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[(
        "Dockerfile",
        "FROM busybox\nRUN mkdir -p /old && touch -d @5 /old\nWORKDIR /old/new/er\n",
    )]);
    store.build(&context, &["-t", "aged", "--build-arg", "SOURCE_DATE_EPOCH=1000"]).expect(0);
    // Nor does the directory above change.
    assert_eq!(store.shell("aged", "stat -c %Y /old /old/new /old/new/er"), "5\n1000\n1000");
    let again = store.build(&context, &["-t", "aged", "--build-arg", "SOURCE_DATE_EPOCH=1000"]).expect(0);
    assert_eq!(again.ran(), [""; 0]);
    let later = store.build(&context, &["-t", "aged", "--build-arg", "SOURCE_DATE_EPOCH=2000"]).expect(0);
    assert_eq!(later.ran(), ["WORKDIR /old/new/er"]);
}

#[test]
fn a_history_shows_whole_instructions_when_asked_to() {
    needs_root!();
    let store = Store::with_busybox();
    let long = format!("LABEL a={}", "x".repeat(100));
    store.image("long", &format!("FROM busybox\n{long}\n"));
    assert!(!store.ok(&["history", "long"]).stdout.contains(&long));
    assert!(store.ok(&["history", "--no-trunc", "long"]).stdout.contains(&long));
}

#[test]
fn steps_are_told_of_hosts_and_proxies_but_only_names_count() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[(
        "Dockerfile",
        "FROM busybox\nRUN --network=none grep 192.0.2 /etc/hosts; echo \"proxy=$HTTPS_PROXY\"\n",
    )]);
    let build = |host: &str, proxy: &str| {
        let args = ["build", "--progress", "plain", "-t", "app", "--add-host", host, context.path()];
        Outcome::of(store.command(&args).env("HTTPS_PROXY", proxy).output().unwrap()).expect(0)
    };
    let first = build("db:192.0.2.7", "http://proxy.test:1");
    assert_eq!(first.ran().len(), 1);
    first.says(&["192.0.2.7\tdb", "proxy=http://proxy.test:1"]);
    assert!(!store.inspect("app").to_string().contains("proxy.test"));
    assert!(!store.ok(&["history", "--no-trunc", "app"]).stdout.contains("proxy.test"));
    assert_eq!(build("db:192.0.2.7", "http://other.test:1").ran(), [""; 0]);
    assert_eq!(build("db:192.0.2.8", "http://other.test:1").ran(), [""; 0], "an address may change");
    build("store:192.0.2.8", "http://other.test:1").says(&["192.0.2.8\tstore"]);
    store
        .command(&["build", "--add-host", "db", context.path()])
        .output()
        .map(Outcome::of)
        .unwrap()
        .expect(2);
}
