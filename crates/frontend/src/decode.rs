//! Bytes to text, at the door.

use crate::{Diagnostic, Span};

/// Checks that `bytes` are UTF-8 text without NUL bytes; a byte order mark is dropped.
///
/// # Errors
/// The place of the first byte that does not fit.
pub fn decode(bytes: &[u8]) -> Result<&str, Diagnostic> {
    let at = |offset: usize, message: &str| {
        Err(Diagnostic::error(Span { start: offset, end: offset + 1 }, message))
    };
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return at(0, "the Dockerfile is UTF-16; save it as UTF-8");
    }
    let bytes = bytes.strip_prefix(&[0xef, 0xbb, 0xbf]).unwrap_or(bytes);
    if let Some(offset) = bytes.iter().position(|&b| b == 0) {
        return at(offset, "the Dockerfile contains a NUL byte");
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => at(error.valid_up_to(), "the Dockerfile is not valid UTF-8 here"),
    }
}
