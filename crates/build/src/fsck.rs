//! `kiln fsck`: whether the store is what it says it is.
//!
//! Records against data, and data against records; deep, every byte against its digest. Repairing
//! means forgetting: what is damaged is not found any more, and the next build or load makes it anew.

mod deep;

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use kiln_content::{Claims, ImageRecord, KeptBlob, PackedRecord, Pinnable, Survey};
use kiln_oci::image::{ImageConfig, Manifest};
use kiln_oci::{ChainId, DiffId, Digest, SnapshotId};
use kiln_snapshotter::{MAX_LOWER, Needs};
use rustix::io::Errno;

use crate::image::{MAX_CONFIG_BYTES, parse_json};
use crate::load::MAX_MANIFEST_BYTES;
use crate::{BuildCancel, BuildError, Engine};

/// How thoroughly, and what to do about what is found.
#[derive(Debug, Clone, Copy, Default)]
pub struct FsckOptions {
    /// Read every blob and every file.
    pub deep: bool,
    /// Forget what is damaged.
    pub repair: bool,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What kind of thing: `index`, `journal`, `name`, `image`, `layer`, `chain`, `result`, `source`,
    /// `snapshot`, `blob`, `packed`, `index of an image`.
    pub kind: &'static str,
    /// Which one.
    pub id: String,
    /// What is wrong with it.
    pub what: String,
    /// What was done about it; `None`: nothing.
    pub repaired: Option<&'static str>,
}

/// What was looked at and what was found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Records that were compared with their data.
    pub records: usize,
    /// Snapshots whose place was looked at.
    pub snapshots: usize,
    /// Blobs that are there.
    pub blobs: usize,
    /// Blobs that were read from end to end.
    pub blobs_read: usize,
    /// Layers whose tree was compared with their diff ID.
    pub layers_read: usize,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// What deserves a word, but is no damage.
    pub notes: Vec<String>,
}

impl Report {
    /// Whether something is wrong that was not repaired.
    pub fn is_damaged(&self) -> bool {
        self.problems.iter().any(|problem| problem.repaired.is_none())
    }
}

/// Checks the store. No garbage is collected meanwhile; builds may go on.
///
/// # Errors
/// [`BuildError`] when the check itself cannot go on; damage is no error, but in the report.
pub fn fsck(engine: &Engine, options: &FsckOptions, cancel: &BuildCancel) -> Result<Report, BuildError> {
    let _turn = crate::gc::turn(engine)?;
    let mut check = Check::new(engine, options.repair)?;
    let lines = engine.store.damaged_journal_lines()?;
    if let Some(what) = engine.store.find_index_damage()? {
        check.found("index", "db/meta.sqlite", what, None);
        // What a damaged index says about the rest is worth nothing.
        return Ok(check.report);
    }
    if lines > 0 {
        let done = Some("written anew from the index");
        check.found("journal", "db/journal", format!("{lines} lines are damaged"), done);
    }
    check.snapshots()?;
    check.records()?;
    check.blobs()?;
    if options.deep {
        check.deep(cancel)?;
    }
    check.garbage();
    engine.store.barrier()?;
    Ok(check.report)
}

/// Drops the records that an index made anew has too many: those of data that is not there. How
/// many things they named.
pub(crate) fn drop_dangling(engine: &Engine) -> Result<usize, BuildError> {
    let mut check = Check::new(engine, true)?;
    check.records()?;
    Ok(check.report.problems.len())
}

/// Drops the records that nobody can vouch for after the index was made of what was found beside the
/// layers: nothing says what had reached the disk. Reads everything.
pub(crate) fn drop_unproven(engine: &Engine) -> Result<(), BuildError> {
    let mut check = Check::new(engine, true)?;
    check.snapshots()?;
    check.records()?;
    check.blobs()?;
    check.deep(&BuildCancel::new()?)?;
    let survey = engine.store.survey()?;
    let proven: BTreeSet<&SnapshotId> = survey.layers.iter().map(|layer| &layer.snapshot).collect();
    let used = survey.cache.iter().map(|(_, record)| &record.snapshot);
    for id in used.chain(survey.sources.iter().map(|(_, record)| &record.snapshot)) {
        if !proven.contains(id) {
            engine.store.disown_snapshot(id)?;
        }
    }
    Ok(())
}

