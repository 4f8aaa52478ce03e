//! The part that reads everything.

use std::collections::BTreeSet;
use std::io::{self, BufReader, Read};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use kiln_content::{LayerBlob, LayerRecord};
use kiln_layer::{ApplyOptions, DiffOptions, Limits, TreeForm, Whiteouts, decoder};
use kiln_oci::{DiffId, Digest};

use super::Check;
use crate::layers::write_tar;
use crate::{BuildCancel, BuildError};

impl Check<'_> {
    /// Every blob is what its name says; every layer's tree is what its diff ID says.
    pub(super) fn deep(&mut self, cancel: &BuildCancel) -> Result<(), BuildError> {
        let stop = || cancel.flag().load(Ordering::Relaxed);
        let mut bad: BTreeSet<Digest> = BTreeSet::new();
        for (digest, _) in self.engine.store.blob_files()?.blobs {
            if stop() {
                return Err(BuildError::Cancelled);
            }
            self.report.blobs_read += 1;
            let what = match self.engine.store.is_blob_good(&digest) {
                Ok(true) | Err(kiln_content::Error::NoBlob(_)) => continue,
                Ok(false) => "its bytes are not those of its digest".to_owned(),
                Err(error) => error.to_string(),
            };
            bad.insert(digest);
            self.bad_blob(&digest, &what)?;
        }
        for layer in self.survey.layers.clone() {
            if stop() {
                return Err(BuildError::Cancelled);
            }
            if self.bad.contains(&layer.snapshot) || !self.parents.contains_key(&layer.snapshot) {
                continue;
            }
            self.report.layers_read += 1;
            // One that is missing was told of before.
            let good =
                |blob: &&LayerBlob| !bad.contains(&blob.digest) && self.engine.store.has_blob(&blob.digest);
            let blob = layer.blob.as_ref().filter(good);
            let compared = match blob {
                Some(blob) => self.compare_with_blob(&layer, blob, cancel),
                None => self.tree_digest(&layer).map(|found| {
                    let differs = found != layer.diff_id && layer.blob.is_none();
                    differs.then(|| format!("its files make {found} instead of {}", layer.diff_id))
                }),
            };
            match compared {
                Ok(None) => {}
                Ok(Some(what)) => self.bad_snapshot(&layer.snapshot, what)?,
                Err(BuildError::Snapshots(kiln_snapshotter::Error::NoSnapshot(_))) => {}
                Err(BuildError::Cancelled) => return Err(BuildError::Cancelled),
                Err(error) => {
                    self.bad_snapshot(&layer.snapshot, format!("its files cannot be read: {error}"))?
                }
            }
        }
        let layers = &self.survey.layers;
        let known = |id| layers.binary_search_by(|layer| layer.snapshot.cmp(id)).is_ok();
        let unknown = self.parents.keys().filter(|id| !known(id)).count();
        if unknown > 0 {
            let note =
                format!("{unknown} layers have no diff ID yet, so that their files cannot be compared");
            self.report.notes.push(note);
        }
        Ok(())
    }

    /// Says that a blob is damaged, and forgets it where something else can stand in for it.
    fn bad_blob(&mut self, digest: &Digest, what: &str) -> Result<(), BuildError> {
        let of_layers = |layer: &LayerRecord| layer.blob.as_ref().is_some_and(|blob| blob.digest == *digest);
        let layers: Vec<LayerRecord> =
            self.survey.layers.iter().filter(|layer| of_layers(layer)).cloned().collect();
        for layer in &layers {
            self.bad_layer_blob(layer, what)?;
        }
        // A damaged config or manifest was found with its image.
        if layers.is_empty() {
            let done = self.repair.then_some("removed");
            if self.repair {
                self.engine.store.remove_blob(digest)?;
            }
            self.found("blob", digest, what, done);
        }
        Ok(())
    }

    /// A layer's blob is missing or damaged: if its files still make the layer, nothing is lost.
    pub(super) fn bad_layer_blob(&mut self, layer: &LayerRecord, what: &str) -> Result<(), BuildError> {
        let Some(blob) = &layer.blob else { return Ok(()) };
        let mut done = None;
        if self.repair {
            self.engine.store.remove_blob(&blob.digest)?;
            if self.tree_digest(layer).is_ok_and(|found| found == layer.diff_id) {
                self.engine.store.forget_layer_blob(&layer.snapshot)?;
                done = Some("removed; the layer can be read out of its files");
            } else {
                self.bad_snapshot(&layer.snapshot, format!("its blob {} is damaged", blob.digest))?;
                done = Some("removed");
            }
        }
        self.found("blob", blob.digest, what, done);
        Ok(())
    }

    /// The diff ID that a layer's files make.
    fn tree_digest(&self, layer: &LayerRecord) -> Result<DiffId, BuildError> {
        Ok(write_tar(&*self.engine.snapshots, &layer.snapshot, io::sink())?.diff_id)
    }

    /// What is wrong with a layer that came as a blob: the blob is unpacked once more, and both trees
    /// must make the same tar.
    fn compare_with_blob(
        &self,
        layer: &LayerRecord,
        blob: &LayerBlob,
        cancel: &BuildCancel,
    ) -> Result<Option<String>, BuildError> {
        let (file, _) = self.engine.store.open_blob(&blob.digest)?;
        let unreadable = |source| BuildError::Unreadable { path: blob.digest.to_string().into(), source };
        let decoded = decoder(BufReader::with_capacity(256 << 10, file));
        let (_, plain): (_, Box<dyn Read>) = decoded.map_err(unreadable)?;
        let scratch = self.engine.prepare(None)?;
        let root = self.engine.snapshots.open_layer(scratch.key())?;
        let options = ApplyOptions {
            whiteouts: Whiteouts::Overlay,
            keep_owner: true,
            limits: Limits::default(),
            cancel: cancel.flag(),
        };
        let applied = match kiln_layer::apply(plain, root.as_fd(), &options) {
            Err(kiln_layer::ApplyError::Cancelled) => return Err(BuildError::Cancelled),
            other => other?,
        };
        if applied.diff_id != layer.diff_id {
            return Ok(Some(format!("its blob makes {} instead of {}", applied.diff_id, layer.diff_id)));
        }
        let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: cancel.flag() };
        let expected = kiln_layer::diff(root.as_fd(), io::sink(), &options)?.diff_id;
        let found = self.tree_digest(layer)?;
        Ok((found != expected).then(|| "its files are not those of its blob".to_owned()))
    }
}
