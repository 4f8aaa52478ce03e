//! Solves a graph of vertices: finds cached results, runs what is missing, each vertex once.
//!
//! Read [`op`] first (the contract), then [`core`](self) in `core.rs`: a synchronous state machine
//! that turns events into commands, and `driver.rs`, the thin asynchronous shell around it.
//!
//! # Invariants
//! - Knows no Dockerfile, no file system and no LLB: an [`Op`] is opaque.
//! - A vertex runs at most once, and only when somebody needs its output.
//! - A vertex's identity ([`CacheKey`]) never depends on the order of events.

#![forbid(unsafe_code)]

mod core;
mod driver;
mod event;
mod key;
mod op;

pub use driver::{Job, SolveError, solve};
pub use event::{Event, EventSink, Stream};
pub use key::CacheKey;
pub use op::{CacheStore, Cached, Cancellation, Identity, InputUse, Op, Scope, VertexInput};
