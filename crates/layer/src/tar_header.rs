//! One member's header: its fields and the records that stand in for them.
//!
//! The `tar` crate splits PAX records at newlines, which binary attribute values contain, so they
//! are taken apart here. Where parsers differ, this one does as Go's archive/tar, which docker and
//! containerd read layers with.

use crate::apply::{ApplyError, Defect};
use crate::index::Timestamp;
use crate::node::Xattrs;
use crate::path::EntryPath;
use crate::tar_acl;
use crate::tar_sparse::{self, SparseHeader, SparseMap};
use crate::tar_write::BLOCK;

/// XATTR_SIZE_MAX of Linux.
const XATTR_MAX: usize = 64 << 10;
/// XATTR_NAME_MAX of Linux.
const XATTR_NAME_MAX: usize = 255;

/// One member, extension members folded in.
#[derive(Debug)]
pub(crate) struct Member {
    /// As it stands in the tar.
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: MemberKind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Of the content that is in the tar.
    pub(crate) size: u64,
    /// Where in the file the content goes; `None`: it is the file.
    pub(crate) sparse: Option<SparseMap>,
    pub(crate) mtime: Timestamp,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Xattrs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemberKind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Dir,
    Fifo,
}

/// What `x`, `L` and `K` members say of the member behind them.
#[derive(Default)]
pub(crate) struct Extensions {
    pub(crate) gnu_path: Option<Vec<u8>>,
    pub(crate) gnu_link: Option<Vec<u8>>,
    pub(crate) pax: Option<Vec<u8>>,
}

