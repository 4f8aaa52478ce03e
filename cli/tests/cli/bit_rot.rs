//! Single bits of the store turn over: each is found by `fsck --deep`, or changes nothing that anybody
//! can see.
//!
//! `KILN_FLIPS=N` turns so many of them, `KILN_SEED=N` repeats a run.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use kiln_testkit::random::Random;
use rustix::fs::{CWD, Timespec, Timestamps, utimensat};

use crate::harness::{Context, Store, needs_root, text};

/// Bits in a run of the test command.
const FLIPS: usize = 1000;

struct Bench {
    store: Store,
    context: Context,
    golden: Vec<String>,
}

impl Bench {
    /// A base, an image built here and one that was loaded compressed.
    fn new() -> Self {
        let store = Store::with_few_commands();
        let run = "FROM busybox\nCOPY . /all/\nRUN --network=none echo made > /made && touch -d @7 /made\n";
        let context = Context::new(&[("Dockerfile", run), ("a", "a"), ("d/b", &"b".repeat(9000))]);
        let bench = Self { store, context, golden: Vec::new() };
        bench.build().expect("a sound store builds");
        let golden = bench.seen().expect("a sound store answers");
        bench.store.sound().expect("it is");
        Self { golden, ..bench }
    }

    fn build(&self) -> Result<String, String> {
        let outcome = self.store.build(&self.context, &["-t", "image"]);
        if outcome.code == Some(0) { Ok(outcome.stdout) } else { Err(outcome.stderr) }
    }

    /// All that a user sees of the store.
    fn seen(&self) -> Result<Vec<String>, String> {
        let out = self.store.beside("out.tar");
        let lines: [&[&str]; 4] = [
            &["inspect", "image"],
            &["inspect", "busybox"],
            &["images", "-q"],
            &["save", "-o", text(&out), "image"],
        ];
        let mut seen = Vec::new();
        for line in lines {
            let outcome = self.store.kiln(line);
            if outcome.code != Some(0) {
                return Err(format!("{line:?}: {}", outcome.stderr));
            }
            seen.push(outcome.stdout);
        }
        let saved = fs::read(&out).map_err(|error| error.to_string())?;
        seen.push(kiln_oci::Digest::of(&saved).to_string());
        seen.push(self.build()?);
        Ok(seen)
    }
}

/// Regular files that are not empty.
fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("ours to read") {
        let entry = entry.expect("ours to read");
        let kind = entry.file_type().expect("ours to read");
        if kind.is_dir() {
            files(&entry.path(), found);
        } else if kind.is_file() && entry.metadata().is_ok_and(|metadata| metadata.len() > 0) {
            found.push(entry.path());
        }
    }
}

/// Turns one bit of a file; its times stay.
fn flip(path: &Path, bit: u64) {
    let metadata = fs::metadata(path).expect("ours to read");
    let file = File::options().read(true).write(true).open(path).expect("ours to write");
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).expect("it is within the file");
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).expect("ours to write");
    let at = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps {
        last_access: at(metadata.atime(), metadata.atime_nsec()),
        last_modification: at(metadata.mtime(), metadata.mtime_nsec()),
    };
    utimensat(CWD, path, &times, rustix::fs::AtFlags::empty()).expect("ours to write");
}

#[test]
fn every_bit_that_turns_is_found_or_does_not_matter() {
    needs_root!();
    let given = std::env::var("KILN_FLIPS").ok().map(|flips| flips.parse().expect("KILN_FLIPS is a number"));
    let flips: usize = given.unwrap_or(FLIPS);
    let mut random = Random::new();
    let seed = random.seed();
    let started = Instant::now();
    let mut bench = Bench::new();
    let (mut found, mut harmless, mut wrong) = (0, 0, Vec::new());
    for number in 0..flips {
        let mut candidates = Vec::new();
        for part in ["blobs", "snapshots/committed", "db", "state"] {
            files(&bench.store.root().join(part), &mut candidates);
        }
        candidates.sort();
        let path = &candidates[random.below(candidates.len())];
        let bits = fs::metadata(path).expect("ours to read").len() * 8;
        let bit = random.number() % bits;
        flip(path, bit);
        let name = path.strip_prefix(bench.store.root()).expect("below it").display().to_string();
        if bench.store.sound().is_err() {
            found += 1;
        } else {
            match bench.seen() {
                Ok(seen) if seen == bench.golden => harmless += 1,
                Ok(seen) => {
                    let other = seen.iter().zip(&bench.golden).find(|(seen, golden)| seen != golden);
                    wrong.push(format!("{number}: bit {bit} of {name}: another answer: {other:#?}"));
                }
                Err(error) => wrong.push(format!("{number}: bit {bit} of {name}: {error}")),
            }
        }
        let is_index = name.starts_with("db/") || name.starts_with("state/");
        if is_index {
            // What kiln has made anew meanwhile is not to be changed back.
            if bench.store.sound().is_err() {
                bench = Bench::new();
            }
        } else {
            flip(path, bit);
        }
    }
    let took = started.elapsed().as_secs_f64();
    println!(
        "{flips} bits: {found} found, {harmless} without effect, {} violations; seed {seed}, {took:.1} s",
        wrong.len()
    );
    assert!(wrong.is_empty(), "seed {seed}\n{}", wrong.join("\n"));
}
