//! `kiln save`: images of the store as one tar that other tools load.

use std::io::Write;
use std::path::Path;

use kiln_content::ImageRecord;
use kiln_oci::Reference;

use super::archive::{ArchiveFormat, Outgoing, TarShelf, write_images};
use super::image::{Assembled, Style, make_ready};
use super::index::whole_index;
use super::packing::Compress;
use crate::{BuildCancel, BuildError, Engine};

/// One image to save, under the names the archive shall give it.
#[derive(Debug, Clone)]
pub struct SavedImage {
    /// The image.
    pub image: ImageRecord,
    /// None: the archive does not name it.
    pub names: Vec<Reference>,
}

/// How to save.
#[derive(Debug, Clone, Copy)]
pub struct SaveOptions {
    /// Who shall read it.
    pub format: ArchiveFormat,
    /// How layers are packed.
    pub compress: Compress,
}

/// Writes `images` as one archive to `out`; `path` is for messages.
///
/// Layers are read out of their snapshots and checked against their digests on the way; packed ones
/// are remembered in the store.
///
/// # Errors
/// [`BuildError::LayerChanged`] when a stored layer is damaged, [`BuildError::Output`] when `out`
/// does not take it. What was written then is no archive.
pub fn save(
    engine: &Engine,
    images: &[SavedImage],
    options: &SaveOptions,
    path: &Path,
    out: &mut dyn Write,
    cancel: &BuildCancel,
) -> Result<(), BuildError> {
    let style = Style::new(options.compress);
    // All of them before the first byte: what cannot be packed leaves no half of an archive.
    let mut outgoing = Vec::with_capacity(images.len());
    for SavedImage { image, names } in images {
        let ready = make_ready(engine, &Assembled::stored(engine, image)?, &style, cancel.flag())?;
        let index = whole_index(engine, image, &ready.descriptor.digest)?;
        outgoing.push(Outgoing { image: ready, names: names.clone(), index });
    }
    let mut shelf = TarShelf::new(out, path);
    write_images(engine, &outgoing, options.format, &mut shelf, cancel.flag())?;
    shelf.finish()
}
