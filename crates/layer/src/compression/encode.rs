//! Writing compressed layers.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use super::gzip::GzipEncoder;

/// How a layer is written: codec and level. The bytes depend on both, on the input, and on nothing
/// else; the number of cores in particular does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// A plain tar.
    Uncompressed,
    /// RFC 1952, levels 0 to 9.
    Gzip {
        /// 0 stores, 1 is fast, 9 is small.
        level: u32,
    },
    /// RFC 8878, levels 1 to 22.
    Zstd {
        /// 1 is fast, 22 is small and takes a GiB of memory.
        level: u32,
    },
}

/// A codec that there is not, or a level that it has not.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    /// No such name.
    #[error("{0:?} is none of uncompressed, gzip, zstd")]
    Name(String),
    /// Beyond the codec's levels.
    #[error("{codec} has levels {least} to {most}, not {level}")]
    Level {
        /// Which codec.
        codec: &'static str,
        /// Lowest level.
        least: u32,
        /// Highest level.
        most: u32,
        /// What was asked for.
        level: i64,
    },
}

impl Codec {
    /// Gzip as it is written when nobody says how: 2 to 4 % larger than level 6 in three quarters of the
    /// time (`docs/adr/0047-what-does-not-compress-is-stored.md`).
    pub const GZIP: Self = Self::Gzip { level: Self::GZIP_LEVEL };
    /// Its level.
    pub const GZIP_LEVEL: u32 = 4;
    /// Zstd as it is written when nobody says how.
    pub const ZSTD: Self = Self::Zstd { level: 3 };

    /// The same codec at another level.
    ///
    /// # Errors
    /// [`CodecError::Level`].
    pub fn with_level(self, level: i64) -> Result<Self, CodecError> {
        let within = |codec, least: u32, most: u32| {
            u32::try_from(level)
                .ok()
                .filter(|level| (least..=most).contains(level))
                .ok_or(CodecError::Level { codec, least, most, level })
        };
        Ok(match self {
            Self::Uncompressed => Self::Uncompressed,
            Self::Gzip { .. } => Self::Gzip { level: within("gzip", 0, 9)? },
            Self::Zstd { .. } => Self::Zstd { level: within("zstd", 1, 22)? },
        })
    }

    /// A writer that compresses into `out`. End it with [`Encoder::finish`].
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn encoder<'a, W: Write + 'a>(self, out: W) -> io::Result<Encoder<'a, W>> {
        Ok(Encoder(match self {
            Self::Uncompressed => Inner::Plain(out),
            Self::Gzip { level } => Inner::Gzip(Box::new(GzipEncoder::new(out, level))),
            Self::Zstd { level } => {
                let level = i32::try_from(level).unwrap_or(i32::MAX);
                let mut zstd = zstd::stream::write::Encoder::new(out, level)?;
                // Bytes with workers differ from those without, but not with their number.
                let workers = u32::try_from(rayon::current_num_threads()).unwrap_or(1);
                zstd.multithread(workers.max(1))?;
                zstd.include_checksum(true)?;
                Inner::Zstd(zstd)
            }
        }))
    }
}

impl FromStr for Codec {
    type Err = CodecError;

    fn from_str(name: &str) -> Result<Self, CodecError> {
        match name {
            "uncompressed" | "none" => Ok(Self::Uncompressed),
            "gzip" => Ok(Self::GZIP),
            "zstd" => Ok(Self::ZSTD),
            _ => Err(CodecError::Name(name.to_owned())),
        }
    }
}

/// `gzip:6`; names the bytes of a layer together with its diff ID.
impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uncompressed => write!(f, "uncompressed"),
            Self::Gzip { level } => write!(f, "gzip:{level}"),
            Self::Zstd { level } => write!(f, "zstd:{level}"),
        }
    }
}

/// Made by [`Codec::encoder`].
pub struct Encoder<'a, W: Write>(Inner<'a, W>);

enum Inner<'a, W: Write> {
    Plain(W),
    Gzip(Box<GzipEncoder<W>>),
    Zstd(zstd::stream::write::Encoder<'a, W>),
}

impl<W: Write> Encoder<'_, W> {
    /// Writes what is left and the end of the stream; the inner writer again.
    ///
    /// # Errors
    /// Those of the inner writer.
    pub fn finish(self) -> io::Result<W> {
        match self.0 {
            Inner::Plain(out) => Ok(out),
            Inner::Gzip(gzip) => gzip.finish(),
            Inner::Zstd(zstd) => zstd.finish(),
        }
    }
}

