//! Which steps are run again because somebody said so, or because their results are too old.

use crate::harness::{Context, Store, needs_root};

/// Two stages that leave the same each time, and a copy.
const STAGES: &str = "FROM busybox AS one
RUN echo first
RUN echo 1 > /file
FROM busybox AS two
LABEL a=b
RUN echo 2 > /file
COPY --from=one /file /one
";

const BUILD: &[&str] = &["--network", "none", "-t", "app"];

fn build(store: &Store, context: &Context, options: &[&str]) -> crate::harness::Outcome {
    store.build(context, &[BUILD, options].concat())
}

#[test]
fn only_the_named_steps_run_again() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", STAGES)]);
    build(&store, &context, &[]).expect(0);
    let (first, second) = ("RUN echo first", "RUN echo 1 > /file");
    let (third, copy) = ("RUN echo 2 > /file", "COPY --from=one /file /one");
    for (options, ran) in [
        (&["--no-cache-filter=ONE"][..], &[first, second][..]),
        (&["--no-cache-filter", "one,two"], &[first, second, third, copy]),
        (&["--no-cache-filter=none"], &[]),
        (&["--no-cache=one"], &[first, second]),
        (&["--no-cache=one:3"], &[second]),
        (&["--no-cache=2"], &[third]),
        (&["--no-cache=two:2", "--no-cache=one:2"], &[first, third]),
        (&["--no-cache=line:3"], &[second]),
        (&["--no-cache=false"], &[]),
        (&["--no-cache"], &[first, second, third, copy]),
        (&["--no-cache=true"], &[first, second, third, copy]),
        (&["--target=one", "--no-cache=two"], &[]),
    ] {
        let mut steps = build(&store, &context, options).expect(0).ran();
        let mut expected = ran.to_vec();
        steps.sort();
        expected.sort_unstable();
        assert_eq!(steps, expected, "{options:?}");
    }
    build(&store, &context, &["--no-cache=one:2"]).expect(0).says(&["why: --no-cache=one:2"]);
    build(&store, &context, &["--no-cache-filter=one"]).expect(0).says(&["why: --no-cache-filter=one"]);
    assert!(store.ok(&["why", "one:2"]).stdout.contains("--no-cache-filter=one"));
    for (options, says) in [
        (
            &["--no-cache=three"][..],
            &["there is no step three in this build", "[one 2/3] RUN echo first"][..],
        ),
        (&["--no-cache=one:9"], &["there is no step one:9"]),
        (&["--no-cache=line:5"], &["there is no step line:5"]),
        (&["--no-cache=one:x"], &["\"one:x\" is no step such as STAGE, 2, STAGE:2 or line:7"]),
    ] {
        build(&store, &context, options).expect(2).says(says);
    }
}

#[test]
fn what_stands_on_a_step_that_makes_something_else_runs_as_well() {
    needs_root!();
    let store = Store::with_busybox();
    let text = "FROM busybox\nRUN head -c 16 /dev/urandom > /random\nRUN echo next\n";
    let context = Context::new(&[("Dockerfile", text)]);
    build(&store, &context, &[]).expect(0);
    let outcome = build(&store, &context, &["--no-cache=2"]).expect(0);
    assert_eq!(outcome.ran(), ["RUN head -c 16 /dev/urandom > /random", "RUN echo next"]);
    outcome.says(&["why: --no-cache=2", "ran again"]);
    assert_eq!(build(&store, &context, &[]).expect(0).ran(), Vec::<String>::new());
}

#[test]
fn a_result_that_is_older_than_its_ttl_is_made_again() {
    needs_root!();
    let store = Store::with_busybox();
    let steps = |ttl: &str, command: &str| {
        format!("# kiln: cache-ttl\nFROM busybox\nRUN {ttl}{command}\nRUN cat /made > /copy\n")
    };
    let same = "echo same > /made";
    let context = Context::new(&[("Dockerfile", &steps("--cache-ttl=24h ", same))]);
    let ran = || build(&store, &context, &[]).expect(0).ran();
    assert_eq!(ran().len(), 2);
    assert_eq!(ran().len(), 0, "it is new");
    // It is no part of the key.
    context.write("Dockerfile", &steps("", same));
    assert_eq!(ran().len(), 0);

    // Whole seconds count: it takes one or two until the result is older.
    context.write("Dockerfile", &steps("--cache-ttl=1ms ", same));
    let outcome = until_it_runs(&store, &context);
    assert_eq!(outcome.ran(), ["RUN --cache-ttl=1ms echo same > /made"], "what stands on it stays");
    outcome.says(&["why: its result was made", "and counts for"]);
    assert!(store.ok(&["why", "2"]).stdout.contains("its result was made"));
    // What it made again counts from now, although the earlier result was kept.
    context.write("Dockerfile", &steps("--cache-ttl=1h ", same));
    assert_eq!(ran().len(), 0);

    let other = "head -c 16 /dev/urandom > /made";
    context.write("Dockerfile", &steps("--cache-ttl=1ms ", other));
    build(&store, &context, &[]).expect(0);
    assert_eq!(until_it_runs(&store, &context).ran().len(), 2, "what stands on it stands on the new one");
}

/// Builds until something runs.
fn until_it_runs(store: &Store, context: &Context) -> crate::harness::Outcome {
    let began = std::time::Instant::now();
    loop {
        let outcome = build(store, context, &[]).expect(0);
        if !outcome.ran().is_empty() {
            return outcome;
        }
        assert!(began.elapsed() < std::time::Duration::from_secs(60), "nothing gets old");
    }
}

#[test]
fn a_ttl_needs_a_directive() {
    needs_root!();
    let store = Store::with_busybox();
    for (text, says) in [
        (
            "FROM busybox\nRUN --cache-ttl=1h true\n",
            &["`--cache-ttl` is kiln's own", "write `# kiln: cache-ttl` above the first instruction"][..],
        ),
        ("FROM busybox\n# kiln: cache-ttl\nRUN --cache-ttl=1h true\n", &["not switched on"]),
        (
            "# kiln: cache-tll\nFROM busybox\n",
            &["there is no extension \"cache-tll\"", "did you mean `cache-ttl`?"],
        ),
        ("# kiln:\nFROM busybox\n", &["names no extension", "kiln knows cache-ttl"]),
        ("# kiln: cache-ttl\nFROM busybox\nRUN --cache-ttl=1d true\n", &["no duration like"]),
        ("# kiln: cache-ttl\nFROM busybox\nRUN --cache-ttl=0 true\n", &["--no-cache=STEP"]),
        ("# kiln: cache-ttl\nFROM busybox\nONBUILD RUN --cache-ttl=1h true\n", &["leave it out of ONBUILD"]),
    ] {
        let context = Context::new(&[("Dockerfile", text)]);
        build(&store, &context, &[]).expect(3).says(says);
    }
}
