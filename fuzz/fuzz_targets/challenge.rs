//! Any text as the challenge of a registry: read to its end, and each realm is a part of it.
#![no_main]

use libfuzzer_sys::fuzz_target;

// Alone, without the crate around it and all that speaks TLS.
#[allow(dead_code, reason = "as the client has it")]
#[path = "../../crates/registry/src/challenge.rs"]
mod challenge;

use challenge::{Challenge, parse};

fuzz_target!(|text: &str| {
    let found = parse(text);
    assert!(found.len() <= text.len());
    for challenge in found {
        let Challenge::Bearer { realm, service, scope } = challenge else { continue };
        let values = [Some(realm), service, scope].into_iter().flatten();
        // Backslashes go, nothing comes.
        let bytes: usize = values.map(|value| value.len()).sum();
        assert!(bytes <= 3 * text.len());
    }
});
