//! What the fuzz targets share; see `README.md`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use kiln_frontend::{BaseImage, Diagnostic, Lowered, Lowering, Options, Severity, lower, parse};
use kiln_oci::image::ImageConfig;
use kiln_oci::{DiffId, Digest, Platform, Reference};

/// A platform that is the same everywhere, so that a found input fails on every machine.
pub fn platform() -> Platform {
    "linux/amd64".parse().expect("a platform")
}

/// Parses and lowers a Dockerfile as a build does, with `build_args`; every image it asks for is
/// a small one. Checks what holds for any text; `None` when the text has an error.
pub fn lowered(text: &str, build_args: &[(&str, &str)]) -> Option<Lowered> {
    let (ast, diagnostics) = parse(text);
    check(&diagnostics, text);
    if diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error) {
        return None;
    }
    let options = options(build_args);
    let mut images = BTreeMap::new();
    loop {
        match lower(&ast, &options, &images) {
            Ok(Lowering::Done(lowered)) => {
                check(&lowered.warnings, text);
                return Some(*lowered);
            }
            Ok(Lowering::Needs(needs)) => {
                let known = images.len();
                images.extend(needs.into_iter().map(|(reference, _)| (reference.clone(), image(&reference))));
                assert!(images.len() > known, "it asks again for what it has got");
            }
            Err(diagnostics) => {
                assert!(!diagnostics.is_empty(), "an error without a message");
                check(&diagnostics, text);
                return None;
            }
        }
    }
}

fn options(build_args: &[(&str, &str)]) -> Options {
    Options {
        build_args: build_args.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        target: None,
        platform: platform(),
        labels: BTreeMap::new(),
        ignore: Vec::new(),
    }
}

fn image(reference: &Reference) -> BaseImage {
    let mut config = ImageConfig::empty(&platform());
    config.rootfs.diff_ids.push(DiffId(Digest::of(b"layer")));
    config.config.env = vec!["PATH=/bin".into(), "BASE=1".into()];
    if reference.path().contains("onbuild") {
        config.config.on_build = vec!["ENV FROM_BASE=$BASE".into()];
    }
    BaseImage { config_digest: Digest::of(b"config"), config }
}

/// Every message can be shown at its place.
fn check(diagnostics: &[Diagnostic], text: &str) {
    for diagnostic in diagnostics {
        let span = diagnostic.span;
        assert!(span.start <= span.end && span.start <= text.len(), "{diagnostic:?}");
        let shown = diagnostic.render("Dockerfile", text);
        let is_raw = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
        assert!(!shown.contains(is_raw), "a control character reaches the terminal: {shown:?}");
    }
}
