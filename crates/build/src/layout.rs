//! One image out of an OCI layout directory (`oci-layout://…`).

use std::path::Path;

use kiln_content::ImageRecord;
use kiln_oci::image::{Descriptor, Index};
use kiln_oci::{Digest, Platform, document};

use crate::archive::{Archive, broken};
use crate::load::{MAX_MANIFEST_BYTES, blob_name, layout_index, load_picked, oci_name, pick_manifest};
use crate::load_oci::refers;
use crate::{BuildCancel, BuildError, Engine};

/// Which image of a layout is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayoutImage {
    /// The only one, or the one with the tag `latest`.
    Default,
    /// The one with this tag in the index.
    Tag(String),
    /// The one whose manifest or index has this digest.
    Digest(Digest),
}

/// Loads one image, for `platform` if there is a choice, from the OCI layout directory at `path`. No name is set.
///
/// # Errors
/// [`BuildError::Archive`] when it is no layout, has no such image or is damaged.
pub fn load_layout(
    engine: &Engine,
    path: &Path,
    image: &LayoutImage,
    platform: &Platform,
    cancel: &BuildCancel,
) -> Result<ImageRecord, BuildError> {
    let archive = Archive::open_dir(path)?;
    let index = layout_index(&archive)?;
    let descriptor = find_in_layout(&archive, &index, image)?;
    let picked = pick_manifest(&archive, &descriptor, platform, 0)?;
    load_picked(engine, &archive, &picked, true, cancel)
}

