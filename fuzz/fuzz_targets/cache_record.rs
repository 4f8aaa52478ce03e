//! Any bytes as the record of a remote cache: refused, or what can be written again.
#![no_main]

use kiln_oci::Digest;
use kiln_remote::{MAX_LAYERS, Record};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let key = Digest::of(b"key");
    let Ok(record) = Record::decode(bytes, &key) else { return };
    assert_eq!(*record.key(), key);
    assert!(record.layers.len() <= MAX_LAYERS);
    assert!(record.blobs().len() <= record.layers.len());
    let again = Record::decode(&record.encode(), &key).expect("what we write can be read");
    assert_eq!(again, record);
});
