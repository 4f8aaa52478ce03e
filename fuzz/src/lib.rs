//! What the fuzz targets share; see `README.md`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use kiln_frontend::{BaseImage, Diagnostic, EpochTime, Lowered, Lowering, Options, lower, parse};
use kiln_oci::image::ImageConfig;
use kiln_oci::{DiffId, Digest, Platform, Reference};

/// A platform that is the same everywhere, so that a found input fails on every machine.
pub fn platform() -> Platform {
    "linux/amd64".parse().expect("a platform")
}

/// No choices but these build arguments.
pub fn options(build_args: &[(&str, &str)]) -> Options {
    let mut options = Options::new(platform());
    options.build_args = build_args.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    options
}

/// Parses and lowers a Dockerfile as a build does; every image it asks for is a small one. Checks
/// what holds for any text; `None` when the text has an error.
pub fn lowered(text: &str, options: &Options) -> Option<Lowered> {
    let (ast, diagnostics) = parse(text);
    check(&diagnostics, text);
    if diagnostics.iter().any(Diagnostic::is_error) {
        return None;
    }
    let (mut images, mut options) = (BTreeMap::new(), options.clone());
    loop {
        match lower(&ast, &options, &images) {
            Ok(Lowering::Done(lowered)) => {
                check(&lowered.warnings, text);
                return Some(*lowered);
            }
            Ok(Lowering::Needs(needs)) => {
                let known = images.len();
                let found = needs.into_iter().map(|need| {
                    let image = image(&need.image.reference);
                    (need.image, image)
                });
                images.extend(found);
                assert!(images.len() > known, "it asks again for what it has got");
            }
            Ok(Lowering::NeedsTime(_)) => {
                assert_eq!(options.epoch, EpochTime::Unasked, "it asks again for what it has got");
                options.epoch = EpochTime::At(1);
            }
            Err(diagnostics) => {
                assert!(diagnostics.iter().any(Diagnostic::is_error), "an error without a message");
                check(&diagnostics, text);
                return None;
            }
        }
    }
}

fn image(reference: &Reference) -> BaseImage {
    let mut config = ImageConfig::empty(&platform());
    config.rootfs.diff_ids.push(DiffId(Digest::of(b"layer")));
    config.config.env = vec!["PATH=/bin".into(), "BASE=1".into()];
    if reference.path().contains("onbuild") {
        config.config.on_build = vec!["ENV FROM_BASE=$BASE".into()];
    }
    BaseImage { config_digest: Digest::of(b"config"), config, unknown: false }
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
