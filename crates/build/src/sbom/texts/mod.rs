//! What package managers write: bytes in, packages out. No file is opened here, so that all of it can be fuzzed
//! (`fuzz/fuzz_targets/sbom.rs`).

mod apk;
mod dpkg;
mod npm;
mod os_release;
mod python;
mod stanza;

pub(crate) use apk::apk;
pub(crate) use dpkg::dpkg;
pub(crate) use npm::{is_npm, npm};
pub(crate) use os_release::System;
pub(crate) use python::{is_python, python};

/// A name, version or other word that is longer is none.
pub(crate) const MAX_WORD_BYTES: usize = 512;

/// A package as its manager describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Described {
    /// Whose it is, where the manager has a place for that.
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) version: String,
    /// Empty: it is for any processor, or the manager does not say.
    pub(crate) arch: String,
    pub(crate) license: Option<String>,
    pub(crate) maintainer: Option<String>,
}

/// `text` if it is one word or line that can stand for something.
pub(crate) fn word(text: &str) -> Option<String> {
    let text = text.trim();
    let fits = !text.is_empty() && text.len() <= MAX_WORD_BYTES && !text.chars().any(char::is_control);
    fits.then(|| text.to_owned())
}
