//! Copying bytes whose digest is wanted, at the speed of the slower of both.

use std::io::{self, Read, Write};
use std::sync::Arc;

use kiln_oci::Digest;

use crate::ahead::{InPlace, Pieces};
use crate::hashing::Hashing;

/// Which side of a copy failed.
#[derive(Debug)]
pub enum CopyFault {
    /// Reading.
    Read(io::Error),
    /// Writing.
    Write(io::Error),
}

/// Copies all of `from` into `to`: digest and size of what passed. Hashes on a thread of its own when
/// there is more than a mebibyte.
///
/// # Errors
/// [`CopyFault`].
pub fn copy_hashed(from: impl Read, mut to: impl Write) -> Result<(Digest, u64), CopyFault> {
    let (mut pieces, mut hashing) = (InPlace::new(from), Hashing::new());
    loop {
        let piece = pieces.next(hashing.room()).map_err(CopyFault::Read)?;
        if piece.is_empty() {
            return Ok(hashing.finish());
        }
        let piece = Arc::new(piece);
        hashing.hash(&piece);
        to.write_all(&piece).map_err(CopyFault::Write)?;
        hashing.give_back(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hashing::PIECE;

    #[test]
    fn what_passed_is_copied_and_known() {
        for length in [0, 1, PIECE, 5 * PIECE + 1] {
            let bytes: Vec<u8> = (0..length).map(|at| (at / 7) as u8).collect();
            let mut out = Vec::new();
            let copied = copy_hashed(&bytes[..], &mut out).ok();
            assert_eq!(copied, Some((Digest::of(&bytes), length as u64)));
            assert!(out == bytes);
        }
        assert!(matches!(copy_hashed(&b"abc"[..], &mut &mut [0; 1][..]), Err(CopyFault::Write(_))));
    }
}
