//! Manifests, indexes and image configs: what is read is written as something that reads the same,
//! and the same value is always the same bytes.
#![no_main]

use kiln_oci::image::{ImageConfig, Index, Manifest, to_json};
use libfuzzer_sys::fuzz_target;
use serde_json::from_slice;

fuzz_target!(|bytes: &[u8]| {
    macro_rules! survives {
        ($kind:ty) => {
            if let Ok(document) = from_slice::<$kind>(bytes) {
                let written = to_json(&document);
                let again: $kind = from_slice(&written).expect("what we write can be read");
                assert_eq!(again, document);
                assert_eq!(to_json(&again), written);
            }
        };
    }
    survives!(Manifest);
    survives!(Index);
    survives!(ImageConfig);
});
