//! A Dockerfile's text becomes a build definition and an image config.
//!
//! ```text
//! decode ─▶ lexer ─▶ parser ─▶ Ast ─▶ lower ─▶ Definition + ImageConfig
//!                                       └─▶ Needs(base images): resolve them, call again
//! ```
//! Read [`lexer`](self) first, then `ast.rs`, `parser.rs`, `words.rs`, `lower.rs` and [`ignore`].
//!
//! # Invariants
//! - Pure: no file, no clock, no environment. Base images' configs are handed in.
//! - Every diagnostic knows the bytes it speaks of.
//! - What is not supported yet is an error at its place, never silently left out.

#![forbid(unsafe_code)]

mod ast;
mod changes;
mod decode;
mod diagnostic;
pub mod git_url;
pub mod ignore;
mod lexer;
mod lower;
mod parser;
mod suggest;
mod words;

pub use ast::Ast;
pub use changes::{ChangeError, apply_changes};
pub use decode::decode;
pub use diagnostic::{Diagnostic, Severity, Span};
pub use lower::{BaseImage, HistoryEntry, Lowered, Lowering, Options, lower};
pub use parser::parse;
pub use suggest::nearest;

#[cfg(test)]
mod tests;
