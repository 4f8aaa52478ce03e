//! `kiln fsck`, and stores that were damaged in every way.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Context, Store, needs_root, text};

const DOCKERFILE: &str = "FROM busybox\nRUN echo one > /one\nCOPY f /f\nRUN ln /f /g && echo two > /two\n";

/// A store with a base, an image built here, and one that was loaded as a compressed archive.
struct Bench {
    store: Store,
    context: Context,
    archive: PathBuf,
}

impl Bench {
    fn new() -> Bench {
        let store = Store::with_busybox();
        let context = Context::new(&[("Dockerfile", DOCKERFILE), ("f", "content")]);
        store.build(&context, &["-t", "app:1"]).expect(0);
        // A layer that came as a blob.
        let other = Store::with_busybox();
        let loaded = Context::new(&[("Dockerfile", "FROM scratch\nCOPY f /loaded\n"), ("f", "loaded")]);
        other.build(&loaded, &["-t", "loaded:1"]).expect(0);
        let archive = store.beside("loaded.tar");
        other.ok(&["save", "--compression", "gzip", "-o", text(&archive), "loaded:1"]);
        store.ok(&["load", "-i", text(&archive)]);
        store.ok(&["fsck", "--deep"]);
        Bench { store, context, archive }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.store.root().join(name)
    }

    /// The directory of the snapshot that has this file, and the file.
    fn snapshot_with(&self, file: &str) -> (PathBuf, PathBuf) {
        let committed = fs::read_dir(self.at("snapshots/committed")).expect("ours");
        let mut places = committed.map(|entry| entry.expect("ours").path());
        let place = places.find(|place| place.join("fs").join(file).exists()).expect("some layer has it");
        let path = place.join("fs").join(file);
        (place, path)
    }

    fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.at("blobs/sha256").join(&hex[..2]).join(hex)
    }

    /// The blob that the loaded layer came as: the one that is no JSON.
    fn layer_blob(&self) -> PathBuf {
        let dirs = fs::read_dir(self.at("blobs/sha256")).expect("ours");
        let files = dirs.flat_map(|dir| fs::read_dir(dir.expect("ours").path()).expect("ours"));
        let mut paths = files.map(|file| file.expect("ours").path());
        paths.find(|path| fs::read(path).expect("ours").first() != Some(&b'{')).expect("it was loaded")
    }

    fn blobs(&self) -> Vec<PathBuf> {
        let dirs = fs::read_dir(self.at("blobs/sha256")).expect("ours");
        let files = dirs.flat_map(|dir| fs::read_dir(dir.expect("ours").path()).expect("ours"));
        let mut paths: Vec<PathBuf> = files.map(|file| file.expect("ours").path()).collect();
        paths.sort();
        paths
    }

    /// Damage is found and told, repaired when asked, and afterwards everything can be had again.
    #[track_caller]
    fn check(&self, what: &str, deep: bool, kinds: &[&str]) {
        let fast = self.store.kiln(&["fsck", "--format", "json"]);
        assert_eq!(fast.code, Some(if deep { 0 } else { 6 }), "{what}: {}{}", fast.stdout, fast.stderr);
        let found = self.store.kiln(&["fsck", "--deep", "--format", "json"]).expect(6);
        let report: Value = serde_json::from_str(&found.stdout).expect("fsck prints JSON");
        assert_eq!(report["damaged"], true);
        for kind in kinds {
            let mut problems = report["problems"].as_array().expect("a list").iter();
            assert!(problems.any(|problem| problem["kind"] == *kind), "{what}: {report:#}");
        }
        let said = self.store.kiln(&["fsck", "--deep"]).expect(6).stdout;
        assert!(said.contains("--repair"), "{said}");
        let repaired = self.store.kiln(&["fsck", "--deep", "--repair"]).expect(0).stdout;
        assert!(repaired.contains("repaired"), "{what}: {repaired}");
        self.store.ok(&["fsck", "--deep"]);
        self.store.ok(&["gc"]);
        self.whole(what);
    }

    /// Makes everything once more and looks at it.
    #[track_caller]
    fn whole(&self, what: &str) {
        if self.store.kiln(&["inspect", "busybox"]).code != Some(0) {
            let tar = crate::harness::busybox_tar(&self.store.beside(""));
            self.store.ok(&["import", text(&tar), "busybox:latest", "-c", "ENV PATH=/bin"]);
        }
        self.store.build(&self.context, &["-t", "app:1"]).expect(0);
        assert_eq!(self.store.shell("app:1", "cat /one /f /g /two"), "one\ncontentcontenttwo", "{what}");
        self.store.ok(&["load", "-i", text(&self.archive)]);
        let saved = self.store.beside("again.tar");
        self.store.ok(&["save", "--compression", "gzip", "-o", text(&saved), "loaded:1", "app:1"]);
        self.store.ok(&["fsck", "--deep"]);
    }
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).expect("ours");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).expect("ours");
}

