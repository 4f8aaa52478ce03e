//! `kiln build --output`: what it writes, and what it leaves alone.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Context, Outcome, Store, needs_root, own_uid, text};

const DOCKERFILE: &str =
    "FROM busybox\nCOPY --chown=1234 app /srv/app\nRUN echo made > /srv/made && ln -s made /srv/link\n";

fn context() -> Context {
    Context::new(&[("Dockerfile", DOCKERFILE), ("app", "the app\n")])
}

/// Files of a tar by name, with their time.
fn files(tar: &[u8]) -> BTreeMap<String, (u64, Vec<u8>)> {
    let mut archive = tar::Archive::new(tar);
    let mut files = BTreeMap::new();
    for entry in archive.entries().expect("a tar") {
        let mut entry = entry.expect("a tar");
        let name = entry.path().expect("UTF-8").to_string_lossy().into_owned();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).expect("in memory");
        files.insert(name, (entry.header().mtime().expect("a number"), content));
    }
    files
}

fn json(files: &BTreeMap<String, (u64, Vec<u8>)>, name: &str) -> Value {
    serde_json::from_slice(&files[name].1).expect("JSON")
}

/// The only manifest of an archive.
fn manifest(files: &BTreeMap<String, (u64, Vec<u8>)>) -> Value {
    let digest = json(files, "index.json")["manifests"][0]["digest"].as_str().expect("a digest").to_owned();
    json(files, &format!("blobs/{}", digest.replace(':', "/")))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("it is there")
        .map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

/// The arguments of a build with these outputs.
#[track_caller]
fn build(store: &Store, context: &Context, outputs: &[&str], more: &[&str]) -> Outcome {
    let mut args = more.to_vec();
    outputs.iter().for_each(|output| args.extend(["-o", output]));
    store.build(context, &args)
}

#[test]
fn a_directory_gets_the_files_and_nothing_else_is_touched() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    let (dir, outside) = (store.beside("out"), store.beside("outside"));
    fs::create_dir_all(dir.join("srv")).expect("ours");
    fs::create_dir(&outside).expect("ours");
    fs::write(dir.join("kept"), "kept").expect("ours");
    // Links in the directory lead outside of it.
    symlink(&outside, dir.join("bin")).expect("ours");
    symlink(outside.join("victim"), dir.join("srv/app")).expect("ours");
    let outcome = build(&store, &context, &[text(&dir)], &[]).expect(0);
    assert!(outcome.stdout.contains(&format!("wrote {}", dir.display())), "{}", outcome.stdout);
    assert!(names(&outside).is_empty(), "{:?}", names(&outside));
    assert_eq!(fs::read_to_string(dir.join("srv/app")).expect("written"), "the app\n");
    assert_eq!(fs::symlink_metadata(dir.join("srv/app")).expect("written").uid(), own_uid());
    assert_eq!(fs::read_to_string(dir.join("srv/link")).expect("written"), "made\n");
    assert!(dir.join("kept").exists() && dir.join("bin/busybox").exists());
    assert_eq!(store.ok(&["images", "-q"]).stdout.lines().count(), 1, "busybox alone");

    let delete = format!("type=local,dest={},mode=delete", text(&dir));
    build(&store, &context, &[&delete], &[]).expect(0);
    assert!(!dir.join("kept").exists() && dir.join("srv/made").exists());

    let split = format!("type=local,dest={},platform-split=true", text(&store.beside("split")));
    build(&store, &context, &[&split], &[]).expect(0);
    let [platform] = names(&store.beside("split")).try_into().expect("one platform");
    assert!(platform.starts_with("linux_"), "{platform}");
    assert!(store.beside("split").join(platform).join("srv/made").exists());
}

