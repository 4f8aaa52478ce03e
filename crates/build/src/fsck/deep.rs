//! The part that reads everything.

use std::collections::BTreeSet;
use std::io::{self, BufReader, Read};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use kiln_content::{LayerBlob, LayerRecord, PackedRecord};
use kiln_layer::{CopyFault, DiffOptions, Limits, Reading, TreeForm, copy_hashed, decoder, opaque_attribute};
use kiln_oci::{DiffId, Digest, SnapshotId};
use kiln_snapshotter::Form;
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::{Check, Fault, fault};
use crate::layers::write_tar;
use crate::reread::{Stoppable, is_blob_good, side_by_side};
use crate::stand::{prepare_layer, stand_on, unpack_layer};
use crate::{BuildCancel, BuildError, Engine};

/// What is wrong with something, if anything is.
type Finding = Option<Fault>;

impl Check<'_> {
    /// Every blob is what its name says; every layer's tree is what its diff ID says; every packed layer
    /// is the one that it was packed from.
    pub(super) fn deep(&mut self, cancel: &BuildCancel) -> Result<(), BuildError> {
        self.see_all()?;
        let bad = self.deep_blobs(cancel)?;
        self.deep_layers(&bad, cancel)?;
        self.deep_packed(&bad, cancel)?;
        let layers = &self.survey.layers;
        let known = |id| layers.binary_search_by(|layer| layer.snapshot.cmp(id)).is_ok();
        let pending = self.parents.keys().filter(|id| !known(id)).count();
        if pending > 0 {
            let note = format!(
                "{pending} layers have no diff ID yet (it is pending), so that their files cannot be compared"
            );
            self.report.notes.push(note);
        }
        Ok(())
    }

    /// Returns those that are damaged.
    fn deep_blobs(&mut self, cancel: &BuildCancel) -> Result<BTreeSet<Digest>, BuildError> {
        let engine = self.engine;
        let blobs: Vec<Digest> = engine.store.blob_files()?.blobs.into_iter().map(|(blob, _)| blob).collect();
        let faults = side_by_side(&blobs, cancel, |digest| match is_blob_good(engine, digest, cancel) {
            Ok(true) | Err(BuildError::Store(kiln_content::Error::NoBlob(_))) => Ok(None),
            Ok(false) => Ok(Some("its bytes are not those of its digest".into())),
            Err(error) => fault(error).map(Some),
        })?;
        self.report.blobs_read += blobs.len();
        let mut bad = BTreeSet::new();
        for (digest, what) in blobs.iter().zip(faults) {
            if let Some(what) = what {
                bad.insert(*digest);
                self.bad_blob(digest, &what)?;
            }
        }
        Ok(bad)
    }

    fn deep_layers(&mut self, bad: &BTreeSet<Digest>, cancel: &BuildCancel) -> Result<(), BuildError> {
        // They came in under limits that may have been others.
        let mut unlimited = self.engine.clone();
        unlimited.limits = Limits::checked();
        let engine = &unlimited;
        let is_whole = |layer: &&LayerRecord| {
            !self.bad.contains(&layer.snapshot) && self.parents.contains_key(&layer.snapshot)
        };
        let mut layers: Vec<LayerRecord> = self.survey.layers.iter().filter(is_whole).cloned().collect();
        // What stands on a damaged layer is damaged, whatever it looks like from there.
        layers.sort_by_cached_key(|layer| engine.snapshots.chain(&layer.snapshot).map_or(0, |c| c.len()));
        let faults = side_by_side(&layers, cancel, |layer| {
            // A blob that is missing was told of before.
            let good = |blob: &&LayerBlob| !bad.contains(&blob.digest) && engine.store.has_blob(&blob.digest);
            let compared = match layer.blob.as_ref().filter(good) {
                Some(blob) => compare_with_blob(engine, layer, blob, cancel),
                None => tree_digest(engine, layer).map(|found| {
                    let differs = found != layer.diff_id && layer.blob.is_none();
                    differs.then(|| format!("its files make {found} instead of {}", layer.diff_id).into())
                }),
            };
            match compared {
                Err(BuildError::Snapshots(
                    kiln_snapshotter::Error::NoSnapshot(_) | kiln_snapshotter::Error::TooDeep { .. },
                )) => Ok(None),
                Err(BuildError::Cancelled) => Err(BuildError::Cancelled),
                Err(error) => Ok(Some(fault(error)?.of("its files cannot be read"))),
                compared => compared,
            }
        })?;
        self.report.layers_read += layers.len();
        for (layer, what) in layers.iter().zip(faults) {
            if let Some(what) = what.filter(|_| !self.bad.contains(&layer.snapshot)) {
                self.bad_snapshot(&layer.snapshot, what)?;
            }
        }
        Ok(())
    }

    fn deep_packed(&mut self, bad: &BTreeSet<Digest>, cancel: &BuildCancel) -> Result<(), BuildError> {
        let engine = self.engine;
        let is_there =
            |packed: &&PackedRecord| !bad.contains(&packed.blob) && engine.store.has_blob(&packed.blob);
        let records: Vec<PackedRecord> = self.survey.packed.iter().filter(is_there).cloned().collect();
        let faults = side_by_side(&records, cancel, |packed| {
            let plain = match open_plain(engine, &packed.blob) {
                Ok(inner) => Stoppable { inner, cancel },
                Err(error) => return Ok(Some(fault(error)?.of("it cannot be unpacked"))),
            };
            match copy_hashed(plain, io::sink()) {
                Ok((found, size_bytes)) => {
                    let differs = (found, size_bytes) != (packed.packed_diff_id.0, packed.tar_size_bytes);
                    let expected = packed.packed_diff_id;
                    Ok(differs.then(|| format!("it makes {found} instead of {expected}").into()))
                }
                Err(_) if cancel.flag().load(Ordering::Relaxed) => Err(BuildError::Cancelled),
                Err(CopyFault::Read(source) | CopyFault::Write(source)) => {
                    let error = BuildError::Unchecked { path: packed.blob.to_string().into(), source };
                    Ok(Some(fault(error)?.of("it cannot be unpacked")))
                }
            }
        })?;
        for (packed, what) in records.iter().zip(faults) {
            if let Some(what) = what {
                self.bad_packed(&packed.blob, &what)?;
            }
        }
        Ok(())
    }

    /// Says that a blob is damaged, and forgets it where something else can stand in for it.
    fn bad_blob(&mut self, digest: &Digest, fault: &Fault) -> Result<(), BuildError> {
        let of_layers = |layer: &LayerRecord| layer.blob.as_ref().is_some_and(|blob| blob.digest == *digest);
        let layers: Vec<LayerRecord> =
            self.survey.layers.iter().filter(|layer| of_layers(layer)).cloned().collect();
        for layer in &layers {
            self.bad_layer_blob(layer, fault)?;
        }
        let is_packed = self.survey.packed.iter().any(|packed| packed.blob == *digest);
        if is_packed && layers.is_empty() {
            self.bad_packed(digest, fault)?;
        }
        let kept: Vec<Digest> =
            self.survey.kept.iter().filter(|kept| kept.blob == *digest).map(|kept| kept.config).collect();
        for config in &kept {
            self.bad_kept(config, digest, fault)?;
        }
        // A damaged config or manifest was found with its image.
        if layers.is_empty() && !is_packed && kept.is_empty() {
            let repair = self.repair && fault.is_proof && self.drop_blob(digest, || Ok(()))?;
            let done = repair.then_some("removed");
            self.found("blob", digest, &fault.what, done);
        }
        Ok(())
    }

    /// A layer's blob is missing or damaged: if its files still make the layer, nothing is lost.
    pub(super) fn bad_layer_blob(&mut self, layer: &LayerRecord, fault: &Fault) -> Result<(), BuildError> {
        let Some(blob) = &layer.blob else { return Ok(()) };
        let mut done = None;
        if self.repair && fault.is_proof {
            self.see_all()?;
            let of_files = match tree_digest(self.engine, layer) {
                Ok(found) if found == layer.diff_id => None,
                Ok(_) => Some(Fault::from(format!("its blob {} is damaged", blob.digest))),
                Err(error) => Some(super::fault(error)?.of("its files cannot be read")),
            };
            let store = &self.engine.store;
            let is_proof = of_files.as_ref().is_none_or(|of_files| of_files.is_proof);
            let forget = || {
                match &of_files {
                    None => store.forget_layer_blob(&layer.snapshot)?,
                    Some(_) => store.disown_snapshot(&layer.snapshot)?,
                };
                Ok(store.forget_packed(&blob.digest)?)
            };
            let gone = is_proof && self.drop_blob(&blob.digest, forget)?;
            done = match &of_files {
                _ if !gone => None,
                None => Some("removed; the layer can be read out of its files"),
                Some(_) => Some("removed"),
            };
            if let Some(of_files) = of_files.filter(|of_files| gone || !of_files.is_proof) {
                self.bad_snapshot(&layer.snapshot, of_files)?;
            }
        }
        self.found("blob", blob.digest, &fault.what, done);
        Ok(())
    }

    /// Makes sure that all that a layer's files hold is visible: without `CAP_SYS_ADMIN` the kernel
    /// hides `trusted.*`, and every opaque directory looks damaged.
    fn see_all(&mut self) -> Result<(), BuildError> {
        if self.sees_all {
            return Ok(());
        }
        let active = self.engine.prepare(None)?;
        let dir = self.engine.snapshots.open_layer(active.key())?;
        let opaque = opaque_attribute();
        let blind = |error: Errno| BuildError::Unchecked {
            path: self.engine.store.root().join("snapshots"),
            source: io::Error::new(
                io::Error::from(error).kind(),
                format!("looking into layers takes CAP_SYS_ADMIN, to see `{opaque}` ({error})"),
            ),
        };
        rustix::fs::fsetxattr(&dir, opaque, b"y", XattrFlags::empty()).map_err(blind)?;
        let mut names = vec![0; 64 << 10];
        let length = rustix::fs::flistxattr(&dir, &mut names[..]).map_err(blind)?;
        if !names[..length].split(|byte| *byte == 0).any(|name| name == opaque.as_bytes()) {
            return Err(blind(Errno::PERM));
        }
        self.sees_all = true;
        Ok(())
    }
}