#[test]
fn damaged_blobs_are_found_forgotten_and_made_anew() {
    needs_root!();
    let bench = Bench::new();
    flip(&bench.layer_blob());
    bench.check("a flipped bit in a layer", true, &["blob"]);
    let bench = Bench::new();
    let layer = bench.layer_blob();
    fs::write(&layer, &fs::read(&layer).expect("ours")[..100]).expect("ours");
    bench.check("a layer cut short", false, &["blob"]);
    let bench = Bench::new();
    fs::remove_file(bench.layer_blob()).expect("ours");
    bench.check("no layer", false, &["blob"]);
    for remove in [false, true] {
        let bench = Bench::new();
        let config = bench.store.inspect("app:1")["Id"].as_str().map(str::to_owned);
        let path = match config {
            Some(config) => bench.blob(&config),
            None => {
                let id = bench.store.build(&bench.context, &["-q"]).expect(0).stdout;
                bench.blob(id.trim())
            }
        };
        if remove {
            fs::remove_file(&path).expect("ours")
        } else {
            flip(&path)
        }
        bench.check("an image's config", false, &["image"]);
    }
}

#[test]
fn damaged_files_of_layers_are_found_forgotten_and_made_anew() {
    needs_root!();
    type Damage = fn(&Bench);
    let damages: [(&str, Damage); 6] = [
        ("a file with another byte", |bench| {
            let path = bench.snapshot_with("two").1;
            let old = fs::metadata(&path).expect("ours");
            flip(&path);
            // As rot does it: nothing shows.
            let mtime = rustix::fs::Timespec { tv_sec: old.mtime(), tv_nsec: old.mtime_nsec() };
            let times = rustix::fs::Timestamps { last_access: mtime, last_modification: mtime };
            rustix::fs::utimensat(rustix::fs::CWD, &path, &times, rustix::fs::AtFlags::empty())
                .expect("ours");
        }),
        ("a file that is gone", |bench| fs::remove_file(bench.snapshot_with("one").1).expect("ours")),
        ("a file too many", |bench| fs::write(bench.snapshot_with("f").0.join("fs/x"), "x").expect("ours")),
        ("another mode", |bench| {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o4755);
            fs::set_permissions(bench.snapshot_with("two").1, mode).expect("ours");
        }),
        ("a file of a loaded layer", |bench| flip(&bench.snapshot_with("loaded").1)),
        ("a file of the base", |bench| flip(&bench.snapshot_with("bin/busybox").0.join("fs/etc/passwd"))),
    ];
    for (what, damage) in damages {
        let bench = Bench::new();
        damage(&bench);
        bench.check(what, true, &["snapshot"]);
    }
}

