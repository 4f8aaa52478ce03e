//! The catalogue of bad manifests and configs (J), through every way into the store that reads them.
//!
//! What a registry alone can do is tested where its client is, and here in the form it has in an
//! archive: J02 is a `Content-Type` there and the media type of a descriptor here; J03 and J15 arrive by
//! HTTP there, with the same exit code; J18 asks nobody, wherever the image comes from.

mod forge;

use std::fs;
use std::net::TcpListener;

use kiln_oci::{Digest, Platform};

use crate::harness::{needs_root, text};
use crate::layers::raw::{Member, file};
use crate::universal::Watch;
use forge::*;

const NETWORK: i32 = 5;
const STORE: i32 = 6;
const LIMIT: i32 = 8;

#[test]
fn an_image_without_fault_is_taken_in_every_form() {
    needs_root!();
    for &form in ALL {
        let door = Door::new();
        door.takes(&Forge::new(), form);
        assert_eq!(crate::layers::listing(&crate::layers::only_snapshot(&door.store)), ["made = forged"]);
    }
}

#[test]
fn j01_and_j02_a_document_is_one_thing_and_what_was_announced() {
    needs_root!();
    let door = Door::new();
    for (from, to, names) in [
        (r#""layers":["#, r#""manifests":[],"layers":["#, "config, layers, manifests"),
        (r#""layers":["#, r#""MANIFESTS":[],"layers":["#, "\"MANIFESTS\" is \"manifests\""),
        (r#""schemaVersion":2"#, r#""schemaVersion":2,"Layers":[]"#, "\"Layers\" is \"layers\""),
    ] {
        door.refuses(&Forge::manifest(from, to), MANIFESTED, STORE, &["blobs/sha256/", names]);
    }
    for more in [r#""layers":[]"#, r#""config":{}"#] {
        let forge = Forge::index(r#""manifests":["#, &format!(r#"{more},"manifests":["#));
        door.refuses(&forge, INDEXED, STORE, &["index.json", "at once"]);
    }
    let (manifest, index) =
        ("application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json");
    let docker = "application/vnd.docker.distribution.manifest.v2+json";
    for own in [index, docker, "text/html"] {
        let says = ["mediaType", own, manifest];
        door.refuses(&Forge::manifest(manifest, own), INDEXED, STORE, &says);
    }
    for announced in [index, docker] {
        door.refuses(&Forge::index(manifest, announced), INDEXED, STORE, &["mediaType", announced]);
    }
    door.refuses(&Forge::index(manifest, "text/html"), INDEXED, STORE, &["\"text/html\" is neither"]);
    let forge = Forge::index(r#""schemaVersion":2"#, &format!(r#""schemaVersion":2,"mediaType":"{docker}""#));
    door.refuses(&forge, INDEXED, STORE, &["index.json", "mediaType"]);
}

#[test]
fn a_manifest_of_a_directory_is_read_as_any_other() {
    needs_root!();
    let door = Door::new();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    for (forge, code, says) in [
        (Forge::manifest(r#""layers":["#, r#""manifests":[],"layers":["#), STORE, "at once"),
        (Forge::manifest(kind, "text/html"), STORE, "\"text/html\" is neither"),
        (Forge::manifest(kind, "application/vnd.oci.image.index.v1+json"), STORE, "mediaType"),
        (Forge::manifest("CONFIG_SIZE", "1"), STORE, "is not what its descriptor says"),
        (Forge::manifest("LAYER_SIZE", "1"), STORE, "cannot be loaded"),
        (Forge::manifest("LAYER_SIZE", "9223372036854775808"), LIMIT, "manifest.json"),
        (Forge::manifest("LAYER_SIZE", "-1"), STORE, "layers[0].size"),
        (Forge::manifest(r#""digest":"LAYER""#, r#""digest":"sha256:../../x""#), STORE, "layers[0].digest"),
        (
            Forge { manifest: r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(), ..Forge::new() },
            NETWORK,
            "schema 1",
        ),
        (Forge { manifest: "[]".to_owned(), ..Forge::new() }, STORE, "manifest.json is refused"),
    ] {
        door.refuses(&forge, &[Dir], code, &[says]);
    }
}

#[test]
fn j03_a_manifest_of_schema_1_is_named_so() {
    needs_root!();
    let door = Door::new();
    let old = r#"{"schemaVersion":1,"name":"x","tag":"1","fsLayers":[{"blobSum":"LAYER"}],"history":[{"v1Compatibility":"{}"}]}"#;
    let forge = Forge { manifest: old.to_owned(), ..Forge::new() };
    door.refuses(&forge, MANIFESTED, NETWORK, &["schema 1", "blobs/sha256/", "skopeo"]);
    let kind = "application/vnd.oci.image.manifest.v1+json";
    for old in
        ["", "+json", "+prettyjws"].map(|end| format!("application/vnd.docker.distribution.manifest.v1{end}"))
    {
        door.refuses(&Forge::index(kind, &old), INDEXED, NETWORK, &["schema 1", "blobs/sha256/"]);
    }
}

#[test]
fn j04_to_j06_a_digest_is_sha256_and_64_digits() {
    needs_root!();
    let door = Door::new();
    let digest = Digest::of(b"");
    for bad in [
        "sha256:../../../../../../etc/passwd",
        "sha256:..",
        "sha256:",
        &format!("SHA256:{}", digest.hex()),
        &format!("sha256:{}", digest.hex().to_uppercase()),
        &format!("sha256:{}", &digest.hex()[1..]),
        &format!("sha256:{}0", digest.hex()),
        "md5:d41d8cd98f00b204e9800998ecf8427e",
        "",
    ] {
        let digest_of = |what: &str| format!(r#""digest":"{what}""#);
        let says = ["index.json", "manifests[0].digest"];
        door.refuses(&Forge::index(&digest_of("MANIFEST"), &digest_of(bad)), INDEXED, STORE, &says);
        for (what, at) in [("CONFIG", "config.digest"), ("LAYER", "layers[0].digest")] {
            let forge = Forge::manifest(&digest_of(what), &digest_of(bad));
            door.refuses(&forge, &[OciArchive, LayoutDigest], STORE, &["blobs/sha256/", at]);
        }
        door.refuses(&Forge::config("DIFF_ID", bad), &[Layout, DockerArchive], STORE, &["rootfs.diff_ids"]);
    }
}

#[test]
fn j07_to_j09_sizes_are_what_they_say() {
    needs_root!();
    let door = Door::new();
    for (size, code) in [
        ("-1", STORE),
        ("1.5", STORE),
        ("\"1\"", STORE),
        ("null", STORE),
        ("9223372036854775808", LIMIT),
        ("18446744073709551615", LIMIT),
        ("36893488147419103232", LIMIT),
    ] {
        let index = Forge::index("MANIFEST_SIZE", size);
        door.refuses(&index, INDEXED, code, &["index.json", "manifests[0].size"]);
        for (what, at) in [("CONFIG_SIZE", "config.size"), ("LAYER_SIZE", "layers[0].size")] {
            door.refuses(
                &Forge::manifest(what, size),
                &[OciArchive, LayoutDigest],
                code,
                &["blobs/sha256/", at],
            );
        }
    }
    for size in ["0", "1", "100000", "9223372036854775807"] {
        let says = ["is not what its descriptor says", "blobs/sha256/", size];
        door.refuses(&Forge::index("MANIFEST_SIZE", size), INDEXED, STORE, &says);
        door.refuses(&Forge::manifest("CONFIG_SIZE", size), MANIFESTED, STORE, &says);
        let says = ["the layer blobs/sha256/", "cannot be loaded", size];
        door.refuses(&Forge::manifest("LAYER_SIZE", size), MANIFESTED, STORE, &says);
    }
}

#[test]
fn j10_a_manifest_beyond_4_mib_is_not_read() {
    needs_root!();
    let door = Door::new();
    let blanks = " ".repeat(4 << 20);
    let says = ["blobs/sha256/", "4194304 are allowed"];
    door.refuses(
        &Forge::manifest("{\"schemaVersion\"", &format!("{blanks}{{\"schemaVersion\"")),
        MANIFESTED,
        LIMIT,
        &says,
    );
    let forge = Forge::index("{\"schemaVersion\"", &format!("{blanks}{{\"schemaVersion\""));
    door.refuses(&forge, INDEXED, LIMIT, &["index.json", "4194304 are allowed"]);
    // Small documents may stand for much: many layers, many values, the same config again and again.
    let layer =
        r#"{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"LAYER","size":LAYER_SIZE}"#;
    let many = vec![layer; 4097].join(",");
    door.refuses(
        &Forge::manifest(layer, &many),
        MANIFESTED,
        LIMIT,
        &["blobs/sha256/", "more than 4096 layers"],
    );
    let values = format!(r#""history":[{}0],"#, "0,".repeat(4_000_000));
    door.refuses(&Forge::config(r#""history":["#, &format!(r#"{values}"x":["#)), ALL, LIMIT, &["values"]);
}

#[test]
fn j10_all_documents_together_are_bound_too() {
    needs_root!();
    let door = Door::new();
    let mut forge = Forge::config(r#""history":["#, &format!(r#""x":"{}","history":["#, "x".repeat(7 << 20)));
    let config = forge.config.replace("ARCH", &Platform::host().architecture);
    let config = config.replace("DIFF_ID", &Digest::of(&forge.layer).to_string());
    let mut listed = Vec::new();
    for nth in 0..20 {
        let manifest = MANIFEST
            .replace("CONFIG_SIZE", &config.len().to_string())
            .replace("CONFIG", &Digest::of(config.as_bytes()).to_string())
            .replace("LAYER_SIZE", &forge.layer.len().to_string())
            .replace("LAYER", &Digest::of(&forge.layer).to_string())
            .replacen('{', &format!(r#"{{"annotations":{{"nth":"{nth}"}},"#), 1);
        let (digest, size) = (Digest::of(manifest.as_bytes()), manifest.len());
        listed.push(format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":{size}}}"#
        ));
        forge.blobs.push((blob(manifest.as_bytes()), manifest.into_bytes()));
    }
    forge.index = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, listed.join(","));
    // What was loaded before the limit has no name.
    let watch = Watch::new(&door.store);
    let archive = forge.write_archive(&door.store);
    let outcome = watch.kiln(&["load", "-i", &archive]).expect(LIMIT);
    outcome.says(&["67108864 are allowed"]);
    assert_eq!(door.store.ok(&["images", "--format", "json"]).stdout.matches("forged").count(), 0);
}

#[test]
fn j11_and_j12_depth_is_bound_and_a_name_stands_once() {
    needs_root!();
    let door = Door::new();
    for depth in [64, 127, 100_000] {
        let nested = format!(r#""x":{}1{},"#, "[".repeat(depth), "]".repeat(depth));
        let with = |text: &str| text.replacen('{', &format!("{{{nested}"), 1);
        let says = ["more than 64 levels", "x[0][0]"];
        door.refuses(&Forge { config: with(CONFIG), ..Forge::new() }, ALL, STORE, &says);
        door.refuses(&Forge { manifest: with(MANIFEST), ..Forge::new() }, MANIFESTED, STORE, &says);
        door.refuses(&Forge { index: with(INDEX), ..Forge::new() }, INDEXED, STORE, &says);
    }
    for (from, at) in [(r#""os":"linux""#, "os"), (r#""Env":["A=b"]"#, "config.Env")] {
        let twice = Forge::config(from, &format!("{from},{from}"));
        door.refuses(&twice, ALL, STORE, &[at, "twice"]);
    }
    let digest = r#""digest":"LAYER""#;
    let twice = Forge::manifest(digest, &format!("{digest},{digest}"));
    door.refuses(&twice, MANIFESTED, STORE, &["layers[0].digest", "twice"]);
    let twice = Forge::index(r#""schemaVersion":2"#, r#""schemaVersion":2,"schemaVersion":2"#);
    door.refuses(&twice, INDEXED, STORE, &["schemaVersion", "twice"]);
    for broken in ["", "{", "[]", "null", "{\"schemaVersion\":2", "\u{feff}{}", "{}{}"] {
        door.refuses(&Forge { config: broken.to_owned(), ..Forge::new() }, ALL, STORE, &["is refused"]);
        door.refuses(
            &Forge { manifest: broken.to_owned(), ..Forge::new() },
            MANIFESTED,
            STORE,
            &["is refused"],
        );
        door.refuses(&Forge { index: broken.to_owned(), ..Forge::new() }, INDEXED, STORE, &["is refused"]);
    }
}

/// An index of one entry.
fn index_of(digest: &str, size: usize) -> String {
    format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"{digest}","size":{size}}}]}}"#
    )
}

#[test]
fn j13_and_j14_indexes_in_indexes_end() {
    needs_root!();
    let door = Door::new();
    for depth in [6, 1000] {
        let mut forge = Forge::new();
        let mut inner = index_of(&Digest::of(b"").to_string(), 0);
        for _ in 0..depth {
            let outer = index_of(&Digest::of(inner.as_bytes()).to_string(), inner.len());
            forge.blobs.push((blob(inner.as_bytes()), inner.into_bytes()));
            inner = outer;
        }
        forge.index = inner;
        door.refuses(&forge, INDEXED, STORE, &["an index in an index, more than 4 levels", "blobs/sha256/"]);
    }
    // One that names itself is not what its name says.
    let own = Digest::of(b"itself");
    let index = index_of(&own.to_string(), 200);
    let mut forge = Forge { index: index.clone(), ..Forge::new() };
    forge.blobs.push((format!("blobs/sha256/{}", own.hex()), index.into_bytes()));
    door.refuses(&forge, INDEXED, STORE, &["is not what its descriptor says", &own.hex()]);
}

#[test]
fn j15_platforms_that_are_there_are_listed() {
    needs_root!();
    let door = Door::new();
    let for_platform = |platform: &str| {
        let digest = r#""digest":"MANIFEST""#;
        Forge::index(digest, &format!(r#"{digest},"platform":{platform}"#)).index
    };
    let inner = for_platform(r#"{"os":"linux","architecture":"riscv64"}"#);
    // By the one index, and by another that stands in it.
    let mut forge = Forge { index: inner, ..Forge::new() };
    forge.load_args = vec!["--platform", "linux/s390x"];
    door.refuses(&forge, &[OciArchive], NETWORK, &["holds no image for linux/s390x", "linux/riscv64"]);
    let [_, manifest, inner] = forge.texts();
    let mut nested =
        Forge { index: index_of(&Digest::of(inner.as_bytes()).to_string(), inner.len()), ..Forge::new() };
    nested.blobs = vec![
        (blob(inner.as_bytes()), inner.into_bytes()),
        (blob(manifest.as_bytes()), manifest.into_bytes()),
    ];
    let host = format!("holds no image for {}", Platform::host());
    door.refuses(&nested, INDEXED, NETWORK, &[&host, "linux/riscv64"]);
    let mut docker = Forge::new();
    docker.load_args = vec!["--platform", "linux/s390x"];
    let host = Platform::host().to_string();
    door.refuses(&docker, &[OciArchive, DockerArchive], NETWORK, &["holds no image for linux/s390x", &host]);
}

#[test]
fn j16_and_j17_layers_are_those_of_the_config() {
    needs_root!();
    let door = Door::new();
    let zeros = Digest::of(b"another").to_string();
    for ids in ["[]", r#"["DIFF_ID","DIFF_ID"]"#] {
        let forge = Forge::config(r#"["DIFF_ID"]"#, ids);
        door.refuses(&forge, ALL, STORE, &["rootfs.diff_ids: there are ", "for 1 layers"]);
    }
    let more = Forge::config(r#""history":["#, r#""history":[{"created_by":"x"},"#);
    door.refuses(&more, ALL, STORE, &["history", "there are 2, for 1 layers"]);
    let wrong = Forge::config("DIFF_ID", &zeros);
    door.refuses(&wrong, ALL, STORE, &["the layer ", "cannot be loaded", &zeros, "promises"]);
    // A layer that is another one than its digest says.
    let mut swapped = Forge::new();
    swapped.without_layer = true;
    let evil = crate::layers::raw::tar(&[file("made", "evil..")]);
    swapped.blobs.push((blob(&swapped.layer), evil));
    door.refuses(&swapped, MANIFESTED, STORE, &["the layer blobs/sha256/", "cannot be loaded"]);
}

#[test]
fn j18_urls_of_layers_are_never_asked() {
    needs_root!();
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a loopback");
    listener.set_nonblocking(true).expect("a socket");
    let port = listener.local_addr().expect("bound").port();
    let digest = r#""digest":"LAYER""#;
    let urls = format!(r#"{digest},"urls":["http://127.0.0.1:{port}/layer","http://169.254.169.254/"]"#);
    for (kind, form) in MANIFESTED.iter().flat_map(|&form| {
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar";
        ["application/vnd.oci.image.layer.v1.tar", foreign].map(|kind| (kind, form))
    }) {
        let mut forge = Forge::manifest(digest, &urls);
        forge.manifest = forge.manifest.replace("application/vnd.oci.image.layer.v1.tar", kind);
        let door = Door::new();
        door.takes(&forge, form);
        assert_eq!(crate::layers::listing(&crate::layers::only_snapshot(&door.store)), ["made = forged"]);
        // Not even when the layer is nowhere else.
        let door = Door::new();
        forge.without_layer = true;
        door.refuses(&forge, &[form], 4, &["is not in it", "urls", "never fetched"]);
    }
    let asked = listener.accept().map(|_| ()).expect_err("somebody asked");
    assert_eq!(asked.kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn j19_to_j22_configs_that_would_run_something_else() {
    needs_root!();
    let door = Door::new();
    for (env, says) in [
        (r#"["A=b","B"]"#, "config.Env[1]"),
        (r#"["=b"]"#, "config.Env[0]"),
        (r#"[""]"#, "config.Env[0]"),
        (r#"["A=\u0000b"]"#, "config.Env"),
        (r#"{"A":"b"}"#, "config.Env"),
        (r#"[1]"#, "config.Env[0]"),
    ] {
        door.refuses(&Forge::config(r#"["A=b"]"#, env), ALL, STORE, &[says]);
    }
    for (field, says) in [
        (r#""Entrypoint":"sh""#, "config.Entrypoint"),
        (r#""Cmd":"sh""#, "config.Cmd"),
        (r#""Cmd":["a\u0000b"]"#, "config.Cmd"),
        (r#""User":"a\u0000b""#, "config.User"),
        (r#""WorkingDir":"/a\u0000""#, "config.WorkingDir"),
        (r#""Labels":["a"]"#, "config.Labels"),
        (r#""ExposedPorts":["80"]"#, "config.ExposedPorts"),
    ] {
        door.refuses(&Forge::config(r#""Env":["A=b"]"#, field), ALL, STORE, &[says]);
    }
    let large = format!(r#""Labels":{{"x":"{}"}}"#, "x".repeat(9 << 20));
    door.refuses(&Forge::config(r#""Env":["A=b"]"#, &large), ALL, LIMIT, &["8388608 are allowed"]);
    for (from, to, says) in [
        (r#""os":"linux""#, r#""os":"../../linux""#, "os: \"../../linux\""),
        (r#""architecture":"ARCH""#, r#""architecture":"../../x""#, "architecture: \"../../x\""),
        (r#""os":"linux""#, r#""os":"linux","variant":"../v8""#, "variant: \"../v8\""),
        (r#""os":"linux""#, r#""os":"a\u0000b""#, "os: "),
    ] {
        door.refuses(&Forge::config(from, to), ALL, STORE, &[says]);
    }
    let digest = r#""digest":"MANIFEST""#;
    for platform in [r#"{"os":"../../x","architecture":"ARCH"}"#, r#"{"os":"linux","architecture":"a/../b"}"#]
    {
        let forge = Forge::index(digest, &format!(r#"{digest},"platform":{platform}"#));
        door.refuses(&forge, INDEXED, STORE, &["index.json", "manifests[0].platform"]);
    }
}

#[test]
fn j21_labels_of_64_mib_are_not_read() {
    needs_root!();
    let door = Door::new();
    // Nothing but a hole, so that this process does not grow: its memory would count as kiln's.
    const SIZE: u64 = 64 << 20;
    let archive = door.store.beside("large.tar");
    let manifest = r#"[{"Config":"config.json","RepoTags":["forged:1"],"Layers":[]}]"#;
    let config = Member::new("config.json", b'0').octal(124, 12, SIZE).bytes();
    fs::write(&archive, [file("manifest.json", manifest), config].concat()).expect("ours to write");
    let file = fs::OpenOptions::new().write(true).open(&archive).expect("just written");
    file.set_len(file.metadata().expect("open").len() + SIZE + 1024).expect("a hole");
    let command = door.store.command(&["load", "-i", text(&archive)]);
    let says = ["large.tar: config.json has 67108864 bytes, 8388608 are allowed", "hint: "];
    Watch::new(&door.store).refuses(&command, LIMIT, &says);
}
