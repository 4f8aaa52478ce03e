//! Outputs of a build for several platforms, or with something to be said of them: an index of images, or the files of
//! each.
//!
//! In the store the index is kept beside the image of one platform, as one that was loaded or pulled with it:
//! this machine's if it is among them, else the first. That image has the name.

use std::io::{self, Write};

use kiln_content::ImageRecord;
use kiln_oci::image::{Descriptor, Extra, Index, media_type, to_json};
use kiln_oci::{Digest, Platform, Reference};

use super::archive::ImageWriter;
use super::attestation::ReadyAttestation;
use super::file::{Dest, NewFile, Target};
use super::image::{ReadyImage, make_ready};
use super::layers::{Along, LayerContent, write_plain};
use super::layout::DirShelf;
use super::output::{ArchiveOutput, ImageFormat, ImageOutput, TreeOutput};
use super::run::{Delivered, Delivery};
use super::tree::{left_out_note, write_local, write_tar};
use super::{Shelf, TarShelf};
use crate::BuildError;
use crate::image::{note_chains, store_image};
use crate::platforms::Product;

/// Images of all platforms and what is said of them, with the index that lists all that.
pub(crate) struct ReadyIndex {
    /// One for each platform, whether they are the same or not.
    pub(crate) images: Vec<ReadyImage>,
    pub(crate) attestations: Vec<ReadyAttestation>,
    /// Points to the index.
    pub(crate) descriptor: Descriptor,
    pub(crate) json: Vec<u8>,
}

impl ReadyIndex {
    /// Lists `images`, each once: platforms may turn out to have the same one. Who takes the first that fits finds
    /// them before what is said of them.
    fn new(
        images: Vec<ReadyImage>,
        attestations: Vec<ReadyAttestation>,
        format: &ImageFormat,
        oci: bool,
    ) -> Self {
        let kind = if oci { media_type::OCI_INDEX } else { media_type::DOCKER_INDEX };
        let mut manifests: Vec<Descriptor> = Vec::with_capacity(images.len());
        for image in &images {
            if !manifests.contains(&image.descriptor) {
                manifests.push(image.descriptor.clone());
            }
        }
        manifests.extend(attestations.iter().map(|said| said.descriptor.clone()));
        let index = Index {
            schema_version: 2,
            media_type: Some(kind.to_owned()),
            manifests,
            annotations: format.annotations.of_index().clone(),
            extra: Extra::new(),
        };
        let json = to_json(&index);
        let mut descriptor = Descriptor::new(kind, Digest::of(&json), json.len() as u64);
        descriptor.annotations.clone_from(format.annotations.of_index_descriptor());
        Self { images, attestations, descriptor, json }
    }

    /// What users know it by: an image for one platform has an ID.
    fn id(&self) -> Digest {
        if let [only] = self.images.as_slice() { only.config } else { self.descriptor.digest }
    }
}