#[test]
fn devices_that_a_directory_does_not_get_are_told_in_one_warning() {
    needs_root!();
    let store = Store::with_busybox();
    let made = "FROM busybox\nRUN for n in 1 2 3 4 5; do mknod /tmp/d$n c 1 3; done; echo x > /tmp/x\n";
    let context = Context::new(&[("Dockerfile", made)]);
    let dir = store.beside("out");
    let said = build(&store, &context, &[text(&dir)], &[]).expect(0).stderr;
    let warnings: Vec<&str> = said.lines().filter(|line| line.starts_with("warning:")).collect();
    assert_eq!(warnings.len(), 1, "{said}");
    let expected = "5 devices are left out: \"tmp/d1\", \"tmp/d2\", \"tmp/d3\" and 2 more";
    assert!(warnings[0].contains(expected), "{said}");
    assert_eq!(names(&dir.join("tmp")), ["x"]);
    let plain = build(&store, &self::context(), &[text(&store.beside("plain"))], &[]).expect(0);
    assert!(!plain.stderr.contains("left out"), "{}", plain.stderr);
}

#[test]
fn a_tar_has_the_files_on_standard_output_and_in_a_file() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    let file = store.beside("out.tar");
    let dest = format!("type=tar,dest={}", text(&file));
    build(&store, &context, &[&dest], &[]).expect(0);
    let written = fs::read(&file).expect("written");
    let found = files(&written);
    assert_eq!(found["srv/app"].1, b"the app\n");
    assert!(found.contains_key("bin/busybox"));

    let mut command = store.command(&["build", "--progress", "plain", "-o", "-", context.path()]);
    let output = command.output().expect("kiln starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == written, "nothing else goes to standard output");
    assert!(String::from_utf8_lossy(&output.stderr).contains("everything from the cache"));

    let epoch = ["--build-arg", "SOURCE_DATE_EPOCH=1234567890"];
    let split = format!("type=tar,dest={},platform-split=true", text(&file));
    build(&store, &context, &[&split], &epoch).expect(0);
    let found = files(&fs::read(&file).expect("written"));
    assert!(found.values().all(|(mtime, _)| *mtime == 1_234_567_890));
    assert!(found.keys().all(|name| name.starts_with("linux_")));
}

#[test]
fn archives_of_every_packing_are_the_same_image_again() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    store.build(&context, &["-t", "app"]).expect(0);
    let id = store.inspect("app")["Id"].clone();
    for kind in ["oci", "docker"] {
        for (packing, media_type) in [
            ("uncompressed", "application/vnd.oci.image.layer.v1.tar"),
            ("gzip", "application/vnd.oci.image.layer.v1.tar+gzip"),
            ("zstd", "application/vnd.oci.image.layer.v1.tar+zstd"),
            ("estargz", "application/vnd.oci.image.layer.v1.tar+gzip"),
        ] {
            let file = store.beside("out.tar");
            let output = format!("type={kind},dest={},compression={packing}", text(&file));
            build(&store, &context, &[&output], &["-t", "app:1"]).expect(0);
            let found = files(&fs::read(&file).expect("written"));
            let manifest = manifest(&found);
            for layer in manifest["layers"].as_array().expect("a list") {
                assert_eq!(layer["mediaType"], media_type, "{kind} {packing}");
                let toc = &layer["annotations"]["containerd.io/snapshot/stargz/toc.digest"];
                assert_eq!(toc.is_string(), packing == "estargz");
            }
            assert_eq!(found.contains_key("manifest.json"), kind == "docker");
            let other = Store::empty();
            let loaded = other.ok(&["load", "-i", text(&file)]);
            assert_eq!(loaded.stdout, "Loaded image: app:1\n", "{kind} {packing}");
            // eStargz puts files of its own into the layers, so it is another image.
            assert_eq!(other.inspect("app:1")["Id"] == id, packing != "estargz");
            assert_eq!(other.shell("app:1", "cat /srv/app /srv/link"), "the app\nmade");
        }
    }
}

