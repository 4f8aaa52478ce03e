//! What is in a step's key: one thing about a build is changed, and the steps that run are these. The ops'
//! fields are in a table of `kiln-llb`; here stand instructions and options.

use crate::harness::{Context, Store, needs_root};

/// A change of a build: what the last line of the Dockerfile's first part is, and options.
struct Row {
    before: (&'static str, &'static [&'static str]),
    after: (&'static str, &'static [&'static str]),
    /// The first words of what runs.
    ran: &'static [&'static str],
}

const fn line(before: &'static str, after: &'static str, ran: &'static [&'static str]) -> Row {
    Row { before: (before, &[]), after: (after, &[]), ran }
}

const fn option(
    line: &'static str,
    before: &'static [&'static str],
    after: &'static [&'static str],
    ran: &'static [&'static str],
) -> Row {
    Row { before: (line, before), after: (line, after), ran }
}

/// Behind the line that is changed stand a RUN that leaves nothing and a COPY.
const ROWS: &[Row] = &[
    // What is only in the image's config, and what is no part of a result.
    Row {
        before: (
            "LABEL a=1\nCMD one\nENTRYPOINT one\nEXPOSE 1\nVOLUME /v\nSTOPSIGNAL 1\nHEALTHCHECK CMD one\n\
             ONBUILD RUN one\nMAINTAINER one",
            &["--label", "b=1", "-t", "one", "--build-arg", "http_proxy=one", "--jobs", "1"],
        ),
        after: (
            "LABEL a=2\nCMD two\nENTRYPOINT two\nEXPOSE 2\nVOLUME /w\nSTOPSIGNAL 2\nHEALTHCHECK CMD two\n\
             ONBUILD RUN two\nMAINTAINER two\nARG a",
            &["--label", "b=2", "-t", "two", "--build-arg", "NO_PROXY=*", "--jobs", "2"],
        ),
        ran: &[],
    },
    option("", &["--add-host", "one:10.0.0.1"], &["--add-host", "one:10.0.0.2"], &[]),
    // What is built for, where nothing depends on it: the first stage of these is not built.
    option(
        "FROM --platform=$BUILDPLATFORM busybox",
        &["--platform", "linux/arm64"],
        &["--platform", "linux/riscv64"],
        &[],
    ),
    option(
        "FROM --platform=$BUILDPLATFORM busybox\nARG TARGETARCH",
        &["--platform", "linux/arm64"],
        &["--platform", "linux/riscv64"],
        &["RUN"],
    ),
    // What a process sees. It leaves what it left, so that the copy on it stays.
    line("ENV a=1", "ENV a=2", &["RUN"]),
    line("ENV a=1 b=2", "ENV b=2 a=1", &["RUN"]),
    line("ARG a=1", "ARG a=2", &["RUN"]),
    option("ARG a", &["--build-arg", "a=1"], &["--build-arg", "a=2"], &["RUN"]),
    line("SHELL [\"sh\", \"-c\"]", "SHELL [\"/bin/sh\", \"-c\"]", &["RUN"]),
    option("", &["--add-host", "one:10.0.0.1"], &["--add-host", "two:10.0.0.1"], &["RUN"]),
    // The step itself.
    line("RUN true 1", "RUN true 2", &["RUN true 2"]),
    line("WORKDIR /a", "WORKDIR /b", &["WORKDIR", "RUN", "COPY"]),
    line(
        "RUN --mount=type=cache,target=/c,id=one true",
        "RUN --mount=type=cache,target=/c,id=two,sharing=locked true",
        &[],
    ),
    line("RUN --mount=target=/m,source=one true", "RUN --mount=target=/m,source=two true", &[]),
    line(
        "RUN --mount=target=/m,source=one true",
        "RUN --mount=target=/m,source=other true",
        &["RUN --mount"],
    ),
    // Whose content is the same, wherever it was.
    line("COPY one/f /f", "COPY two/f /f", &[]),
    line("COPY one/* /x/", "COPY two/* /x/", &[]),
    // Said otherwise, and the same is made: what stands on it stays.
    line("COPY one/f /f", "COPY one/g /f", &["COPY one/g"]),
    line("COPY one/f one/g /x/", "COPY one/? /x/", &["COPY one/?"]),
    line("COPY one/f /f", "COPY other/f /f", &["COPY other/f", "RUN", "COPY"]),
    line("COPY one/f /f", "COPY --chmod=600 one/f /f", &["COPY --chmod", "RUN", "COPY"]),
    line("COPY --parents one/f /f/", "COPY --parents two/f /f/", &["COPY --parents", "RUN", "COPY"]),
];

#[test]
fn what_is_changed_runs_and_what_does_not_count_does_not() {
    needs_root!();
    let store = Store::with_busybox();
    let files =
        [("one/f", "1"), ("one/g", "1"), ("two/f", "1"), ("two/g", "1"), ("other/f", "2"), ("last", "")];
    let context = Context::new(&files);
    for (at, Row { before, after, ran }) in ROWS.iter().enumerate() {
        let build = |(line, options): (&str, &[&str])| {
            // No two rows know each other's results.
            let text = format!("FROM busybox\nCOPY last /row{at}\n{line}\nRUN :\nCOPY last /last\n");
            context.write("Dockerfile", &text);
            store.build(&context, &[&["--network", "none"], options].concat()).expect(0).ran()
        };
        build(*before);
        let steps = build(*after);
        let is_right =
            steps.len() == ran.len() && steps.iter().zip(*ran).all(|(step, start)| step.starts_with(start));
        assert!(is_right, "{before:?} -> {after:?} ran {steps:?}, not {ran:?}");
    }
}
