//! The registry over its own socket. `pull`, `push`, `discovery` and `management` are the requirements of OCI's
//! conformance suite, by the names that it gives them.

mod accounts;
mod client;
mod collection;
mod discovery;
mod hostile;
mod images;
mod lab;
mod management;
mod mirror;
mod pull;
mod push;
