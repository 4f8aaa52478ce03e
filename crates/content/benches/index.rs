//! What it costs to make the index of a large store anew: from its journal, and from what is written
//! beside the layers. `cargo bench -p kiln-content`; the target is 2 seconds for 10,000 objects.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_content::{CacheRecord, ImageRecord, LayerRecord, Store};
use kiln_oci::{ChainId, DiffId, Digest, SnapshotId};

const LAYERS: u32 = 10_000;
const SAMPLES: usize = 5;

/// A store that knows this many layers, each a result of a build, and an image with a name for each tenth.
fn fill(root: &Path) {
    let store = Store::open(root).expect("a new directory");
    for number in 0..LAYERS {
        let digest = Digest::of(&number.to_le_bytes());
        let snapshot: SnapshotId = format!("0123456789ab-{number}").parse().expect("digits and a dash");
        let cached = CacheRecord {
            canonical: digest,
            snapshot: snapshot.clone(),
            created_unix: 1_700_000_000,
            description: format!("RUN make -C src/{number} all install"),
        };
        store.cache_put(&[digest], &cached, false).expect("there is room");
        let diff_id = DiffId(digest);
        let layer = LayerRecord { snapshot: snapshot.clone(), diff_id, size_bytes: 4096, blob: None };
        store.put_layer(&layer).expect("there is room");
        store.put_chain(&ChainId(digest), &snapshot).expect("there is room");
        if number % 10 == 0 {
            let snapshot = Some(snapshot);
            let image =
                ImageRecord { config: digest, manifest: digest, snapshot, size_bytes: 4096, created_unix: 1 };
            store.put_image(&image).expect("there is room");
            let name = format!("app:{number}").parse().expect("a name");
            store.set_name(&name, &image).expect("there is room");
        }
    }
    store.barrier().expect("the disk works");
}

/// The median of opening the store when these files are gone.
fn measure(root: &Path, gone: &[&str]) -> (Duration, i64) {
    let mut samples = Vec::new();
    for _ in 0..SAMPLES {
        gone.iter().for_each(|file| fs::remove_file(root.join(file)).expect("it is there"));
        let started = Instant::now();
        let store = Store::open(root).expect("it is made anew");
        let records = store.rebuilt().expect("it was lost").records;
        samples.push((started.elapsed(), records));
    }
    samples.sort();
    samples[SAMPLES / 2]
}

fn main() {
    let dir = match std::env::var_os("KILN_BENCH_DIR") {
        Some(place) => tempfile::tempdir_in(place),
        None => tempfile::tempdir(),
    };
    let dir = dir.expect("temporary directories can be made");
    fill(dir.path());
    println!("| Index made anew | records | ms |\n|---|---|---|");
    let ways: [(&str, &[&str]); 2] = [
        ("from its journal", &["db/meta.sqlite"]),
        ("from what is beside the layers", &["db/meta.sqlite", "db/journal"]),
    ];
    for (what, gone) in ways {
        let (took, records) = measure(dir.path(), gone);
        println!("| {what} | {records} | {:.0} |", took.as_secs_f64() * 1000.0);
    }
}
