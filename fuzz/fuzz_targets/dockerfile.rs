//! Any bytes as a Dockerfile: decoded, parsed, lowered. The same text gives the same definition.
#![no_main]

use kiln_fuzz::lowered;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = kiln_frontend::decode(bytes) else { return };
    if let Some(first) = lowered(text, &[]) {
        let second = lowered(text, &[]).expect("it was accepted once");
        assert_eq!(first.definition.digests(), second.definition.digests());
        assert_eq!(first.config, second.config);
    }
});
