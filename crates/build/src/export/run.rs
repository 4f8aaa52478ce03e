//! The outputs of a build, all or none.

use std::borrow::Cow;
use std::io::{BufWriter, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kiln_content::{ImageRecord, Named};
use kiln_oci::image::{Descriptor, Index, Manifest, media_type};
use kiln_oci::{Digest, Platform, Reference};

use super::archive::{ArchiveFormat, ImageWriter, Outgoing, TarShelf};
use super::attestation::is_of_one_image;
use super::file::{Dest, NewFile, Target};
use super::image::{Assembled, ReadyImage, Style, make_ready};
use super::layers::Along;
use super::layout::DirShelf;
use super::output::{ArchiveOutput, ImageFormat, ImageOutput, Output, TreeOutput};
use super::packing::{Compress, Packing};
use super::save::{Leaving, write_archive, write_ready};
use super::tree::{TreeStyle, write_tar};
use crate::archive::Archive;
use crate::image::{parse_json, store_image};
use crate::load::{MAX_MANIFEST_BYTES, load_only_image};
use crate::platforms::Product;
use crate::registry::{Outbound, PushedName, Registries, push_index, push_ready};
use crate::streams::OutStream;
use crate::{BuildCancel, BuildError, Engine};

/// What a build made, before anything of it has left.
pub(crate) struct Delivery<'a> {
    pub(crate) engine: &'a Engine,
    /// For each platform, one at least.
    pub(crate) products: &'a [Product],
    /// Somebody wants to know what the manifest is, even of an image that only stays in the store.
    pub(crate) wants_manifest: bool,
    /// `SOURCE_DATE_EPOCH`
    pub(crate) epoch: Option<i64>,
    /// `None`: nothing can be pushed.
    pub(crate) registries: Option<&'a Registries>,
    pub(crate) cancel: &'a BuildCancel,
}

/// What has left.
#[derive(Debug, Default)]
pub(crate) struct Delivered {
    /// The image in the store.
    pub(crate) image: Option<ImageRecord>,
    /// Image ID and manifest of the first output that is an image.
    pub(crate) id: Option<Digest>,
    pub(crate) manifest: Option<Descriptor>,
    /// Names in the store and in archives, each once.
    pub(crate) names: Vec<Reference>,
    /// Files and directories that were written.
    pub(crate) files: Vec<PathBuf>,
    /// Names that registries have now.
    pub(crate) pushed: Vec<PushedName>,
    /// What the user should know.
    pub(crate) notes: Vec<String>,
    /// What is to be pushed once all files are written, and what of it is on its way to the first name.
    outgoing: Vec<(ReadyImage, Vec<Reference>, Option<Outbound>)>,
    /// Indexes in the store that are to be pushed then.
    pub(super) indexes: Vec<(Descriptor, Vec<Reference>)>,
}