pub(crate) fn find_in_layout(
    archive: &Archive,
    index: &Index,
    image: &LayoutImage,
) -> Result<Descriptor, BuildError> {
    let tagged = |tag: &str| {
        let fits = |descriptor: &&Descriptor| {
            let short = descriptor.annotations.get("org.opencontainers.image.ref.name");
            // Docker writes the whole name there.
            let named = oci_name(descriptor).is_some_and(|name| name.tag() == Some(tag));
            short.is_some_and(|short| short == tag) || named
        };
        index.manifests.iter().find(fits).cloned()
    };
    match image {
        LayoutImage::Tag(tag) => tagged(tag)
            .ok_or_else(|| broken(archive.path(), &format!("index.json has no image with the tag {tag:?}"))),
        LayoutImage::Default => {
            if let [only] = index.manifests.as_slice() {
                return Ok(only.clone());
            }
            if let Some(latest) = tagged("latest") {
                return Ok(latest);
            }
            // What is about an image is none to choose.
            let images: Vec<&Descriptor> =
                index.manifests.iter().filter(|listed| !refers(archive, listed)).collect();
            match images.as_slice() {
                [only] => Ok((*only).clone()),
                several => {
                    let count = several.len();
                    let why = format!("index.json lists {count} images: add `:TAG` or `@DIGEST`");
                    Err(broken(archive.path(), &why))
                }
            }
        }
        LayoutImage::Digest(digest) => {
            if let Some(found) = index.manifests.iter().find(|found| found.digest == *digest) {
                return Ok(found.clone());
            }
            // One that only another index names: its own bytes say what it is.
            let bytes = archive.read_small(&blob_name(digest), MAX_MANIFEST_BYTES)?;
            let kind = archive.parse(&blob_name(digest), &bytes, document::own_media_type)?;
            Ok(Descriptor::new(&kind, *digest, bytes.len() as u64))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use kiln_oci::image::{ImageConfig, Manifest, media_type, to_json};
    use kiln_oci::{DiffId, Platform};

    use super::*;
    use crate::source::tests::Bench;

    /// A layout whose images each have one file, named after their tag.
    struct Layout {
        path: PathBuf,
        index: Index,
    }

    impl Layout {
        fn new(bench: &Bench, tags: &[&str]) -> Self {
            let path = bench.dir.path().join("layout");
            fs::create_dir_all(path.join("blobs/sha256")).unwrap();
            let json = br#"{"schemaVersion":2,"manifests":[]}"#;
            let mut layout = Self { path, index: serde_json::from_slice(json).unwrap() };
            for tag in tags {
                let mut manifest = layout.image(tag);
                manifest.annotations.insert("org.opencontainers.image.ref.name".into(), (*tag).into());
                layout.index.manifests.push(manifest);
            }
            fs::write(layout.path.join("index.json"), to_json(&layout.index)).unwrap();
            layout
        }

        fn blob(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
            let digest = Digest::of(bytes);
            fs::write(self.path.join(blob_name(&digest)), bytes).unwrap();
            Descriptor::new(media_type, digest, bytes.len() as u64)
        }

        fn image(&self, tag: &str) -> Descriptor {
            let mut header = tar::Header::new_gnu();
            header.set_size(0);
            let mut tar = tar::Builder::new(Vec::new());
            tar.append_data(&mut header, tag, &b""[..]).unwrap();
            let layer = self.blob(media_type::OCI_LAYER, &tar.into_inner().unwrap());
            let mut config = ImageConfig::empty(&Platform::host());
            config.rootfs.diff_ids.push(DiffId(layer.digest));
            let config = self.blob(media_type::OCI_CONFIG, &to_json(&config));
            let mut manifest: Manifest = serde_json::from_value(serde_json::json!({
                "schemaVersion": 2, "config": config, "layers": []
            }))
            .unwrap();
            manifest.layers.push(layer);
            self.blob(media_type::OCI_MANIFEST, &to_json(&manifest))
        }
    }

    fn load(bench: &Bench, layout: &Layout, image: &LayoutImage) -> Result<String, BuildError> {
        let record = load_layout(&bench.engine, &layout.path, image, &Platform::host(), &bench.cancel)?;
        let files = fs::read_dir(bench.path(&record.snapshot.unwrap())).unwrap();
        let names: Vec<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        Ok(names.join(" "))
    }

    #[test]
    fn an_image_is_found_by_tag_digest_or_being_alone() {
        let bench = Bench::new();
        let layout = Layout::new(&bench, &["v1", "latest", "example.com/app:v2"]);
        let tag = |tag: &str| LayoutImage::Tag(tag.to_owned());
        assert_eq!(load(&bench, &layout, &tag("v1")).unwrap(), "v1");
        assert_eq!(load(&bench, &layout, &LayoutImage::Default).unwrap(), "latest");
        let digest = LayoutImage::Digest(layout.index.manifests[0].digest);
        assert_eq!(load(&bench, &layout, &digest).unwrap(), "v1");
        // In no index, but in the layout.
        let hidden = LayoutImage::Digest(layout.image("hidden").digest);
        assert_eq!(load(&bench, &layout, &hidden).unwrap(), "hidden");
        let absent = load(&bench, &layout, &tag("v3")).unwrap_err();
        assert!(absent.to_string().contains("no image with the tag \"v3\""), "{absent}");

        let bench = Bench::new();
        let layout = Layout::new(&bench, &["v1"]);
        assert_eq!(load(&bench, &layout, &LayoutImage::Default).unwrap(), "v1");
        let bench = Bench::new();
        let layout = Layout::new(&bench, &["v1", "v2"]);
        let many = load(&bench, &layout, &LayoutImage::Default).unwrap_err();
        assert!(many.to_string().contains("lists 2 images"), "{many}");
    }

    #[test]
    fn an_index_that_names_the_same_a_thousand_times_is_read_once() {
        let bench = Bench::new();
        let mut layout = Layout::new(&bench, &["v1"]);
        let mut below = layout.index.manifests[0].clone();
        below.annotations.clear();
        for _ in 0..3 {
            layout.index.manifests = vec![below; 1000];
            below = layout.blob(media_type::OCI_INDEX, &to_json(&layout.index));
        }
        layout.index.manifests = vec![below];
        fs::write(layout.path.join("index.json"), to_json(&layout.index)).unwrap();
        assert_eq!(load(&bench, &layout, &LayoutImage::Default).unwrap(), "v1");
        let kept = bench.engine.store.survey().unwrap().kept;
        // Three indexes, a manifest, a config and a layer.
        assert_eq!(kept.len(), 6);
    }

    #[test]
    fn a_layout_that_is_damaged_or_none_is_said() {
        let bench = Bench::new();
        let layout = Layout::new(&bench, &["v1"]);
        let manifest = layout.path.join(blob_name(&layout.index.manifests[0].digest));
        fs::write(&manifest, "{}").unwrap();
        let damaged = load(&bench, &layout, &LayoutImage::Default).unwrap_err();
        assert!(damaged.to_string().contains("is not what its descriptor says"), "{damaged}");
        fs::remove_file(&manifest).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &manifest).unwrap();
        let outside = load(&bench, &layout, &LayoutImage::Default).unwrap_err();
        assert!(outside.to_string().contains("is missing"), "{outside}");
        fs::remove_file(layout.path.join("index.json")).unwrap();
        assert!(matches!(load(&bench, &layout, &LayoutImage::Default), Err(BuildError::Archive { .. })));
        let absent = load_layout(
            &bench.engine,
            Path::new("/absent"),
            &LayoutImage::Default,
            &Platform::host(),
            &bench.cancel,
        );
        assert!(matches!(absent, Err(BuildError::Unreadable { .. })));
        assert!(bench.engine.snapshots.list().unwrap().0.is_empty());
    }
}
