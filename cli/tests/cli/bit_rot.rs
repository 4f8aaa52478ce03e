//! Single bits of the store turn over: each is found by `fsck --deep`, or changes nothing that anybody
//! can see. Whatever the damage, it does not leave: `save` and `push` refuse, or what they send is what they
//! always sent.
//!
//! What a container or a step reads of a tree is not compared with anything: no builder reads every file
//! before each use. That is for `fsck --deep`, and a test says so.
//!
//! `KILN_FLIPS=N` turns so many bits, `KILN_DAMAGES=N` does so many damages of each kind, `KILN_SEED=N` repeats
//! a run.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use kiln_testkit::random::Random;
use rustix::fs::{CWD, Timespec, Timestamps, utimensat};

use crate::harness::{Context, Outcome, Place, Store, needs_root, text};
use crate::scripted::Server;

/// Bits in a run of the test command.
const FLIPS: usize = 1000;
/// Damages of each kind in a run of the test command.
const DAMAGES: usize = 30;

struct Bench {
    store: Store,
    context: Context,
    golden: Vec<String>,
}

impl Bench {
    /// A base, an image built here and one that was loaded compressed.
    fn new() -> Self {
        let store = Store::with_few_commands(Place::Memory);
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
    silently(path, |file| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, bit / 8).expect("it is within the file");
        byte[0] ^= 1 << (bit % 8);
        file.write_all_at(&byte, bit / 8).expect("ours to write");
    });
}

/// Changes a file and sets its times back.
fn silently(path: &Path, change: impl FnOnce(&File)) {
    let metadata = fs::metadata(path).expect("ours to read");
    change(&File::options().read(true).write(true).open(path).expect("ours to write"));
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

/// What may become of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Damage {
    Flip,
    Truncation,
    /// A block of zeros, as of a disk that lost a write.
    Zeros,
    /// Another file's content.
    Swap,
}

const KINDS: [Damage; 4] = [Damage::Flip, Damage::Truncation, Damage::Zeros, Damage::Swap];

impl Damage {
    /// `content` with this damage; `None`: it would be the same.
    fn of(self, content: &[u8], other: &[u8], random: &mut Random) -> Option<Vec<u8>> {
        const BLOCK: usize = 4096;
        let mut damaged = content.to_vec();
        let at = random.below(content.len());
        match self {
            Damage::Flip => damaged[at] ^= 1 << random.below(8),
            Damage::Truncation => damaged.truncate(at),
            Damage::Zeros => {
                let from = at / BLOCK * BLOCK;
                let end = content.len().min(from + BLOCK);
                damaged[from..end].fill(0);
            }
            Damage::Swap => damaged = other.to_vec(),
        }
        (damaged != content).then_some(damaged)
    }
}

fn put(path: &Path, content: &[u8]) {
    silently(path, |file| {
        file.set_len(content.len() as u64).expect("ours to write");
        file.write_all_at(content, 0).expect("ours to write");
    });
}

/// The image of the bench on its way out.
struct Exits {
    server: Server,
    name: String,
}

/// What left: file or manifest and blobs, by name.
type Left = BTreeMap<String, Vec<u8>>;

impl Exits {
    fn new() -> Self {
        let server = Server::new();
        let name = format!("{}/team/image:v1", server.domain());
        Self { server, name }
    }

    fn save(bench: &Bench, format: &str) -> (Outcome, Left) {
        let out = bench.store.beside("leaves.tar");
        let _ = fs::remove_file(&out);
        let outcome = bench.store.kiln(&["save", "--format", format, "-o", text(&out), "image"]);
        let left = fs::read(&out).map(|bytes| Left::from([(format.to_owned(), bytes)]));
        (outcome, left.unwrap_or_default())
    }

    /// To a registry that has nothing. What it got without a manifest is nobody's image.
    fn push(&self, bench: &Bench) -> (Outcome, Left) {
        *self.server.state.lock().expect("no panic") = Default::default();
        bench.store.ok(&["tag", "image", &self.name]);
        let mut command = bench.store.command(&["push", &self.name]);
        command.env("DOCKER_CONFIG", bench.store.beside("no-docker"));
        let outcome = Outcome::of(command.output().expect("kiln starts"));
        let state = self.server.state.lock().expect("no panic");
        let Some((_, manifest)) = state.manifests.get("v1") else { return (outcome, Left::new()) };
        let blobs = state.blobs.iter().map(|(digest, blob)| (digest.to_string(), blob.clone()));
        let left = blobs.chain([("manifest".to_owned(), manifest.clone())]).collect();
        (outcome, left)
    }

