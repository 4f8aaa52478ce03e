//! `--chmod`: what is accepted gives permission bits, and the same ones when it is applied twice
//! unless it copies bits from one class to another.
#![no_main]

use kiln_llb::Mode;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(mode) = text.parse::<Mode>() else { return };
    assert_eq!(mode.to_string().parse().as_ref(), Ok(&mode));
    for is_dir in [false, true] {
        for current in [0, 0o644, 0o755, 0o2750, 0o7777] {
            let changed = mode.apply(current, is_dir);
            assert!(changed <= 0o7777, "{changed:o}");
            // `X` and `g=u` look at bits that an earlier clause of the same mode may have changed.
            if !text.contains('X')
                && !text.contains("=u")
                && !text.contains("=g")
                && !text.contains("=o")
                && !text.contains(['u', 'g', 'o'])
            {
                assert_eq!(mode.apply(changed, is_dir), changed, "{text:?} on {current:o}");
            }
        }
    }
    if let Some(bits) = mode.octal() {
        assert_eq!(mode.apply(0o7777, false), bits);
    }
});
