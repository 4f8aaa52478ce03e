//! The registry over its own socket. `pull`, `push`, `discovery` and `management` are the requirements of OCI's
//! conformance suite, by the names that it gives them; `kept` has them once more.

#![allow(clippy::duplicate_mod, reason = "requirements are for each form of a registry")]

mod accounts;
mod client;
mod collection;
mod discovery;
mod hostile;
mod images;
mod kept;
mod lab;
mod management;
mod mirror;
mod pull;
mod push;