/// Writes all `outputs`. Files get their names only when every output is written, and what is to be pushed
/// is; names in the store come last.
///
/// # Errors
/// [`BuildError`]; of files nothing is left then, and no name has moved.
pub(crate) fn deliver(delivery: &Delivery<'_>, outputs: &[Output]) -> Result<Delivered, BuildError> {
    let mut delivered = Delivered::default();
    let mut files: Vec<NewFile> = Vec::new();
    let mut names: Vec<(Reference, ImageRecord)> = Vec::new();
    // What cannot be taken back comes after what can: standard output at the end.
    let mut ordered: Vec<&Output> = outputs.iter().collect();
    ordered.sort_by_key(|output| match output {
        _ if output.is_stdout() => 3,
        Output::Local(_) => 2,
        Output::Archive(archive) if archive.directory => 1,
        _ => 0,
    });
    let first = delivery.products.first();
    let first = first.ok_or_else(|| BuildError::Bug { what: "nothing was built".to_owned() })?;
    let is_single = delivery.products.len() == 1;
    let is_attested = delivery.products.iter().any(|product| !product.predicates.is_empty());
    // One image and nothing else needs no index.
    let is_one = is_single && !is_attested;
    for output in ordered {
        match output {
            Output::Image(output) => {
                let (record, digest) = if is_one {
                    let record = delivery.image(output, first, &mut delivered)?;
                    let digest = record.manifest;
                    (record, digest)
                } else {
                    delivery.store_index(output, &mut delivered)?
                };
                for name in delivery.names(output, &digest)? {
                    names.push((name, record.clone()));
                }
                delivered.image = Some(record);
            }
            Output::Archive(output) if is_one || (is_single && output.kind == ArchiveFormat::Docker) => {
                delivery.archive(output, first, &mut files, &mut delivered)?;
                if is_attested {
                    let note = "type=docker holds no attestations: type=oci and type=image do";
                    delivered.notes.push(note.to_owned());
                }
            }
            Output::Archive(output) => delivery.archive_index(output, &mut files, &mut delivered)?,
            Output::Tar(output) if is_one => {
                let style = delivery.tree_style(output, first);
                delivery.write_to(&output.dest, &mut files, &mut |target| {
                    let (engine, cancel) = (delivery.engine, delivery.cancel.flag());
                    write_tar(engine, first.top.as_ref(), &style, target.path, target.out, cancel)
                })?;
            }
            Output::Tar(output) => {
                delivery
                    .write_to(&output.dest, &mut files, &mut |target| delivery.write_tars(output, target))?;
            }
            Output::Local(output) => delivery.write_locals(output, &mut delivered)?,
            Output::CacheOnly => {}
        }
    }
    for (ready, names, outbound) in std::mem::take(&mut delivered.outgoing) {
        let none = || BuildError::Bug { what: "there are no registries to push to".to_owned() };
        let registries = delivery.registries.ok_or_else(none)?;
        let (engine, cancel) = (delivery.engine, delivery.cancel);
        let pushed = push_ready(engine, registries, &ready, None, &names, outbound, cancel)?;
        delivered.pushed.extend(pushed);
    }
    for (root, names) in std::mem::take(&mut delivered.indexes) {
        let none = || BuildError::Bug { what: "there are no registries to push to".to_owned() };
        let registries = delivery.registries.ok_or_else(none)?;
        let pushed = push_index(delivery.engine, registries, &root, &names, delivery.cancel)?;
        delivered.pushed.extend(pushed);
    }
    for file in files {
        delivered.files.push(file.path().to_owned());
        file.finish()?;
    }
    let mut unsaid: Vec<ImageRecord> = Vec::new();
    if names.is_empty() {
        unsaid.extend(delivered.image.clone());
    }
    for (name, image) in names {
        let named = delivery.engine.store.set_name(&name, &image)?;
        delivered.add_name(&name);
        // Who builds again what the name led to has asked with the look at the name.
        if named != (Named::Already { has_index: false }) && !unsaid.contains(&image) {
            unsaid.push(image);
        }
    }
    for image in unsaid.iter().filter(|_| is_one) {
        delivery.forget_said(image, &mut delivered)?;
    }
    Ok(delivered)
}

impl Delivered {
    pub(super) fn add_name(&mut self, name: &Reference) {
        if !self.names.contains(name) {
            self.names.push(name.clone());
        }
    }

