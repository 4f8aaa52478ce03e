//! What the disk has damaged does not leave the store.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kiln_oci::Digest;

use super::server::{Bench, digest_in};
use crate::harness::{Context, needs_root};
use crate::scripted::{Server, answer};

/// A registry that takes whatever comes for what it is said to be.
fn gullible() -> Server {
    Server::scripted(|request, _| (request.method == "PUT").then(|| answer(201, &[], b"")))
}

/// The largest blob of the store: a layer as it was packed.
fn packed_layer(bench: &Bench) -> PathBuf {
    let dirs = fs::read_dir(bench.store.root().join("blobs/sha256")).expect("ours");
    let files = dirs.flat_map(|dir| fs::read_dir(dir.expect("ours").path()).expect("ours"));
    let files = files.map(|file| file.expect("ours").path());
    files.max_by_key(|file| file.metadata().expect("ours").len()).expect("there are blobs")
}

fn flip(file: &Path) {
    let open = File::options().read(true).write(true).open(file).expect("ours to write");
    let (mut byte, at) = ([0], file.metadata().expect("ours").len() / 2);
    open.read_exact_at(&mut byte, at).expect("it is that long");
    open.write_all_at(&[byte[0] ^ 1], at).expect("ours to write");
}

fn cut(file: &Path) {
    let length = file.metadata().expect("ours").len();
    File::options().write(true).open(file).and_then(|file| file.set_len(length - 1)).expect("ours to write");
}

fn lengthen(file: &Path) {
    let length = file.metadata().expect("ours").len();
    File::options().write(true).open(file).and_then(|file| file.set_len(length + 1)).expect("ours to write");
}

/// Pushes an image with a layer of so many bytes, damages the layer as it was packed, and pushes it elsewhere.
#[track_caller]
fn check(bytes: usize, damage: fn(&Path)) {
    let (first, second, bench) = (Server::new(), gullible(), Bench::empty());
    let [here, there] = [&first, &second].map(|server| format!("{}/team/app:v1", server.domain()));
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /\n")]);
    fs::write(context.at("file"), &super::pace::noise(1)[..bytes]).expect("ours to write");
    bench.build(&context, &["-t", &here, "-t", &there]).expect(0);
    let digest = digest_in(&bench.ok(&["push", &here])).to_owned();
    let layer = packed_layer(&bench);
    let name = layer.file_name().and_then(|name| name.to_str()).expect("a digest").to_owned();
    damage(&layer);
    let refused = bench.kiln(&["push", &there]).expect(6).says(&[&name]);
    assert_eq!(refused.stderr.matches("error:").count(), 1, "{refused:?}");
    // Nothing has got its name there, and what was begun was given back.
    let ended = second.seen().into_iter().filter(|request| request.method == "PUT");
    let ended: Vec<String> = ended.map(|request| request.query).collect();
    assert!(ended.iter().all(|query| !query.contains(&name)), "{ended:?}");
    assert!(second.lines().iter().all(|line| !line.starts_with("PUT /v2/team/app/manifests/")));
    assert_eq!(super::pace::uploads(&second, "DELETE"), 1, "{:?}", second.lines());
    // What is damaged is found, forgotten and packed again.
    bench.kiln(&["fsck", "--deep"]).expect(6);
    bench.ok(&["fsck", "--deep", "--repair"]);
    let healthy = Server::new();
    let again = format!("{}/team/app:v1", healthy.domain());
    bench.ok(&["tag", &here, &again]);
    assert_eq!(digest_in(&bench.ok(&["push", &again])), digest);
    let state = healthy.state.lock().unwrap();
    assert!(state.blobs.iter().all(|(digest, bytes)| Digest::of(bytes) == *digest));
    bench.store.sound().unwrap();
}

#[test]
fn a_packed_layer_that_is_damaged_is_no_ones_layer() {
    needs_root!();
    // In pieces, and with the request that ends the upload.
    for bytes in [1 << 20, 100_000] {
        for damage in [flip as fn(&Path), cut, lengthen] {
            check(bytes, damage);
        }
    }
}
