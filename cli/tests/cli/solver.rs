//! What runs, how much at once, and by whom when several builds want the same.

use rustix::process::Signal;

use crate::harness::{Context, Running, Store, needs_root};

/// What it says there; its text does not.
const AT_THE_GATE: &str = "standing at 42";

/// A step that says when it runs and goes on once the gate, a cache mount, is open.
const GATED: &str = "FROM busybox
RUN --mount=type=cache,id=gate,target=/gate head -c 16 /dev/urandom | md5sum > /stamp; \
    echo standing at $((6*7)); until [ -e /gate/open ]; do sleep 0.05; done
";

fn open_gate(store: &Store) {
    let opener = "FROM busybox\nRUN --mount=type=cache,id=gate,target=/gate touch /gate/open\n";
    store.build(&Context::new(&[("Dockerfile", opener)]), &["--network", "none"]).expect(0);
}

fn start(store: &Store, context: &Context, tag: &str) -> Running {
    let line = ["build", "--progress", "plain", "--network", "none", "-t", tag, context.path()];
    Running::start(store.command(&line))
}

#[test]
fn two_processes_that_want_the_same_step_run_it_once() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", GATED)]);
    let mut one = start(&store, &context, "one");
    one.wait_for(AT_THE_GATE);
    let mut two = start(&store, &context, "two");
    two.wait_for(&format!("waiting for the build of process {}", one.id()));
    open_gate(&store);
    one.end().expect(0);
    let two = two.end().expect(0);
    assert!(!two.stderr.contains(AT_THE_GATE), "it ran twice:\n{}", two.stderr);
    assert_eq!(store.shell("one", "cat /stamp"), store.shell("two", "cat /stamp"));
    assert_eq!(claims(&store), Vec::<String>::new());
}

#[test]
fn whoever_waits_for_a_build_that_is_killed_takes_over() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", GATED)]);
    let mut one = start(&store, &context, "one");
    one.wait_for(AT_THE_GATE);
    let mut two = start(&store, &context, "two");
    two.wait_for("waiting for the build of process");
    one.signal(Signal::KILL);
    two.wait_for(AT_THE_GATE);
    open_gate(&store);
    two.end().expect(0);
    assert_eq!(one.end().code, None);
    assert_eq!(store.shell("two", "test -s /stamp && echo made"), "made");
    assert_eq!(claims(&store), Vec::<String>::new());
}

#[test]
fn a_build_that_waits_for_another_can_be_interrupted() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", GATED)]);
    let mut one = start(&store, &context, "one");
    one.wait_for(AT_THE_GATE);
    let mut two = start(&store, &context, "two");
    two.wait_for("waiting for the build of process");
    two.signal(Signal::INT);
    two.end().expect(130);
    open_gate(&store);
    one.end().expect(0);
}

/// Files of claims on steps.
fn claims(store: &Store) -> Vec<String> {
    let names = std::fs::read_dir(store.root().join("locks")).expect("a store has locks");
    let names = names.map(|entry| entry.expect("it is there").file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("step-")).collect()
}

#[test]
fn a_step_that_makes_the_same_again_leaves_what_follows_cached() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile =
        |first: &str| format!("FROM busybox\nRUN {first}\nRUN cat /made > /copy\nRUN echo end\n");
    let context = Context::new(&[("Dockerfile", &dockerfile("echo 1 > /made"))]);
    let build = || store.build(&context, &["--network", "none", "-q"]).expect(0).stdout;
    let ran = || store.build(&context, &["--network", "none"]).expect(0).ran();
    let first = build();

    context.write("Dockerfile", &dockerfile("echo $((2-1)) > /made"));
    assert_eq!(ran(), ["RUN echo $((2-1)) > /made"]);
    assert_eq!(ran(), Vec::<String>::new());
    let kept = store.shell(build().trim(), "cat /copy");
    assert_eq!(kept, "1");

    for different in [
        "echo 2 > /made",
        "echo 1 > /made; chmod 600 /made",
        "echo 1 > /made; chown 7 /made",
        "echo 1 > /made; ln /made /more",
        "echo 1 > /made; mkdir /more",
        "echo 1 > /made; rm /bin/ls",
        "ln -s /bin/sh /made",
    ] {
        context.write("Dockerfile", &dockerfile(different));
        assert_eq!(ran().len(), 3, "{different}");
    }
    context.write("Dockerfile", &dockerfile("echo 1 > /made"));
    assert_eq!(build(), first, "the first results are still known");
}

/// Two steps of which each waits for the other, for so many times 50 ms.
fn rendezvous(limit: u32) -> Context {
    let step = |own: &str, other: &str| {
        format!(
            "RUN --mount=type=cache,id=place,target=/place touch /place/{own}; i=0; \
             until [ -e /place/{other} ]; do i=$((i+1)); [ $i -gt {limit} ] && exit 9; sleep 0.05; done; \
             touch /{own}"
        )
    };
    let dockerfile = format!(
        "FROM busybox AS a\n{}\nFROM busybox AS b\n{}\nFROM busybox\nCOPY --from=a /a /\nCOPY --from=b /b /\n",
        step("a", "b"),
        step("b", "a"),
    );
    Context::new(&[("Dockerfile", &dockerfile)])
}

#[test]
fn jobs_says_how_many_steps_run_at_once() {
    needs_root!();
    let alone = Store::with_busybox();
    alone
        .build(&rendezvous(3), &["--network", "none", "--jobs", "1"])
        .expect(1)
        .says(&["exited with code 9"]);
    let together = Store::with_busybox();
    together.build(&rendezvous(1200), &["--network", "none", "--jobs", "2"]).expect(0);
    together.kiln(&["build", "--jobs", "0", "."]).expect(2).says(&["--jobs"]);
}
