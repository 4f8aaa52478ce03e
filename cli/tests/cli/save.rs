//! `kiln save`, `kiln load`, `kiln export`: every packing, several images, pipes, damage.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;

use crate::harness::{Context, Store, needs_root, text};

fn app(store: &Store, name: &str) {
    let dockerfile = "FROM busybox\nRUN seq 100000 > /numbers && mkdir /d && ln /numbers /d/linked\n";
    store.build(&Context::new(&[("Dockerfile", dockerfile)]), &["-t", name]).expect(0);
}

/// Names and sizes of the blobs in an archive.
fn blobs(tar: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(fs::File::open(tar).expect("written"));
    let mut blobs = BTreeMap::new();
    for entry in archive.entries().expect("a tar") {
        let mut entry = entry.expect("a tar");
        let name = entry.path().expect("UTF-8").to_string_lossy().into_owned();
        let mut content = Vec::new();
        std::io::copy(&mut entry, &mut content).expect("in memory");
        blobs.insert(name, content);
    }
    blobs
}

fn media_types(tar: &Path) -> Vec<String> {
    let blobs = blobs(tar);
    let read = |name: &str| serde_json::from_slice::<Value>(&blobs[name]).expect("JSON");
    let digest = read("index.json")["manifests"][0]["digest"].as_str().expect("a digest").to_owned();
    let manifest = read(&format!("blobs/{}", digest.replace(':', "/")));
    let layers = manifest["layers"].as_array().expect("a list").clone();
    layers
        .iter()
        .map(|layer| {
            layer["mediaType"].as_str().expect("text").replace("application/vnd.oci.image.layer.v1.", "")
        })
        .collect()
}

fn save(store: &Store, args: &[&str]) -> std::path::PathBuf {
    let tar = store.beside("saved.tar");
    store.ok(&[&["save", "-o", text(&tar)], args].concat());
    tar
}

#[test]
fn every_packing_comes_back_as_the_same_image() {
    needs_root!();
    let store = Store::with_busybox();
    app(&store, "app:1");
    let id = store.inspect("app:1")["Id"].clone();
    for (args, expected) in [
        (&["--format", "docker"][..], "tar"),
        (&["--format", "oci"], "tar+gzip"),
        (&["--format", "oci-archive", "--compression", "uncompressed"], "tar"),
        (&["--format", "docker", "--compression", "gzip", "--compression-level", "9"], "tar+gzip"),
        (&["--format", "oci", "--compression", "zstd", "--compression-level", "0"], "tar+zstd"),
        (&["--format", "oci", "--compression", "estargz"], "tar+gzip"),
    ] {
        let tar = save(&store, &[args, &["app:1"]].concat());
        assert_eq!(media_types(&tar), [expected, expected], "{args:?}");
        let other = Store::empty();
        other.ok(&["load", "-i", text(&tar)]);
        assert_eq!(other.inspect("app:1")["Id"] == id, !args.contains(&"estargz"), "{args:?}");
        assert_eq!(other.shell("app:1", "tail -n1 /d/linked; stat -c %h /numbers"), "100000\n2");
    }
}

#[test]
fn packed_layers_are_remembered_and_made_again_when_they_are_gone() {
    needs_root!();
    let store = Store::with_busybox();
    app(&store, "app:1");
    let first = blobs(&save(&store, &["--format", "oci", "app:1"]));
    let held = store.holds();
    assert!(blobs(&save(&store, &["--format", "oci", "app:1"])) == first);
    assert_eq!(store.holds(), held, "nothing was made a second time");
    save(&store, &["--format", "oci", "--compression-level", "1", "app:1"]);
    let blobs_in = |files: &[String]| files.iter().filter(|file| Path::new(file).is_file()).count();
    assert_eq!(blobs_in(&store.holds().1), blobs_in(&held.1) + 2, "two layers, packed in another way");
    for file in held.1.iter().filter(|file| file.contains("/blobs/") && Path::new(file).is_file()) {
        let gzip = fs::read(file).expect("a blob").starts_with(&[0x1f, 0x8b]);
        if gzip {
            fs::remove_file(file).expect("ours");
        }
    }
    assert!(blobs(&save(&store, &["--format", "oci", "app:1"])) == first);
}

#[test]
fn layers_from_elsewhere_leave_as_they_came_unless_forced() {
    needs_root!();
    let store = Store::with_busybox();
    app(&store, "app:1");
    let tar = save(&store, &["--format", "oci", "--compression-level", "1", "app:1"]);
    let came = blobs(&tar);
    let other = Store::empty();
    other.ok(&["load", "-i", text(&tar)]);
    // As they came: index, manifest and all.
    let again = save(&other, &["--format", "oci", "--compression", "zstd", "app:1"]);
    assert!(blobs(&again) == came);
    let docker = blobs(&save(&other, &["--format", "docker", "app:1"]));
    assert!(came.iter().all(|(name, content)| docker.get(name) == Some(content)));
    // The same packing needs no force; another one, or a level, is another layer.
    assert!(blobs(&save(&other, &["--format", "oci", "--force-compression", "app:1"])) == came);
    let forced = ["--format", "oci", "--force-compression", "--compression"];
    assert_eq!(
        media_types(&save(&other, &[&forced[..], &["zstd", "app:1"]].concat())),
        ["tar+zstd", "tar+zstd"]
    );
    let plain = save(&other, &[&forced[..], &["uncompressed", "app:1"]].concat());
    assert_eq!(media_types(&plain), ["tar", "tar"]);
    let level =
        save(&other, &["--format", "oci", "--force-compression", "--compression-level", "6", "app:1"]);
    assert!(blobs(&level) == blobs(&save(&store, &["--format", "oci", "--compression-level", "6", "app:1"])));
}

