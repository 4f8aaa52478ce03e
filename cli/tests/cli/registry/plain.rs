//! Layers that are pushed as they are: written while they are sent, and kept nowhere.

use std::fs;
use std::process::Command;

use kiln_oci::Digest;
use serde_json::Value;

use super::pace::{build, layer_file, uploads};
use super::server::{Bench, Registry, digest_in, needs_programs};
use crate::harness::{Outcome, needs_root};
use crate::scripted::{Server, answer};

/// Runs kiln where no file may grow beyond so many bytes.
fn limited(bench: &Bench, bytes: u64, args: &[&str]) -> Outcome {
    let kiln = bench.command(args);
    let mut command = Command::new("prlimit");
    command.arg(format!("--fsize={bytes}")).arg(kiln.get_program()).args(kiln.get_args());
    for (name, value) in kiln.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    Outcome::of(command.output().expect("prlimit starts"))
}

#[test]
fn an_uncompressed_layer_is_written_to_the_registry_and_to_no_file() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo", "prlimit");
    let (registry, bench) = (Registry::open(), Bench::empty());
    let (name, other) = (registry.name("team/app:v1"), registry.name("team/other:v1"));
    build(&bench, &name, 24);
    let push = |name: &str| limited(&bench, 8 << 20, &["push", "--compression", "uncompressed", name]);
    let pushed = push(&name).expect(0).stdout;
    assert!(pushed.contains("2 blobs sent"), "{pushed}");
    assert_eq!(digest_in(&pushed), registry.digest("team/app:v1"));
    assert!(push(&name).expect(0).stdout.contains("nothing to send"));
    // Its digest is known before it is made: what the registry has is not.
    bench.ok(&["tag", &name, &other]);
    let known = push(&other).expect(0).stdout;
    assert!(known.contains("nothing to send, 2 mounted"), "{known}");
    // The limit is one.
    limited(&bench, 8 << 20, &["push", "--compression", "zstd", &name]).says(&["File too large"]);

    let raw = registry.skopeo(&["inspect", "--raw", &format!("docker://{name}")]);
    let manifest: Value = serde_json::from_str(&raw).unwrap();
    assert_eq!(manifest["layers"][0]["mediaType"], "application/vnd.oci.image.layer.v1.tar");
    let fresh = Bench::empty();
    fresh.ok(&["pull", &name]);
    assert_eq!(fresh.id(&name), bench.id(&name));
    fresh.store.sound().unwrap();
    bench.store.sound().unwrap();
}

#[test]
fn an_uncompressed_layer_goes_on_at_the_byte_where_it_broke_off() {
    needs_root!();
    let own = std::sync::Arc::new(std::sync::OnceLock::<Server>::new());
    let known = own.clone();
    let server = Server::scripted(move |request, _| {
        if request.method != "PATCH" || !request.header("content-range")?.starts_with("0-") {
            return None;
        }
        known.get()?.arrive(request, 5_000_001);
        Some(answer(502, &[], b""))
    });
    own.set(server.clone()).ok().unwrap();
    let bench = Bench::empty();
    let name = format!("{}/team/app:v1", server.domain());
    build(&bench, &name, 12);
    bench.ok(&["push", "--compression", "uncompressed", &name]);
    assert_eq!(uploads(&server, "PATCH"), 2, "{:?}", server.lines());
    let state = server.state.lock().unwrap();
    assert!(state.blobs.iter().all(|(digest, bytes)| Digest::of(bytes) == *digest));
    assert!(state.blobs.values().any(|bytes| bytes.len() > 12 << 20));
}

#[test]
fn an_uncompressed_layer_that_turns_out_to_be_damaged_is_taken_back() {
    needs_root!();
    let (server, bench) = (Server::new(), Bench::empty());
    let name = format!("{}/team/app:v1", server.domain());
    build(&bench, &name, 12);
    let file = layer_file(&bench);
    let good = fs::read(&file).unwrap();
    let mut bytes = good.clone();
    bytes[1000] ^= 1;
    for damaged in [bytes, good[1..].to_vec(), [&good[..], &good[..]].concat()] {
        fs::write(&file, damaged).unwrap();
        bench.kiln(&["push", "--compression", "uncompressed", &name]).expect(6).says(&["layer"]);
        let state = server.state.lock().unwrap();
        assert!(state.blobs.values().all(|bytes| bytes.len() < 1 << 20) && state.manifests.is_empty());
    }
    assert_eq!(uploads(&server, "DELETE"), 3, "{:?}", server.lines());
}