/// Decodes a header block with the extensions before it. Of a sparse file the map is still to be
/// read, as the [`SparseHeader`] says.
pub(crate) fn member(
    block: &[u8; BLOCK],
    flag: u8,
    raw_path: Vec<u8>,
    size: u64,
    extensions: Extensions,
) -> Result<(Member, Option<SparseHeader>), ApplyError> {
    let entry = EntryPath(raw_path.clone());
    let fault = |defect| ApplyError::Broken { entry: entry.clone(), defect };
    let id = |range: std::ops::Range<usize>, name| {
        let number = unsigned(&block[range], u32::MAX.into()).ok_or_else(|| fault(Defect::Number(name)))?;
        u32::try_from(number).map_err(|_| fault(Defect::Number(name)))
    };
    let mut member = Member {
        path: raw_path,
        link: until_nul(block[157..257].to_vec()),
        kind: MemberKind::File,
        mode: id(100..108, "mode")? & 0o7777,
        uid: 0,
        gid: 0,
        size,
        sparse: None,
        mtime: Timestamp::default(),
        device: (0, 0),
        xattrs: Xattrs::new(),
    };
    let pax = parse_pax(extensions.pax.as_deref().unwrap_or_default()).map_err(fault)?;
    let value = |key: &[u8]| pax.iter().rev().find(|(k, v)| *k == key && !v.is_empty()).map(|(_, v)| *v);
    // A record stands where the field cannot hold the number: the field is not looked at then.
    let number = |key: &'static str| -> Result<Option<u64>, ApplyError> {
        let Some(text) = value(key.as_bytes()) else { return Ok(None) };
        decimal(text).map(Some).ok_or_else(|| fault(Defect::Number(key)))
    };
    let pax_id = |key, range| match number(key)? {
        Some(number) => u32::try_from(number).map_err(|_| fault(Defect::Number(key))),
        None => id(range, key),
    };
    member.uid = pax_id("uid", 108..116)?;
    member.gid = pax_id("gid", 116..124)?;
    member.size = number("size")?.unwrap_or(size);
    member.mtime = match value(b"mtime") {
        Some(text) => pax_time(text),
        None => signed(&block[136..148]).map(|secs| Timestamp { secs, nanos: 0 }),
    }
    .ok_or_else(|| fault(Defect::Number("mtime")))?;
    if let Some(path) = extensions.gnu_path.or_else(|| value(b"path").map(<[u8]>::to_vec)) {
        member.path = path;
    }
    if let Some(link) = extensions.gnu_link.or_else(|| value(b"linkpath").map(<[u8]>::to_vec)) {
        member.link = link;
    }
    for (key, value) in &pax {
        let Some(name) = key.strip_prefix(b"SCHILY.xattr.") else { continue };
        if value.len() > XATTR_MAX {
            let (limit, actual) = (XATTR_MAX as u64, value.len() as u64);
            return Err(ApplyError::Limit { what: "bytes of extended attribute", limit, actual });
        }
        if name.is_empty() || name.len() > XATTR_NAME_MAX || name.contains(&0) {
            return Err(fault(Defect::XattrName));
        }
        member.xattrs.insert(name.to_vec(), value.to_vec());
    }
    member.kind = match flag {
        // Before POSIX a directory was a file with a closing slash.
        0 if member.path.ends_with(b"/") => MemberKind::Dir,
        0 | b'0' | b'7' | b'S' => MemberKind::File,
        b'1' => MemberKind::HardLink,
        b'2' => MemberKind::Symlink,
        b'3' => MemberKind::Char,
        b'4' => MemberKind::Block,
        b'5' => MemberKind::Dir,
        b'6' => MemberKind::Fifo,
        flag => return Err(fault(Defect::Type(flag))),
    };
    for (record, name) in tar_acl::RECORDS {
        // The kernel has defaults for directories alone, and nothing for links.
        let may_have = match member.kind {
            MemberKind::Dir => true,
            MemberKind::Symlink | MemberKind::HardLink => false,
            _ => name.ends_with(b"access"),
        };
        let text = value(record).filter(|text| may_have && text.len() <= XATTR_MAX);
        // Where both are there, the attribute is the exact one.
        if let Some(acl) = text.and_then(tar_acl::parse) {
            member.xattrs.entry(name.to_vec()).or_insert(acl);
        }
    }
    if matches!(member.kind, MemberKind::Char | MemberKind::Block) {
        member.device = (id(329..337, "device")?, id(337..345, "device")?);
    }
    if member.kind != MemberKind::File {
        member.size = 0;
    }
    let sparse = match flag {
        b'S' => Some(tar_sparse::old_header(block).map_err(fault)?),
        _ => tar_sparse::pax_header(&pax).map_err(fault)?,
    };
    if let Some(sparse) = &sparse {
        if member.kind != MemberKind::File {
            return Err(fault(Defect::SparseMap));
        }
        // Ahead of all others, as in Go: theirs is made up for readers that do not know sparse files.
        if let Some(name) = &sparse.name {
            member.path.clone_from(name);
        }
    }
    Ok((member, sparse))
}

/// Key and value.
pub(crate) type Record<'b> = (&'b [u8], &'b [u8]);

/// `length key=value\n`, the length counted in bytes; values may hold anything.
fn parse_pax(mut rest: &[u8]) -> Result<Vec<Record<'_>>, Defect> {
    let mut records = Vec::new();
    while !rest.is_empty() {
        let space = rest.iter().take(20).position(|&b| b == b' ').ok_or(Defect::Pax)?;
        let length = decimal(&rest[..space]).and_then(|n| usize::try_from(n).ok()).ok_or(Defect::Pax)?;
        let record = rest.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or(Defect::Pax)?;
        let equals = record.iter().position(|&b| b == b'=').ok_or(Defect::Pax)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if matches!(key, b"path" | b"linkpath") && value.contains(&0) {
            return Err(Defect::Pax);
        }
        records.push((key, value));
        rest = &rest[length..];
    }
    Ok(records)
}

pub(crate) fn raw_path(block: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(block[..100].to_vec());
    // Only POSIX headers have a prefix; GNU's keep times there.
    let prefix =
        if &block[257..263] == b"ustar\0" { until_nul(block[345..500].to_vec()) } else { Vec::new() };
    crate::path::join(&prefix, &name)
}

pub(crate) fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&b| b == 0) {
        bytes.truncate(end);
    }
    bytes
}