#[test]
fn media_types_and_annotations_are_as_asked() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    let file = store.beside("out.tar");
    let output = format!("type=docker,dest={},oci-mediatypes=false", text(&file));
    build(&store, &context, &[&output], &["-t", "app"]).expect(0);
    let docker = manifest(&files(&fs::read(&file).expect("written")));
    assert_eq!(docker["mediaType"], "application/vnd.docker.distribution.manifest.v2+json");
    assert_eq!(docker["config"]["mediaType"], "application/vnd.docker.container.image.v1+json");
    let layer = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    assert_eq!(docker["layers"][0]["mediaType"], layer);
    Store::empty().ok(&["load", "-i", text(&file)]);

    let output =
        format!("type=oci,dest={},annotation.team=a,annotation-manifest-descriptor.x=y", text(&file));
    build(&store, &context, &[&output], &["-t", "app", "--annotation", "from=flag"]).expect(0);
    let found = files(&fs::read(&file).expect("written"));
    assert_eq!(manifest(&found)["annotations"], json!({ "from": "flag", "team": "a" }));
    assert_eq!(json(&found, "index.json")["manifests"][0]["annotations"]["x"], "y");
}

#[test]
fn several_outputs_leave_at_once_and_the_store_only_gets_what_it_was_asked_to() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    let before = store.holds().0;
    let (oci, tar, dir) = (store.beside("a.tar"), store.beside("b.tar"), store.beside("dir"));
    let outputs = [
        format!("type=oci,dest={}", text(&oci)),
        format!("type=tar,dest={}", text(&tar)),
        format!("type=local,dest={}", text(&dir)),
    ];
    let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
    build(&store, &context, &outputs, &["-t", "app"]).expect(0);
    assert!(oci.exists() && tar.exists() && dir.join("srv/app").exists());
    assert_eq!(store.holds().0, before, "no image was asked for");
    build(&store, &context, &["type=cacheonly"], &["-t", "app"]).expect(0);
    assert_eq!(store.holds().0, before);
    let outcome = build(&store, &context, &outputs, &["-t", "app", "--load"]).expect(0);
    assert!(outcome.stdout.contains("named app:latest"), "{}", outcome.stdout);
    assert_eq!(store.shell("app", "cat /srv/app"), "the app");
    let two = build(&store, &context, &["-", "type=oci"], &[]).expect(2);
    two.says(&["only one output can go to standard output"]);
}

#[test]
fn after_an_error_nothing_is_left() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nRUN false\n")]);
    let dir = store.beside("results");
    fs::create_dir(&dir).expect("ours");
    let at = |name: &str| text(&dir.join(name)).to_owned();
    fs::write(dir.join("id"), "of an earlier build").expect("ours");
    let oci = format!("type=oci,dest={}", at("a.tar"));
    build(&store, &context, &[&oci, &at("local")], &["--iidfile", &at("id"), "--metadata-file", &at("meta")])
        .expect(1);
    assert!(names(&dir).is_empty(), "{:?}", names(&dir));

    // One output cannot be written: the other is not there either, and no name has moved.
    context.write("Dockerfile", "FROM busybox\nRUN true\n");
    let bad = format!("type=tar,dest={}", at("absent/b.tar"));
    let outcome = build(&store, &context, &[&oci, &bad], &["-t", "app", "--load"]).expect(4);
    outcome.says(&["cannot write", "absent/b.tar"]);
    assert!(names(&dir).is_empty(), "{:?}", names(&dir));
    store.kiln(&["inspect", "app"]).expect(4);
    build(&store, &context, &["type=tar,dest=/dev/full"], &[]).expect(8).says(&["/dev/full"]);
    build(&store, &context, &["type=registry"], &[]).expect(2).says(&["a push needs a name"]);
    build(&store, &context, &[], &["--push"]).expect(2).says(&["a push needs a name"]);
    build(&store, &context, &["type=oci,colour=red"], &[]).expect(2).says(&["no attribute \"colour\""]);
}

