//! The catalogue of bad input, as far as one Dockerfile shows it: D are Dockerfiles, M mounts of
//! RUN. Each row: its number, the exit code, the Dockerfile, what the message has to say.

use crate::harness::{Context, Outcome, Store, needs_root};

type Row<'a> = (&'a str, i32, &'a [u8], &'a [&'a str]);

const DOCKERFILES: &[Row<'static>] = &[
    ("D01", 3, b"", &["the Dockerfile has no instructions", "hint:", "Dockerfile:1:1"]),
    ("D02", 3, b"# nothing but words\n", &["no instructions", "Dockerfile:1:1"]),
    ("D03", 3, b"\0\0\0\0", &["Dockerfile:1:1"]),
    ("D04", 0, b"\xef\xbb\xbfFROM busybox\n", &[]),
    ("D05", 3, b"\xff\xfeF\0R\0O\0M\0 \0b\0\n\0", &["UTF-16", "Dockerfile:1:1"]),
    ("D07", 3, b"FROM busybox\nRUN echo \xff\xfe\n", &["UTF-8", "Dockerfile:2:10"]),
    ("D10", 3, b"FROM\n", &["Dockerfile:1:1"]),
    ("D11", 3, b"RUN true\nFROM busybox\n", &["FROM", "Dockerfile:1:1"]),
    ("D12", 3, b"FROM busybox\nRNU true\n", &["unknown instruction `RNU`", "`RUN`", "Dockerfile:2:1"]),
    ("D13", 3, b"FROM busybox AS b AS c\n", &["Dockerfile:1:"]),
    ("D14 number", 3, b"FROM busybox AS 0\n", &["Dockerfile:1:17"]),
    ("D14 dash", 3, b"FROM busybox AS -x\n", &["Dockerfile:1:17"]),
    ("D14 blank", 3, b"FROM busybox AS A B\n", &["Dockerfile:1:"]),
    (
        "D15",
        3,
        b"FROM busybox AS a\nCOPY --from=later /a /a\nFROM busybox AS later\nFROM a\n",
        &["later", "Dockerfile:2:13"],
    ),
    (
        "D15 circle",
        3,
        b"FROM busybox AS a\nCOPY --from=b /x /y\nFROM a AS b\n",
        &["itself", "Dockerfile:3:1"],
    ),
    ("D16", 0, b"FROM busybox AS busybox\n", &[]),
    ("D18", 3, b"FROM busybox\nRUN <<EOF\necho\n", &["EOF", "Dockerfile:2:5"]),
    ("D19", 3, b"FROM busybox\nRUN <<'EOF'x\necho\nEOF\n", &["EOFx", "Dockerfile:2:"]),
    ("D22", 3, b"FROM busybox\nENV B=1 A=${A:-${B}\n", &["Dockerfile:2:11"]),
    ("D25", 3, b"# escape=`\n# escape=`\nFROM busybox\n", &["escape", "Dockerfile:2:"]),
    ("D26", 3, b"# syntax=evil/frontend\nFROM busybox\n", &["evil/frontend", "hint:", "Dockerfile:1:10"]),
    ("D27 twice", 3, b"FROM busybox\nONBUILD ONBUILD RUN true\n", &["ONBUILD", "Dockerfile:2:"]),
    ("D27 from", 3, b"FROM busybox\nONBUILD FROM busybox\n", &["FROM", "Dockerfile:2:"]),
    ("D28", 4, b"FROM busybox\nCOPY ../nosuch /\n", &["nosuch", "Dockerfile:2:1"]),
    ("D29", 4, b"FROM busybox\nCOPY /etc/passwd /\n", &["etc/passwd", "Dockerfile:2:1"]),
    (
        "D30",
        3,
        b"FROM busybox\nADD --checksum=sha256:zz https://example.invalid/a /a\n",
        &["sha256:zz", "Dockerfile:2:"],
    ),
    ("D31 large", 3, b"FROM busybox\nEXPOSE 70000/tcp\n", &["70000", "Dockerfile:2:8"]),
    ("D31 negative", 3, b"FROM busybox\nEXPOSE -1\n", &["-1", "Dockerfile:2:8"]),
    ("D32", 3, b"FROM busybox\nHEALTHCHECK --interval=-1s CMD true\n", &["interval", "Dockerfile:2:"]),
    ("D33", 3, b"FROM busybox\nUSER 4294967296\n", &["4294967296", "Dockerfile:2:6"]),
    ("D34", 3, b"FROM busybox\nINCLUDE Dockerfile\n", &["unknown instruction `INCLUDE`", "Dockerfile:2:1"]),
];

const MOUNTS: &[Row<'static>] = &[
    ("M01", 3, b"FROM busybox\nRUN --mount=type=bnid,target=/x true\n", &["bnid", "Dockerfile:2:"]),
    ("M02", 3, b"FROM busybox\nRUN --mount=type=cache true\n", &["target", "Dockerfile:2:"]),
    ("M02 bind", 3, b"FROM busybox\nRUN --mount=type=bind true\n", &["target", "Dockerfile:2:"]),
    ("M03", 7, b"FROM busybox\nRUN --mount=type=cache,target=/ true\n", &["Dockerfile:2:"]),
    ("M04 proc", 7, b"FROM busybox\nRUN --mount=type=tmpfs,target=/proc true\n", &["/proc", "Dockerfile:2:"]),
    ("M04 sys", 7, b"FROM busybox\nRUN --mount=type=tmpfs,target=/sys true\n", &["/sys", "Dockerfile:2:"]),
    (
        "M04 device",
        7,
        b"FROM busybox\nRUN --mount=type=bind,source=a,target=/dev/null true\n",
        &["/dev/null", "Dockerfile:2:"],
    ),
    (
        "M07 missing",
        4,
        b"FROM busybox\nRUN --mount=type=bind,source=nothing,target=/x true\n",
        &["nothing", "Dockerfile:2:"],
    ),
    (
        "M08",
        3,
        b"FROM busybox\nRUN --mount=from=nosuchstage,target=/x true\n",
        &["nosuchstage", "Dockerfile:2:"],
    ),
    (
        "M09",
        3,
        b"FROM busybox\nRUN --mount=type=cache,target=/x,mode=0777777 true\n",
        &["0777777", "Dockerfile:2:"],
    ),
    (
        "M10",
        3,
        b"FROM busybox\nRUN --mount=type=cache,target=/x,uid=-1 true\n",
        &["uid", "-1", "Dockerfile:2:"],
    ),
    (
        "M11",
        3,
        b"FROM busybox\nRUN --mount=type=tmpfs,target=/x,size=1e99 true\n",
        &["1e99", "Dockerfile:2:"],
    ),
    (
        "M12",
        3,
        b"FROM busybox\nRUN --mount=type=tmpfs,target=/x --mount=type=cache,target=/x true\n",
        &["/x", "Dockerfile:2:"],
    ),
    (
        "M13",
        3,
        b"FROM busybox\nRUN --mount=type=bind,target=/x,bind-propagation=shared true\n",
        &["bind-propagation", "Dockerfile:2:"],
    ),
];

/// Builds each and names all that is not as its row says.
#[track_caller]
fn check_rows(rows: &[Row<'_>]) {
    let store = Store::with_busybox();
    let context = Context::new(&[("a", "a")]);
    let mut wrong = String::new();
    for &(id, code, dockerfile, says) in rows {
        std::fs::write(context.at("Dockerfile"), dockerfile).expect("ours to write");
        let before = store.holds();
        let Outcome { code: got, stderr, .. } = store.build_bounded(&context, &["-t", "made"]);
        let mut complain = |what: String| wrong.push_str(&format!("{id}: {what}\n{stderr}\n"));
        if got != Some(code) {
            complain(format!("exit code {got:?}, not {code}"));
        }
        for text in says.iter().filter(|text| !stderr.contains(**text)) {
            complain(format!("{text:?} is not said"));
        }
        if code != 0 && stderr.matches("error:").count() != 1 {
            complain("not one error".to_owned());
        }
        if code != 0 && store.holds() != before {
            complain("the store has changed".to_owned());
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn bad_dockerfiles_are_refused_with_place_and_exit_code() {
    needs_root!();
    check_rows(DOCKERFILES);
}

#[test]
fn bad_mounts_are_refused_with_place_and_exit_code() {
    needs_root!();
    check_rows(MOUNTS);
}

#[test]
fn input_that_would_grow_without_end_is_stopped() {
    needs_root!();
    let long_line = format!("FROM busybox\nRUN true {}\n", "x".repeat(2 << 20));
    let nested = format!("FROM busybox\nENV A={}{}\n", "${A:-".repeat(10_000), "}".repeat(10_000));
    let mut doubling = "ARG A0=xxxxxxxxxxxxxxxx\n".to_owned();
    for n in 0..30 {
        doubling.push_str(&format!("ARG A{}=$A{n}$A{n}\n", n + 1));
    }
    doubling.push_str("FROM busybox\n");
    check_rows(&[
        ("D09", 3, long_line.as_bytes(), &["1 MiB", "Dockerfile"]),
        ("D23", 3, nested.as_bytes(), &["Dockerfile:2:"]),
        ("D24", 3, doubling.as_bytes(), &["1048576", "Dockerfile:18:"]),
    ]);
}

#[test]
fn ten_thousand_stages_are_built() {
    needs_root!();
    let stages: String = (0..10_000).map(|n| format!("FROM busybox AS s{n}\nENV N={n}\n")).collect();
    check_rows(&[("D17", 0, stages.as_bytes(), &[])]);
}

#[test]
fn what_buildkit_accepts_with_a_shrug_is_accepted() {
    needs_root!();
    check_rows(&[
        // No JSON, so a command for the shell; that shell then finds no program `[a,`.
        ("D20", 1, b"FROM busybox\nRUN [\"a\",\n", &["JSON", "Dockerfile:2:"]),
        ("D21", 3, b"FROM busybox\nENV A\n", &["ENV", "Dockerfile:2:"]),
        ("D25 unknown", 0, b"# colour=blue\nFROM busybox\n", &[]),
    ]);
}

#[test]
fn line_ends_of_windows_make_the_same_image() {
    needs_root!();
    let store = Store::with_busybox();
    let text = "FROM busybox\nENV A=1 \\\n  B=2\nRUN echo \"$A$B\" \\\n  > /ab\n";
    let context = Context::new(&[("Dockerfile", text)]);
    store.build_bounded(&context, &["-t", "unix"]).expect(0);
    context.write("Dockerfile", &text.replace('\n', "\r\n"));
    store.build_bounded(&context, &["-t", "windows"]).expect(0);
    assert_eq!(store.inspect("unix")["Id"], store.inspect("windows")["Id"], "D06");
}