pub(crate) fn checksum_holds(block: &[u8; BLOCK]) -> bool {
    let blank = |at: usize| if (148..156).contains(&at) { b' ' } else { block[at] };
    let unsigned_sum: u64 = (0..BLOCK).map(|at| u64::from(blank(at))).sum();
    // Some old writers added signed bytes.
    let signed_sum: i64 = (0..BLOCK).map(|at| i64::from(blank(at).cast_signed())).sum();
    unsigned(&block[148..156], u64::MAX >> 1)
        .is_some_and(|sum| sum == unsigned_sum || i64::try_from(sum) == Ok(signed_sum))
}

pub(crate) fn unsigned(field: &[u8], max: u64) -> Option<u64> {
    signed(field).and_then(|number| u64::try_from(number).ok()).filter(|&number| number <= max)
}

/// Octal text, or GNU's big-endian two's complement marked by the top bit.
fn signed(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Bit 6 is the sign, the top bit only the mark.
        let start = if first & 0x40 != 0 { i64::from(first.cast_signed()) } else { i64::from(first & 0x3f) };
        return rest.iter().try_fold(start, |sum, &b| sum.checked_mul(256)?.checked_add(b.into()));
    }
    let text = until_nul(field.to_vec());
    let digits = text.trim_ascii();
    digits.iter().try_fold(0_i64, |sum, &b| match b {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add((b - b'0').into()),
        _ => None,
    })
}

pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |sum, &b| match b {
        b'0'..=b'9' => sum.checked_mul(10)?.checked_add((b - b'0').into()),
        _ => None,
    })
}

/// `[-]seconds[.fraction]`, cut at nanoseconds.
fn pax_time(text: &[u8]) -> Option<Timestamp> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = text.iter().position(|&b| b == b'.').unwrap_or(text.len());
    let secs = i64::try_from(decimal(&text[..dot])?).ok()?;
    let fraction = text.get(dot + 1..).unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0_u32, |sum, b| sum * 10 + u32::from(b - b'0'));
    Some(match (negative, nanos) {
        (false, nanos) => Timestamp { secs, nanos },
        (true, 0) => Timestamp { secs: -secs, nanos: 0 },
        (true, nanos) => Timestamp { secs: -secs - 1, nanos: 1_000_000_000 - nanos },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_values_may_hold_newlines() {
        let records = parse_pax(b"22 SCHILY.xattr.a=\n=\n\n9 path=x\n");
        assert_eq!(records, Ok(vec![(&b"SCHILY.xattr.a"[..], &b"\n=\n"[..]), (b"path", b"x")]));
        for bad in [&b"9 path=xx"[..], b"99 path=x\n", b"x", b"0 a=b\n", b"3 =", b"6 path\n"] {
            assert_eq!(parse_pax(bad), Err(Defect::Pax), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn numbers_are_octal_or_marked_binary() {
        assert_eq!(signed(b"0000644\0"), Some(0o644));
        assert_eq!(signed(b"   644 \0"), Some(0o644));
        assert_eq!(signed(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(signed(&[0x80, 0, 0, 1, 0, 0, 0, 0]), Some(1 << 32));
        assert_eq!(signed(&[0xff; 12]), Some(-1));
        assert_eq!(unsigned(&[0xff; 12], u64::MAX), None);
        assert_eq!(signed(&[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0]), None);
        assert_eq!(signed(b"12x\0"), None);
    }

    #[test]
    fn times_have_signs_and_fractions() {
        assert_eq!(pax_time(b"1.5"), Some(Timestamp { secs: 1, nanos: 500_000_000 }));
        assert_eq!(pax_time(b"-1.5"), Some(Timestamp { secs: -2, nanos: 500_000_000 }));
        assert_eq!(pax_time(b"7.1234567899"), Some(Timestamp { secs: 7, nanos: 123_456_789 }));
        assert_eq!(pax_time(b"99999999999999999999"), None);
        assert_eq!(pax_time(b"1.x"), None);
    }
}
