//! Each document and what is said of it.

use crate::Digest;
use crate::image::media_type::{OCI_INDEX, OCI_MANIFEST};

use super::*;

/// `D` stands for a digest.
#[track_caller]
fn check<T>(read: impl Fn(&[u8]) -> Result<T, DocumentError>, json: &str, says: &str) {
    let json = json.replace("\"D\"", &format!("\"{}\"", Digest::of(b"")));
    match read(json.as_bytes()) {
        Ok(_) => assert_eq!(says, "", "{json} is accepted"),
        Err(error) => {
            let text = error.to_string();
            assert!(!says.is_empty() && text.contains(says), "{json}: {text}");
        }
    }
}

#[track_caller]
fn check_manifest(json: &str, says: &str) {
    check(|json| read_manifest(json, OCI_MANIFEST), json, says);
}

#[track_caller]
fn check_index(json: &str, says: &str) {
    check(|json| read_index(json, OCI_INDEX), json, says);
}

/// A config with this in `config` and that beside it.
#[track_caller]
fn check_config(inside: &str, beside: &str, says: &str) {
    let json = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{{inside}}},"rootfs":{{"type":"layers","diff_ids":["D"]}}{beside}}}"#
    );
    check(|json| read_config(json, 1), &json, says);
}

#[test]
fn a_manifest_is_a_manifest_and_nothing_else() {
    let config = r#""config":{"mediaType":"c","digest":"D","size":1}"#;
    check_manifest(&format!(r#"{{"schemaVersion":2,{config},"layers":[]}}"#), "");
    check_manifest(
        &format!(r#"{{"schemaVersion":2,{config},"layers":[],"manifests":[]}}"#),
        "manifest and an index",
    );
    check_manifest(r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#, "layers, manifests");
    check_manifest(
        &format!(r#"{{"schemaVersion":2,{config},"layers":[],"Layers":[]}}"#),
        "\"Layers\" is \"layers\"",
    );
    check_manifest(
        &format!(r#"{{"schemaVersion":3,{config},"layers":[]}}"#),
        "schemaVersion: \"3\" is not 2",
    );
    check_manifest(&format!(r#"{{{config},"layers":[]}}"#), "schemaVersion");
    check_manifest(r#"{"schemaVersion":1,"fsLayers":[],"signatures":[]}"#, "schema 1");
    check_manifest(
        &format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}",{config},"layers":[]}}"#),
        "mediaType: it says \"application/vnd.oci.image.index.v1+json\"",
    );
    check_manifest("[]", "schemaVersion");
}

#[test]
fn descriptors_have_a_digest_and_a_size() {
    let with = |descriptor: &str, says: &str| {
        check_manifest(
            &format!(
                r#"{{"schemaVersion":2,"config":{{"mediaType":"c","digest":"D","size":1}},"layers":[{descriptor}]}}"#
            ),
            says,
        );
    };
    with(r#"{"mediaType":"l","digest":"D","size":9223372036854775807}"#, "");
    with(r#"{"mediaType":"l","digest":"D","size":-1}"#, "layers[0].size: ");
    with(r#"{"mediaType":"l","digest":"D","size":9223372036854775808}"#, "layers[0].size: no blob");
    with(r#"{"mediaType":"l","digest":"D","size":1e300}"#, "layers[0].size: no blob");
    with(r#"{"mediaType":"l","digest":"D","size":1.5}"#, "layers[0].size: ");
    with(r#"{"mediaType":"l","digest":"D","size":"1"}"#, "layers[0].size: ");
    with(
        r#"{"mediaType":"l","digest":"D","digest":"D","size":1}"#,
        "layers[0].digest: the name is there twice",
    );
    for digest in ["sha256:../../etc", "md5:00", &Digest::of(b"").to_string().to_uppercase(), "sha256:ab"] {
        with(&format!(r#"{{"mediaType":"l","digest":"{digest}","size":1}}"#), "layers[0].digest: digest ");
    }
    let many = vec![r#"{"mediaType":"l","digest":"D","size":1}"#; MAX_LAYERS + 1].join(",");
    with(&many, "more than 4096 layers");
}

#[test]
fn platforms_of_an_index_are_words() {
    let with = |platform: &str, says: &str| {
        check_index(
            &format!(
                r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"m","digest":"D","size":1,"platform":{platform}}}]}}"#
            ),
            says,
        );
    };
    with(r#"{"os":"windows","architecture":"amd64","os.version":"10.0.1/x"}"#, "");
    with(r#"{"os":"unknown","architecture":"unknown"}"#, "");
    with(r#"{"os":"../../etc","architecture":"amd64"}"#, "manifests[0].platform.os: \"../../etc\"");
    with(r#"{"os":"linux","architecture":".."}"#, "manifests[0].platform.architecture");
    with(r#"{"os":"linux","architecture":"arm","variant":"v7/.."}"#, "manifests[0].platform.variant");
}

#[test]
fn configs_run_something() {
    check_config(r#""Env":["A=","B=1=2"],"Entrypoint":["x"]"#, "", "");
    check_config(r#""Env":["A=","B"]"#, "", "config.Env[1]: \"B\" is not");
    check_config(r#""Env":["=B"]"#, "", "config.Env[0]");
    check_config(r#""Env":["A=\u0000"]"#, "", "config.Env: \"A=\\0\" has a NUL");
    check_config(r#""WorkingDir":"/a\u0000b""#, "", "config.WorkingDir");
    check_config(r#""Entrypoint":"sh""#, "", "config.Entrypoint: invalid type: string");
    check_config("", r#","history":[{"empty_layer":true},{}]"#, "");
    check_config("", r#","history":[{},{}]"#, "history without empty_layer: there are 2, for 1 layers");
    check_config("", r#","variant":"../v7""#, "variant: \"../v7\"");
    check_config("", r#","OS":"plan9""#, "\"OS\" is \"os\"");
    check_config(r#""Labels":{"a":"1","a":"2"}"#, "", "config.Labels.a: the name is there twice");
    check(
        |json| read_config(json, 2),
        r#"{"architecture":"a","os":"l","rootfs":{"type":"layers"}}"#,
        "diff_ids: there are 0",
    );
}

#[test]
fn depth_and_number_of_values_are_bound() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let any = |json: &[u8]| read::<serde::de::IgnoredAny>(json);
    check(any, &nested(64), "");
    check(any, &nested(65), "more than 64 levels");
    check(any, &nested(100_000), "[0][0]");
    check(any, &"{\"a\":".repeat(100_000), "a.a.a");
    let many = format!("[{}0]", "0,".repeat(600_000));
    check(any, &many, "more than 500000 values");
    check(any, "{} {}", "no valid JSON");
    check(any, "", "no valid JSON");
    check(any, "{\"a\":1e999}", "no valid JSON");
}

#[test]
fn what_refers_to_something_says_so_and_what_it_is() {
    let digest = Digest::of(b"");
    let blob = |kind: &str| format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":0}}"#);
    let read = |json: String| read_referring(json.as_bytes()).expect("a document");
    let own = read(format!(
        r#"{{"subject":{},"artifactType":"a/sbom","config":{},"annotations":{{"by":"x"}}}}"#,
        blob("m"),
        blob("c")
    ));
    assert_eq!(own.subject.as_ref().map(|subject| subject.digest), Some(digest));
    let listed = own.listed(&Descriptor::new("m", digest, 3));
    assert_eq!((artifact_type(&listed), listed.size), ("a/sbom", 3));
    assert_eq!(listed.annotations["by"], "x");
    // What has no word of its own is what its config is.
    let by_config = read(format!(r#"{{"artifactType":"","config":{}}}"#, blob("c")));
    assert_eq!((by_config.artifact_type.as_str(), by_config.subject), ("c", None));
    let silent = read("{}".to_owned());
    assert_eq!(artifact_type(&silent.listed(&Descriptor::new("m", digest, 3))), "");
    assert!(read_referring(br#"{"subject":{"mediaType":"m"}}"#).is_err());
}
