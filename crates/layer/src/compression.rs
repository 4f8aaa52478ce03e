//! Compressed layers: read by content, written by choice.

mod encode;
mod estargz;
mod gunzip;
mod gzip;
mod hashed;
mod noise;

use std::io::{self, BufRead, Cursor, Read};

use bzip2::bufread::MultiBzDecoder;
use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;

pub use encode::{Codec, CodecError, Encoder};
pub use estargz::{Estargz, estargz};
pub use hashed::{CopyFault, copy_hashed};

/// Windows above 128 MiB are refused: a few bytes must not cost gigabytes.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// `xz -9` needs 65 MiB.
const XZ_MEMORY_KIB: u32 = 256 << 10;
/// Enough for the longest magic, and to tell gzip whose members say how long they are.
const MAGIC: usize = gzip::HEADER.len();

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all, or not in a way known here.
    None,
    /// RFC 1952, any number of members.
    Gzip,
    /// RFC 8878, any number of frames.
    Zstd,
    /// The .xz format.
    Xz,
    /// The .bz2 format, any number of streams.
    Bzip2,
}

/// Tells the compression from the first six bytes of a stream.
pub fn detect(head: &[u8]) -> Compression {
    match head {
        [0x1f, 0x8b, 8, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        // A skippable frame may stand first.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Compression::Xz,
        // Block size, then the first block's magic or, of an empty file, the end's.
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, ..] => Compression::Bzip2,
        [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72, ..] => Compression::Bzip2,
        _ => Compression::None,
    }
}

/// The plain bytes behind `reader`, and what they were compressed with.
///
/// # Errors
/// When the first bytes cannot be read; damage shows while reading.
pub fn decoder<'a>(
    mut reader: impl BufRead + Send + 'a,
) -> io::Result<(Compression, Box<dyn Read + Send + 'a>)> {
    let mut head = Vec::with_capacity(MAGIC);
    reader.by_ref().take(MAGIC as u64).read_to_end(&mut head)?;
    let compression = detect(&head);
    let whole = Cursor::new(head).chain(reader);
    let plain: Box<dyn Read + Send + 'a> = match compression {
        Compression::None => Box::new(whole),
        Compression::Gzip if gunzip::says_its_length(whole.get_ref().0.get_ref()) => {
            Box::new(gunzip::GunzipMembers::new(whole))
        }
        Compression::Gzip => Box::new(MultiGzDecoder::new(whole)),
        Compression::Zstd => {
            let mut zstd = zstd::stream::read::Decoder::with_buffer(whole)?;
            zstd.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(zstd)
        }
        Compression::Xz => Box::new(XzReader::new_mem_limit(whole, true, XZ_MEMORY_KIB)),
        Compression::Bzip2 => Box::new(MultiBzDecoder::new(whole)),
    };
    Ok((compression, plain))
}

