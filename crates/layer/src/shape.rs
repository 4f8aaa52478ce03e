//! What a tar is besides the content of its files.

use std::io;

/// A digest of all bytes of a tar that are not content of a file: headers, extensions, padding, the end.
///
/// A tree that was unpacked from a tar gives the same tar again when it gives the same shape
/// ([`crate::shape`]): every name stands in it once and with its size, and content went into the file
/// of its name. So the content need not be read a second time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape(blake3::Hash);

/// Hashes a shape as it comes.
pub(crate) struct ShapeHasher {
    hash: blake3::Hasher,
    /// Headers are small, and the hash is several times faster in large pieces.
    waiting: Vec<u8>,
}

const PIECE: usize = 64 << 10;

impl ShapeHasher {
    pub(crate) fn new() -> Self {
        Self { hash: blake3::Hasher::new(), waiting: Vec::new() }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        if self.waiting.len() + bytes.len() > PIECE {
            self.hash.update(&self.waiting);
            self.waiting.clear();
        }
        if bytes.len() > PIECE {
            self.hash.update(bytes);
        } else {
            self.waiting.extend_from_slice(bytes);
        }
    }

    pub(crate) fn finish(mut self) -> Shape {
        self.hash.update(&self.waiting);
        Shape(self.hash.finalize())
    }
}

impl io::Write for ShapeHasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