/// The diff ID that a layer's files make.
fn tree_digest(engine: &Engine, layer: &LayerRecord) -> Result<DiffId, BuildError> {
    Ok(write_tar(&*engine.snapshots, &layer.snapshot, io::sink())?.diff_id)
}

/// The tar inside a blob of the store.
fn open_plain(engine: &Engine, blob: &Digest) -> Result<Box<dyn Read + Send>, BuildError> {
    let (file, _) = engine.store.open_blob(blob)?;
    let unreadable = |source| BuildError::Unchecked { path: blob.to_string().into(), source };
    Ok(decoder(BufReader::with_capacity(256 << 10, file)).map_err(unreadable)?.1)
}

/// What is wrong with a layer that came as a blob: the blob is unpacked once more, on what the layer
/// stands on, and both must be the same.
fn compare_with_blob(
    engine: &Engine,
    layer: &LayerRecord,
    blob: &LayerBlob,
    cancel: &BuildCancel,
) -> Result<Finding, BuildError> {
    let parent = engine.snapshots.needs(&layer.snapshot)?.parent;
    let active = prepare_layer(engine, parent.as_ref())?;
    let cancelled = |error| match error {
        BuildError::Apply(kiln_layer::ApplyError::Cancelled) => BuildError::Cancelled,
        error => error,
    };
    let applied = unpack_layer(engine, &active, open_plain(engine, &blob.digest)?, Reading::Ahead, cancel)
        .map_err(cancelled)?;
    if applied.diff_id != layer.diff_id {
        let what = format!("its blob makes {} instead of {}", applied.diff_id, layer.diff_id);
        return Ok(Some(what.into()));
    }
    let again = || open_plain(engine, &blob.digest);
    let active = stand_on(engine, active, &applied, parent.as_ref(), again, cancel).map_err(cancelled)?;
    // Some backends settle what was written only then. Nobody knows its name.
    let fresh = active.commit()?;
    let same = are_same(engine, &fresh, &layer.snapshot, cancel);
    engine.snapshots.remove(&fresh)?;
    Ok((!same?).then(|| "its files are not those of its blob".into()))
}

/// Whether two snapshots on the same parent hold the same changes.
fn are_same(
    engine: &Engine,
    one: &SnapshotId,
    other: &SnapshotId,
    cancel: &BuildCancel,
) -> Result<bool, BuildError> {
    let (left, right) = (engine.snapshots.open_changes(one)?, engine.snapshots.open_changes(other)?);
    let options = DiffOptions { form: TreeForm::OverlayUpper, root_entry: false, cancel: cancel.flag() };
    let (left_dir, right_dir) = (left.dir.as_fd(), right.dir.as_fd());
    let same = match (&left.form, &right.form) {
        (Form::Tree { .. }, Form::Tree { .. }) => {
            kiln_layer::diff_trees(left_dir, right_dir, io::sink(), &options)
                .map(|written| written.entries == 0)
        }
        _ => kiln_layer::diff(left_dir, io::sink(), &options)
            .and_then(|left| Ok(left.diff_id == kiln_layer::diff(right_dir, io::sink(), &options)?.diff_id)),
    };
    same.map_err(|error| match error {
        kiln_layer::DiffError::Cancelled => BuildError::Cancelled,
        error => error.into(),
    })
}