#[test]
fn damaged_places_of_snapshots_are_found_forgotten_and_made_anew() {
    needs_root!();
    type Damage = fn(&Bench);
    let damages: [(&str, Damage, &str); 4] = [
        (
            "a snapshot that is gone",
            |bench| fs::remove_dir_all(bench.snapshot_with("two").0).expect("ours"),
            "image",
        ),
        (
            "a parent that is gone",
            |bench| fs::remove_dir_all(bench.snapshot_with("one").0).expect("ours"),
            "snapshot",
        ),
        (
            "no sidecar",
            |bench| fs::remove_file(bench.snapshot_with("one").0.join("meta")).expect("ours"),
            "snapshot",
        ),
        (
            "a sidecar of noise",
            |bench| fs::write(bench.snapshot_with("f").0.join("meta"), "{x").expect("ours"),
            "snapshot",
        ),
    ];
    for (what, damage, kind) in damages {
        let bench = Bench::new();
        damage(&bench);
        bench.check(what, false, &[kind]);
    }
}

#[test]
fn damaged_index_costs_one_warning_and_no_cache() {
    needs_root!();
    let bench = Bench::new();
    let index = bench.at("db/meta.sqlite");
    let whole = fs::read(&index).expect("ours");
    assert!(whole.len() > 10 * 4096, "pages to swap");
    let swapped = || {
        let mut bytes = whole.clone();
        for at in 0..4096 {
            bytes.swap(2 * 4096 + at, 7 * 4096 + at);
        }
        bytes
    };
    let noise: Vec<u8> = (0..whole.len()).map(|at| (at * 7919 % 251) as u8).collect();
    let damages: [(&str, Option<Vec<u8>>); 6] = [
        ("missing", None),
        ("empty", Some(Vec::new())),
        ("cut short", Some(whole[..whole.len() / 2].to_vec())),
        ("a few bytes", Some(whole[..20].to_vec())),
        ("noise", Some(noise)),
        ("swapped pages", Some(swapped())),
    ];
    for (what, bytes) in damages {
        match bytes {
            None => fs::remove_file(&index).expect("ours"),
            Some(bytes) => fs::write(&index, bytes).expect("ours"),
        }
        let build = bench.store.build(&bench.context, &["-t", "app:1"]).expect(0);
        let warnings = build.stderr.lines().filter(|line| line.starts_with("warning:")).count();
        assert_eq!(warnings, 1, "{what}: {}", build.stderr);
        assert_eq!(build.ran(), [""; 0], "{what}");
        assert!(build.stdout.contains("everything from the cache"), "{what}: {}", build.stdout);
        let quiet = bench.store.ok(&["fsck", "--deep"]);
        assert_eq!(quiet.stderr, "", "{what}: once is enough");
        assert_eq!(bench.store.shell("app:1", "cat /one"), "one");
        assert_eq!(bench.store.shell("busybox", "echo here"), "here");
    }
}

#[test]
fn without_index_and_journal_all_that_is_written_beside_layers_comes_back() {
    needs_root!();
    type Damage = fn(&Path);
    let noise = |path: &Path| fs::write(path, [7, 0, 255, 10].repeat(5000)).expect("ours");
    let damages: [(&str, Damage); 3] = [
        ("both gone", |db| {
            fs::remove_file(db.join("meta.sqlite")).expect("ours");
            fs::remove_file(db.join("journal")).expect("ours");
        }),
        ("all of it gone", |db| fs::remove_dir_all(db).expect("ours")),
        ("both noise", |_| ()),
    ];
    for (what, damage) in damages {
        for ask in [false, true] {
            let bench = Bench::new();
            let line = ["tag", "app:1", "app:2"];
            bench.store.ok(&line);
            bench.store.ok(&["rmi", "app:2"]);
            bench.store.image("app:3", "FROM scratch\nLABEL nothing=here\n");
            let before = bench.store.holds();
            damage(&bench.at("db"));
            if what == "both noise" {
                noise(&bench.at("db/meta.sqlite"));
                noise(&bench.at("db/journal"));
            }
            let first = if ask { &["fsck", "--rebuild"][..] } else { &["images"] };
            let first = bench.store.ok(first);
            let warnings: Vec<&str> = first.stderr.lines().collect();
            assert_eq!(warnings.len(), 1, "{what}: {}", first.stderr);
            assert!(warnings[0].contains("records were found beside the layers"), "{what}: {}", first.stderr);
            assert_eq!(bench.store.holds(), before, "{what}");
            let images = bench.store.ok(&["images"]).stdout;
            for name in ["app", "busybox", "loaded"] {
                assert!(images.contains(name), "{what}: {images}");
            }
            assert!(!bench.store.ok(&["images", "app:2"]).stdout.contains("app"), "{what}: {images}");
            assert_eq!(
                bench.store.build(&bench.context, &["-t", "app:1"]).expect(0).ran(),
                [""; 0],
                "{what}"
            );
            assert_eq!(bench.store.ok(&["fsck", "--deep"]).stderr, "", "{what}: once is enough");
            bench.whole(what);
        }
    }
}

