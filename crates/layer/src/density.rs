//! Compressed streams that grow out of all proportion are cut off.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::apply::Limits;
use crate::compression::{Compression, decoder};

/// Gzip's best is 1032 to 1; nothing that is of use comes near.
const MAX_RATIO: u64 = 1000;
/// What libzstd says of a window above the limit that [`decoder`] sets.
const ZSTD_WINDOW: &str = "Frame requires too much memory for decoding";

/// Why a stream is not decompressed further: it costs more than anybody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DensityError {
    /// A bomb: the disk would be full before the stream is at its end.
    #[error(
        "the stream has grown to {plain_bytes} bytes, more than {MAX_RATIO} times the {packed_bytes} that it came in"
    )]
    Ratio {
        /// Bytes read of the compressed stream.
        packed_bytes: u64,
        /// Bytes that came out.
        plain_bytes: u64,
    },
    /// A zstd frame that needs more than 128 MiB of memory.
    #[error("the zstd stream needs a window of more than 128 MiB")]
    Window,
}

impl DensityError {
    /// The one in `error`, which a reader of [`bounded_decoder`] gave.
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

/// Like [`decoder`]; reading fails with a [`DensityError`] once more than [`Limits::free_bytes`] (by
/// default 1 GiB: preallocated files are all zeros, too) has come out of less than a thousandth.
///
/// # Errors
/// Those of [`decoder`].
pub fn bounded_decoder<'a>(
    reader: impl BufRead + Send + 'a,
    limits: &Limits,
) -> io::Result<(Compression, Box<dyn Read + Send + 'a>)> {
    let packed = Arc::new(AtomicU64::new(0));
    let (compression, plain) = decoder(Counting { inner: reader, count: packed.clone() })?;
    let bounded: Box<dyn Read + Send> = match compression {
        Compression::None => plain,
        _ => Box::new(Bounded { plain, packed, plain_bytes: 0, free_bytes: limits.free_bytes }),
    };
    Ok((compression, bounded))
}

struct Counting<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: BufRead> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.count.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

impl<R: BufRead> BufRead for Counting<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, length: usize) {
        self.inner.consume(length);
        self.count.fetch_add(length as u64, Ordering::Relaxed);
    }
}

struct Bounded<'a> {
    plain: Box<dyn Read + Send + 'a>,
    packed: Arc<AtomicU64>,
    plain_bytes: u64,
    free_bytes: u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.plain.read(buffer).map_err(|error| match error.get_ref() {
            Some(inner) if inner.to_string() == ZSTD_WINDOW => io::Error::other(DensityError::Window),
            _ => error,
        })?;
        self.plain_bytes += length as u64;
        let (packed_bytes, plain_bytes) = (self.packed.load(Ordering::Relaxed), self.plain_bytes);
        if plain_bytes > self.free_bytes && plain_bytes / MAX_RATIO > packed_bytes {
            return Err(io::Error::other(DensityError::Ratio { packed_bytes, plain_bytes }));
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    /// A zstd frame of `blocks` blocks of 128 KiB, each of which takes four bytes.
    fn zeros(blocks: usize) -> Vec<u8> {
        // Magic; a window of 128 KiB; blocks of one repeated byte.
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 7 << 3];
        for nth in 1..=blocks {
            let header = (128 << 10) << 3 | 1 << 1 | u32::from(nth == blocks);
            frame.extend_from_slice(&header.to_le_bytes()[..3]);
            frame.push(0);
        }
        frame
    }

    fn read(packed: &[u8]) -> Result<u64, Option<DensityError>> {
        read_within(packed, &Limits::default())
    }

    fn read_within(packed: &[u8], limits: &Limits) -> Result<u64, Option<DensityError>> {
        let (_, mut plain) = bounded_decoder(BufReader::new(packed), limits).unwrap();
        io::copy(&mut plain, &mut io::sink()).map_err(|error| DensityError::of(&error))
    }

    #[test]
    fn a_gibibyte_of_nothing_passes_and_more_does_not() {
        assert_eq!(read(&zeros(8192)), Ok(1 << 30));
        assert!(matches!(read(&zeros(8193)), Err(Some(DensityError::Ratio { .. }))));
        let more = Limits::vouched(8200 << 17);
        assert_eq!(read_within(&zeros(8193), &more), Ok(8193 << 17));
        assert!(matches!(read_within(&zeros(8201), &more), Err(Some(DensityError::Ratio { .. }))));
    }

    #[test]
    fn large_windows_are_told_from_damage() {
        let large = [0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3, 1, 0, 0];
        assert_eq!(read(&large), Err(Some(DensityError::Window)));
        assert_eq!(read(&zeros(2)[..9]), Err(None));
    }
}
