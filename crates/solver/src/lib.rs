//! Solves graphs of vertices: finds cached results, runs what is missing, each vertex once.
//!
//! Read [`op`] first (the contract), then [`core`](self) in `core.rs`: a synchronous state machine
//! that turns facts into commands, and `driver.rs`, the thin asynchronous shell around it.
//!
//! # Invariants
//! - Knows no Dockerfile, no file system and no LLB: an [`Op`] is opaque.
//! - A vertex runs at most once, and only when somebody needs its output.
//! - A vertex's identity ([`CacheKey`]) and the set of vertices that run never depend on the order of
//!   events.
//! - The state machine belongs to one task. Threads that run ops share nothing with it: they get their
//!   inputs by value and answer through a channel.

#![forbid(unsafe_code)]

mod core;
mod driver;
mod event;
mod key;
mod op;

pub use crate::core::Limits;
pub use driver::{Job, SolveError, Solver, solve};
pub use event::{Event, EventSink, Stream};
pub use key::CacheKey;
pub use op::{
    CacheStore, Cached, Cancellation, Claim, Cost, Identity, InputUse, Op, Places, Scope, Vertex, VertexInput,
};
