//! Manifests, indexes and image configs: what is read is written as something that reads the same,
//! and the same value is always the same bytes. What the strict reader accepts, serde alone reads too.
#![no_main]

use kiln_oci::document;
use kiln_oci::image::{ImageConfig, Index, Manifest, media_type, to_json};
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
    if let Ok(manifest) = document::read_manifest(bytes, media_type::OCI_MANIFEST) {
        assert_eq!(from_slice::<Manifest>(bytes).expect("it was just read"), manifest);
        assert!(document::read_index(bytes, media_type::OCI_INDEX).is_err(), "both at once");
    }
    if let Ok(index) = document::read_index(bytes, media_type::OCI_INDEX) {
        assert_eq!(from_slice::<Index>(bytes).expect("it was just read"), index);
    }
    if let Ok(config) = from_slice::<ImageConfig>(bytes) {
        let layers = config.rootfs.diff_ids.len();
        let strict = document::read_config(bytes, layers);
        assert!(strict.is_err() || document::read_config(bytes, layers + 1).is_err(), "any number of layers");
    }
});
