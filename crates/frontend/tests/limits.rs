//! Dockerfiles and ignore files that are too much: refused or done, never a hang or a crash.

use std::collections::BTreeMap;

use kiln_frontend::ignore::Patterns;
use kiln_frontend::{BaseImage, ImageKey, Lowered, Lowering, Options, decode, lower, parse};
use kiln_oci::image::ImageConfig;
use kiln_oci::{DiffId, Digest, Platform};

fn platform() -> Platform {
    "linux/amd64".parse().expect("it is a platform")
}

/// The build, or the first error's message.
fn build(text: &str) -> Result<Box<Lowered>, String> {
    let text = decode(text.as_bytes()).map_err(|error| error.message)?;
    let (ast, diagnostics) = parse(text);
    if let Some(error) = diagnostics.into_iter().find(|found| found.is_error()) {
        return Err(error.message);
    }
    let mut config = ImageConfig::empty(&platform());
    config.rootfs.diff_ids.push(DiffId(Digest::of(b"layer")));
    let base = BaseImage { config_digest: Digest::of(b"debian"), config, unknown: false };
    let reference = "debian".parse().expect("it is a reference");
    let images = BTreeMap::from([(ImageKey { reference, platform: platform(), layout: None }, base)]);
    match lower(&ast, &Options::new(platform()), &images) {
        Ok(Lowering::Done(lowered)) => Ok(lowered),
        Ok(Lowering::Needs(needs)) => Err(format!("needs {needs:?}")),
        Ok(Lowering::NeedsTime(time)) => Err(format!("needs {time:?}")),
        Err(errors) => Err(errors[0].message.clone()),
    }
}

#[track_caller]
fn check_refused(text: &str, part: &str) {
    match build(text) {
        Ok(_) => panic!("{} bytes were accepted", text.len()),
        Err(message) => assert!(message.contains(part), "{message}"),
    }
}

#[test]
fn a_line_of_two_mebibytes_is_refused() {
    let text = format!("FROM debian\nRUN echo {}\n", "x".repeat(2 << 20));
    assert!(build(&text).is_err());
}

#[test]
fn a_line_of_65535_bytes_is_the_longest() {
    let line = |length: usize| format!("FROM debian\nRUN {}\n", "x".repeat(length - "RUN ".len()));
    assert!(build(&line(65_535)).is_ok(), "{:?}", build(&line(65_535)).err());
    check_refused(&line(65_536), "65535");
}

#[test]
fn ten_thousand_stages_are_lowered() {
    let mut text = "FROM debian AS s0\n".to_owned();
    for number in 1..10_000 {
        text.push_str(&format!("FROM debian AS s{number}\nRUN step {number}\n"));
    }
    let lowered = build(&text).unwrap_or_else(|message| panic!("{message}"));
    assert_eq!(lowered.definition.vertices().len(), 2, "only the last stage is built");
}

#[test]
fn a_thousand_stages_in_a_chain_are_lowered() {
    let mut text = "FROM debian AS s0\n".to_owned();
    for number in 1..1_000 {
        text.push_str(&format!("FROM s{} AS s{number}\nRUN step {number}\n", number - 1));
    }
    let lowered = build(&text).unwrap_or_else(|message| panic!("{message}"));
    assert_eq!(lowered.definition.vertices().len(), 1_000);
    assert_eq!(lowered.history.len(), 999, "a stage has the history of all stages below it");
}

#[test]
fn defaults_nested_ten_thousand_deep_are_refused() {
    let depth = 10_000;
    let text = format!("FROM debian\nENV B={}x{}\n", "${A:-".repeat(depth), "}".repeat(depth));
    check_refused(&text, "deep");
}

#[test]
fn triggers_of_triggers_end() {
    let text = "FROM debian AS a\nONBUILD RUN one\nFROM a AS b\nONBUILD RUN two\nFROM b\n";
    let lowered = build(text).unwrap_or_else(|message| panic!("{message}"));
    assert_eq!(lowered.definition.vertices().len(), 3);
}

#[test]
fn a_hundred_thousand_ignore_patterns_are_matched() {
    let lines: Vec<String> = (0..100_000).map(|number| format!("dir{number}/*.o")).collect();
    let patterns = Patterns::from_lines(&lines).expect("the rules are valid");
    assert!(patterns.is_ignored("dir99999/x.o"));
    assert!(!patterns.is_ignored("dir99999/x.c"));
}

#[test]
fn a_chain_of_double_stars_takes_no_exponential_time() {
    let rule = format!("{}never", "**/".repeat(64));
    let patterns =
        Patterns::from_lines(&[rule, format!("{}b", "*a".repeat(64))]).expect("the rules are valid");
    assert!(!patterns.is_ignored(&vec!["a"; 256].join("/")));
    assert!(!patterns.is_ignored(&"a".repeat(255)));
    assert!(patterns.is_ignored(&format!("{}/never", vec!["a"; 64].join("/"))));
}
