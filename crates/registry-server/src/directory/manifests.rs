//! Manifests, tags, and what refers to what.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use kiln_oci::Digest;
use kiln_oci::document::{self, DocumentError};
use kiln_oci::image::Descriptor;
use serde::Deserialize;

use super::collect::Reach;
use super::{Directory, DirectoryError, digests, is_gone, is_unreadable, names, remove, sync};
use crate::route::{Name, Tag, Which};

/// A manifest or an index as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) bytes: Vec<u8>,
}

/// What a registry reads of a manifest: all else is for those who run it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Reads {
    #[serde(default)]
    pub(crate) schema_version: Option<u64>,
    #[serde(default)]
    pub(crate) media_type: Option<String>,
    #[serde(default)]
    pub(crate) artifact_type: Option<String>,
    #[serde(default)]
    pub(crate) config: Option<Descriptor>,
    #[serde(default)]
    pub(crate) layers: Vec<Descriptor>,
    #[serde(default)]
    pub(crate) manifests: Vec<Descriptor>,
    #[serde(default)]
    pub(crate) subject: Option<Descriptor>,
    #[serde(default)]
    pub(crate) annotations: Option<serde_json::Map<String, serde_json::Value>>,
}

/// A tag that is written and leads nowhere yet; dropping it takes it back.
pub(crate) struct ReadyTag {
    new: PathBuf,
    path: PathBuf,
}

impl Drop for ReadyTag {
    fn drop(&mut self) {
        // Renamed away once it was set.
        let _ = fs::remove_file(&self.new);
    }
}

/// Why a manifest is not put.
pub(crate) enum NotPut {
    /// The repository does not have this blob, or manifest.
    Lacks {
        digest: Digest,
        is_manifest: bool,
    },
    Directory(DirectoryError),
}

impl From<DirectoryError> for NotPut {
    fn from(error: DirectoryError) -> Self {
        Self::Directory(error)
    }
}

impl Reads {
    pub(crate) fn new(bytes: &[u8]) -> Result<Self, DocumentError> {
        document::read(bytes)
    }

    /// The blobs that have to be there.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        // Layers that may not be distributed are elsewhere, and nobody sends them.
        let is_foreign =
            |kind: &str| kind.contains(".nondistributable.") || kind.contains(".rootfs.foreign.");
        self.config.iter().chain(&self.layers).filter(move |blob| !is_foreign(&blob.media_type))
    }

    /// The same with those that are elsewhere, and may be here as well.
    pub(crate) fn all_blobs(&self) -> impl Iterator<Item = &Descriptor> {
        self.config.iter().chain(&self.layers)
    }

    /// Whether this is an image that could be unpacked, not something that is packed like one: a signature, a
    /// chart, an attestation.
    pub(crate) fn is_image(&self) -> bool {
        use kiln_oci::image::media_type::{
            DOCKER_CONFIG, DOCKER_LAYER, DOCKER_LAYER_GZIP, OCI_CONFIG, OCI_LAYER, OCI_LAYER_GZIP,
            OCI_LAYER_ZSTD,
        };
        const LAYERS: [&str; 9] = [
            OCI_LAYER,
            OCI_LAYER_GZIP,
            OCI_LAYER_ZSTD,
            DOCKER_LAYER,
            DOCKER_LAYER_GZIP,
            "application/vnd.oci.image.layer.nondistributable.v1.tar",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        ];
        let has_kind = self.artifact_type.as_deref().is_some_and(|kind| !kind.is_empty());
        let config = self.config.as_ref().map(|config| config.media_type.as_str());
        !has_kind
            && self.subject.is_none()
            && matches!(config, Some(OCI_CONFIG | DOCKER_CONFIG))
            && self.layers.iter().all(|layer| LAYERS.contains(&layer.media_type.as_str()))
    }

    /// What a list of referrers calls it.
    fn kind(&self) -> Option<&str> {
        let own = self.artifact_type.as_deref().filter(|kind| !kind.is_empty());
        own.or_else(|| Some(self.config.as_ref()?.media_type.as_str()))
    }
}

impl Directory {
    pub(super) fn manifest_path(&self, name: &Name, digest: &Digest) -> PathBuf {
        self.repository(name).join("_manifests").join(digest.hex())
    }

    fn tag_path(&self, name: &Name, tag: &Tag) -> PathBuf {
        self.repository(name).join("_tags").join(tag.as_str())
    }

