//! Any text behind ENV, LABEL and ARG, with variables that are set, empty and long. Expansion is
//! bounded, and what comes out of it is not expanded again.
#![no_main]

use kiln_fuzz::{lowered, options};
use libfuzzer_sys::fuzz_target;

/// What one expansion may grow to, and some room for what stands around it.
const MOST: usize = (1 << 20) + 4096;

fuzz_target!(|text: &str| {
    let escape = if text.starts_with('`') { '`' } else { '\\' };
    let text: String = text.chars().filter(|c| !matches!(c, '\n' | '\r' | '\0')).collect();
    // That would take in the next line.
    if text.trim_end().ends_with(escape) {
        return;
    }
    let dockerfile = format!(
        "# escape={escape}\nFROM scratch\nARG A\nARG EMPTY=\nENV LONG=abcabcabc/x/abc.tar.gz\nENV X={text}\nENV Y=\"{text}\"\nLABEL {text}\nLABEL again=$X\nWORKDIR /{text}\n"
    );
    let Some(lowered) = lowered(&dockerfile, &options(&[("A", "a b"), ("HIDDEN", "never declared")])) else {
        return;
    };
    let env = lowered.config.config.env;
    let value = |name: &str| env.iter().find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='));
    for entry in &env {
        assert!(entry.len() <= MOST, "{} bytes", entry.len());
        assert!(!entry.contains("never declared") || text.contains("never declared"), "{entry}");
    }
    let labels = lowered.config.config.labels;
    assert_eq!(labels.get("again").map(String::as_str), value("X"), "a value was expanded twice");
});