    fn seen_first(&mut self, made: &[Outgoing<'_>]) {
        made.iter().for_each(|made| self.seen(made.image.config, &made.image.descriptor));
    }

    pub(super) fn seen(&mut self, id: Digest, manifest: &Descriptor) {
        if self.id.is_none() {
            self.id = Some(id);
            self.manifest = Some(manifest.clone());
        }
    }
}

impl Delivery<'_> {
    /// The image of `product` for an output: with the time that it has of its own, if any.
    pub(super) fn assembled<'p>(
        &self,
        format: &ImageFormat,
        product: &'p Product,
    ) -> Result<Cow<'p, Assembled>, BuildError> {
        let lacking = || BuildError::Bug { what: "an output lacks its image".to_owned() };
        let image = product.image.as_ref().ok_or_else(lacking)?;
        match format.epoch {
            Some(epoch) => Ok(Cow::Owned(image.made_at(epoch)?)),
            None => Ok(Cow::Borrowed(image)),
        }
    }

    pub(super) fn tree_style(&self, output: &TreeOutput, product: &Product) -> TreeStyle {
        let is_split = output.platform_split.unwrap_or(self.products.len() > 1);
        let below = is_split.then(|| product.platform.to_string().replace('/', "_"));
        TreeStyle { epoch: output.epoch.or(self.epoch), below }
    }

    pub(super) fn style(
        &self,
        format: &ImageFormat,
        platform: &Platform,
        delivered: &mut Delivered,
    ) -> Style {
        let compress = format.compress.unwrap_or(Compress::new(Packing::GZIP));
        let newest = format.epoch.or(self.epoch).filter(|_| format.rewrite_timestamp);
        if format.rewrite_timestamp && newest.is_none() {
            let note = "rewrite-timestamp has no effect: SOURCE_DATE_EPOCH is not set";
            if !delivered.notes.iter().any(|known| known == note) {
                delivered.notes.push(note.to_owned());
            }
        }
        Style {
            newest,
            oci: Output::oci_types(format, &compress),
            annotations: format.annotations.of_manifest(platform),
            descriptor_annotations: format.annotations.of_descriptor(platform),
            ..Style::new(compress)
        }
    }

    /// An image in the store. Packed only when somebody asked for it.
    fn image(
        &self,
        output: &ImageOutput,
        product: &Product,
        delivered: &mut Delivered,
    ) -> Result<ImageRecord, BuildError> {
        let image = self.assembled(&output.format, product)?;
        let Assembled { config_json, layers, top, .. } = &*image;
        let mut format = output.format.clone();
        if output.push {
            // What the registry gets is what the store says the image is.
            format.compress.get_or_insert(Compress::new(Packing::GZIP));
        }
        let format = &format;
        let ImageFormat { rewrite_timestamp, epoch, artifact, .. } = *format;
        let plain = ImageFormat { rewrite_timestamp, epoch, artifact, ..ImageFormat::default() };
        let style = self.style(format, &product.platform, delivered);
        if *format == plain && style.newest.is_none() {
            let record = store_image(self.engine, config_json, layers, top.clone(), None)?;
            if self.wants_manifest {
                let json = self.engine.store.read_blob(&record.manifest, MAX_MANIFEST_BYTES)?;
                let parsed: Manifest = parse_json("manifest", &record.manifest, &json)?;
                let kind = parsed.media_type.as_deref().unwrap_or(media_type::OCI_MANIFEST);
                let mut descriptor = Descriptor::new(kind, record.manifest, json.len() as u64);
                descriptor.platform = Some(product.platform.clone());
                delivered.seen(record.config, &descriptor);
            }
            return Ok(record);
        }
        // Without a request layers are written anew only where they must.
        let compress = format.compress.unwrap_or(Compress::new(Packing::UNCOMPRESSED));
        let style = Style { compress, ..style };
        // Blobs without a manifest are nobody's: they may leave before it is known that all outputs can be
        // written.
        let mut outbound = match (self.registries, output.names.first()) {
            (Some(registries), Some(name)) if output.push => {
                Some(Outbound::new(self.engine, registries, name, false)?)
            }
            _ => None,
        };
        let mut along = outbound.as_mut().map_or(Along::Nobody, Along::Registry);
        let ready = make_ready(self.engine, &image, &style, self.cancel.flag(), &mut along)?;
        delivered.seen(ready.config, &ready.descriptor);
        if output.push {
            let names = output.names.iter().map(|name| match output.by_digest {
                true => with_digest(name, &ready.descriptor.digest),
                false => Ok(name.clone()),
            });
            delivered.outgoing.push((ready.clone(), names.collect::<Result<_, _>>()?, outbound));
        }
        if ready.config == Digest::of(config_json) {
            let made = Some(&*ready.manifest_json);
            return store_image(self.engine, config_json, layers, top.clone(), made);
        }
        self.store_changed(ready)
    }

    /// Forgets what another build said of the very same image: who pushes it now says no more than this one did. Whose
    /// name goes without it then is told.
    fn forget_said(&self, image: &ImageRecord, delivered: &mut Delivered) -> Result<(), BuildError> {
        let store = &self.engine.store;
        let Some(root) = store.index_of(&image.config)? else { return Ok(()) };
        // One that is damaged is nothing that a build ends with.
        let Ok(json) = store.read_blob(&root, MAX_MANIFEST_BYTES) else { return Ok(()) };
        if parse_json("index", &root, &json).is_ok_and(|index: Index| is_of_one_image(&index)) {
            store.forget_index(&image.config)?;
            let names = store.names_of(&image.config)?;
            let others = names.iter().filter(|name| !delivered.names.contains(name));
            let others: Vec<String> = others.map(Reference::familiar).collect();
            if !others.is_empty() {
                delivered.notes.push(format!(
                    "what was said of {}, the very same image, is taken back: this build says nothing",
                    others.join(", ")
                ));
            }
        }
        Ok(())
    }

    /// Stores an image whose layers are no longer those of the snapshots: it is unpacked.
    pub(super) fn store_changed(&self, ready: ReadyImage) -> Result<ImageRecord, BuildError> {
        let path = Path::new("the image");
        let failed = |source| BuildError::Output { path: path.to_owned(), source };
        let mut spool = self.engine.store.spool()?;
        let outgoing = Outgoing { image: ready, names: &[], index: None };
        let mut out = BufWriter::with_capacity(256 << 10, &spool);
        let mut shelf = TarShelf::new(Target { path, out: &mut out, file: None });
        let mut writer = ImageWriter::new(self.engine, ArchiveFormat::Oci, &mut shelf, self.cancel.flag());
        writer.image(&outgoing)?;
        writer.finish()?;
        shelf.finish()?;
        out.into_inner().map_err(|error| failed(error.into_error()))?;
        spool.seek(SeekFrom::Start(0)).map_err(failed)?;
        load_only_image(self.engine, &Archive::open(path, spool)?, self.cancel)
    }

    /// The names that an image gets in the store; `digest` is what is behind them.
    fn names(&self, output: &ImageOutput, digest: &Digest) -> Result<Vec<Reference>, BuildError> {
        let mut names = output.names.clone();
        if output.canonical {
            for name in &output.names {
                names.push(with_digest(name, digest)?);
            }
        }
        if let (Some(prefix), true) = (&output.dangling_prefix, output.names.is_empty()) {
            names.push(with_digest(prefix, digest)?);
        }
        Ok(names)
    }

    fn archive(
        &self,
        output: &ArchiveOutput,
        product: &Product,
        files: &mut Vec<NewFile>,
        delivered: &mut Delivered,
    ) -> Result<(), BuildError> {
        let style = self.style(&output.format, &product.platform, delivered);
        output.names.iter().for_each(|name| delivered.add_name(name));
        let (engine, cancel) = (self.engine, self.cancel.flag());
        let image = self.assembled(&output.format, product)?;
        let leaving = [Leaving { image: &image, names: &output.names, index: None }];
        if let (Dest::Path(dir), true) = (&output.dest, output.directory) {
            let mut shelf = DirShelf::new(dir)?;
            let made = write_ready(engine, &leaving, &style, output.kind, &mut shelf, cancel)?;
            delivered.seen_first(&made);
            delivered.files.push(dir.clone());
            return Ok(());
        }
        self.write_to(&output.dest, files, &mut |target| {
            let made = write_archive(engine, &leaving, &style, output.kind, target, cancel)?;
            delivered.seen_first(&made);
            Ok(())
        })
    }

    /// Lets `write` write to `dest`; a file is added to `files`, to get its name later.
    pub(super) fn write_to(
        &self,
        dest: &Dest,
        files: &mut Vec<NewFile>,
        write: &mut dyn FnMut(&mut Target<'_>) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        match dest {
            Dest::Stdout => {
                let path = Path::new("standard output");
                let unwritable = |source| BuildError::Output { path: path.to_owned(), source };
                OutStream::written(self.cancel, unwritable, |out| {
                    write(&mut Target { path, out, file: None })
                })
            }
            Dest::Path(path) => {
                let new = NewFile::create(path)?;
                new.write_by(write)?;
                files.push(new);
                Ok(())
            }
        }
    }
}

/// `name`, without its tag and with this digest.
pub(super) fn with_digest(name: &Reference, digest: &Digest) -> Result<Reference, BuildError> {
    let text = format!("{}@{digest}", name.familiar_name());
    text.parse().map_err(|error: kiln_oci::ReferenceError| BuildError::Bug { what: error.to_string() })
}
