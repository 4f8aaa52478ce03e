//! What umoci makes of layers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_oci::Digest;
use kiln_oci::image::media_type;
use serde_json::{Value, json};

pub(crate) fn is_there() -> bool {
    super::is_there("umoci")
}

/// Whether it reads what this maker of the corpus packs: plain tars, of whose members it knows each.
pub(crate) fn reads(maker: &str) -> bool {
    ["tar ", "bsdtar ", "python3 "].iter().any(|program| maker.starts_with(program))
}

/// Unpacks plain layers, lowest first, below `work`; where. `None`: it refuses a kind of member, which is told:
/// GNU's sparse files, global headers, contiguous files.
#[track_caller]
pub(crate) fn unpack(layers: &[Vec<u8>], work: &Path, what: &str) -> Option<PathBuf> {
    let (layout, rootfs) = (work.join("layout"), work.join("by-umoci"));
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let blob = |kind: &str, bytes: &[u8]| -> Value {
        let digest = Digest::of(bytes);
        fs::write(layout.join("blobs").join(digest.to_string().replace(':', "/")), bytes).unwrap();
        json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
    };
    let listed: Vec<Value> = layers.iter().map(|layer| blob(media_type::OCI_LAYER, layer)).collect();
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": []
    });
    let config = blob(media_type::OCI_CONFIG, config.to_string().as_bytes());
    let manifest = json!({"schemaVersion": 2, "config": config, "layers": listed});
    let mut manifest = blob(media_type::OCI_MANIFEST, manifest.to_string().as_bytes());
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "x"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    let image = format!("{}:x", layout.display());
    let mut umoci = Command::new("umoci");
    let output = umoci.args(["raw", "unpack", "--image", &image]).arg(&rootfs).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && told.contains("unknown typeflag") {
        eprintln!("NOT READ by umoci: {what}");
        return None;
    }
    assert!(output.status.success(), "{what}: {told}");
    Some(rootfs)
}
