//! Whole Dockerfiles in, definitions and messages out.

use std::collections::BTreeMap;

use kiln_llb::{Op, VertexId};
use kiln_oci::image::ImageConfig;
use kiln_oci::{DiffId, Digest, Platform};

use crate::{BaseImage, ImageKey, Lowered, Lowering, Options, lower, parse};

fn options() -> Options {
    Options::new("linux/amd64".parse().expect("a platform"))
}

fn images() -> BTreeMap<ImageKey, BaseImage> {
    let platform: Platform = "linux/amd64".parse().unwrap();
    let mut config = ImageConfig::empty(&platform);
    config.rootfs.diff_ids.push(DiffId(Digest::of(b"layer")));
    config.config.cmd = Some(vec!["base".to_owned()]);
    let base = BaseImage { config_digest: Digest::of(b"config"), config, unknown: false };
    let key = ImageKey { reference: "debian".parse().unwrap(), platform, layout: None };
    [(key, base)].into()
}

fn try_lower(text: &str, options: &Options) -> Result<Lowered, String> {
    let (ast, diagnostics) = parse(text);
    if let Some(diagnostic) = diagnostics.first() {
        return Err(diagnostic.render("Dockerfile", text));
    }
    match lower(&ast, options, &images()) {
        Ok(Lowering::Done(lowered)) => Ok(*lowered),
        Ok(Lowering::Needs(needs)) => Err(format!("needs {needs:?}")),
        Ok(Lowering::NeedsTime(time)) => Err(format!("needs {time:?}")),
        Err(diagnostics) => Err(diagnostics[0].render("Dockerfile", text)),
    }
}

/// Titles of all vertices of `text`, in order.
fn titles(text: &str, options: &Options) -> Vec<String> {
    let lowered = try_lower(text, options).unwrap_or_else(|error| panic!("{error}"));
    (0..lowered.definition.vertices().len())
        .map(|id| lowered.source_map.title(VertexId(id)).to_owned())
        .collect()
}

/// The message for `text` contains `expected`.
fn check_error(text: &str, expected: &str) {
    let error = try_lower(text, &options()).err().unwrap_or_else(|| panic!("{text:?} was accepted"));
    assert!(error.contains(expected), "{text:?} gives:\n{error}");
}

#[test]
fn only_what_the_target_needs_becomes_a_vertex() {
    let text =
        "FROM debian AS a\nRUN one\nFROM nowhere AS unused\nRUN two\nFROM debian\nCOPY --from=a /x /y\n";
    let from = "FROM docker.io/library/debian:latest";
    let expected = [
        format!("[a 1/2] {from}"),
        "[a 2/2] RUN one".to_owned(),
        "[stage-2 2/2] COPY --from=a /x /y".to_owned(),
    ];
    assert_eq!(titles(text, &options()), expected);
    let target = Options { target: Some("a".to_owned()), ..options() };
    assert_eq!(titles(text, &target), expected[..2]);
}

#[test]
fn missing_base_images_are_asked_for_with_their_place() {
    let (ast, _) = parse("FROM alpine\n");
    let Ok(Lowering::Needs(needs)) = lower(&ast, &options(), &images()) else { panic!("it needs alpine") };
    assert_eq!(needs[0].image.reference.familiar(), "alpine:latest");
    assert_eq!((needs[0].span.start, needs[0].span.end), (5, 11));
}

#[test]
fn variables_follow_their_scopes() {
    let text = "ARG TAG=debian\nFROM $TAG\nARG V=1\nENV W=$V-$TAG X=$W\nRUN echo\n";
    let set = Options { build_args: [("V".to_owned(), "2".to_owned())].into(), ..options() };
    let lowered = try_lower(text, &set).unwrap();
    let env = &lowered.config.config.env;
    assert_eq!(env[1..], ["W=2-", "X="], "global ARGs end at FROM; one instruction sees the state before it");
    let Op::Exec(exec) = &lowered.definition.vertex(lowered.result.unwrap()).op else {
        panic!("RUN is last")
    };
    assert!(exec.env.contains(&("V".to_owned(), "2".to_owned())));
    assert_eq!(exec.args, ["/bin/sh", "-c", "echo"]);
    let created_by = lowered.history.last().unwrap().history.created_by.clone().unwrap();
    assert_eq!(created_by, "RUN |1 V=2 /bin/sh -c echo # buildkit");
}

