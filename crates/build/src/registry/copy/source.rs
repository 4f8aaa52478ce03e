//! Where an image comes from, opened.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use kiln_oci::image::Descriptor;
use kiln_oci::{Digest, Reference, document};

use super::docker::find_in_docker;
use super::{Place, Registries};
use crate::archive::Archive;
use crate::export::SHORT_NAME;
use crate::layout::find_in_layout;
use crate::load::{MAX_MANIFEST_BYTES, blob_name, layout_index, read_verified, seekable};
use crate::load_oci::parse_index;
use crate::registry::pull::{Abort, Fetch, State};
use crate::{BuildCancel, BuildError, Engine, LayoutImage};

/// An image of a place outside the store.
pub(super) struct Source {
    pub(super) archive: Arc<Archive>,
    /// Blobs have to be announced to it: what was not is a manifest.
    pub(super) fetch: Option<Arc<Fetch>>,
    pub(super) from: Option<Reference>,
    /// What the name leads to.
    pub(super) root: Descriptor,
    /// What is meant where nobody says for which platform; `None`: what `root` has for this machine's.
    pub(super) own: Option<Descriptor>,
    /// The place had no manifest for it: one was made.
    pub(super) is_bare: bool,
    /// What the entries of a layout refer to, by that.
    referrers: HashMap<Digest, Vec<Descriptor>>,
}

impl Source {
    /// The second value ends what is still on its way.
    pub(super) fn open(
        engine: &Engine,
        registries: &Arc<Registries>,
        from: &Place,
        cancel: &BuildCancel,
    ) -> Result<(Self, Option<Abort>), BuildError> {
        match from {
            Place::Layout(path, image) => Ok((Self::of_layout(Archive::open_dir(path)?, image)?, None)),
            Place::Archive(path, image) => {
                let archive = Archive::open(path, seekable(engine, path, cancel)?)?;
                Ok((Self::of_layout(archive, image)?, None))
            }
            Place::Docker(path, name) => {
                let mut archive = Archive::open(path, seekable(engine, path, cancel)?)?.healing();
                let found = find_in_docker(engine, &mut archive, name.as_ref())?;
                let source = Self::of_files(archive, found.root);
                Ok((Self { own: Some(found.own), is_bare: found.is_bare, ..source }, None))
            }
            Place::Registry(name) => {
                let repository = registries.repository(name);
                let root = registries.wait(cancel, repository.manifest(name.into()))?;
                engine.store.put_blob(&root.bytes)?;
                let fetch = Fetch::new(engine, registries, repository, cancel);
                fetch.set(root.digest, State::There);
                let shown = name.familiar();
                let archive = Archive::of_blobs(Path::new(&shown), engine.store.clone(), fetch.clone());
                let abort = Abort(fetch.clone());
                let source = Self::of_files(archive, root.descriptor());
                Ok((Self { fetch: Some(fetch), from: Some(name.clone()), ..source }, Some(abort)))
            }
        }
    }

    fn of_files(archive: Archive, root: Descriptor) -> Self {
        let (fetch, from, own, is_bare, referrers) = Default::default();
        Self { archive: Arc::new(archive), fetch, from, root, own, is_bare, referrers }
    }

    fn of_layout(archive: Archive, image: &LayoutImage) -> Result<Self, BuildError> {
        let archive = archive.healing();
        let root = find_in_layout(&archive, &layout_index(&archive)?, image)?;
        Ok(Self::of_files(archive, root))
    }

    /// Looks for what refers to what. Costs reading the manifests that a layout lists; a registry is asked later.
    pub(super) fn look_for_referrers(&mut self) -> Result<(), BuildError> {
        if self.fetch.is_none() {
            self.referrers = referrers_in(&self.archive)?;
        }
        Ok(())
    }

    /// What refers to a manifest. After [`Source::look_for_referrers`].
    pub(super) fn referrers(&self, subject: &Digest) -> Result<Vec<Descriptor>, BuildError> {
        match &self.fetch {
            Some(fetch) => fetch.referrers(subject),
            None => Ok(self.referrers.get(subject).cloned().unwrap_or_default()),
        }
    }
}

/// What the entries of a layout's index refer to, by that. Some tools keep lists in it, as they do in registries
/// that know nothing of subjects.
fn referrers_in(archive: &Archive) -> Result<HashMap<Digest, Vec<Descriptor>>, BuildError> {
    let mut found: HashMap<Digest, Vec<Descriptor>> = HashMap::new();
    for entry in layout_index(archive)?.manifests {
        let (name, kind) = (blob_name(&entry.digest), entry.media_type.as_str());
        if !(document::is_manifest(kind) || document::is_index(kind)) || !archive.contains(&name) {
            continue;
        }
        let json = read_verified(archive, &name, &entry, MAX_MANIFEST_BYTES)?;
        let kept_of =
            |tag: &String| format!("sha256:{}", tag.strip_prefix("sha256-")?).parse::<Digest>().ok();
        if let Some(subject) = entry.annotations.get(SHORT_NAME).and_then(kept_of)
            && document::is_index(kind)
        {
            let kept = parse_index(archive, &entry, &json)?.manifests;
            found.entry(subject).or_default().extend(kept);
            continue;
        }
        let referring = archive.parse(&name, &json, document::read_referring)?;
        if let Some(subject) = &referring.subject {
            found.entry(subject.digest).or_default().push(referring.listed(&entry));
        }
    }
    Ok(found)
}
