//! Containers: processes on a writable layer of their own above an image.
//!
//! So far one life: [`run`] in the foreground, its layer gone at the end.
//!
//! # Invariants
//! - Writes never reach the image: the process sees an active snapshot.
//! - When [`run`] returns, no process, mount or layer of the container is left.

#![forbid(unsafe_code)]

pub mod devices;
mod lifecycle;

pub use lifecycle::{RunError, RunRequest, Tty, run};
