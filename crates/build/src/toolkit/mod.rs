//! The layer toolkit: which layer put a file there, what two images differ in, files out of an image,
//! and images made of others without a Dockerfile.
//!
//! Read `tree.rs` first: the layers of an image, read one by one, become the tree that a
//! container would see, with the layer that each file is from. All else asks that tree.
//!
//! # Invariants
//! - Trees are read out of committed snapshots, below a directory descriptor; nothing is unpacked.
//! - Names are bytes. Nothing here makes text of them but error messages, which escape.
//! - Memory grows with the number of files, never with their content.

mod append;
pub(crate) mod compare;
mod copy_out;
mod diff;
mod error;
mod layers;
mod mutate;
mod show;
mod squash;
mod tree;

pub use compare::Aspect;
pub use copy_out::{CopiedOut, CopyOut, CopySource, copy_out, copy_out_tar};
pub use diff::{Difference, Kind, diff};
pub use error::ToolkitError;
pub use layers::{LayerInfo, layers};
pub use mutate::{Mutated, Mutation, Squash, flatten, mutate};
pub use show::{PathReport, Place, ShowReport, Step, Summary, Waste, WasteKind, show};