/// Records images whose blobs and layers are all there, but that no record speaks of; they have no
/// names. Reads all small blobs.
pub(crate) fn find_nameless(engine: &Engine) -> Result<Vec<Digest>, BuildError> {
    let store = &engine.store;
    let mut found = Vec::new();
    for (digest, file) in store.blob_files()?.blobs {
        if file.size_bytes > MAX_MANIFEST_BYTES {
            continue;
        }
        let Ok(json) = store.read_blob(&digest, MAX_MANIFEST_BYTES) else { continue };
        let Ok(manifest) = parse_json::<Manifest>("manifest", &digest, &json) else { continue };
        let id = manifest.config.digest;
        let Ok(config) = store.read_blob(&id, MAX_CONFIG_BYTES) else { continue };
        let Ok(config) = parse_json::<ImageConfig>("image config", &id, &config) else { continue };
        let diff_ids = &config.rootfs.diff_ids;
        if diff_ids.is_empty() || diff_ids.len() != manifest.layers.len() || store.image(&id)?.is_some() {
            continue;
        }
        let top = ChainId::of(diff_ids).map(|chain| store.snapshot_by_chain(&chain)).transpose()?.flatten();
        let Some(top) = top.filter(|top| engine.snapshots.contains(top)) else { continue };
        let mut size_bytes = 0;
        let chain = match engine.snapshots.chain(&top) {
            Ok(chain) => chain,
            Err(kiln_snapshotter::Error::TooDeep { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        for id in chain {
            size_bytes += store.layer(&id)?.map_or(0, |layer| layer.size_bytes);
        }
        let created_unix = crate::engine::now_unix();
        store.put_image(&ImageRecord {
            config: id,
            manifest: digest,
            snapshot: Some(top),
            size_bytes,
            created_unix,
        })?;
        found.push(id);
    }
    Ok(found)
}

/// A check under way.
struct Check<'a> {
    engine: &'a Engine,
    repair: bool,
    survey: Survey,
    /// Committed snapshots and what they stand on; `None`: nobody can tell.
    parents: BTreeMap<SnapshotId, Option<Option<SnapshotId>>>,
    /// What snapshots are deltas on.
    fulls: BTreeMap<SnapshotId, SnapshotId>,
    /// Snapshots known to be damaged, or to need such.
    bad: BTreeSet<SnapshotId>,
    /// All that layers hold is known to be visible to this process.
    sees_all: bool,
    report: Report,
}

/// What was found out about something.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fault {
    what: String,
    /// It is damaged. Otherwise it could not be read, which may be the disk's fault or pass: that is
    /// told, and nothing is forgotten for it.
    is_proof: bool,
}

impl From<String> for Fault {
    fn from(what: String) -> Self {
        Self { what, is_proof: true }
    }
}

impl From<&str> for Fault {
    fn from(what: &str) -> Self {
        what.to_owned().into()
    }
}

impl Fault {
    /// With the name of the part that it is about in front.
    fn of(self, part: &str) -> Self {
        Self { what: format!("{part}: {}", self.what), ..self }
    }
}

impl<'a> Check<'a> {
    fn new(engine: &'a Engine, repair: bool) -> Result<Self, BuildError> {
        // Records first: data comes before its record, so that there is data for all of these.
        let survey = engine.store.survey()?;
        let (mut parents, mut fulls) = (BTreeMap::new(), BTreeMap::new());
        for id in engine.snapshots.committed()? {
            let parent = match engine.snapshots.needs(&id) {
                Ok(Needs { parent, full }) => {
                    fulls.extend(full.map(|full| (id.clone(), full)));
                    Some(parent)
                }
                Err(kiln_snapshotter::Error::NoSnapshot(_)) => continue,
                Err(kiln_snapshotter::Error::Damaged { .. }) => None,
                Err(error) => return Err(error.into()),
            };
            parents.insert(id, parent);
        }
        Ok(Self {
            engine,
            repair,
            survey,
            parents,
            fulls,
            bad: BTreeSet::new(),
            sees_all: false,
            report: Report::default(),
        })
    }

    fn found(
        &mut self,
        kind: &'static str,
        id: impl ToString,
        what: impl Into<String>,
        done: Option<&'static str>,
    ) {
        self.report.problems.push(Problem { kind, id: id.to_string(), what: what.into(), repaired: done });
    }

    /// Whether a record names a snapshot.
    fn is_named(&self, id: &SnapshotId) -> bool {
        let survey = &self.survey;
        survey.images.iter().any(|image| image.snapshot.as_ref() == Some(id))
            || survey.layers.iter().any(|record| record.snapshot == *id)
            || survey.chains.iter().any(|(_, snapshot)| snapshot == id)
            || survey.cache.iter().any(|(_, record)| record.snapshot == *id)
            || survey.sources.iter().any(|(_, record)| record.snapshot == *id)
    }

    /// Says that a snapshot is not to be trusted, and forgets it with all that need it. If no
    /// record leads there, it is garbage and no damage.
    fn bad_snapshot(&mut self, id: &SnapshotId, fault: impl Into<Fault>) -> Result<(), BuildError> {
        let Fault { what, is_proof } = fault.into();
        if !is_proof {
            self.found("snapshot", id, what, None);
            return Ok(());
        }
        let mut pending = vec![id.clone()];
        let (mut done, mut is_named) = (None, false);
        while let Some(id) = pending.pop() {
            if !self.bad.insert(id.clone()) {
                continue;
            }
            is_named |= self.is_named(&id);
            if self.repair {
                self.engine.store.disown_snapshot(&id)?;
                done = Some("forgotten, with the images that need it");
            }
            let on_it = self
                .parents
                .iter()
                .filter(|(_, parent)| matches!(parent, Some(Some(parent)) if *parent == id));
            let deltas = self.fulls.iter().filter(|(_, full)| **full == id);
            pending.extend(on_it.map(|(child, _)| child).chain(deltas.map(|(delta, _)| delta)).cloned());
        }
        if is_named {
            self.found("snapshot", id, what, done);
        } else {
            self.report.notes.push(format!("layer {id}, which nothing refers to: {what}"));
        }
        Ok(())
    }

    /// Every snapshot has a sidecar, a parent that is there, and files.
    fn snapshots(&mut self) -> Result<(), BuildError> {
        self.report.snapshots = self.parents.len();
        let mut too_deep = 0;
        for (id, parent) in self.parents.clone() {
            let missing = |parent: &SnapshotId| !self.parents.contains_key(parent);
            match parent {
                None => self.bad_snapshot(&id, "what it stands on cannot be read")?,
                Some(Some(parent)) if missing(&parent) => {
                    self.bad_snapshot(&id, format!("layer {parent}, on which it stands, is missing"))?;
                }
                Some(_) => {
                    if self.bad.contains(&id) {
                        continue;
                    }
                    let chain = self.engine.snapshots.chain(&id).map(drop);
                    match chain.and_then(|()| self.engine.snapshots.open_changes(&id).map(drop)) {
                        // Removed by its user meanwhile, which only happens to what has no records.
                        Ok(()) | Err(kiln_snapshotter::Error::NoSnapshot(_)) => {}
                        Err(kiln_snapshotter::Error::TooDeep { .. }) => too_deep += 1,
                        Err(error) => self.bad_snapshot(&id, fault(error)?)?,
                    }
                }
            }
        }
        if too_deep > 0 {
            let note = format!("{too_deep} layers stand on more than {MAX_LOWER}, and cannot be used");
            self.report.notes.push(note);
        }
        Ok(())
    }

    /// Every record has its data.
    fn records(&mut self) -> Result<(), BuildError> {
        let survey = std::mem::take(&mut self.survey);
        let images: BTreeMap<Digest, &ImageRecord> =
            survey.images.iter().map(|image| (image.config, image)).collect();
        let store = &self.engine.store;
        for (id, kind) in survey
            .layers
            .iter()
            .map(|record| (&record.snapshot, "layer"))
            .chain(survey.chains.iter().map(|(_, snapshot)| (snapshot, "chain")))
            .chain(survey.cache.iter().map(|(_, record)| (&record.snapshot, "result")))
            .chain(survey.sources.iter().map(|(_, record)| (&record.snapshot, "source")))
        {
            self.report.records += 1;
            if self.is_absent(id) && self.bad.insert(id.clone()) {
                let done = self.repair.then_some("forgotten");
                if self.repair {
                    store.disown_snapshot(id)?;
                }
                self.found(kind, id, "its files are missing", done);
            }
        }
        for image in images.values() {
            self.report.records += 1;
            if let Some(Fault { what, is_proof }) = self.image(image, &survey)? {
                let repair = self.repair && is_proof;
                let done = repair.then_some("forgotten, with its names");
                if repair {
                    store.disown_image(&image.config)?;
                }
                self.found("image", image.config, what, done);
            }
        }
        for (name, config) in &survey.names {
            self.report.records += 1;
            if !images.contains_key(config) {
                let done = self.repair.then_some("removed");
                if self.repair {
                    store.remove_name(name, config)?;
                }
                self.found("name", name.familiar(), format!("it leads to {config}, which is no image"), done);
            }
        }
        self.survey = survey;
        Ok(())
    }

    fn is_absent(&self, id: &SnapshotId) -> bool {
        // A snapshot may have come since the listing.
        !self.parents.contains_key(id) && !self.engine.snapshots.contains(id)
    }

    /// What is wrong with an image, its layers' content apart.
    fn image(&self, image: &ImageRecord, survey: &Survey) -> Result<Option<Fault>, BuildError> {
        let store = &self.engine.store;
        let config = match store.read_blob(&image.config, MAX_CONFIG_BYTES) {
            Ok(json) => parse_json::<ImageConfig>("image config", &image.config, &json),
            Err(error) => Err(error.into()),
        };
        let config = match config {
            Ok(config) => config,
            Err(error) => return Ok(Some(fault(error)?.of("its config"))),
        };
        let manifest = match store.read_blob(&image.manifest, MAX_MANIFEST_BYTES) {
            Ok(json) => parse_json::<Manifest>("manifest", &image.manifest, &json),
            Err(error) => Err(error.into()),
        };
        match manifest {
            Ok(manifest) if manifest.config.digest != image.config => {
                return Ok(Some("its manifest is of another image".into()));
            }
            Ok(_) => {}
            Err(error) => return Ok(Some(fault(error)?.of("its manifest"))),
        }
        let chain = match &image.snapshot {
            None => Vec::new(),
            Some(top) if self.is_absent(top) => {
                return Ok(Some(format!("its files ({top}) are missing").into()));
            }
            Some(top) => match self.engine.snapshots.chain(top) {
                Ok(chain) => chain,
                // It cannot be used, but that is no damage.
                Err(kiln_snapshotter::Error::TooDeep { .. }) => return Ok(None),
                Err(error) => return fault(error).map(Some),
            },
        };
        if let Some(bad) = chain.iter().find(|id| self.bad.contains(id)) {
            return Ok(Some(format!("layer {bad} is damaged").into()));
        }
        let diff_ids = &config.rootfs.diff_ids;
        if chain.len() != diff_ids.len() {
            return Ok(Some(
                format!("its config lists {} layers, it has {}", diff_ids.len(), chain.len()).into(),
            ));
        }
        for (id, diff_id) in chain.iter().zip(diff_ids) {
            let found = survey.layers.binary_search_by(|layer| layer.snapshot.cmp(id)).ok();
            let found = found.map(|at| survey.layers[at].diff_id);
            if found.is_some_and(|found| found != *diff_id) {
                return Ok(Some(format!("layer {id} is not the one that its config lists").into()));
            }
        }
        Ok(None)
    }

    /// Every blob that a record needs is there and as long as it should be; every chain ID is that of
    /// the layers it stands for.
    fn blobs(&mut self) -> Result<(), BuildError> {
        let files = self.engine.store.blob_files()?;
        self.report.blobs = files.blobs.len();
        for stray in files.strays {
            self.report.notes.push(format!("{} does not belong there", stray.display()));
        }
        let sizes: BTreeMap<Digest, u64> =
            files.blobs.iter().map(|(digest, file)| (*digest, file.size_bytes)).collect();
        for layer in self.survey.layers.clone() {
            let Some(blob) = &layer.blob else { continue };
            let what = match sizes.get(&blob.digest) {
                // It may have come since the listing.
                None if self.engine.store.has_blob(&blob.digest) => continue,
                None => "it is missing".to_owned(),
                Some(size) if *size != blob.size_bytes => {
                    format!("it has {size} bytes instead of {}", blob.size_bytes)
                }
                Some(_) => continue,
            };
            self.bad_layer_blob(&layer, &what.into())?;
        }
        self.made_and_kept(&sizes)?;
        let diff_ids: BTreeMap<&SnapshotId, DiffId> =
            self.survey.layers.iter().map(|layer| (&layer.snapshot, layer.diff_id)).collect();
        let mut wrong = Vec::new();
        for (chain, id) in &self.survey.chains {
            let Ok(stack) = self.engine.snapshots.chain(id) else { continue };
            let stack: Option<Vec<DiffId>> = stack.iter().map(|id| diff_ids.get(id).copied()).collect();
            if stack.is_some_and(|stack| ChainId::of(&stack) != Some(*chain)) {
                wrong.push((*chain, id.clone()));
            }
        }
        for (chain, id) in wrong {
            let done = self.repair.then_some("forgotten");
            if self.repair {
                self.engine.store.disown_snapshot(&id)?;
            }
            self.found("chain", chain, format!("layer {id} is not at the top of this stack"), done);
        }
        Ok(())
    }

    /// Layers that were packed, and indexes that were kept, are there. A record that outlived its layer
    /// or image names nothing that has to be.
    fn made_and_kept(&mut self, sizes: &BTreeMap<Digest, u64>) -> Result<(), BuildError> {
        let diff_ids: BTreeSet<DiffId> = self.survey.layers.iter().map(|layer| layer.diff_id).collect();
        let of_layers = |packed: &&PackedRecord| diff_ids.contains(&packed.diff_id);
        for packed in self.survey.packed.iter().filter(of_layers).cloned().collect::<Vec<_>>() {
            self.report.records += 1;
            let what = match sizes.get(&packed.blob) {
                None if self.engine.store.has_blob(&packed.blob) => continue,
                None => "it is missing".to_owned(),
                Some(size) if *size != packed.size_bytes => {
                    format!("it has {size} bytes instead of {}", packed.size_bytes)
                }
                Some(_) => continue,
            };
            self.bad_packed(&packed.blob, &what.into())?;
        }
        let configs: BTreeSet<Digest> = self.survey.images.iter().map(|image| image.config).collect();
        let of_images = |kept: &&KeptBlob| configs.contains(&kept.config);
        for kept in self.survey.kept.iter().filter(of_images).copied().collect::<Vec<_>>() {
            self.report.records += 1;
            if !sizes.contains_key(&kept.blob) && !self.engine.store.has_blob(&kept.blob) {
                self.bad_kept(&kept.config, &kept.blob, &"it is missing".into())?;
            }
        }
        Ok(())
    }

    /// Forgets what needs a blob, and only then removes it, unless something else needs it. `false`:
    /// somebody uses it, and nothing has changed.
    fn drop_blob(
        &self,
        blob: &Digest,
        forget: impl FnOnce() -> Result<(), BuildError>,
    ) -> Result<bool, BuildError> {
        let store = &self.engine.store;
        let claims = Claims::open(store)?;
        // From here on nobody can begin to use it.
        let Some(_claim) = claims.claim(&Pinnable::Blob(*blob))? else { return Ok(false) };
        forget()?;
        if !store.is_blob_needed(blob)? {
            // Records that come back after a power cut must find their data.
            store.settle()?;
            store.remove_blob(blob)?;
        }
        Ok(true)
    }

    /// A packed layer is missing or wrong: it can be packed again.
    fn bad_packed(&mut self, blob: &Digest, fault: &Fault) -> Result<(), BuildError> {
        let store = &self.engine.store;
        let repair =
            self.repair && fault.is_proof && self.drop_blob(blob, || Ok(store.forget_packed(blob)?))?;
        self.found("packed", blob, &fault.what, repair.then_some("forgotten; the layer is packed again"));
        Ok(())
    }

    /// Something of the index that an image came with is missing or damaged: the image is whole without.
    fn bad_kept(&mut self, config: &Digest, blob: &Digest, fault: &Fault) -> Result<(), BuildError> {
        let store = &self.engine.store;
        let repair =
            self.repair && fault.is_proof && self.drop_blob(blob, || Ok(store.forget_index(config)?))?;
        let what = format!("{blob}, kept for this image: {}", fault.what);
        let done = repair.then_some("forgotten; the image stays, for its own platform");
        self.found("index of an image", config, what, done);
        Ok(())
    }

    /// Tells of garbage, which is no damage.
    fn garbage(&mut self) {
        let mut known: BTreeSet<&SnapshotId> = BTreeSet::new();
        known.extend(self.survey.images.iter().filter_map(|image| image.snapshot.as_ref()));
        known.extend(self.survey.cache.iter().map(|(_, record)| &record.snapshot));
        known.extend(self.survey.sources.iter().map(|(_, record)| &record.snapshot));
        known.extend(self.parents.values().filter_map(|parent| parent.as_ref()?.as_ref()));
        known.extend(self.fulls.values());
        let unknown = self.parents.keys().filter(|id| !known.contains(id)).count();
        if unknown > 0 {
            self.report
                .notes
                .push(format!("{unknown} layers that nothing refers to: `kiln gc` removes them"));
        }
    }
}

/// What an error says of what was read. Whatever may be the fault of this process, which lacks a
/// privilege or memory, or of the moment, says nothing and stays an error: what is no proof of damage
/// must not cost anybody an image.
fn fault(error: impl Into<BuildError>) -> Result<Fault, BuildError> {
    let error = error.into();
    let what = error.to_string();
    match errno(&error) {
        // These are about making a copy, and not about what is there.
        _ if matches!(&error, BuildError::Apply(kiln_layer::ApplyError::Host { .. })) => Err(error),
        Some(Errno::NOENT | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP | Errno::UCLEAN | Errno::BADMSG) => {
            Ok(what.into())
        }
        Some(Errno::IO) => Ok(Fault { what, is_proof: false }),
        None if is_about_content(&error) => Ok(what.into()),
        _ => Err(error),
    }
}

/// The kernel's reason, if it was the kernel that refused.
fn errno(error: &BuildError) -> Option<Errno> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(at) = cause {
        let io_error = at.downcast_ref::<io::Error>();
        let found = io_error.and_then(Errno::from_io_error).or_else(|| at.downcast_ref().copied());
        if found.is_some() {
            return found;
        }
        // An `io::Error` passes over what it wraps.
        let wrapped = io_error.and_then(io::Error::get_ref).map(|inner| inner as &dyn std::error::Error);
        cause = wrapped.or_else(|| at.source());
    }
    None
}

