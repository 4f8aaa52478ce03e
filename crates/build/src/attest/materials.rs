//! What a build was made of: images, repositories, files of web servers; each by its digest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use kiln_llb::{Definition, Git, Op, Source, VertexId};
use kiln_oci::image::media_type;
use kiln_oci::{Digest, Platform, Reference};
use serde::Serialize;

use crate::purl;

/// A digest with the name of its algorithm.
pub(super) type Digests = BTreeMap<&'static str, String>;

/// Something that a build was made of (SLSA's `ResourceDescriptor`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Material {
    pub(super) uri: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) digest: Digests,
    /// What the digest is of, where that is not what the URI leads to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) media_type: Option<&'static str>,
}

/// An image that a build stands on, as it was found.
#[derive(Debug, Clone)]
pub(crate) struct Stood {
    pub(crate) reference: Reference,
    /// What it was asked for.
    pub(crate) platform: Platform,
    /// Digest of its config.
    pub(crate) config: Digest,
    /// Digest of what its name leads to; `None`: it came from no registry.
    pub(crate) root: Option<Digest>,
}

/// What came from outside while a build ran, by the vertex that brought it.
#[derive(Debug, Default)]
pub(crate) struct Found(Mutex<BTreeMap<usize, (&'static str, String)>>);

impl Found {
    /// The vertex brought this.
    pub(crate) fn note(&self, vertex: usize, digest: (&'static str, String)) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(vertex, digest);
    }

    fn of(&self, vertex: VertexId) -> Digests {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&vertex.0).cloned().into_iter().collect()
    }
}

/// A commit with the name of the algorithm that named it.
pub(crate) fn of_git(commit: &str) -> (&'static str, String) {
    (if commit.len() == 64 { "sha256" } else { "sha1" }, commit.to_owned())
}

/// A reference of git as BuildKit writes it: `REMOTE#REF:DIR`.
pub(super) fn git_uri(git: &Git) -> String {
    let dir = if git.subdir.is_empty() { String::new() } else { format!(":{}", git.subdir) };
    let mark = if git.reference.is_empty() && dir.is_empty() { "" } else { "#" };
    format!("{}{mark}{}{dir}", git.remote, git.reference)
}

/// All vertices that `result` needs, itself included.
pub(super) fn needed(definition: &Definition, result: Option<VertexId>) -> BTreeSet<VertexId> {
    let mut needed: BTreeSet<VertexId> = result.into_iter().collect();
    // Inputs stand before their users.
    for id in (0..definition.vertices().len()).rev().map(VertexId) {
        if needed.contains(&id) {
            needed.extend(definition.vertex(id).inputs.iter().copied());
        }
    }
    needed
}

/// What these vertices brought from outside, each once; directories of the client have no digest and are not among
/// it.
pub(super) fn materials(
    definition: &Definition,
    needed: &BTreeSet<VertexId>,
    stood: &[Stood],
    found: &Found,
) -> Vec<Material> {
    let mut all: BTreeSet<Material> = BTreeSet::new();
    for id in needed {
        match &definition.vertex(*id).op {
            Op::Source(Source::Image(image)) => {
                let known = stood.iter().filter(|base| base.config == image.config);
                all.extend(known.map(of_image));
            }
            Op::Source(Source::Git(git)) => {
                all.insert(Material { uri: git_uri(git), digest: found.of(*id), media_type: None });
            }
            Op::Source(Source::Http(http)) => {
                all.insert(Material { uri: http.url.clone(), digest: found.of(*id), media_type: None });
            }
            Op::Source(Source::Local(_)) | Op::Exec(_) | Op::File(_) | Op::Merge(_) => {}
        }
    }
    all.into_iter().collect()
}

fn of_image(base: &Stood) -> Material {
    let uri = purl::of_image(&base.reference, &base.platform);
    // What no registry has is known by its ID alone.
    let (digest, media_type) = match base.root.or(base.reference.digest().copied()) {
        Some(root) => (root, None),
        None => (base.config, Some(media_type::OCI_CONFIG)),
    };
    Material { uri, digest: [("sha256", digest.hex())].into(), media_type }
}

#[cfg(test)]
mod tests {
    use kiln_llb::{InputIndex, Merge, SourceImage, Vertex};

    use super::*;

    fn image(name: &str) -> (Op, Stood) {
        let (reference, config): (Reference, _) = (name.parse().unwrap(), Digest::of(name.as_bytes()));
        let op = SourceImage { reference: reference.clone(), config, rootfs: config };
        let platform = "linux/amd64".parse().unwrap();
        (Op::Source(Source::Image(op)), Stood { reference, platform, config, root: None })
    }

    #[test]
    fn only_what_the_target_needs_is_listed() {
        let mut definition = Definition::default();
        let ((one, mut first), (other, second), (unused, third)) = (image("one"), image("other"), image("x"));
        first.root = Some(Digest::of(b"index"));
        let git = Git {
            remote: "https://host/r.git".to_owned(),
            reference: "main".to_owned(),
            checksum: None,
            subdir: "d".to_owned(),
            keep_git_dir: false,
            submodules: true,
            mtime: Default::default(),
            fetch_by_commit: false,
        };
        let ids: Vec<VertexId> = [one, other, unused, Op::Source(Source::Git(git))]
            .into_iter()
            .map(|op| definition.push(Vertex { op, inputs: Vec::new() }))
            .collect();
        let merge = Op::Merge(Merge { base: Some(InputIndex(0)), layer: InputIndex(1) });
        let below = definition.push(Vertex { op: merge.clone(), inputs: vec![ids[0], ids[3]] });
        let top = definition.push(Vertex { op: merge, inputs: vec![below, ids[1]] });
        let found = Found::default();
        found.note(ids[3].0, of_git(&"a".repeat(40)));
        let needed = needed(&definition, Some(top));
        assert_eq!(needed.len(), 5);
        let stood = [first, second, third];
        let all = materials(&definition, &needed, &stood, &found);
        let text: Vec<String> = all
            .iter()
            .map(|material| format!("{} {:?} {:?}", material.uri, material.digest, material.media_type))
            .collect();
        let (index, other) = (Digest::of(b"index").hex(), Digest::of(b"other").hex());
        assert_eq!(
            text,
            [
                format!("https://host/r.git#main:d {{\"sha1\": \"{}\"}} None", "a".repeat(40)),
                format!("pkg:docker/one@latest?platform=linux%2Famd64 {{\"sha256\": \"{index}\"}} None"),
                format!(
                    "pkg:docker/other@latest?platform=linux%2Famd64 {{\"sha256\": \"{other}\"}} Some({:?})",
                    media_type::OCI_CONFIG
                ),
            ]
        );
        assert!(materials(&definition, &super::needed(&definition, None), &stood, &found).is_empty());
    }
}
