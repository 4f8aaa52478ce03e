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
    // What becomes of the result, and how it is shown.
    option("", &[], &["-o", "type=cacheonly", "--annotation", "a=b"], &[]),
    option("", &["--cache-to", "type=inline"], &["--cache-from", "nobody/has:it", "--load"], &[]),
    option("", &["--pull=never"], &["--offline"], &[]),
    // How much room there is for what comes from elsewhere.
    option("", &["--max-layer", "1GB"], &["--max-layer", "2GB"], &[]),
    // Written otherwise, and the same is said.
    line("RUN true", "# A note\nrun true", &[]),
    line("COPY one/f /f", "copy  one/f \\\n  /f", &[]),
    line("COPY one/f /f", "COPY [\"one/f\", \"/f\"]", &[]),
    line("COPY one/f one/g /x/", "COPY ./one/f /one/g /x/", &[]),
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
    line("USER 0", "USER 1", &["RUN"]),
    option(
        "",
        &["--build-arg", "BUILDKIT_SANDBOX_HOSTNAME=one"],
        &["--build-arg", "BUILDKIT_SANDBOX_HOSTNAME=two"],
        &["RUN"],
    ),
    option("", &["--network", "none"], &["--network", "host"], &["RUN"]),
    // What is expanded, where it is.
    line("ENV d=/x\nCOPY one/f $d/", "ENV d=/y\nCOPY one/f $d/", &["COPY one/f $d/", "RUN", "COPY"]),
    line("ARG d=/x\nWORKDIR $d", "ARG d=/y\nWORKDIR $d", &["WORKDIR", "RUN", "COPY"]),
    // The step itself.
    line("RUN true 1", "RUN true 2", &["RUN true 2"]),
    line("RUN true", "RUN [\"true\"]", &["RUN [\"true\"]"]),
    line("RUN true", "RUN <<EOF\ntrue\nEOF", &["RUN <<EOF"]),
    // Who says that it is the usual one has chosen, too.
    line("RUN --network=none true", "RUN --network=default true", &["RUN --network=default"]),
    option(
        "RUN --network=host true",
        &["--allow", "network.host"],
        &["--allow=network.host", "--allow=security.insecure"],
        &[],
    ),
    Row {
        before: ("RUN true", &[]),
        after: ("RUN --security=insecure true", &["--allow", "security.insecure"]),
        ran: &["RUN --security"],
    },
    option("RUN true", &[], &["--no-cache"], &["COPY last", "RUN true", "RUN :", "COPY last"]),
    option("RUN true", &[], &["--no-cache=3"], &["RUN true"]),
    option(
        "FROM busybox AS here\nRUN true",
        &[],
        &["--no-cache-filter", "here"],
        &["RUN true", "RUN :", "COPY last"],
    ),
    // Mounts: where, which kind, and what of it; not what is behind a secret's name.
    line("RUN --mount=type=cache,target=/c true", "RUN --mount=type=cache,target=/d true", &["RUN --mount"]),
    line("RUN --mount=type=cache,target=/c true", "RUN --mount=type=tmpfs,target=/c true", &["RUN --mount"]),
    line(
        "RUN --mount=type=cache,target=/c true",
        "RUN --mount=type=cache,target=/c,ro true",
        &["RUN --mount"],
    ),
    line(
        "RUN --mount=type=cache,target=/c,mode=0755 true",
        "RUN --mount=type=cache,target=/c,mode=0700 true",
        &["RUN --mount"],
    ),
    line(
        "RUN --mount=type=tmpfs,target=/t,size=1m true",
        "RUN --mount=type=tmpfs,target=/t,size=2m true",
        &["RUN --mount"],
    ),
    line("RUN --mount=target=/m,source=one true", "RUN --mount=target=/n,source=one true", &["RUN --mount"]),
    line(
        "RUN --mount=target=/m,source=one true",
        "RUN --mount=target=/m,source=one,rw true",
        &["RUN --mount"],
    ),
    option(
        "RUN --mount=type=secret,id=s true",
        &["--secret", "id=s,env=PATH"],
        &["--secret", "id=s,env=KILN_ROOT"],
        &[],
    ),
    line("RUN --mount=type=secret,id=s true", "RUN --mount=type=secret,id=t true", &["RUN --mount"]),
    line(
        "RUN --mount=type=secret,id=s true",
        "RUN --mount=type=secret,id=s,mode=0444 true",
        &["RUN --mount"],
    ),
    line(
        "RUN --mount=type=secret,id=s,env=A true",
        "RUN --mount=type=secret,id=s,env=B true",
        &["RUN --mount"],
    ),
    line("RUN --mount=type=ssh true", "RUN --mount=type=ssh,id=other true", &["RUN --mount"]),
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
    line("COPY one/* /x/", "COPY --exclude=nothing one/* /x/", &["COPY --exclude"]),
    line("COPY --chown=0 one/f /f", "COPY --chown=root one/f /f", &["COPY --chown=root"]),
    line("COPY one/f /x/", "COPY one/g /x/", &["COPY one/g", "RUN", "COPY"]),
    line("COPY one/f /f", "COPY one/f /g", &["COPY one/f /g", "RUN", "COPY"]),
    line("COPY one/* /x/", "COPY --exclude=g one/* /x/", &["COPY --exclude", "RUN", "COPY"]),
    line("COPY one /x/", "COPY --parents one /x/", &["COPY --parents", "RUN", "COPY"]),
    line("COPY one/f /f", "COPY --chown=1 one/f /f", &["COPY --chown", "RUN", "COPY"]),
    line("COPY <<EOF /f\none\nEOF", "COPY <<EOF /f\ntwo\nEOF", &["COPY <<EOF", "RUN", "COPY"]),
    // The same is made, but not looked at: that is for plain copies.
    line("COPY one/f /f", "ADD one/f /f", &["ADD one/f", "RUN", "COPY"]),
    line("COPY --chmod=644 one/f /f", "COPY --chmod=u=rw,go=r one/f /f", &["COPY --chmod", "RUN", "COPY"]),
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
    let mut wrong = Vec::new();
    for (at, Row { before, after, ran }) in ROWS.iter().enumerate() {
        let build = |(line, options): (&str, &[&'static str])| {
            // No two rows know each other's results.
            let text = format!("FROM busybox\nCOPY last /row{at}\n{line}\nRUN :\nCOPY last /last\n");
            context.write("Dockerfile", &text);
            let mut options = options.to_vec();
            if !options.contains(&"--network") {
                options.extend(["--network", "none"]);
            }
            let built = store.build(&context, &options);
            if built.code == Some(0) { Ok(built.ran()) } else { Err(built.stderr) }
        };
        let steps = build(*before).and_then(|_| build(*after));
        let is_right = steps.as_ref().is_ok_and(|steps| {
            steps.len() == ran.len() && steps.iter().zip(*ran).all(|(step, start)| step.starts_with(start))
        });
        if !is_right {
            wrong.push(format!("{before:?} -> {after:?} ran {steps:?}, not {ran:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Options that have no row above, and why.
const ELSEWHERE: &[(&str, &str)] = &[
    ("attest", "said beside the image: `attestations`"),
    ("build-context", "a directory or an image like others: `remote_named`"),
    ("ca-cert", "`certificates`: no key knows it"),
    ("call", "builds nothing"),
    ("check", "builds nothing"),
    ("file", "the Dockerfile's text is what counts: `build`"),
    ("help", "builds nothing"),
    ("iidfile", "written beside the image"),
    ("insecure-registry", "how to reach a registry"),
    ("lock", "which images names stand for: `registry::locks`"),
    ("locked", "the same"),
    ("metadata-file", "written beside the image"),
    ("on-error", "needs a terminal"),
    ("progress", "how it is shown"),
    ("provenance", "said beside the image: `attestations`"),
    ("push", "needs a registry: `registry`"),
    ("quiet", "how it is shown"),
    ("registry-mirror", "how to reach a registry"),
    ("root", "where the store is"),
    ("runtime", "who runs steps is in no key: `runtime`"),
    ("sbom", "said beside the image: `attestations`"),
    ("snapshotter", "how the store keeps files: `layers::backends`"),
    ("ssh", "what is behind a name"),
    ("target", "which steps there are"),
    ("transfer-timeout", "how to reach a registry"),
    ("watch", "builds again by the same keys: `watch`"),
];

/// A new option has a row, or a reason for none.
#[test]
fn every_option_is_known_here() {
    let help = Store::empty().ok(&["build", "--help"]).stdout;
    let options = help.lines().filter_map(|line| {
        let (_, rest) = line.split_once("--")?;
        let is_first = line.trim_start().starts_with('-');
        is_first.then(|| rest.split([' ', '[', '=', '<']).next().unwrap_or_default().trim().to_owned())
    });
    let used: Vec<&str> =
        ROWS.iter().flat_map(|row| [row.before.1, row.after.1]).flatten().copied().collect();
    let short = [("-t", "tag"), ("-o", "output")];
    let is_used = |name: &str| {
        let long = format!("--{name}");
        let is_it =
            |word: &&&str| word.split('=').next() == Some(long.as_str()) || short.contains(&(**word, name));
        used.iter().any(|word| is_it(&word))
    };
    let mut seen = 0;
    for name in options {
        seen += 1;
        let is_elsewhere = ELSEWHERE.iter().any(|(known, _)| *known == name);
        assert!(is_used(&name) || is_elsewhere, "what does --{name} do to keys?");
    }
    assert!(seen > 30, "{help}");
}