#[test]
fn without_index_and_journal_what_is_damaged_does_not_come_back() {
    needs_root!();
    let bench = Bench::new();
    flip(&bench.snapshot_with("two").1);
    fs::remove_dir_all(bench.at("db")).expect("ours");
    let images = bench.store.ok(&["images"]).stdout;
    assert!(!images.contains("app") && images.contains("loaded"), "{images}");
    bench.store.ok(&["fsck", "--deep"]);
    bench.whole("after a layer was dropped");
}

#[test]
fn without_index_and_journal_images_that_nothing_speaks_of_are_found_without_names() {
    needs_root!();
    let bench = Bench::new();
    let id = bench.store.inspect("loaded:1")["Id"].as_str().expect("a digest").to_owned();
    for file in fs::read_dir(bench.at("records")).expect("ours") {
        let path = file.expect("ours").path();
        let lines = fs::read_to_string(&path).expect("ours");
        let about = |line: &&str| !(line.contains(&id) && line.contains("\"put\""));
        let kept: Vec<&str> = lines.lines().filter(about).collect();
        fs::write(&path, format!("{}\n", kept.join("\n"))).expect("ours");
    }
    fs::remove_dir_all(bench.at("db")).expect("ours");
    let found = bench.store.ok(&["images", "--no-trunc"]);
    found.says(&[&format!("warning: image {id} was found; its names are lost")]);
    let images = bench.store.ok(&["images", "--no-trunc"]).stdout;
    let line = images.lines().find(|line| line.contains(&id)).expect("it is listed");
    assert!(line.starts_with("<none>"), "{images}");
    bench.store.ok(&["tag", &id, "loaded:1"]);
    bench.store.ok(&["fsck", "--deep"]);
    bench.whole("with a name again");
}

#[test]
fn a_lost_journal_is_written_anew_from_the_index() {
    needs_root!();
    for ask in [&["fsck", "--rebuild"][..], &["images"]] {
        let bench = Bench::new();
        let before = bench.store.holds();
        fs::remove_file(bench.at("db/journal")).expect("ours");
        bench.store.ok(ask);
        assert_eq!(bench.store.holds(), before);
        assert_eq!(bench.store.build(&bench.context, &["-t", "app:1"]).expect(0).ran(), [""; 0]);
    }
}

#[test]
fn damaged_journal_is_told_and_written_anew() {
    needs_root!();
    let bench = Bench::new();
    let journal = bench.at("db/journal");
    let bytes = fs::read(&journal).expect("ours").len();
    flip(&journal);
    let said = bench.store.ok(&["fsck"]).stdout;
    assert!(said.contains("journal db/journal: 1 lines are damaged (written anew"), "{bytes} bytes: {said}");
    assert_eq!(bench.store.ok(&["fsck", "--rebuild"]).stdout.lines().count(), 1);
    assert_eq!(bench.store.build(&bench.context, &["-t", "app:1"]).expect(0).ran(), [""; 0]);
}