#[test]
fn files_tell_of_the_result() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    let (id, meta, oci) = (store.beside("id"), store.beside("meta.json"), store.beside("a.tar"));
    let more = ["-t", "app:1", "-t", "app:2", "--iidfile", text(&id), "--metadata-file", text(&meta)];
    let output = format!("type=oci,dest={}", text(&oci));
    build(&store, &context, &["type=image", &output], &more).expect(0);
    let read = fs::read_to_string(&id).expect("written");
    assert_eq!(json!(read), store.inspect("app:1")["Id"]);
    let meta: Value = serde_json::from_slice(&fs::read(&meta).expect("written")).expect("JSON");
    assert_eq!(meta["containerimage.config.digest"], read);
    assert_eq!(meta["containerimage.digest"], store.inspect("app:1")["Manifest"]);
    assert_eq!(meta["containerimage.descriptor"]["digest"], meta["containerimage.digest"]);
    assert_eq!(meta["image.name"], "docker.io/library/app:1,docker.io/library/app:2");
    // Without an image the ID is that of the image that would have been.
    build(&store, &context, &["type=cacheonly"], &["--iidfile", text(&id)]).expect(0);
    assert_eq!(fs::read_to_string(&id).expect("written"), read);
}

#[test]
fn a_layout_directory_keeps_the_images_it_has() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    let dir = store.beside("layout");
    let output = format!("type=oci,tar=false,dest={}", text(&dir));
    build(&store, &context, &[&output], &["-t", "app:1"]).expect(0);
    context.write("app", "another\n");
    for _ in 0..2 {
        build(&store, &context, &[&output], &["-t", "app:2"]).expect(0);
    }
    let index: Value =
        serde_json::from_slice(&fs::read(dir.join("index.json")).expect("written")).expect("JSON");
    let tags: Vec<&Value> = index["manifests"].as_array().expect("a list").iter().collect();
    assert_eq!(tags.len(), 2, "{index}");
    let other = Store::empty();
    let from = Context::new(&[("Dockerfile", "FROM base\nCOPY --from=two /srv/app /two\n")]);
    let (one, two) =
        (format!("base=oci-layout://{}:1", text(&dir)), format!("two=oci-layout://{}:2", text(&dir)));
    other.build(&from, &["-t", "both", "--build-context", &one, "--build-context", &two]).expect(0);
    assert_eq!(other.shell("both", "cat /srv/app /two"), "the app\nanother");
}

#[test]
fn times_are_rewritten_in_own_layers_and_the_image_in_the_store_has_them_too() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    let epoch = ["-t", "app", "--build-arg", "SOURCE_DATE_EPOCH=1234567890"];
    let base = store.inspect("busybox")["RootFS"]["Layers"][0].clone();
    build(&store, &context, &["type=image,rewrite-timestamp=true"], &epoch).expect(0);
    assert_eq!(store.inspect("app")["RootFS"]["Layers"][0], base, "layers below stay");
    assert_eq!(store.shell("app", "stat -c %Y /srv/made /srv/app"), "1234567890\n1234567890");
    let id = store.inspect("app")["Id"].clone();
    let file = store.beside("a.tar");
    let output = format!("type=oci,dest={},rewrite-timestamp=true", text(&file));
    build(&store, &context, &[&output], &epoch).expect(0);
    let other = Store::empty();
    other.ok(&["load", "-i", text(&file)]);
    assert_eq!(other.inspect("app")["Id"], id);
    let without = build(&store, &context, &[&output], &["-t", "app"]).expect(0);
    without.says(&["warning: rewrite-timestamp has no effect: SOURCE_DATE_EPOCH is not set"]);
}

