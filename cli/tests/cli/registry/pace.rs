//! Large layers: sent while they are packed, and fetched over several connections.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kiln_oci::Digest;
use rustix::process::Signal;

use super::replies::{Image, offer};
use super::server::{Bench, Registry, digest_in, needs_programs};
use crate::harness::{Context, Running, needs_root, text};
use crate::scripted::{Reply, Request, Server, answer, head};

/// As long as nobody waits who is not about to fail.
const LONG: Duration = Duration::from_secs(60);

/// Bytes that no compressor makes less of.
pub(super) fn noise(mib: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    std::iter::repeat_with(word).take(mib << 18).flat_map(u32::to_le_bytes).collect()
}

/// An image with a layer of so many MiB, which was never packed, as `name`.
pub(super) fn build(bench: &Bench, name: &str, mib: usize) {
    let context = large(mib);
    bench.build(&context, &["-t", name]).expect(0);
}

fn large(mib: usize) -> Context {
    let context = Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /\n")]);
    fs::write(context.at("file"), noise(mib)).expect("ours to write");
    context
}

/// Whether a blob is being written to the store at this moment.
fn is_packing(store: &Path) -> bool {
    fs::read_dir(store.join("ingest")).is_ok_and(|entries| entries.count() > 0)
}

#[test]
fn a_layer_leaves_before_it_is_packed_to_its_end() {
    needs_root!();
    for is_build in [false, true] {
        let bench = Bench::empty();
        let (root, early) = (bench.store.root(), Arc::new(AtomicBool::new(false)));
        let seen = early.clone();
        let server = Server::scripted(move |request, _| {
            // The first request of an upload, when there are 40 MiB still to pack.
            if request.method == "POST" && is_packing(&root) {
                seen.store(true, Ordering::SeqCst);
            }
            None
        });
        let name = format!("{}/team/app:v1", server.domain());
        let said = if is_build {
            bench.build(&large(48), &["--push", "-t", &name]).expect(0).stdout
        } else {
            build(&bench, &name, 48);
            bench.ok(&["push", &name])
        };
        assert!(early.load(Ordering::SeqCst), "{:?}", server.lines());
        assert!(said.contains("2 blobs sent"), "{said}");
        // All of the layer, and each byte once.
        let sent: usize = server.seen().iter().map(|request| request.body.len()).sum();
        let state = server.state.lock().unwrap();
        let blobs: usize = state.blobs.values().map(Vec::len).sum();
        let (_, manifest) = &state.manifests["v1"];
        assert_eq!(sent, blobs + manifest.len());
        let digests: Vec<Digest> = state.blobs.values().map(|bytes| Digest::of(bytes)).collect();
        assert_eq!(digests, state.blobs.keys().copied().collect::<Vec<_>>());
        drop(state);
        assert!(bench.ok(&["push", &name]).contains("nothing to send"));
        bench.store.sound().unwrap();
    }
}

#[test]
fn what_was_sent_while_it_was_packed_is_what_others_get() {
    needs_root!();
    needs_programs!("docker-registry", "skopeo");
    let (registry, bench) = (Registry::open(), Bench::empty());
    for packing in ["gzip", "zstd", "estargz"] {
        let name = registry.name(&format!("team/{packing}:v1"));
        build(&bench, &name, 24);
        let pushed = bench.ok(&["push", "--compression", packing, &name]);
        assert_eq!(digest_in(&pushed), registry.digest(&format!("team/{packing}:v1")));
        let fresh = Bench::empty();
        assert_eq!(digest_in(&fresh.ok(&["pull", &name])), digest_in(&pushed));
        fresh.store.sound().unwrap();
    }
    bench.store.sound().unwrap();
}

pub(super) fn uploads(server: &Server, method: &str) -> usize {
    let is_upload = |request: &Request| request.method == method && request.path.contains("/uploads/");
    server.seen().iter().filter(|request| is_upload(request)).count()
}

/// The file of an image's only layer.
pub(super) fn layer_file(bench: &Bench) -> PathBuf {
    let committed = fs::read_dir(bench.store.root().join("snapshots/committed")).expect("ours");
    let mut found = committed.flat_map(|entry| {
        let snapshot = entry.expect("ours").path();
        [snapshot.join("fs/file"), snapshot.join("file"), snapshot.join("upper/file")]
    });
    found.find(|path| path.exists()).expect("there is one snapshot with a file")
}

#[test]
fn a_layer_that_turns_out_to_be_damaged_is_taken_back() {
    needs_root!();
    let (server, bench) = (Server::new(), Bench::empty());
    let name = format!("{}/team/app:v1", server.domain());
    build(&bench, &name, 24);
    let file = layer_file(&bench);
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    bench.kiln(&["push", &name]).expect(6);
    assert_eq!((uploads(&server, "POST"), uploads(&server, "DELETE"), uploads(&server, "PUT")), (1, 1, 0));
    let state = server.state.lock().unwrap();
    assert!(state.blobs.is_empty() && state.manifests.is_empty());
    assert!(!is_packing(&bench.store.root()));
}

