//! Any bytes as a Dockerfile: decoded, parsed, lowered for a build and for a check. The same text
//! gives the same definition.
#![no_main]

use kiln_frontend::{parse, targets};
use kiln_fuzz::{lowered, options};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = kiln_frontend::decode(bytes) else { return };
    let built = lowered(text, &options(&[]));
    if let Some(first) = &built {
        let second = lowered(text, &options(&[])).expect("it was accepted once");
        assert_eq!(first.to_string(), second.to_string());
        assert_eq!(first.definition.digests(), second.definition.digests());
        assert_eq!(first.config, second.config);
    }

    let mut every_stage = options(&[]);
    every_stage.all_stages = true;
    let checked = lowered(text, &every_stage);
    assert!(checked.is_none() || built.is_some(), "the check passes and the build does not");

    let (ast, _) = parse(text);
    assert_eq!(ast.to_string(), parse(text).0.to_string());
    let lines = text.lines().count();
    assert!(targets(&ast).iter().all(|target| (1..=lines).contains(&target.line)));
});