#[test]
fn own_entrypoint_drops_the_base_images_command() {
    let config = |text: &str| try_lower(text, &options()).unwrap().config.config;
    assert_eq!(config("FROM debian\nENTRYPOINT [\"x\"]\n").cmd, None);
    let kept = config("FROM debian\nCMD [\"y\"]\nENTRYPOINT [\"x\"]\n");
    assert_eq!(kept.cmd, Some(vec!["y".to_owned()]));
}

#[test]
fn continuations_comments_and_heredocs_make_one_instruction() {
    let text = "# escape=`\nFROM debian\nRUN a `\n  # comment\n  b\nRUN <<EOF\nx\ny\nEOF\n";
    let lowered = try_lower(text, &options()).unwrap();
    let commands: Vec<&str> = lowered
        .definition
        .vertices()
        .iter()
        .filter_map(|vertex| match &vertex.op {
            Op::Exec(exec) => exec.args.last().map(String::as_str),
            _ => None,
        })
        .collect();
    assert_eq!(commands, ["a   b", "x\ny\n"]);
}

#[test]
fn moving_a_line_leaves_the_digests_alone() {
    let digests = |text: &str| try_lower(text, &options()).unwrap().definition.digests().to_vec();
    assert_eq!(digests("FROM debian\nRUN x\n"), digests("# hello\n\nFROM debian\n\nRUN x\n"));
    assert_ne!(digests("FROM debian\nRUN x\n"), digests("FROM debian\nRUN y\n"));
}

#[test]
fn unknown_flag_is_reported_where_it_stands() {
    let expected = "  Dockerfile:2:6\n     1 |     FROM debian\n     2 | >>> COPY --chwon=1 a b\n       |          ^^^^^^^\nhint: did you mean `--chown`?\n";
    check_error("FROM debian\nCOPY --chwon=1 a b\n", expected);
}

#[test]
fn mistakes_are_said_plainly() {
    check_error("", "is empty");
    check_error("# only a comment\n", "no instructions");
    check_error("RUN x\n", "only ARG may stand in front of the first FROM");
    check_error("ARG A=1\n", "no FROM");
    check_error("FROM\n", "FROM needs at least one argument");
    check_error("FROM a b c\n", "`AS` is expected");
    check_error("FROM debian AS 1x\n", "invalid stage name");
    check_error("FROM debian\nRNU x\n", "did you mean `RUN`?");
    check_error("FROM debian\nCOPY a\n", "a source and a destination");
    check_error("FROM debian\nCOPY a b /dst\n", "write `/dst/`");
    check_error(
        "FROM debian AS a\nCOPY --from=later x /y\nFROM debian AS later\nFROM a\n",
        "must be defined before",
    );
    check_error("FROM debian\nRUN <<EOF\nx\n", "is not closed");
    check_error("FROM debian\nEXPOSE 70000\n", "is no port");
    check_error("FROM debian\nENV A=${B\n", "`}` is missing");
    check_error("FROM debian\nCMD [1]\n", "only strings");
    check_error("# syntax=evil/frontend\nFROM debian\n", "not supported");
    check_error("FROM Debian\n", "lower case");
    check_error("FROM x AS x\nFROM debian\nCOPY --from=0 a b\n", "needs");
}

#[test]
fn no_control_character_of_a_dockerfile_reaches_the_terminal() {
    check_error("FROM debian\nRN\u{1b}[31mU x\n", "unknown instruction `RN\u{fffd}[31mU`");
    check_error("FROM debian\nENV A=${B\u{7}}\n", "unsupported modifier `\u{fffd}`");
}
