//! Everything that leaves the store: archives, layouts, trees.
//!
//! Read [`Output`] first (what users ask for), then `image.rs` (an image made ready to leave),
//! `layers.rs` (blobs on demand), and the writers: `archive.rs`, `layout.rs`, `tree.rs`;
//! `several.rs` for what has an index: several platforms at once, and images of which something is said
//! (`attestation.rs`; beside files: `beside.rs`).
//!
//! # Invariants
//! - What is written depends on the image and the options alone: two stores give the same bytes.
//! - Every byte that leaves is checked against its digest on the way.
//! - A file has its name only when it is whole; after an error nothing is left of it.

mod archive;
mod attestation;
mod beside;
mod file;
mod image;
mod index;
mod layers;
mod layout;
mod output;
mod packing;
mod run;
mod save;
mod several;
mod tree;

pub use archive::ArchiveFormat;
pub use file::{Dest, NewFile, Target, write_whole};
pub use output::{
    Annotations, ArchiveOutput, ImageFormat, ImageOutput, LocalMode, Output, OutputError, TreeOutput,
};
pub use packing::{Compress, Packing, PackingError};
pub use save::{SaveOptions, SavedImage, save, save_layout};
pub use tree::export_tree;

pub(crate) use archive::{DockerEntry, SHORT_NAME, Shelf, TarShelf, named, put_bytes, put_index, put_list};
pub(crate) use attestation::{PREDICATE_TYPE, REFERENCE_DIGEST, is_attestation_of};
pub(crate) use image::{Assembled, ReadyImage, Style, are_of, make_ready};
pub(crate) use index::whole_index;
pub(crate) use layers::{
    Along, LayerContent, ReadyLayer, WriteError, is_ready, oci_type, packed_layer, packing_name, ready,
    write_layer,
};
pub(crate) use layout::DirShelf;
pub(crate) use output::Attributes;
pub(crate) use run::{Delivered, Delivery, deliver};
