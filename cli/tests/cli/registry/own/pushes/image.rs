//! Small images, and what a client sends of them.

use std::io::Write;

use kiln_oci::Digest;
use serde_json::{Value, json};

use super::super::client::Client;

pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

/// An image with one layer, of one file.
pub(super) struct Image {
    pub(super) layer: Vec<u8>,
    pub(super) layer_kind: &'static str,
    pub(super) config: Vec<u8>,
}

impl Image {
    pub(super) fn new(name: &[u8], content: &str) -> Self {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1);
        header.set_cksum();
        let mut tar = tar::Builder::new(Vec::new());
        tar.append(&header, content.as_bytes()).unwrap();
        Self::of(tar.into_inner().unwrap())
    }

    pub(super) fn of(layer: Vec<u8>) -> Self {
        let config = json!({
            "architecture": kiln_oci::Platform::host().architecture, "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer)] },
        });
        Self { layer, layer_kind: TAR, config: config.to_string().into_bytes() }
    }

    /// The same layer, as somebody's own gzip makes it.
    pub(super) fn packed(self, level: u32) -> Self {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
        out.write_all(&self.layer).unwrap();
        Self {
            layer: out.finish().unwrap(),
            layer_kind: "application/vnd.oci.image.layer.v1.tar+gzip",
            ..self
        }
    }

    /// With white space that nobody else would write.
    pub(super) fn manifest(&self) -> Vec<u8> {
        let blob = |bytes: &[u8], kind: &str| json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": blob(&self.config, "application/vnd.oci.image.config.v1+json"),
            "layers": [blob(&self.layer, self.layer_kind)],
        });
        format!("{manifest:#}\n\n").into_bytes()
    }

    pub(super) fn push_blobs(&self, client: &mut Client, name: &str) {
        client.push_blob(name, &self.config);
        client.push_blob(name, &self.layer);
    }

    /// Its manifest's digest.
    #[track_caller]
    pub(super) fn push(&self, client: &mut Client, name: &str, tag: &str) -> Digest {
        self.push_blobs(client, name);
        client.push_manifest(name, tag, &self.manifest())
    }

    /// Whether it is there just as it was pushed.
    #[track_caller]
    pub(super) fn check(&self, client: &mut Client, name: &str, which: &str) {
        let reply = client.get(&format!("/v2/{name}/manifests/{which}")).expect(200);
        assert_eq!(reply.body, self.manifest());
        for blob in [&self.config, &self.layer] {
            assert!(client.get(&format!("/v2/{name}/blobs/{}", Digest::of(blob))).expect(200).body == *blob);
        }
    }
}

/// An index of the first of these for this machine, and of the second for another one.
pub(super) fn index(images: [(&Image, &[u8]); 2]) -> Vec<u8> {
    let host = kiln_oci::Platform::host().architecture;
    let other = if host == "arm64" { "riscv64" } else { "arm64" };
    let of = images.iter().zip([host.as_str(), other]).map(|((_, manifest), architecture)| {
        let platform = json!({ "os": "linux", "architecture": architecture });
        json!({ "mediaType": MANIFEST, "digest": Digest::of(manifest), "size": manifest.len(), "platform": platform })
    });
    let of: Vec<Value> = of.collect();
    json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": of }).to_string().into_bytes()
}