    pub(super) fn referrers_path(&self, name: &Name, subject: &Digest) -> PathBuf {
        self.repository(name).join("_referrers").join(subject.hex())
    }

    /// Whether there is such a tag.
    pub(crate) fn has_tag(&self, name: &Name, tag: &Tag) -> bool {
        self.tag_path(name, tag).exists()
    }

    /// Where a tag leads.
    pub(crate) fn tag(&self, name: &Name, tag: &Tag) -> Result<Option<Digest>, DirectoryError> {
        let path = self.tag_path(name, tag);
        match fs::read_to_string(&path) {
            Ok(text) => match text.trim_end().parse() {
                Ok(digest) => Ok(Some(digest)),
                Err(_) => Err(DirectoryError::Damaged { path }),
            },
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) if is_unreadable(&error) => Err(DirectoryError::Damaged { path }),
            Err(error) => Err(DirectoryError::host("read", path)(error)),
        }
    }

    /// A manifest of a repository; its digest was compared again.
    pub(crate) fn manifest(&self, name: &Name, which: &Which) -> Result<Option<Manifest>, DirectoryError> {
        let digest = match which {
            Which::Digest(digest) => *digest,
            Which::Tag(tag) => match self.tag(name, tag)? {
                Some(digest) => digest,
                None => return Ok(None),
            },
        };
        read(&self.manifest_path(name, &digest), digest)
    }

    /// Puts a manifest, then the tag that leads to it. What it needs has to be there.
    pub(crate) fn put_manifest(
        &self,
        name: &Name,
        tag: Option<&Tag>,
        manifest: &Manifest,
        reads: &Reads,
    ) -> Result<(), NotPut> {
        let publishing = self.publishing.read().unwrap_or_else(PoisonError::into_inner);
        for blob in reads.blobs() {
            if !self.has_blob(name, &blob.digest)? {
                return Err(NotPut::Lacks { digest: blob.digest, is_manifest: false });
            }
        }
        for child in &reads.manifests {
            if !self.has_manifest(name, &child.digest) {
                return Err(NotPut::Lacks { digest: child.digest, is_manifest: true });
            }
        }
        let is_new = self.store_manifest(name, manifest, reads)?;
        if let Some(tag) = tag {
            self.write_tag(name, tag, &manifest.digest)?;
        }
        for blob in reads.all_blobs() {
            self.fresh.add(&blob.digest);
        }
        drop(publishing);
        let has_subject =
            || reads.subject.as_ref().is_some_and(|subject| self.has_manifest(name, &subject.digest));
        if tag.is_some() || !self.waiting.is_strict() || has_subject() {
            self.needs(name, &manifest.digest);
        }
        if tag.is_none() && is_new && !has_subject() {
            self.waiting.add_manifest(name, &manifest.digest, manifest.bytes.len() as u64);
        }
        Ok(())
    }

    /// What this manifest leads to waits for nothing any more. Costs reading all of it where that is counted.
    fn needs(&self, name: &Name, digest: &Digest) {
        if !self.waiting.is_counted() {
            return;
        }
        // Of what is damaged the next collection knows more.
        for (manifest, blobs) in self.reach(name, [*digest], Reach::Down).unwrap_or_default() {
            self.waiting.forget_manifest(name, &manifest);
            for blob in &blobs {
                // A collection that has looked here before knows nothing of the tag.
                self.fresh.add(blob);
                self.waiting.forget(blob);
            }
        }
    }

    /// A tag that leads to `digest` once [`Directory::set_tag`] is told so. All that may want for room is done then.
    pub(crate) fn ready_tag(
        &self,
        name: &Name,
        tag: &Tag,
        digest: &Digest,
    ) -> Result<ReadyTag, DirectoryError> {
        let path = self.tag_path(name, tag);
        self.make_dirs(path.parent().unwrap_or(&self.root))?;
        let new = self.new_file();
        let ready = ReadyTag { new: new.clone(), path };
        let write = || {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            writeln!(file, "{digest}")?;
            file.sync_data()
        };
        write().map_err(DirectoryError::host("written", &new))?;
        Ok(ready)
    }

    /// The tag leads to the manifest from now on, which is put again if somebody has removed it meanwhile.
    pub(crate) fn set_tag(
        &self,
        name: &Name,
        ready: &ReadyTag,
        manifest: &Manifest,
        reads: &Reads,
    ) -> Result<(), DirectoryError> {
        let publishing = self.publishing.read().unwrap_or_else(PoisonError::into_inner);
        self.store_manifest(name, manifest, reads)?;
        let dir = ready.path.parent().unwrap_or(&self.root);
        // A collection may have found it empty.
        self.make_dirs(dir)?;
        fs::rename(&ready.new, &ready.path).map_err(DirectoryError::host("written", &ready.path))?;
        sync(dir)?;
        drop(publishing);
        self.needs(name, &manifest.digest);
        Ok(())
    }

    /// Says that somebody has asked for a manifest: who finds it here will not send it, so it stays as one that came just
    /// now.
    pub(crate) fn ask_for(&self, name: &Name, digest: &Digest) {
        let path = self.manifest_path(name, digest);
        if fs::metadata(&path).is_ok_and(|stat| super::blobs::is_recent(&stat)) {
            return;
        }
        // Nobody decides meanwhile that it is old.
        let _publishing = self.publishing.read().unwrap_or_else(PoisonError::into_inner);
        if let Ok(file) = fs::File::open(path) {
            let _ = super::blobs::touch(&file);
        }
    }

    /// Whether there is such a manifest; nobody looks into it.
    pub(crate) fn has_manifest(&self, name: &Name, digest: &Digest) -> bool {
        self.manifest_path(name, digest).exists()
    }

    /// The same without looking for what it needs, as a mirror has it: that comes when somebody asks for it.
    pub(crate) fn mirror_manifest(
        &self,
        name: &Name,
        tag: Option<&Tag>,
        manifest: &Manifest,
    ) -> Result<(), DirectoryError> {
        let _publishing = self.publishing.read().unwrap_or_else(PoisonError::into_inner);
        self.store_manifest(name, manifest, &Reads::default())?;
        tag.map_or(Ok(()), |tag| self.write_tag(name, tag, &manifest.digest))
    }

    /// Whether it was not there before.
    fn store_manifest(
        &self,
        name: &Name,
        manifest: &Manifest,
        reads: &Reads,
    ) -> Result<bool, DirectoryError> {
        // First: a referrer that is none yet is left out of lists, one that is in none would be lost.
        if let Some(subject) = &reads.subject {
            let link = self.referrers_path(name, &subject.digest).join(manifest.digest.hex());
            if !link.exists() {
                self.write(&link, b"")?;
            }
        }
        let path = self.manifest_path(name, &manifest.digest);
        let mut text = manifest.media_type.clone().into_bytes();
        text.push(b'\n');
        text.extend_from_slice(&manifest.bytes);
        let is_new = fs::read(&path).map_or(true, |old| old != text);
        if is_new {
            self.write(&path, &text)?;
        } else if let Ok(file) = fs::File::open(&path) {
            // It has no tag yet that would keep it.
            let _ = super::blobs::touch(&file);
        }
        Ok(is_new)
    }

    fn write_tag(&self, name: &Name, tag: &Tag, digest: &Digest) -> Result<(), DirectoryError> {
        if self.tag(name, tag).ok().flatten() == Some(*digest) {
            return Ok(());
        }
        self.write(&self.tag_path(name, tag), format!("{digest}\n").as_bytes())
    }

    /// The configs of the images that a manifest is, or leads to; an empty set: it is something else. And whether all that
    /// it leads to is there. `None`: that is more than anybody wants to read. Costs reading it.
    pub(crate) fn image_configs(
        &self,
        name: &Name,
        manifest: &Manifest,
    ) -> Result<Option<(HashSet<Digest>, bool)>, DirectoryError> {
        let mut is_whole = true;
        let mut configs = HashSet::new();
        // A client says how many there are, and how large they are.
        const MOST: usize = 1000;
        const MOST_BYTES: usize = 64 << 20;
        let mut bytes = manifest.bytes.len();
        let (mut seen, mut open) = (HashSet::new(), Vec::new());
        let mut look = |bytes: &[u8], open: &mut Vec<Digest>| {
            // What was put could be read; what is damaged leads nowhere.
            let Ok(reads) = Reads::new(bytes) else { return };
            open.extend(reads.manifests.iter().map(|child| child.digest));
            configs.extend(reads.config.as_ref().filter(|_| reads.is_image()).map(|config| config.digest));
        };
        look(&manifest.bytes, &mut open);
        while let Some(digest) = open.pop() {
            if !seen.insert(digest) {
                continue;
            }
            match self.manifest(name, &Which::Digest(digest))? {
                Some(child) => {
                    bytes += child.bytes.len();
                    look(&child.bytes, &mut open);
                }
                None => is_whole = false,
            }
            if seen.len() > MOST || bytes > MOST_BYTES {
                return Ok(None);
            }
        }
        Ok(Some((configs, is_whole)))
    }

    /// Every tag of a repository, sorted.
    pub(crate) fn all_tags(&self, name: &Name) -> Result<Vec<Tag>, DirectoryError> {
        let tags = names(&self.repository(name).join("_tags"))?;
        Ok(tags.iter().filter_map(|tag| tag.parse().ok()).collect())
    }

    /// Removes a tag if it still leads to `digest`; whether it did.
    pub(crate) fn remove_tag(&self, name: &Name, tag: &Tag, digest: &Digest) -> Result<bool, DirectoryError> {
        let _publishing = self.publishing.write().unwrap_or_else(PoisonError::into_inner);
        if self.tag(name, tag)? != Some(*digest) {
            return Ok(false);
        }
        self.remove_durably(&self.tag_path(name, tag))
    }

    /// When the tag was written, or confirmed.
    pub(crate) fn tag_age(&self, name: &Name, tag: &Tag) -> Option<std::time::Duration> {
        fs::metadata(self.tag_path(name, tag)).ok()?.modified().ok()?.elapsed().ok()
    }

    /// The tag leads where it led.
    pub(crate) fn confirm_tag(&self, name: &Name, tag: &Tag) {
        if let Ok(file) = fs::File::open(self.tag_path(name, tag)) {
            let _ = file.set_times(fs::FileTimes::new().set_modified(std::time::SystemTime::now()));
        }
    }

    /// Removes a tag alone, or a manifest with all tags that lead to it; whether there was one.
    pub(crate) fn remove_manifest(&self, name: &Name, which: &Which) -> Result<bool, DirectoryError> {
        let digest = match which {
            Which::Tag(tag) => {
                let _publishing = self.publishing.write().unwrap_or_else(PoisonError::into_inner);
                return self.remove_durably(&self.tag_path(name, tag));
            }
            Which::Digest(digest) => digest,
        };
        let blobs = self.needed_by_this_alone(name, digest)?;
        let _publishing = self.publishing.write().unwrap_or_else(PoisonError::into_inner);
        let removed = self.forget_manifest(name, digest)?;
        self.count_again(name, digest, &blobs);
        Ok(removed)
    }

    /// Removes a manifest that no tag leads to; whether there was one, or `None`: a tag does.
    pub(crate) fn remove_untagged(
        &self,
        name: &Name,
        digest: &Digest,
    ) -> Result<Option<bool>, DirectoryError> {
        let blobs = self.needed_by_this_alone(name, digest)?;
        let _publishing = self.publishing.write().unwrap_or_else(PoisonError::into_inner);
        for tag in self.all_tags(name)? {
            if self.tag(name, &tag).ok().flatten() == Some(*digest) {
                return Ok(None);
            }
        }
        let removed = self.forget_manifest(name, digest)?;
        self.count_again(name, digest, &blobs);
        Ok(Some(removed))
    }

    /// What waits again once this manifest is gone. The next collection knows better. Costs reading the repository's
    /// manifests, and looking into every other.
    fn needed_by_this_alone(&self, name: &Name, digest: &Digest) -> Result<HashSet<Digest>, DirectoryError> {
        let mut blobs = HashSet::new();
        if !self.waiting.is_counted() {
            return Ok(blobs);
        }
        let read = |digest: &Digest| {
            let manifest = self.manifest(name, &Which::Digest(*digest)).ok().flatten();
            manifest.and_then(|manifest| Reads::new(&manifest.bytes).ok())
        };
        if let Some(reads) = read(digest) {
            blobs.extend(reads.all_blobs().map(|blob| blob.digest));
        }
        for other in self.manifests(name)? {
            if other != *digest
                && !blobs.is_empty()
                && let Some(reads) = read(&other)
            {
                for blob in reads.all_blobs() {
                    blobs.remove(&blob.digest);
                }
            }
        }
        if !blobs.is_empty() {
            let mut others = self.repositories()?;
            others.retain(|other| other != name);
            // Another repository that has it mostly needs it.
            blobs.retain(|blob| !others.iter().any(|other| self.mark(other, blob).exists()));
        }
        Ok(blobs)
    }

    fn count_again(&self, name: &Name, digest: &Digest, blobs: &HashSet<Digest>) {
        self.waiting.forget_manifest(name, digest);
        for blob in blobs {
            if let Ok(stat) = fs::metadata(self.blob(blob)) {
                self.waiting.add(blob, stat.len());
            }
        }
    }

    /// Under the lock, alone.
    pub(super) fn forget_manifest(&self, name: &Name, digest: &Digest) -> Result<bool, DirectoryError> {
        let path = self.manifest_path(name, digest);
        if !path.exists() {
            return Ok(false);
        }
        // The tags first: one that leads nowhere would be a lie.
        for tag in names(&self.repository(name).join("_tags"))? {
            let Ok(tag) = tag.parse::<Tag>() else { continue };
            if self.tag(name, &tag).ok().flatten() == Some(*digest) {
                self.remove_durably(&self.tag_path(name, &tag))?;
            }
        }
        let subject = read(&path, *digest).ok().flatten();
        let subject = subject.and_then(|manifest| Reads::new(&manifest.bytes).ok()?.subject);
        let removed = self.remove_durably(&path)?;
        if let Some(subject) = subject {
            let links = self.referrers_path(name, &subject.digest);
            remove(&links.join(digest.hex()))?;
            // Fails unless it was the last.
            let _ = fs::remove_dir(links);
        }
        Ok(removed)
    }

    fn remove_durably(&self, path: &Path) -> Result<bool, DirectoryError> {
        let was_there = remove(path)?;
        if was_there {
            sync(path.parent().unwrap_or(&self.root))?;
        }
        Ok(was_there)
    }

    /// The digests of a repository's manifests, sorted.
    pub(super) fn manifests(&self, name: &Name) -> Result<Vec<Digest>, DirectoryError> {
        digests(&self.repository(name).join("_manifests"))
    }

    /// Those that name `subject` as theirs, of this kind if one is asked for, behind `last`: at most about a
    /// mebibyte of them, and whether there are more.
    pub(crate) fn referrers(
        &self,
        name: &Name,
        subject: &Digest,
        kind: Option<&str>,
        last: Option<&Digest>,
    ) -> Result<(Vec<Descriptor>, bool), DirectoryError> {
        const ENOUGH_BYTES: usize = 1 << 20;
        let mut found = Vec::new();
        let mut bytes = 0;
        for digest in digests(&self.referrers_path(name, subject))? {
            if last.is_some_and(|last| digest <= *last) {
                continue;
            }
            let manifest = match self.manifest(name, &Which::Digest(digest)) {
                Ok(Some(manifest)) => manifest,
                // The others can be had nevertheless.
                Ok(None) | Err(DirectoryError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            };
            let Ok(reads) = Reads::new(&manifest.bytes) else { continue };
            if kind.is_some_and(|kind| reads.kind() != Some(kind)) {
                continue;
            }
            if bytes > ENOUGH_BYTES {
                return Ok((found, true));
            }
            let mut descriptor = Descriptor::new(&manifest.media_type, digest, manifest.bytes.len() as u64);
            if let Some(kind) = reads.kind() {
                descriptor.extra.insert("artifactType".to_owned(), kind.into());
            }
            for (key, value) in reads.annotations.unwrap_or_default() {
                if let serde_json::Value::String(value) = value {
                    bytes += key.len() + value.len();
                    descriptor.annotations.insert(key, value);
                }
            }
            bytes += 300;
            found.push(descriptor);
        }
        Ok((found, false))
    }
}

fn read(path: &Path, digest: Digest) -> Result<Option<Manifest>, DirectoryError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) if is_unreadable(&error) => return Err(DirectoryError::Damaged { path: path.to_owned() }),
        Err(error) => return Err(DirectoryError::host("read", path)(error)),
    };
    let damaged = || DirectoryError::Damaged { path: path.to_owned() };
    let end = text.iter().position(|byte| *byte == b'\n').ok_or_else(damaged)?;
    let media_type = String::from_utf8(text[..end].to_vec()).map_err(|_| damaged())?;
    let bytes = text[end + 1..].to_vec();
    if Digest::of(&bytes) != digest {
        return Err(damaged());
    }
    Ok(Some(Manifest { media_type, digest, bytes }))
}
