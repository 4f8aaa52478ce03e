//! Build operations as data, in the shape of BuildKit's LLB.
//!
//! Read [`op`] first, then [`definition`] and [`source_map`].
//!
//! # Invariants
//! - Pure data: nothing here runs, reads or waits.
//! - A vertex's inputs stand before it in [`Definition::vertices`]; a definition has no cycle.
//! - Every field of an op that can change its result is a component of its digest
//!   ([`Op::components`]), and source positions never are.

#![forbid(unsafe_code)]

mod definition;
#[cfg(test)]
mod keys;
mod mode;
mod op;
mod source_map;

pub use definition::{Definition, Vertex, VertexId};
pub use mode::{Mode, ModeError};
pub use op::{
    BindMount, CacheMount, Component, Copy, Exec, File, FileAction, Git, GitMtime, Http, InputIndex, Local,
    Merge, Mkdir, Mkfile, Mount, MountKind, Network, Op, Owner, SecretEnv, SecretMount, Security, Sharing,
    Source, SourceImage, Unpack,
};
pub use source_map::{Location, SourceMap};