    /// All ways out, the one that packs nothing first.
    fn all(&self, bench: &Bench) -> [(&'static str, Outcome, Left); 3] {
        let (plain, plain_left) = Self::save(bench, "docker");
        let (packed, packed_left) = Self::save(bench, "oci");
        let (push, push_left) = self.push(bench);
        [("save", plain, plain_left), ("save", packed, packed_left), ("push", push, push_left)]
    }

    /// What a sound store sends.
    fn golden(&self, bench: &Bench) -> [Left; 3] {
        self.all(bench).map(|(_, outcome, left)| {
            assert!(outcome.code == Some(0) && !left.is_empty(), "{outcome:?}");
            left
        })
    }
}

#[test]
fn nothing_that_is_damaged_leaves() {
    needs_root!();
    let given = std::env::var("KILN_DAMAGES").ok();
    let damages: usize = given.map_or(DAMAGES, |damages| damages.parse().expect("KILN_DAMAGES is a number"));
    let mut random = Random::new();
    let (seed, started, exits) = (random.seed(), Instant::now(), Exits::new());
    let mut refused: BTreeMap<(Damage, &str), usize> = BTreeMap::new();
    let (mut harmless, mut wrong) = (0, Vec::new());
    // Layers that were never packed, which are packed from their trees; then those that were.
    for was_packed in [false, true] {
        let mut bench = Bench::new();
        if was_packed {
            exits.golden(&bench);
        }
        for (number, kind) in KINDS.iter().cycle().take(damages * KINDS.len() / 2).enumerate() {
            let mut candidates = Vec::new();
            for part in ["blobs", "snapshots/committed"] {
                files(&bench.store.root().join(part), &mut candidates);
            }
            candidates.sort();
            let [path, other] = [(); 2].map(|()| candidates[random.below(candidates.len())].clone());
            let [content, other] = [&path, &other].map(|path| fs::read(path).expect("ours to read"));
            let Some(damaged) = kind.of(&content, &other, &mut random) else { continue };
            put(&path, &damaged);
            let ended = exits.all(&bench);
            put(&path, &content);
            let name = path.strip_prefix(bench.store.root()).expect("below it").display();
            let mut complain = |way: &str, what: &str, outcome: &Outcome| {
                wrong.push(format!("{number}: {kind:?} of {name}: {way} {what}: {outcome:?}"));
            };
            let has_left = ended.iter().any(|(_, outcome, _)| outcome.code == Some(0));
            let golden = has_left.then(|| exits.golden(&bench));
            for (nth, (way, outcome, left)) in ended.iter().enumerate() {
                // A packed blob goes as it is, and the registry compares it.
                let by_registry = outcome.code == Some(5) && outcome.stderr.contains("DIGEST_INVALID");
                match outcome.code {
                    Some(0) if golden.as_ref().is_some_and(|golden| golden[nth] == *left) => {}
                    Some(0) => complain(way, "sends something else", outcome),
                    _ if !left.is_empty() => complain(way, "fails and leaves something", outcome),
                    Some(6) => *refused.entry((*kind, way)).or_default() += 1,
                    _ if *way == "push" && by_registry => *refused.entry((*kind, way)).or_default() += 1,
                    _ => complain(way, "does not call it damage", outcome),
                }
            }
            harmless += usize::from(has_left);
            if has_left && !was_packed {
                bench = Bench::new();
            }
        }
        bench.store.sound().expect("all damage was undone");
    }
    let took = started.elapsed().as_secs_f64();
    println!("{refused:?}, {harmless} without effect; seed {seed}, {took:.1} s");
    assert!(wrong.is_empty(), "seed {seed}\n{}", wrong.join("\n"));
    for way in ["save", "push"] {
        for kind in KINDS {
            assert!(refused.contains_key(&(kind, way)), "seed {seed}: no {kind:?} ever mattered to {way}");
        }
    }
}

#[test]
fn an_image_that_lost_the_layer_below_is_no_smaller_image() {
    needs_root!();
    let (bench, exits) = (Bench::new(), Exits::new());
    let mut sidecars = Vec::new();
    files(&bench.store.root().join("snapshots/committed"), &mut sidecars);
    sidecars.retain(|path| path.ends_with("meta"));
    let is_lowest = |path: &PathBuf| fs::read_to_string(path).expect("JSON").contains("\"parent\":null");
    let (lowest, upper): (Vec<PathBuf>, Vec<PathBuf>) = sidecars.into_iter().partition(is_lowest);
    let lowest = fs::read(&lowest[0]).expect("ours to read");
    let on_it = Context::new(&[("Dockerfile", "FROM image\nCOPY a /again\n"), ("a", "a")]);
    assert_eq!(upper.len(), 2, "COPY and RUN");
    for path in upper {
        let whole = fs::read(&path).expect("ours to read");
        // As good a record as any, but for another layer.
        put(&path, &lowest);
        for (_, outcome, left) in exits.all(&bench) {
            outcome.expect(6).says(&["are not those that its config lists", "fsck --deep --repair"]);
            assert!(left.is_empty());
        }
        bench.store.build(&on_it, &["-t", "on-it"]).expect(6).says(&["are not those that its config lists"]);
        bench.store.kiln(&["fsck"]).expect(6);
        put(&path, &whole);
    }
    exits.all(&bench).into_iter().for_each(|(_, outcome, _)| drop(outcome.expect(0)));
    bench.store.build(&on_it, &["-t", "on-it"]).expect(0);
    bench.store.sound().unwrap();
}

#[test]
fn what_says_how_to_run_is_compared_and_what_is_run_is_for_fsck() {
    needs_root!();
    let bench = Bench::new();
    let run = || bench.store.kiln(&["run", "--rm", "--network", "none", "image", "cat", "/all/a"]);
    assert_eq!(run().expect(0).stdout, "a");
    // The config is read whole before each use.
    let id = bench.store.inspect("image")["Id"].as_str().expect("a digest").replace("sha256:", "");
    let config = bench.store.root().join("blobs/sha256").join(&id[..2]).join(&id);
    flip(&config, 40);
    run().expect(125).says(&[&id]);
    flip(&config, 40);
    // A file of the tree is not: it is what is on the disk.
    let mut trees = Vec::new();
    files(&bench.store.root().join("snapshots/committed"), &mut trees);
    let copied = trees.iter().find(|path| path.ends_with("all/a")).expect("it was copied");
    put(copied, b"b");
    assert_eq!(run().expect(0).stdout, "b");
    bench.store.kiln(&["fsck"]).expect(0);
    let told = bench.store.kiln(&["fsck", "--deep"]).expect(6).stdout;
    assert!(!told.is_empty());
    bench.store.kiln(&["fsck", "--deep", "--repair"]);
    bench.build().expect("the step is run again");
    assert_eq!(run().expect(0).stdout, "a");
}
