//! All that a thread which runs an op shares with the task that owns the core. The tests in `threads.rs` put
//! shuttle's in their place.

pub(super) use std::sync::atomic::{AtomicBool, Ordering};

pub(super) use tokio::sync::mpsc::Sender;