/// Whether a stream that begins with `head` is a tar: its first block is a header whose checksum
/// holds. Fewer than 512 bytes are none.
pub fn is_tar(head: &[u8]) -> bool {
    // POSIX ustar: the sum of all bytes, its own eight counted as blanks, in octal at offset 148.
    let Some(header) = head.get(..512) else { return false };
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).sum::<u32>();
    let field = &header[148..156];
    let digits: String = field.iter().map(|&b| char::from(b)).filter(|c| ('0'..='7').contains(c)).collect();
    let expected = sum(header) - sum(field) + 8 * u32::from(b' ');
    u32::from_str_radix(&digits, 8).is_ok_and(|written| written == expected)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = Codec::GZIP.encoder(Vec::new()).unwrap();
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn check(bytes: &[u8], compression: Compression, expected: &[u8]) {
        let (found, mut plain) = decoder(bytes).unwrap();
        let mut text = Vec::new();
        plain.read_to_end(&mut text).unwrap();
        assert_eq!((found, text.as_slice()), (compression, expected));
    }

    #[test]
    fn gzip_members_are_all_read() {
        check(&[gzip(b"one "), gzip(b"two")].concat(), Compression::Gzip, b"one two");
    }

    #[test]
    fn gzip_is_deterministic_and_names_no_time() {
        assert_eq!(gzip(b"text"), gzip(b"text"));
        assert_eq!(&gzip(b"text")[4..8], [0; 4]);
    }

    #[test]
    fn junk_behind_gzip_is_an_error() {
        let bytes = [gzip(b"one"), b"junk".to_vec()].concat();
        let (_, mut plain) = decoder(bytes.as_slice()).unwrap();
        assert!(plain.read_to_end(&mut Vec::new()).is_err());
    }

    #[test]
    fn zstd_frames_are_all_read_and_large_windows_refused() {
        let one = zstd::encode_all(&b"one "[..], 1).unwrap();
        check(&[one.clone(), one].concat(), Compression::Zstd, b"one one ");
        // Magic, no flags, window descriptor 2^31, an empty raw last block.
        let large = [0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3, 1, 0, 0];
        let (_, mut plain) = decoder(&large[..]).unwrap();
        assert!(plain.read_to_end(&mut Vec::new()).is_err());
    }

    #[test]
    fn xz_is_read() {
        // `printf kiln | xz --check=crc32`
        let bytes = [
            0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x00, 0x21, 0x01,
            0x16, 0x00, 0x00, 0x00, 0x74, 0x2f, 0xe5, 0xa3, 0x01, 0x00, 0x03, 0x6b, 0x69, 0x6c, 0x6e, 0x00,
            0x45, 0x37, 0x27, 0xe9, 0x00, 0x01, 0x18, 0x04, 0x6b, 0xe9, 0xf0, 0xa5, 0x90, 0x42, 0x99, 0x0d,
            0x01, 0x00, 0x00, 0x00, 0x00, 0x01, 0x59, 0x5a,
        ];
        check(&bytes, Compression::Xz, b"kiln");
    }

    #[test]
    fn bzip2_streams_are_all_read_and_damage_is_noticed() {
        // `printf kiln | bzip2`
        let one = [
            0x42, 0x5a, 0x68, 0x39, 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, 0xe6, 0x1d, 0xf9, 0xd7, 0x00, 0x00,
            0x00, 0x81, 0x00, 0x00, 0x2d, 0x20, 0x00, 0x21, 0x9a, 0x68, 0x33, 0x4d, 0x07, 0x3c, 0x5d, 0xc9,
            0x14, 0xe1, 0x42, 0x43, 0x98, 0x77, 0xe7, 0x5c,
        ];
        check(&[one, one].concat(), Compression::Bzip2, b"kilnkiln");
        // `printf '' | bzip2`
        check(b"BZh9\x17\x72\x45\x38\x50\x90\0\0\0\0", Compression::Bzip2, b"");
        let (_, mut plain) = decoder(&one[..one.len() - 4]).unwrap();
        assert!(plain.read_to_end(&mut Vec::new()).is_err());
    }

    #[test]
    fn a_tar_is_told_by_its_checksum() {
        let mut header = tar::Header::new_ustar();
        header.set_path("file").unwrap();
        header.set_cksum();
        assert!(is_tar(header.as_bytes()) && is_tar(&[header.as_bytes(), &b"more"[..]].concat()));
        assert!(!is_tar(&header.as_bytes()[..511]));
        assert!(!is_tar(&[0; 512]) && !is_tar(&[b'0'; 512]));
        let mut other = *header.as_bytes();
        other[0] = b'F';
        assert!(!is_tar(&other));
    }

    #[test]
    fn short_and_unknown_streams_pass_as_they_are() {
        check(b"", Compression::None, b"");
        check(b"ab", Compression::None, b"ab");
        check(b"BZh91 is no bzip2", Compression::None, b"BZh91 is no bzip2");
    }
}