#[test]
fn index_is_made_anew_when_asked() {
    needs_root!();
    let bench = Bench::new();
    let before = bench.store.holds();
    let said = bench.store.ok(&["fsck", "--rebuild", "--deep"]);
    assert!(said.stderr.contains("it was made anew"), "{}", said.stderr);
    assert_eq!(bench.store.holds(), before);
    assert_eq!(bench.store.build(&bench.context, &["-t", "app:1"]).expect(0).ran(), [""; 0]);
}

#[test]
fn index_made_anew_does_not_name_what_is_gone() {
    needs_root!();
    let bench = Bench::new();
    fs::remove_dir_all(bench.snapshot_with("two").0).expect("ours");
    fs::remove_file(bench.at("db/meta.sqlite")).expect("ours");
    let images = bench.store.ok(&["images"]);
    assert!(!images.stdout.contains("app") && images.stdout.contains("loaded"), "{}", images.stdout);
    bench.store.ok(&["fsck", "--deep"]);
    bench.whole("after the index was made anew");
}

#[test]
fn formats_of_a_newer_kiln_are_refused_and_left_alone() {
    needs_root!();
    let bench = Bench::new();
    let meta = bench.snapshot_with("two").0.join("meta");
    let old = fs::read_to_string(&meta).expect("ours");
    let newer = old.replacen("\"version\":1", "\"version\":99", 1);
    fs::write(&meta, &newer).expect("ours");
    let committed = bench.store.holds();
    for args in [
        &["fsck", "--repair"][..],
        &["gc", "--keep-duration", "0s"],
        &["prune", "-af"],
        &["run", "--rm", "app:1", "true"],
    ] {
        let refused = bench.store.kiln(args);
        assert!(matches!(refused.code, Some(6 | 125)), "{args:?}: {refused:?}");
        refused.says(&["has version 99"]);
    }
    assert_eq!(bench.store.holds(), committed);
    assert_eq!(fs::read_to_string(&meta).expect("ours"), newer);
    fs::write(&meta, old).expect("ours");
    bench.store.ok(&["fsck", "--deep"]);

    let cached = "FROM busybox\nRUN --mount=type=cache,id=things,target=/c echo x > /c/x\n";
    let context = Context::new(&[("Dockerfile", cached)]);
    bench.store.build(&context, &[]).expect(0);
    let mount = fs::read_dir(bench.at("cache-mounts")).expect("ours").next().expect("one").expect("ours");
    let record = mount.path().join("record");
    let newer = fs::read_to_string(&record).expect("ours").replacen("\"version\":1", "\"version\":2", 1);
    fs::write(&record, &newer).expect("ours");
    for args in [&["build", "--no-cache", context.path()][..], &["prune", "--force"]] {
        bench.store.kiln(args).expect(6).says(&["has version 2"]);
    }
    assert_eq!(fs::read_to_string(&record).expect("ours"), newer);

    fs::remove_file(bench.at("db/meta.sqlite")).expect("ours");
    let journal = fs::read_to_string(bench.at("db/journal")).expect("ours");
    let newer = journal.replacen("kiln-journal 1", "kiln-journal 7", 1);
    fs::write(bench.at("db/journal"), &newer).expect("ours");
    for args in [&["images"][..], &["fsck"], &["fsck", "--rebuild"], &["build", bench.context.path()]] {
        bench.store.kiln(args).expect(6).says(&["has version 7", "knows versions up to 1"]);
    }
    assert_eq!(fs::read_to_string(bench.at("db/journal")).expect("ours"), newer);
    assert!(!bench.at("db/meta.sqlite").exists());
}

#[test]
fn damaged_packed_layers_are_found_forgotten_and_packed_again() {
    needs_root!();
    let bench = Bench::new();
    let saved = bench.store.beside("packed.tar");
    let save = || drop(bench.store.ok(&["save", "--compression", "zstd", "-o", text(&saved), "app:1"]));
    let before: Vec<PathBuf> = bench.blobs();
    save();
    let all_packed =
        || -> Vec<PathBuf> { bench.blobs().into_iter().filter(|blob| !before.contains(blob)).collect() };
    let packed = all_packed();
    assert!(packed.len() > 2, "{packed:?}");
    bench.store.ok(&["fsck", "--deep"]);
    fs::remove_file(&packed[0]).expect("ours");
    bench.check("a packed layer is missing", false, &["packed"]);
    save();
    let packed = all_packed();
    flip(&packed[1]);
    bench.check("a packed layer is damaged", true, &["packed"]);
    save();
    let packed = all_packed();
    fs::write(&packed[2], "short").expect("ours");
    bench.check("a packed layer is cut off", false, &["packed"]);
}

