//! The client beside registries that do what registries do, and what they should not.

mod auth;
mod bench;
mod matrix;
mod mirrors;
mod pull;
mod push;
mod search;
mod server;
