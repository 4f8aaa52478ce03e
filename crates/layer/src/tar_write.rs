//! Tar headers: ustar where it fits, PAX records where it does not (POSIX.1-2017, pax).

use std::io::{self, Write};

use crate::index::Timestamp;
use crate::node::Xattrs;

pub(crate) const BLOCK: usize = 512;

/// To be raised with every change of the bytes that a member becomes, here or in [`crate::diff`]: states of
/// a layer's hash that another version kept say nothing about a tar of this one.
pub(crate) const VERSION: u32 = 1;

/// One member's header, before it is bytes.
pub(crate) struct Header<'a> {
    /// With a closing slash for directories.
    pub(crate) path: &'a [u8],
    pub(crate) flag: u8,
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    pub(crate) mtime: Timestamp,
    pub(crate) device: (u32, u32),
    /// Only those that belong into the tar.
    pub(crate) xattrs: &'a Xattrs,
}

/// Largest number in a field of eight bytes: seven octal digits and a NUL.
const MAX_SMALL: u64 = 0o7_777_777;
/// Largest number in a field of twelve bytes.
const MAX_LARGE: u64 = 0o77_777_777_777;

/// Writes a member's header blocks, the PAX member in front included.
pub(crate) fn write_header(out: &mut impl Write, header: &Header<'_>) -> io::Result<()> {
    let records = pax_records(header);
    if !records.is_empty() {
        let name = pax_name(header.path);
        let none = Xattrs::new();
        let pax = Header {
            path: &name,
            flag: b'x',
            link: b"",
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: records.len() as u64,
            mtime: Timestamp::default(),
            device: (0, 0),
            xattrs: &none,
        };
        out.write_all(&ustar(&pax))?;
        out.write_all(&records)?;
        write_padding(out, records.len() as u64)?;
    }
    out.write_all(&ustar(header))
}

/// Fills up to the next block after `size` bytes of content.
pub(crate) fn write_padding(out: &mut impl Write, size: u64) -> io::Result<()> {
    let over = (size % BLOCK as u64) as usize;
    if over == 0 { Ok(()) } else { out.write_all(&[0; BLOCK][over..]) }
}

/// The records, sorted by key, of whatever the ustar fields cannot hold.
fn pax_records(header: &Header<'_>) -> Vec<u8> {
    let mut records = Vec::new();
    // Upper case sorts before lower case, so these come first; a BTreeMap is sorted.
    for (name, value) in header.xattrs {
        push_record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
    }
    if u64::from(header.gid) > MAX_SMALL {
        push_record(&mut records, b"gid", header.gid.to_string().as_bytes());
    }
    if header.link.len() > 100 {
        push_record(&mut records, b"linkpath", header.link);
    }
    if header.mtime.nanos != 0 || ustar_mtime(header.mtime).is_none() {
        push_record(&mut records, b"mtime", decimal(header.mtime).as_bytes());
    }
    if split_name(header.path).is_none() {
        push_record(&mut records, b"path", header.path);
    }
    if header.size > MAX_LARGE {
        push_record(&mut records, b"size", header.size.to_string().as_bytes());
    }
    if u64::from(header.uid) > MAX_SMALL {
        push_record(&mut records, b"uid", header.uid.to_string().as_bytes());
    }
    records
}

/// `length key=value\n`, where the length counts its own digits.
fn push_record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} ").as_bytes());
    for part in [key, b"=", value, b"\n"] {
        records.extend_from_slice(part);
    }
}

/// Seconds with a fraction without closing zeros, as Go and GNU tar write them.
fn decimal(time: Timestamp) -> String {
    // Before 1970 the fraction counts away from zero: -1.5 is -2 s + 0.5 s.
    let (sign, secs, nanos) = match (time.secs < 0, time.nanos) {
        (false, nanos) => ("", time.secs.unsigned_abs(), nanos),
        (true, 0) => ("-", time.secs.unsigned_abs(), 0),
        (true, nanos) => ("-", time.secs.unsigned_abs() - 1, 1_000_000_000 - nanos),
    };
    let text = format!("{sign}{secs}.{nanos:09}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn ustar_mtime(time: Timestamp) -> Option<u64> {
    u64::try_from(time.secs).ok().filter(|&secs| secs <= MAX_LARGE)
}

/// The prefix and name fields for `path`, split at a slash; `None` when it does not fit.
fn split_name(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.len() <= 100 {
        return Some((b"", path));
    }
    // The first slash that leaves a name short enough; the closing slash of a directory stays.
    let from = path.len() - 101;
    let at = from + path[from..path.len() - 1].iter().position(|&b| b == b'/')?;
    (1..=155).contains(&at).then(|| (&path[..at], &path[at + 1..]))
}

fn pax_name(path: &[u8]) -> Vec<u8> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let base = path.rsplit(|&b| b == b'/').next().unwrap_or_default();
    let mut name = b"PaxHeaders.0/".to_vec();
    // Old tools that do not know PAX make files of these: keep the names harmless.
    name.extend(base.iter().take(80).map(|&b| if b.is_ascii_graphic() { b } else { b'_' }));
    name
}