#[test]
fn each_output_may_have_a_time_of_its_own() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    let at = |name: &str| text(&store.beside(name)).to_owned();
    let oci = |name: &str, time: &str| format!("type=oci,dest={},rewrite-timestamp=true{time}", at(name));
    let (tar, id_file) = (format!("type=tar,dest={},source-date-epoch=1000", at("files.tar")), at("id"));
    let (own, none) = (oci("own.tar", ",source-date-epoch=1234567890"), oci("none.tar", ""));
    let outputs = ["type=image,source-date-epoch=2000", &own, &tar, &none];
    let outcome = build(&store, &context, &outputs, &["-t", "app", "--iidfile", &id_file]).expect(0);
    let told = outcome.stderr.matches("rewrite-timestamp has no effect").count();
    assert_eq!(told, 1, "of the one without a time: {}", outcome.stderr);

    let (config, base) = (store.config("app"), store.config("busybox"));
    let time = json!("1970-01-01T00:33:20Z");
    let history = config["history"].as_array().expect("a list");
    let inherited = base["history"].as_array().expect("a list");
    assert_eq!(&history[..inherited.len()], &inherited[..], "that of the base stays");
    assert!(history[inherited.len()..].iter().all(|entry| entry["created"] == time), "{history:?}");
    assert_eq!(config["created"], time);
    let id = fs::read_to_string(&id_file).expect("written");
    assert_eq!(store.inspect("app")["Id"], json!(id), "the first image");
    assert!(files(&fs::read(at("files.tar")).expect("written")).values().all(|(time, _)| *time == 1000));
    // What the build argument would have made of it.
    let epoch = ["-t", "app", "--build-arg", "SOURCE_DATE_EPOCH=1234567890"];
    build(&store, &context, &[&oci("arg.tar", "")], &epoch).expect(0);
    let [own, arg, none] =
        ["own.tar", "arg.tar", "none.tar"].map(|name| fs::read(at(name)).expect("written"));
    assert!(own == arg && own != none);
    let wrong = build(&store, &context, &["type=image,source-date-epoch=yesterday"], &[]);
    wrong.expect(2).says(&["source-date-epoch=yesterday is no number of seconds"]);
    let insecure = build(&store, &context, &["type=registry,name=a/b,registry.insecure=true"], &[]);
    insecure.expect(2).says(&["--insecure-registry", "[registries]"]);
}

#[test]
fn images_in_the_store_can_be_packed_and_named_by_digest() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), context());
    build(&store, &context, &["type=image,compression=zstd,name-canonical=true"], &["-t", "app"]).expect(0);
    let manifest = store.inspect("app")["Manifest"].as_str().expect("a digest").to_owned();
    assert_eq!(store.inspect(&format!("app@{manifest}"))["Id"], store.inspect("app")["Id"]);
    build(&store, &context, &["type=image,dangling-name-prefix=loose"], &[]).expect(0);
    assert!(store.ok(&["images"]).stdout.contains("loose "), "{}", store.ok(&["images"]).stdout);
    build(&store, &context, &["type=image,compression=estargz"], &["-t", "lazy"]).expect(0);
    assert_ne!(store.inspect("lazy")["Id"], store.inspect("app")["Id"]);
    assert_eq!(store.shell("lazy", "cat /srv/app; ls -a / | grep -c stargz"), "the app\n1");
}

#[test]
fn two_stores_give_the_same_bytes_in_every_form() {
    needs_root!();
    let context = context();
    let base = Store::with_busybox();
    let base_tar = base.beside("base.tar");
    base.ok(&["save", "-o", text(&base_tar), "busybox"]);
    let write = || {
        let store = Store::empty();
        store.ok(&["load", "-i", text(&base_tar)]);
        let forms = [
            "type=oci",
            "type=oci,compression=zstd",
            "type=oci,compression=estargz,force-compression=true",
            "type=docker",
            "type=docker,compression=uncompressed,oci-mediatypes=false",
            "type=tar",
        ];
        let dests: Vec<_> = (0..forms.len()).map(|nth| store.beside(&format!("{nth}.tar"))).collect();
        let outputs: Vec<String> = forms
            .iter()
            .zip(&dests)
            .map(|(form, dest)| match *form {
                "type=tar" => format!("{form},dest={}", text(dest)),
                _ => format!("{form},dest={},rewrite-timestamp=true", text(dest)),
            })
            .collect();
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let epoch = ["-t", "app", "--build-arg", "SOURCE_DATE_EPOCH=1234567890"];
        build(&store, &context, &outputs, &epoch).expect(0);
        let bytes: Vec<_> = dests.iter().map(|dest| fs::read(dest).expect("written")).collect();
        let read = |dir: &str| fs::read(store.beside(dir).join("srv/made")).expect("written");
        build(&store, &context, &[text(&store.beside("dir"))], &epoch).expect(0);
        (forms, bytes, read("dir"))
    };
    let ((forms, one, one_dir), (_, two, two_dir)) = (write(), write());
    for (nth, form) in forms.iter().enumerate() {
        assert!(one[nth] == two[nth], "{form} differs");
    }
    assert_eq!(one_dir, two_dir);
}
