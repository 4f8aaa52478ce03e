//! The proof that users can run themselves.

use crate::harness::{Store, needs_root};

#[test]
fn the_selftest_finds_the_sandbox_sound() {
    needs_root!();
    let store = Store::empty();
    let outcome = store.kiln(&["selftest", "--security"]);
    // Not every machine can limit a container; everything else holds everywhere.
    let failed: Vec<&str> = outcome.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    let known = |line: &&str| line.contains("limits by control groups");
    assert!(failed.iter().all(known), "{outcome:?}");
    assert_eq!(outcome.code, Some(i32::from(!failed.is_empty())), "{outcome:?}");
    for part in ["mount", "io_uring_setup", "open descriptors", "seccomp filter", "kiln was killed", "checks"]
    {
        assert!(outcome.stdout.contains(part), "{part}: {}", outcome.stdout);
    }
    assert_eq!((store.active_snapshots(), store.mounts()), (vec![], vec![]));
}

#[test]
fn the_probe_finds_a_sandbox_that_is_none() {
    needs_root!();
    let store = Store::empty();
    // On the host itself, where nothing holds it back.
    let outcome = store.ok(&["selftest", "--inside", "probe"]);
    let checks: serde_json::Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let of = |name: &str| {
        let list = checks.as_array().expect("a list");
        let check = list.iter().find(|check| check["name"] == name).expect("it is checked");
        (check["expected"].clone(), check["found"].clone())
    };
    for name in
        ["seccomp filter", "processes in sight", "own number", "/sys", "devices", "capabilities, bounding"]
    {
        let (expected, found) = of(name);
        assert_ne!(expected, found, "{name}");
    }
    store.kiln(&["selftest"]).expect(2).says(&["--security"]);
}