#[test]
fn deep_checks_know_what_every_snapshotter_keeps() {
    needs_root!();
    for snapshotter in ["copy", "fuse-overlayfs"] {
        let bench = Bench::new();
        let store = Store::empty();
        let with = |args: &[&str]| store.kiln(&[&["--snapshotter", snapshotter], args].concat());
        let archive = store.beside("app.tar");
        bench.store.ok(&["save", "--compression", "gzip", "-o", text(&archive), "app:1", "loaded:1"]);
        let loaded = with(&["load", "-i", text(&archive)]);
        if loaded.stderr.contains("fuse-overlayfs failed") {
            eprintln!("SKIPPED ALOUD: {}", loaded.stderr);
            continue;
        }
        loaded.expect(0);
        let context = Context::new(&[("Dockerfile", "FROM app:1\nRUN rm /g && rm -r /one && mkdir /one\n")]);
        with(&["build", "-t", "more:1", context.path()]).expect(0);
        let said = with(&["fsck", "--deep"]).expect(0).stdout;
        assert!(said.contains("layers and") && said.contains("in order"), "{said}");
        let committed = fs::read_dir(store.root().join("snapshots/committed")).expect("ours");
        let places = committed.map(|entry| entry.expect("ours").path().join("fs/f"));
        let place = places.into_iter().find(|place| place.exists()).expect("some layer has it");
        flip(&place);
        with(&["fsck", "--deep"]).expect(6).says(&[]);
        with(&["fsck", "--deep", "--repair"]).expect(0);
        with(&["fsck", "--deep"]).expect(0);
        with(&["load", "-i", text(&archive)]).expect(0);
        with(&["fsck", "--deep"]).expect(0);
    }
}

/// Runs `kiln` as root without `CAP_SYS_ADMIN`, as in most containers.
fn without_sys_admin(store: &Store, args: &[&str]) -> std::process::Output {
    let whole = store.command(args);
    let mut command = std::process::Command::new("setpriv");
    command.args(["--bounding-set=-sys_admin", "--inh-caps=-all"]);
    command.arg(whole.get_program()).args(whole.get_args());
    for (name, value) in whole.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.output().expect("setpriv is part of util-linux")
}

#[test]
fn without_a_privilege_nothing_is_taken_for_damaged() {
    needs_root!();
    let bench = Bench::new();
    bench
        .store
        .image("opaque:1", "FROM busybox\nRUN mkdir -p /o/p\nRUN rm -r /o && mkdir /o && echo x > /o/x\n");
    let before = bench.store.holds();
    for args in [&["fsck", "--deep"][..], &["fsck", "--deep", "--repair"]] {
        let refused = without_sys_admin(&bench.store, args);
        assert_eq!(refused.status.code(), Some(6), "{args:?}: {refused:?}");
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains("CAP_SYS_ADMIN"), "{args:?}: {said}");
    }
    assert_eq!(bench.store.holds(), before);
    bench.store.ok(&["fsck", "--deep"]);

    // A layer whose blob is gone must not be judged by what is visible of its files.
    let blob = bench.layer_blob();
    let bytes = fs::read(&blob).expect("ours");
    fs::remove_file(&blob).expect("ours");
    assert_eq!(without_sys_admin(&bench.store, &["fsck", "--repair"]).status.code(), Some(6));
    fs::write(&blob, bytes).expect("ours");
    bench.store.ok(&["fsck", "--deep"]);

    fs::remove_dir_all(bench.at("db")).expect("ours");
    let refused = without_sys_admin(&bench.store, &["images"]);
    assert_eq!(refused.status.code(), Some(6), "{refused:?}");
    assert_eq!(bench.store.holds(), before);
    bench.store.ok(&["fsck", "--deep"]);
}

