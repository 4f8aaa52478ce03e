//! Image references, digests and platforms: what is accepted means the same when it is written
//! out and read again.
#![no_main]

use kiln_oci::{Digest, Platform, Reference};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<Reference>() {
        for written in [reference.to_string(), reference.familiar()] {
            assert_eq!(written.parse().as_ref(), Ok(&reference), "{written:?}");
        }
        assert!(!reference.domain().is_empty() && !reference.path().is_empty());
        let parts = reference.path().split('/').chain(reference.tag());
        for part in parts {
            assert!(!part.is_empty() && part != ".." && !part.starts_with('-'), "{part:?}");
        }
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string(), text);
    }
    if let Ok(platform) = text.parse::<Platform>() {
        assert_eq!(platform.to_string().parse().as_ref(), Ok(&platform));
    }
});