#[test]
fn a_registry_that_refuses_ends_the_packing() {
    needs_root!();
    let server = Server::scripted(|request, _| {
        (request.method == "POST").then(|| answer(403, &[], br#"{"errors":[{"code":"DENIED"}]}"#))
    });
    let bench = Bench::empty();
    let name = format!("{}/team/app:v1", server.domain());
    build(&bench, &name, 64);
    bench.kiln(&["push", &name]).expect(5).says(&["refuses POST", "DENIED"]);
    // Nothing was packed to its end, and nobody was asked for anything else.
    assert_eq!(server.lines(), ["POST /v2/team/app/blobs/uploads/"]);
    assert!(!is_packing(&bench.store.root()));
    let files = fs::read_dir(bench.store.root().join("blobs/sha256")).unwrap().flat_map(|dir| {
        fs::read_dir(dir.unwrap().path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len())
    });
    assert!(files.max().unwrap_or(0) < 1 << 20, "the layer was packed for nothing");
    bench.store.sound().unwrap();
    // A build keeps its image: there it is packed.
    let other = Bench::empty();
    other.build(&large(24), &["--push", "-t", &name]).expect(5).says(&["refuses POST", "DENIED"]);
    assert_eq!(other.ok(&["images", "-q"]).lines().count(), 1);
}

/// Something that happens once.
#[derive(Clone, Default)]
struct Moment(Arc<(Mutex<bool>, Condvar)>);

impl Moment {
    fn come(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    #[track_caller]
    fn wait(&self) {
        let come = self.0.0.lock().unwrap();
        let (come, _ended) = self.0.1.wait_timeout_while(come, LONG, |come| !*come).unwrap();
        assert!(*come, "it did not come to that");
    }
}

#[test]
fn a_push_that_is_cancelled_takes_back_what_it_has_begun() {
    needs_root!();
    let (begun, cancelled) = (Moment::default(), Moment::default());
    let (say, wait) = (begun.clone(), cancelled.clone());
    let server = Server::scripted(move |request, _| {
        if request.method == "PATCH" {
            say.come();
            wait.wait();
        }
        None
    });
    let bench = Bench::empty();
    let name = format!("{}/team/app:v1", server.domain());
    build(&bench, &name, 48);
    let push = Running::start(bench.command(&["push", &name]));
    begun.wait();
    push.signal(Signal::INT);
    cancelled.come();
    push.end().expect(130);
    assert_eq!((uploads(&server, "DELETE"), uploads(&server, "PUT")), (1, 0), "{:?}", server.lines());
    assert!(server.state.lock().unwrap().manifests.is_empty() && !is_packing(&bench.store.root()));
    bench.store.sound().unwrap();
    // The next one begins anew.
    bench.ok(&["push", &name]);
    assert!(bench.ok(&["push", &name]).contains("nothing to send"));
}

#[test]
fn a_layer_that_comes_slowly_comes_over_several_connections() {
    needs_root!();
    let image = Image::new(&noise(72));
    let layer = image.layer.clone();
    let is_layer = Digest::of(&layer).to_string();
    let asked = Arc::new((Mutex::new(0), Condvar::new()));
    let server = Server::scripted(move |request, _| {
        if !request.is_blob() || !request.path.ends_with(&is_layer) {
            return None;
        }
        if request.header("range").is_none() {
            let begun = [head(200, &[("Accept-Ranges", "bytes")], layer.len()), layer[..1 << 20].to_vec()];
            // 16 MiB in a quarter of a second: less than several connections may bring.
            return Some(Reply::Halting(
                begun.concat(),
                Duration::from_millis(250),
                layer[1 << 20..].to_vec(),
            ));
        }
        // Nobody gets a piece before three have asked for one.
        let mut count = asked.0.lock().unwrap();
        *count += 1;
        asked.1.notify_all();
        let (_count, ended) = asked.1.wait_timeout_while(count, LONG, |count| *count < 3).unwrap();
        ended.timed_out().then(|| answer(403, &[], b""))
    });
    offer(&server, &image);
    let bench = Bench::empty();
    bench.ok(&["pull", &format!("{}/team/app:v1", server.domain())]);
    let ranges: Vec<String> =
        server.seen().iter().filter_map(|request| request.header("range").map(str::to_owned)).collect();
    assert!(ranges.len() >= 3 && ranges.iter().all(|range| !range.ends_with('-')), "{ranges:?}");
    bench.store.sound().unwrap();
    let out = bench.at("out");
    let context = Context::new(&[("Dockerfile", &format!("FROM {}/team/app:v1\n", server.domain()))]);
    bench.build(&context, &["--output", text(&out)]).expect(0);
    assert!(fs::read(out.join("file")).unwrap() == noise(72), "other bytes");
}
