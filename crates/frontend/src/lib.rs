//! A Dockerfile's text becomes a build definition and an image config.
//!
//! ```text
//! decode ─▶ lexer ─▶ parser ─▶ Ast ─▶ stages ─▶ lower ─▶ Definition + ImageConfig
//!                                                └─▶ Needs(base images): resolve them, call again
//! ```
//! Read `lexer.rs` first, then `ast.rs`, `parser.rs`, `words.rs`, `stages.rs`, `lower.rs` with what
//! stands below it, `lint.rs` with [`Rule`], and [`ignore`].
//!
//! # Invariants
//! - Pure: no file, no clock, no environment. Base images' configs are handed in.
//! - Every diagnostic knows the bytes it speaks of.
//! - Time in proportion to the text: limits stop what would double or nest without end.

#![forbid(unsafe_code)]

mod ast;
mod check;
mod decode;
mod diagnostic;
mod directive;
mod dump;
mod flags;
pub mod git_url;
mod healthcheck;
mod heredoc;
pub mod ignore;
mod lexer;
mod lint;
mod lower;
mod mount;
mod outline;
mod parser;
mod pattern;
mod redact;
mod scope;
mod stages;
mod suggest;
mod words;

pub use ast::Ast;
pub use check::{CheckOptions, Rule};
pub use decode::decode;
pub use diagnostic::{Diagnostic, Severity, Span};
pub use lint::looks_like_secret;
pub use lower::{
    BaseImage, ChangeError, EpochTime, HistoryEntry, ImageKey, Lowered, Lowering, NamedContext, Need,
    NeedsTime, Options, TimeOf, apply_changes, lower,
};
pub use outline::{Outline, OutlineArg, Target, targets};
pub use parser::parse;
pub use redact::{masked_credentials, without_credentials};
pub use stages::is_proxy;
pub use suggest::nearest;

#[cfg(test)]
mod tests;