impl<W: Write> Write for Encoder<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Inner::Plain(out) => out.write(bytes),
            Inner::Gzip(gzip) => gzip.write(bytes),
            Inner::Zstd(zstd) => zstd.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Inner::Plain(out) => out.flush(),
            // An early flush would change the bytes.
            Inner::Gzip(_) | Inner::Zstd(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::{Compression, decoder};

    /// Text that compresses, in `length` bytes that are not the same at any two places.
    fn text(length: usize) -> Vec<u8> {
        (0..length).map(|at| b'a' + (at.wrapping_mul(at) / 7 % 11) as u8).collect()
    }

    /// Text with pieces of noise in it, at places that no cut has.
    fn mixed(length: usize) -> Vec<u8> {
        let mut mixed = text(length);
        for (nth, piece) in mixed.chunks_mut(150_000).enumerate() {
            if nth % 2 == 0 {
                random(piece);
            }
        }
        mixed
    }

    /// xorshift64 (Marsaglia).
    fn random(bytes: &mut [u8]) {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for byte in bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = (state >> 32) as u8;
        }
    }

    fn encode(codec: Codec, text: &[u8], chunk: usize) -> Vec<u8> {
        let mut encoder = codec.encoder(Vec::new()).unwrap();
        for piece in text.chunks(chunk) {
            encoder.write_all(piece).unwrap();
            encoder.flush().unwrap();
        }
        encoder.finish().unwrap()
    }

    #[track_caller]
    fn check(codec: Codec, compression: Compression, text: &[u8]) {
        let bytes = encode(codec, text, 100_000);
        let (found, mut plain) = decoder(bytes.as_slice()).unwrap();
        let mut read = Vec::new();
        plain.read_to_end(&mut read).unwrap();
        assert_eq!(found, compression);
        assert!(read == text, "{codec}: {} bytes came back as {}", text.len(), read.len());
    }

    #[test]
    fn what_was_written_is_read_again() {
        let mut noise = vec![0; 1_700_000];
        random(&mut noise);
        for length in [0, 1, (512 << 10) - 1, 512 << 10, (512 << 10) + 1, 1 << 20, 3_000_001] {
            for level in [0, 1, 6, 9] {
                check(Codec::Gzip { level }, Compression::Gzip, &text(length));
            }
            if length > 0 {
                check(Codec::ZSTD, Compression::Zstd, &text(length));
            }
        }
        check(Codec::Uncompressed, Compression::None, &noise);
        for level in [0, 1, 4, 9] {
            check(Codec::Gzip { level }, Compression::Gzip, &noise);
            check(Codec::Gzip { level }, Compression::Gzip, &mixed(2_500_000));
        }
    }

    #[test]
    fn noise_among_text_is_stored_and_level_nine_tries_it() {
        let mixed = mixed(2 << 20);
        let members = |level| {
            let bytes = encode(Codec::Gzip { level }, &mixed, 1 << 20);
            let heads = bytes.windows(super::super::gzip::HEADER.len());
            (heads.filter(|head| **head == super::super::gzip::HEADER).count(), bytes)
        };
        let ((many, stored), (few, tried)) = (members(4), members(9));
        // A mebibyte has three or four pieces of noise, and text between them.
        assert!((10..=16).contains(&many) && few == 2, "{many} and {few} members");
        let found = |bytes: &[u8]| bytes.windows(1000).any(|piece| piece == &mixed[20_000..21_000]);
        assert!(found(&stored) && !found(&mixed[21_000..150_000]));
        assert!(stored.len() < tried.len() + tried.len() / 10, "{} and {}", stored.len(), tried.len());
    }

    #[test]
    fn bytes_depend_on_neither_threads_nor_writes() {
        let text = mixed(5 << 20);
        for codec in [Codec::GZIP, Codec::ZSTD] {
            let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let one = pool(1).install(|| encode(codec, &text, 4096));
            assert!(one == pool(3).install(|| encode(codec, &text, 1 << 20)), "{codec}");
            assert!(one == encode(codec, &text, 777), "{codec}");
        }
    }

    #[test]
    fn other_tools_read_the_cuts() {
        let text = mixed(3 << 20);
        let bytes = encode(Codec::GZIP, &text, 1 << 16);
        let python = "import gzip, sys; sys.stdout.buffer.write(gzip.decompress(sys.stdin.buffer.read()))";
        let tools: [&[&str]; 4] =
            [&["gzip", "-dc"], &["busybox", "gunzip", "-c"], &["bsdcat"], &["python3", "-c", python]];
        for tool in tools {
            let mut command = std::process::Command::new(tool[0]);
            command.args(&tool[1..]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
            let mut reader = match command.spawn() {
                Err(error) if error.kind() == io::ErrorKind::NotFound && tool[0] != "gzip" => {
                    eprintln!("SKIPPED ALOUD: needs {}", tool[0]);
                    continue;
                }
                started => started.unwrap(),
            };
            let mut input = reader.stdin.take().unwrap();
            let output = std::thread::scope(|scope| {
                scope.spawn(|| {
                    input.write_all(&bytes).unwrap();
                    drop(input);
                });
                reader.wait_with_output().unwrap()
            });
            assert!(output.status.success() && output.stdout == text, "{}", tool[0]);
        }
    }

    #[test]
    fn names_and_levels_are_checked() {
        assert_eq!("gzip".parse(), Ok(Codec::GZIP));
        assert_eq!(
            "lz4".parse::<Codec>().unwrap_err().to_string(),
            "\"lz4\" is none of uncompressed, gzip, zstd"
        );
        assert_eq!(Codec::ZSTD.with_level(19), Ok(Codec::Zstd { level: 19 }));
        let error = Codec::GZIP.with_level(-1).unwrap_err();
        assert_eq!(error.to_string(), "gzip has levels 0 to 9, not -1");
    }
}
