//! Layers: a tar stream becomes files below a root; a tree becomes a tar stream.
//!
//! Read [`scan`] first (what a tree is), then [`apply`], [`diff`] and [`copy`].
//!
//! # Invariants
//! - Nothing here mounts anything; `snapshotter` does that.
//! - Tars are hostile. Only [`beneath`] opens a path that came out of a header or a tree.
//! - Same tree in, same bytes out: sorted entries, numeric owners, no access or change times.

#![forbid(unsafe_code)]

mod path;

pub mod beneath;
mod marks;
mod node;

mod index;
mod looked_at;
mod scan;
mod stat_cache;
mod tree_digest;
mod walk;

mod ahead;
mod apply;
mod extract;
mod hashing;
mod tar_acl;
mod tar_header;
mod tar_read;
mod tar_sparse;
mod unpack;

mod archive;
mod diff;
mod member;
mod owners;
mod repack;
mod shape;
mod tar_write;

mod clone;
mod compression;
mod copy;
mod density;

pub use apply::{
    Applied, ApplyError, ApplyOptions, CONTENT_BYTES, Defect, Limits, Reading, Refusal, TAR_BYTES, Whiteouts,
    apply,
};
pub use archive::archive;
pub use beneath::BeneathError;
pub use clone::{TreeError, clone_tree, remove_tree};
pub use compression::{
    Codec, CodecError, Compression, CopyFault, Encoder, Estargz, copy_hashed, decoder, detect, estargz,
    is_tar,
};
pub use copy::{
    Copied, CopyError, CopyRequest, Earlier, Identity, LARGE_FILE_BYTES, ModeChange, Part, TopDir, Whole,
    changed, copy, found_below, made, make_dirs_over, tell_whole,
};
pub use density::{DensityError, bounded_decoder};
pub use diff::{
    DiffError, DiffOptions, Followed, Follower, Following, HashStates, TreeForm, Written, copied_up, diff,
    diff_trees, drop_unchanged, is_opaque, is_whiteout, shape,
};
pub use extract::{ExtractError, ExtractOptions, extract};
pub use index::{Entry, EntryKind, FileStat, KnownFile, ScanError, StatCache, Timestamp};
pub use looked_at::LookedAt;
pub use marks::{copy_record, give, has_single_id, marking, opaque_attribute, uses_user_attributes};
pub use node::is_private_xattr;
pub use owners::record_owner;
pub use path::{EntryPath, PathError, walk_order};
pub use repack::{RepackError, RepackOptions, Times, repack};
pub use scan::{Filter, ScanOptions, Visit, scan};
pub use shape::Shape;
pub use stat_cache::FileStatCache;
pub use tree_digest::tree_digest;
pub use unpack::{ImpliedDir, Inherited, inherit};