impl Delivery<'_> {
    /// Packs the images of all platforms, which get these names.
    fn ready_index(
        &self,
        format: &ImageFormat,
        names: &[Reference],
        delivered: &mut Delivered,
    ) -> Result<ReadyIndex, BuildError> {
        let mut images = Vec::with_capacity(self.products.len());
        let mut attestations = Vec::new();
        let mut oci = true;
        for product in self.products {
            let style = self.style(format, &product.platform, delivered);
            oci &= style.oci;
            let image = self.assembled(format, product)?;
            let made = make_ready(self.engine, &image, &style, self.cancel.flag(), &mut Along::Nobody)?;
            let (said, as_artifact) = (&product.predicates, format.artifact);
            let said = ReadyAttestation::new(&made, &product.platform, said, names, as_artifact);
            attestations.extend(said);
            images.push(made);
        }
        Ok(ReadyIndex::new(images, attestations, format, oci))
    }

    /// The index in the store, with all that it lists: the image that has its name, and its digest.
    pub(super) fn store_index(
        &self,
        output: &ImageOutput,
        delivered: &mut Delivered,
    ) -> Result<(ImageRecord, Digest), BuildError> {
        let store = &self.engine.store;
        let ready = self.ready_index(&output.format, &output.names, delivered)?;
        let mut blobs = Vec::new();
        for (image, product) in ready.images.iter().zip(self.products) {
            for layer in &image.layers {
                let Descriptor { digest, size, .. } = layer.descriptor;
                store.hold_blob(&digest)?;
                if let LayerContent::Plain(record) = &layer.content
                    && !store.has_blob(&digest)
                {
                    let mut ingest = store.ingest()?;
                    write_plain(self.engine, record, &mut ingest, self.cancel.flag())?;
                    ingest.commit(Some((digest, size)))?;
                }
                blobs.push(digest);
            }
            // A build that stands on one of them finds its files.
            let assembled = self.assembled(&output.format, product)?;
            if image.config == Digest::of(&assembled.config_json) {
                note_chains(self.engine, &assembled.layers)?;
            }
            blobs.push(store.put_blob(&image.config_json)?);
            blobs.push(store.put_blob(&image.manifest_json)?);
        }
        for (_, bytes) in ready.attestations.iter().flat_map(|said| &said.blobs) {
            blobs.push(store.put_blob(bytes)?);
        }
        let index = store.put_blob(&ready.json)?;
        blobs.sort_unstable();
        blobs.dedup();
        let nth = self.named();
        let (product, image) = (&self.products[nth], &ready.images[nth]);
        let assembled = self.assembled(&output.format, product)?;
        let record = if image.config == Digest::of(&assembled.config_json) {
            let top = product.top.clone();
            store_image(self.engine, &image.config_json, &assembled.layers, top, Some(&image.manifest_json))?
        } else {
            self.store_changed(image.clone())?
        };
        // What an index lists follows from its digest.
        if store.index_of(&record.config)? != Some(index) {
            store.keep_index(&record.config, &index, &blobs)?;
        }
        delivered.seen(ready.id(), &ready.descriptor);
        if output.push {
            let names = output.names.iter().map(|name| match output.by_digest {
                true => super::run::with_digest(name, &index),
                false => Ok(name.clone()),
            });
            delivered.indexes.push((ready.descriptor, names.collect::<Result<_, _>>()?));
        }
        Ok((record, index))
    }

    /// Which platform's image has the name in the store.
    fn named(&self) -> usize {
        let host = Platform::host();
        let distance = |product: &Product| host.distance(&product.platform).unwrap_or(usize::MAX);
        let all = self.products.iter().enumerate();
        all.min_by_key(|(_, product)| distance(product)).map_or(0, |(nth, _)| nth)
    }

    /// An OCI archive or layout of the index.
    pub(super) fn archive_index(
        &self,
        output: &ArchiveOutput,
        files: &mut Vec<NewFile>,
        delivered: &mut Delivered,
    ) -> Result<(), BuildError> {
        output.names.iter().for_each(|name| delivered.add_name(name));
        let ready = self.ready_index(&output.format, &output.names, delivered)?;
        let put = |shelf: &mut dyn Shelf| {
            let mut writer = ImageWriter::new(self.engine, output.kind, shelf, self.cancel.flag());
            writer.index(&ready, &output.names)?;
            writer.finish()
        };
        if let (Dest::Path(dir), true) = (&output.dest, output.directory) {
            put(&mut DirShelf::new(dir)?)?;
            delivered.files.push(dir.clone());
        } else {
            self.write_to(&output.dest, files, &mut |Target { path, out, file }| {
                let mut shelf = TarShelf::new(Target { path, out: &mut **out, file: *file });
                put(&mut shelf)?;
                shelf.finish()
            })?;
        }
        delivered.seen(ready.id(), &ready.descriptor);
        Ok(())
    }

    /// One tar with the files of all platforms.
    pub(super) fn write_tars(&self, output: &TreeOutput, target: &mut Target<'_>) -> Result<(), BuildError> {
        let (engine, cancel) = (self.engine, self.cancel.flag());
        let failed = |source| BuildError::Output { path: target.path.to_owned(), source };
        for product in self.products {
            let style = self.tree_style(output, product);
            let mut out = WithoutEnd { out: &mut *target.out, held: Vec::new() };
            write_tar(engine, product.top.as_ref(), &style, target.path, &mut out, cancel)?;
            for file in self.beside(output, product, target.path)? {
                file.append_to(&mut *target.out).map_err(failed)?;
            }
        }
        target.out.write_all(&[0; END_BYTES]).and_then(|()| target.out.flush()).map_err(failed)
    }

    /// The files of all platforms in one directory.
    pub(super) fn write_locals(
        &self,
        output: &TreeOutput,
        delivered: &mut Delivered,
    ) -> Result<(), BuildError> {
        let Dest::Path(dir) = &output.dest else { return Ok(()) };
        let (engine, cancel) = (self.engine, self.cancel.flag());
        for product in self.products {
            let style = self.tree_style(output, product);
            let said = self.beside(output, product, dir)?;
            let left_out = write_local(engine, product.top.as_ref(), &style, dir, output.mode, cancel)?;
            let shown = style.below.as_ref().map_or_else(|| dir.clone(), |below| dir.join(below));
            delivered.notes.extend(left_out_note(&shown, &left_out));
            for file in said {
                file.put_into(dir)?;
            }
        }
        delivered.files.push(dir.clone());
        Ok(())
    }
}

/// Two empty blocks: the end of a tar.
const END_BYTES: usize = 1024;

/// Passes on all that is written but the last [`END_BYTES`]: another tar follows.
struct WithoutEnd<'a> {
    out: &'a mut dyn Write,
    held: Vec<u8>,
}

impl Write for WithoutEnd<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(bytes);
        let ready = self.held.len().saturating_sub(END_BYTES);
        self.out.write_all(&self.held[..ready])?;
        self.held.drain(..ready);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_tar_all_but_its_end_is_passed_on() {
        let mut out = Vec::new();
        let mut all: Vec<u8> = (0..5000_u32).map(|n| (n % 251) as u8 + 1).collect();
        all.extend([0; END_BYTES]);
        let mut passed = WithoutEnd { out: &mut out, held: Vec::new() };
        for piece in all.chunks(700) {
            passed.write_all(piece).unwrap();
        }
        assert_eq!(out, all[..5000]);
    }
}