fn ustar(header: &Header<'_>) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let (prefix, name) = split_name(header.path).unwrap_or_else(|| (b"", &header.path[..100]));
    block[..name.len()].copy_from_slice(name);
    block[345..345 + prefix.len()].copy_from_slice(prefix);
    octal(&mut block[100..108], header.mode.into());
    octal(&mut block[108..116], in_range(header.uid.into(), MAX_SMALL));
    octal(&mut block[116..124], in_range(header.gid.into(), MAX_SMALL));
    octal(&mut block[124..136], in_range(header.size, MAX_LARGE));
    octal(&mut block[136..148], ustar_mtime(header.mtime).unwrap_or(0));
    block[156] = header.flag;
    let link = &header.link[..header.link.len().min(100)];
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    octal(&mut block[329..337], in_range(header.device.0.into(), MAX_SMALL));
    octal(&mut block[337..345], in_range(header.device.1.into(), MAX_SMALL));
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
    octal(&mut block[148..155], sum);
    block
}

/// A PAX record stands for what does not fit; the field then holds 0.
fn in_range(number: u64, max: u64) -> u64 {
    if number > max { 0 } else { number }
}

/// Octal digits with leading zeros and a closing NUL.
fn octal(field: &mut [u8], mut number: u64) {
    let digits = field.len() - 1;
    for digit in field[..digits].iter_mut().rev() {
        *digit = b'0' + (number & 7) as u8;
        number >>= 3;
    }
    field[digits] = 0;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(path: &[u8], size: u64, mtime: Timestamp) -> Vec<u8> {
        let header = Header {
            path,
            flag: b'0',
            link: b"",
            mode: 0o644,
            uid: 0,
            gid: 0,
            size,
            mtime,
            device: (0, 0),
            xattrs: &Xattrs::new(),
        };
        let mut out = Vec::new();
        write_header(&mut out, &header).unwrap();
        out
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    #[test]
    fn sizes_from_eight_gibibytes_go_into_a_record() {
        let below = bytes(b"big", MAX_LARGE, Timestamp::default());
        assert_eq!((below.len(), &below[124..136]), (512, &b"77777777777\0"[..]));
        let above = bytes(b"big", 10 << 30, Timestamp::default());
        assert_eq!(above.len(), 3 * 512);
        assert!(text(&above[512..1024]).starts_with("20 size=10737418240\n"));
    }

    #[test]
    fn times_keep_their_nanoseconds_even_before_1970() {
        for (secs, nanos, expected) in [
            (1, 500_000_000, "13 mtime=1.5\n"),
            (-2, 500_000_000, "14 mtime=-1.5\n"),
            (-1, 999_999_999, "22 mtime=-0.000000001\n"),
            (-5, 0, "12 mtime=-5\n"),
        ] {
            let out = bytes(b"x", 0, Timestamp { secs, nanos });
            assert!(text(&out[512..]).starts_with(expected), "{}", text(&out[512..560]));
        }
    }

    #[test]
    fn a_record_counts_its_own_length_digits() {
        for value in 0..2000 {
            let mut record = Vec::new();
            push_record(&mut record, b"k", &vec![b'v'; value]);
            let digits = record.iter().position(|&b| b == b' ').unwrap();
            assert_eq!(text(&record[..digits]), record.len().to_string());
        }
    }

    #[test]
    fn long_names_use_the_prefix_before_pax() {
        let path = [&b"d".repeat(120)[..], b"/", &b"f".repeat(90)[..]].concat();
        let out = bytes(&path, 0, Timestamp::default());
        assert_eq!((out.len(), &out[345..465], &out[..90]), (512, &path[..120], &path[121..]));
        let path = b"f".repeat(101);
        assert_eq!(bytes(&path, 0, Timestamp::default()).len(), 3 * 512);
    }
}
