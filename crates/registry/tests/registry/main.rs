//! The client beside registries that do what registries do, and what they should not.

mod auth;
mod bench;
mod growing;
mod matrix;
mod mirrors;
mod pieces;
mod pull;
mod push;
mod referrers;
mod search;
mod server;
mod tls;
