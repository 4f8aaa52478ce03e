//! A layer's tar becomes another tar with the same files: other times, another packing.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_oci::DiffId;

use crate::apply::{ApplyError, Limits};
use crate::diff::Written;
use crate::hashing::HashedOut;
use crate::index::Timestamp;
use crate::node::Xattrs;
use crate::tar_header::{Member, MemberKind};
use crate::tar_read::TarReader;
use crate::tar_write::{BLOCK, Header, write_header, write_padding};

/// What becomes of the files' modification times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Times {
    /// They stay.
    Keep,
    /// Later ones become this one.
    NotAfter(Timestamp),
    /// All become this one.
    All(Timestamp),
}

impl Times {
    fn of(self, time: Timestamp) -> Timestamp {
        match self {
            Times::Keep => time,
            Times::NotAfter(last) => time.min(last),
            Times::All(one) => one,
        }
    }
}

/// How to write a tar anew.
pub struct RepackOptions<'a> {
    /// What becomes of times.
    pub times: Times,
    /// A directory below which all members go.
    pub below: Option<&'a str>,
    /// How much the tar may ask for.
    pub limits: Limits,
    /// Set by somebody else to stop.
    pub cancel: &'a AtomicBool,
}

/// Why a tar could not be written anew.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RepackError {
    /// The tar cannot be read, or somebody asked to stop.
    #[error(transparent)]
    Input(#[from] ApplyError),
    /// The output could not be written.
    #[error("cannot write the layer")]
    Output(#[source] io::Error),
}

/// Takes the members of a tar one after the other.
pub(crate) trait Members {
    /// A member begins; exactly `size_bytes` of content follow, none but for files.
    fn begin(&mut self, header: &Header<'_>) -> io::Result<()>;
    /// More of its content.
    fn content(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// All of it was there.
    fn end(&mut self) -> io::Result<()>;
}

/// Writes `input`, a plain tar, anew into `out`. Returns the digest of what was read, and what was
/// written: sparse files with their holes as zeros, headers as [`crate::diff()`] writes them.
///
/// # Errors
/// [`RepackError`]; what was written then is no layer.
pub fn repack(
    input: impl Read,
    out: impl Write,
    options: &RepackOptions<'_>,
) -> Result<(DiffId, Written), RepackError> {
    let mut writer = Plain { out: HashedOut::new(out), size_bytes: 0, entries: 0 };
    let source = each_member(input, options, &mut writer)?;
    let Plain { mut out, entries, .. } = writer;
    out.write_all(&[0; 2 * BLOCK]).map_err(RepackError::Output)?;
    let (digest, tar_size_bytes) = out.finish().map_err(RepackError::Output)?;
    Ok((source, Written { diff_id: DiffId(digest), tar_size_bytes, entries }))
}

/// Hands over every member of `input`; the digest of all of it.
pub(crate) fn each_member(
    input: impl Read,
    options: &RepackOptions<'_>,
    members: &mut impl Members,
) -> Result<DiffId, RepackError> {
    let mut tar = TarReader::new(input, options.limits);
    let mut entries = 0;
    let below = options.below.map(|below| format!("{below}/").into_bytes()).unwrap_or_default();
    if !below.is_empty() {
        let none = Xattrs::new();
        let mtime = options.times.of(Timestamp::default());
        let (flag, mode) = (b'5', 0o755);
        let header = Header {
            path: &below,
            flag,
            link: b"",
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            mtime,
            device: (0, 0),
            xattrs: &none,
        };
        members.begin(&header).and_then(|()| members.end()).map_err(RepackError::Output)?;
    }
    while let Some(member) = tar.next()? {
        entries += 1;
        if entries > options.limits.entries {
            let (limit, actual) = (options.limits.entries, entries);
            return Err(ApplyError::Limit { what: "entries", limit, actual }.into());
        }
        if options.cancel.load(Ordering::Relaxed) {
            return Err(ApplyError::Cancelled.into());
        }
        let size = member.sparse.as_ref().map_or(member.size, |map| map.size);
        // Names of hard links are names in the tar; those of symbolic links are not.
        let link_below = if member.kind == MemberKind::HardLink { &*below } else { b"" };
        let header = Header {
            path: &[&below, member.path.as_slice()].concat(),
            flag: flag(member.kind),
            link: &[link_below, member.link.as_slice()].concat(),
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            size,
            mtime: options.times.of(member.mtime),
            device: member.device,
            xattrs: &member.xattrs,
        };
        members.begin(&header).map_err(RepackError::Output)?;
        content(&mut tar, &member, options.cancel, members)?;
        members.end().map_err(RepackError::Output)?;
    }
    let (digest, ..) = tar.finish()?;
    Ok(DiffId(digest))
}

fn flag(kind: MemberKind) -> u8 {
    match kind {
        MemberKind::File => b'0',
        MemberKind::HardLink => b'1',
        MemberKind::Symlink => b'2',
        MemberKind::Char => b'3',
        MemberKind::Block => b'4',
        MemberKind::Dir => b'5',
        MemberKind::Fifo => b'6',
    }
}

fn content(
    tar: &mut TarReader<'_>,
    member: &Member,
    cancel: &AtomicBool,
    members: &mut impl Members,
) -> Result<(), RepackError> {
    let Some(map) = &member.sparse else { return piece(tar, member, member.size, cancel, members) };
    let mut at = 0;
    for segment in &map.segments {
        zeros(segment.offset - at, cancel, members)?;
        piece(tar, member, segment.length, cancel, members)?;
        at = segment.offset + segment.length;
    }
    zeros(map.size - at, cancel, members)
}

fn piece(
    tar: &mut TarReader<'_>,
    member: &Member,
    mut left: u64,
    cancel: &AtomicBool,
    members: &mut impl Members,
) -> Result<(), RepackError> {
    while left > 0 {
        if cancel.load(Ordering::Relaxed) {
            return Err(ApplyError::Cancelled.into());
        }
        let chunk = tar.chunk(&member.path, usize::try_from(left).unwrap_or(usize::MAX))?;
        // The header promised more than is there only in a broken tar, which `chunk` reports.
        let length = chunk.len();
        members.content(chunk).map_err(RepackError::Output)?;
        tar.consume(length);
        left -= length as u64;
    }
    Ok(())
}

fn zeros(mut left: u64, cancel: &AtomicBool, members: &mut impl Members) -> Result<(), RepackError> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while left > 0 {
        if cancel.load(Ordering::Relaxed) {
            return Err(ApplyError::Cancelled.into());
        }
        let length = ZEROS.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        members.content(&ZEROS[..length]).map_err(RepackError::Output)?;
        left -= length as u64;
    }
    Ok(())
}

struct Plain<W> {
    out: HashedOut<W>,
    size_bytes: u64,
    entries: u64,
}

impl<W: Write> Members for Plain<W> {
    fn begin(&mut self, header: &Header<'_>) -> io::Result<()> {
        self.size_bytes = header.size;
        self.entries += 1;
        write_header(&mut self.out, header)
    }

    fn content(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    fn end(&mut self) -> io::Result<()> {
        write_padding(&mut self.out, self.size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use kiln_oci::Digest;

    use super::*;

    /// A tar with a file of the year 2100, one of 2001 and a link.
    fn tar() -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, mtime) in [("new", 4_102_444_800), ("old", 1_000_000_000)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(3);
            header.set_mtime(mtime);
            tar.append_data(&mut header, name, &b"abc"[..]).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        tar.append_link(&mut header, "link", "new").unwrap();
        tar.into_inner().unwrap()
    }

    fn repacked(input: &[u8], times: Times) -> (DiffId, Written, Vec<u8>) {
        let cancel = AtomicBool::new(false);
        let options = RepackOptions { times, below: None, limits: Limits::default(), cancel: &cancel };
        let mut out = Vec::new();
        let (source, written) = repack(input, &mut out, &options).unwrap();
        (source, written, out)
    }

    fn times(tar: &[u8]) -> Vec<u64> {
        let mut tar = tar::Archive::new(tar);
        tar.entries().unwrap().map(|entry| entry.unwrap().header().mtime().unwrap()).collect()
    }

    #[test]
    fn later_times_become_the_last_one_and_nothing_else_changes() {
        let input = tar();
        let last = Times::NotAfter(Timestamp { secs: 1_500_000_000, nanos: 0 });
        let (source, written, out) = repacked(&input, last);
        assert_eq!(source.0, Digest::of(&input));
        assert_eq!((written.diff_id.0, written.tar_size_bytes), (Digest::of(&out), out.len() as u64));
        assert_eq!((written.entries, times(&out)), (3, vec![1_500_000_000, 1_000_000_000, 0]));
        // What is written anew is written the same way for ever.
        assert!(repacked(&out, Times::Keep).2 == out);
        assert!(repacked(&out, last).2 == out);
        let all = repacked(&input, Times::All(Timestamp { secs: 7, nanos: 0 })).2;
        assert_eq!(times(&all), [7, 7, 7]);
    }

    #[test]
    fn members_can_stand_below_a_directory() {
        let cancel = AtomicBool::new(false);
        let below = Some("linux_amd64");
        let options = RepackOptions { times: Times::Keep, below, limits: Limits::default(), cancel: &cancel };
        let mut out = Vec::new();
        repack(&tar()[..], &mut out, &options).unwrap();
        let mut tar = tar::Archive::new(&out[..]);
        let names: Vec<String> = tar
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["linux_amd64/", "linux_amd64/new", "linux_amd64/old", "linux_amd64/link"]);
    }

    #[test]
    fn half_a_tar_is_an_error() {
        let input = tar();
        let cancel = AtomicBool::new(false);
        let options =
            RepackOptions { times: Times::Keep, below: None, limits: Limits::default(), cancel: &cancel };
        let broken = repack(&input[..514], io::sink(), &options);
        assert!(matches!(broken, Err(RepackError::Input(ApplyError::Broken { .. }))), "{broken:?}");
    }
}
