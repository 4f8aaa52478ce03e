//! Any text as an instruction of `--change`: it changes the config, or says why not.
#![no_main]

use kiln_frontend::apply_changes;
use kiln_fuzz::platform;
use kiln_oci::image::{ImageConfig, to_json};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let mut config = ImageConfig::empty(&platform());
    match apply_changes(&mut config, &[text.to_owned()], &platform()) {
        Ok(history) => assert!(history.iter().all(|entry| entry.empty_layer), "{history:?}"),
        Err(error) => assert!(!error.message.is_empty()),
    }
    let written = to_json(&config);
    let read: ImageConfig = serde_json::from_slice(&written).expect("what we write can be read");
    assert_eq!(read, config);
});