#[test]
fn several_images_go_through_a_pipe() {
    needs_root!();
    let store = Store::with_busybox();
    app(&store, "app:1");
    store.ok(&["tag", "app:1", "other/name:x"]);
    for format in ["docker", "oci"] {
        let args = ["save", "--format", format, "app:1", "other/name:x", "busybox"];
        let mut saving = store.command(&args).stdout(Stdio::piped()).spawn().expect("kiln starts");
        let other = Store::empty();
        let mut loading = other.command(&["load"]);
        let output = loading.stdin(saving.stdout.take().expect("piped")).output().expect("kiln starts");
        assert!(saving.wait().expect("our child").success());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for name in ["app:1", "other/name:x", "busybox"] {
            assert_eq!(other.inspect(name)["Id"], store.inspect(name)["Id"], "{format}");
        }
    }
}

#[test]
fn a_file_and_a_pipe_get_the_same_bytes_packed_now_or_before() {
    needs_root!();
    let store = Store::with_busybox();
    app(&store, "app:1");
    // The same changes twice: one blob, which the second image must not bring again.
    let more = "FROM app:1\nRUN seq 300000 > /more\nRUN seq 300000 > /more\n";
    let context = Context::new(&[("Dockerfile", more)]);
    store.build(&context, &["-t", "app:2", "--build-arg", "SOURCE_DATE_EPOCH=1"]).expect(0);
    for packing in ["gzip", "zstd", "estargz"] {
        let words = ["--format", "oci", "--compression", packing, "app:2", "busybox", "app:1"];
        let packed_now = fs::read(save(&store, &words)).expect("written");
        let packed_before = fs::read(save(&store, &words)).expect("written");
        let piped = store.command(&[&["save"], &words[..]].concat()).output().expect("kiln starts");
        assert!(packed_now == packed_before, "{packing}: {} {}", packed_now.len(), packed_before.len());
        assert!(packed_now == piped.stdout, "{packing}: {} {}", packed_now.len(), piped.stdout.len());
        let mut names: Vec<_> = entries(&packed_now);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), entries(&packed_now).len(), "{packing}: a blob is there twice");
    }
}

/// Names of all entries.
fn entries(tar: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(tar);
    let entries = archive.entries().expect("a tar");
    entries.map(|entry| entry.expect("a tar").path().expect("UTF-8").to_string_lossy().into_owned()).collect()
}

#[test]
fn damage_is_found_before_it_leaves_and_no_file_is_left() {
    needs_root!();
    let store = Store::with_busybox();
    app(&store, "app:1");
    save(&store, &["--format", "oci", "app:1"]);
    let (_, held) = store.holds();
    let largest = held
        .iter()
        .filter(|file| file.contains("/blobs/") && Path::new(file).is_file())
        .max_by_key(|file| fs::metadata(file).expect("there").len())
        .expect("layers were packed");
    let mut bytes = fs::read(largest).expect("a blob");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(largest, bytes).expect("ours");
    let dir = store.beside("dir");
    fs::create_dir(&dir).expect("ours");
    let tar = dir.join("a.tar");
    store.kiln(&["save", "--format", "oci", "-o", text(&tar), "app:1"]).expect(6);
    assert_eq!(fs::read_dir(&dir).expect("ours").count(), 0);
}

#[test]
fn mistakes_are_refused_before_anything_is_written() {
    needs_root!();
    let store = Store::with_busybox();
    let tar = store.beside("x.tar");
    for (args, says) in [
        (&["--compression", "lz4"][..], "none of uncompressed, gzip, zstd, estargz"),
        (&["--compression-level", "10"], "gzip has levels 0 to 9, not 10"),
        (&["--compression", "zstd", "--compression-level", "-1"], "zstd has levels 1 to 22, not -1"),
        (&["--colour"], "unexpected argument '--colour'"),
    ] {
        let line = [&["save", "--format", "oci", "-o", text(&tar)], args, &["busybox"]].concat();
        store.kiln(&line).expect(2).says(&[says]);
    }
    store.kiln(&["save", "-o", text(&tar), "absent"]).expect(4);
    store
        .kiln(&["save", "-o", text(&store.beside("absent/x.tar")), "busybox"])
        .expect(4)
        .says(&["cannot write"]);
    store.kiln(&["save", "-o", "/dev/full", "busybox"]).expect(8).says(&["/dev/full"]);
    assert!(!tar.exists());
}

#[test]
fn a_file_system_is_exported_and_imported_again() {
    needs_root!();
    let store = Store::with_busybox();
    app(&store, "app:1");
    let tar = store.beside("rootfs.tar");
    store.ok(&["export", "-o", text(&tar), "app:1"]);
    let names: Vec<String> = blobs(&tar).into_keys().collect();
    for name in ["bin/busybox", "d/linked", "numbers"] {
        assert!(names.iter().any(|found| found == name), "{names:?}");
    }
    store.ok(&["import", text(&tar), "again"]);
    assert_eq!(store.shell("again", "tail -n1 /d/linked; stat -c %h /numbers"), "100000\n2");
    let mut command = store.command(&["export", "app:1"]);
    let output = command.output().expect("kiln starts").stdout;
    assert!(output == fs::read(&tar).expect("written"));
    let mut pipe =
        store.command(&["import", "-", "piped"]).stdin(Stdio::piped()).spawn().expect("kiln starts");
    pipe.stdin.take().expect("piped").write_all(&output).expect("it reads");
    assert!(pipe.wait().expect("our child").success());
    assert_eq!(store.inspect("piped")["RootFS"], store.inspect("again")["RootFS"]);
}