#[test]
fn what_one_command_could_not_prove_the_next_does() {
    needs_root!();
    let bench = Bench::new();
    flip(&bench.snapshot_with("two").1);
    fs::remove_dir_all(bench.at("db")).expect("ours");
    assert!(!without_sys_admin(&bench.store, &["images"]).status.success());
    // The index was made anew before that one gave up, and once more from its journal.
    fs::remove_file(bench.at("db/meta.sqlite")).expect("ours");
    let images = bench.store.ok(&["images"]).stdout;
    assert!(!images.contains("app") && images.contains("loaded"), "{images}");
    assert!(!bench.at("db/unproven").exists());
    bench.whole("after a layer was dropped late");
}

#[test]
fn a_damaged_blob_that_somebody_uses_stays_until_they_are_done() {
    needs_root!();
    let bench = Bench::new();
    let blob = bench.layer_blob();
    flip(&blob);
    let user = kiln_content::Store::open(&bench.store.root()).expect("ours");
    let digest = format!("sha256:{}", blob.file_name().and_then(|name| name.to_str()).expect("hex"));
    let digest = digest.parse().expect("a digest");
    user.hold_blob(&digest).expect("ours");
    let before = bench.store.holds();
    bench.store.kiln(&["fsck", "--deep", "--repair"]).expect(6);
    assert!(blob.exists(), "it is in use");
    assert_eq!(bench.store.holds(), before);
    drop(user);
    bench.store.ok(&["fsck", "--deep", "--repair"]);
    assert!(!blob.exists());
}

#[test]
fn records_of_containers_are_looked_at_and_mended() {
    needs_root!();
    let store = Store::with_busybox();
    store.ok(&["create", "--name", "web", "-v", "data:/data", "busybox", "true"]);
    let said = store.ok(&["fsck"]).stdout;
    assert!(said.contains("1 containers, 1 volumes checked") && said.contains("in order"), "{said}");
    let id = store.ok(&["inspect", "-f", "{{.Id}}", "web"]).stdout.trim().to_owned();
    let dir = store.root().join("containers").join(&id);
    fs::write(dir.join("state.json"), "{").expect("ours");
    fs::remove_file(store.root().join("volumes/data/volume.json")).expect("ours");
    fs::remove_file(store.root().join("containers/.names/web")).expect("ours");
    let said = store.kiln(&["fsck"]).expect(6).stdout;
    for text in ["state.json is damaged", "volume data: its volume.json is missing", "(put back)", "--repair"]
    {
        assert!(said.contains(text), "{text}: {said}");
    }
    let report = store.kiln(&["fsck", "--format", "json"]).expect(6).stdout;
    let report: Value = serde_json::from_str(&report).expect("fsck prints JSON");
    let problems = report["problems"].as_array().expect("a list");
    let kinds: Vec<_> = problems.iter().filter_map(|problem| problem["kind"].as_str()).collect();
    assert_eq!((report["containers"].as_u64(), kinds), (Some(1), vec!["container", "volume"]));
    store.ok(&["fsck", "--repair"]);
    assert_eq!(
        store.ok(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "web"]).stdout,
        "exited 255\n"
    );
    store.ok(&["start", "-a", "web"]);
    // What cannot be mended is removed by whoever wants it to be.
    fs::write(dir.join("config.json"), "{").expect("ours");
    let said = store.kiln(&["fsck", "--repair"]).expect(6).stdout;
    assert!(said.contains("it can only be removed") && said.contains("kiln rm -f"), "{said}");
    store.ok(&["rm", "-f", &id]);
    store.ok(&["volume", "rm", "data"]);
    assert!(store.ok(&["fsck"]).stdout.contains("in order"));
}