/// Whether an error without a reason of the kernel's says that what was read is wrong.
fn is_about_content(error: &BuildError) -> bool {
    use io::ErrorKind::{InvalidData, InvalidInput, Other, UnexpectedEof};
    use kiln_content::Error as Store;
    use kiln_layer::{ApplyError, DiffError};
    use kiln_snapshotter::Error as Snapshots;
    // What decompressors say.
    let of_stream =
        |source: &io::Error| matches!(source.kind(), InvalidData | InvalidInput | UnexpectedEof | Other);
    match error {
        BuildError::Store(error) => {
            matches!(
                error,
                Store::Mismatch { .. } | Store::NoBlob(_) | Store::TooLarge { .. } | Store::Damaged { .. }
            )
        }
        BuildError::Snapshots(error) => {
            matches!(error, Snapshots::Damaged { .. } | Snapshots::NoSnapshot(_) | Snapshots::NoParent(_))
        }
        BuildError::Diff(error) => {
            matches!(error, DiffError::ReservedName { .. } | DiffError::Redirected { .. })
        }
        BuildError::Apply(ApplyError::Input(source)) | BuildError::Unchecked { source, .. } => {
            of_stream(source)
        }
        BuildError::Apply(error) => matches!(error, ApplyError::Broken { .. } | ApplyError::Refused { .. }),
        BuildError::Json { .. }
        | BuildError::WrongDiffId { .. }
        | BuildError::LayerChanged { .. }
        | BuildError::OtherLayers { .. } => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(errno: Errno) -> BuildError {
        let source = io::Error::from(errno);
        kiln_snapshotter::Error::Host { call: "open", path: "x".into(), source }.into()
    }

    #[test]
    fn only_what_cannot_be_otherwise_is_damage() {
        for errno in [Errno::NOENT, Errno::NOTDIR, Errno::UCLEAN, Errno::BADMSG] {
            assert!(fault(refused(errno)).unwrap().is_proof, "{errno}");
        }
        for errno in
            [Errno::PERM, Errno::ACCESS, Errno::ROFS, Errno::AGAIN, Errno::NOSYS, Errno::NOSPC, Errno::MFILE]
        {
            assert!(fault(refused(errno)).is_err(), "{errno}");
        }
        let sick = fault(refused(Errno::IO)).unwrap();
        assert!(!sick.is_proof, "told, but nothing is forgotten");
        let too_deep = kiln_snapshotter::Error::TooDeep { limit: 500 };
        assert!(fault(too_deep).is_err());
        assert!(fault(kiln_content::Error::NoBlob(Digest::of(b"x"))).unwrap().is_proof);
        let noise = BuildError::Unchecked { path: "x".into(), source: io::Error::other("bad frame") };
        assert!(fault(noise).unwrap().is_proof);
        let wrapped = io::Error::other(io::Error::from(Errno::PERM));
        assert!(fault(BuildError::Unchecked { path: "x".into(), source: wrapped }).is_err());
    }
}
