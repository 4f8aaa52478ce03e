//! eStargz: a gzip layer whose files can be fetched one by one.
//!
//! Every piece of a file is a gzip member of its own, a table of contents (TOC) is the tar's last
//! entry, and an empty member with the table's place is the end (stargz-snapshotter, docs/estargz.md).
//! Any reader of gzip layers reads it. The tar has two entries more than the layer it was made of, so
//! its diff ID is another one.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::sync::mpsc::Receiver;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_oci::{DiffId, Digest, Sha256Writer};
use serde::Serialize;

use super::gzip::{HEADER, in_pool, member, wait};
use crate::hashing::HashedOut;
use crate::index::Timestamp;
use crate::node::Xattrs;
use crate::repack::{Members, RepackError, RepackOptions, each_member};
use crate::tar_write::{BLOCK, Header, write_header, write_padding};

/// Files are cut into pieces of this size, as all writers of eStargz do.
pub(super) const CHUNK_BYTES: u64 = 4 << 20;
/// Name of the table's entry.
const TOC_NAME: &[u8] = b"stargz.index.json";
/// Says that nothing is worth fetching before it is asked for.
const LANDMARK: &[u8] = b".no.prefetch.landmark";
const LANDMARK_BYTES: &[u8] = &[0xf];
/// What another run of a converter left; written anew.
const OWN_NAMES: [&[u8]; 3] = [TOC_NAME, LANDMARK, b".prefetch.landmark"];

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estargz {
    /// Digest of the plain tar inside.
    pub diff_id: DiffId,
    /// Size of the plain tar inside.
    pub tar_size_bytes: u64,
    /// Digest of the table of contents.
    pub toc: Digest,
}

/// Writes `input`, a plain tar, as eStargz of a gzip `level` from 0 to 9. Returns the digest of what
/// was read, and what was written. The bytes depend on the tar and the level alone.
///
/// # Errors
/// [`RepackError`]; what was written then is no layer.
pub fn estargz(
    input: impl Read,
    out: impl Write,
    level: u32,
    options: &RepackOptions<'_>,
) -> Result<(DiffId, Estargz), RepackError> {
    let mut writer = Writer::new(out, level);
    writer.landmark().map_err(RepackError::Output)?;
    let source = each_member(input, options, &mut writer)?;
    let written = writer.finish().map_err(RepackError::Output)?;
    Ok((source, written))
}

/// An entry of the table.
#[derive(Debug, Default, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
struct TocEntry {
    name: String,
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    size: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    modtime: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    link_name: String,
    #[serde(skip_serializing_if = "is_zero")]
    mode: u64,
    #[serde(skip_serializing_if = "is_zero")]
    uid: u64,
    #[serde(skip_serializing_if = "is_zero")]
    gid: u64,
    #[serde(skip_serializing_if = "is_zero")]
    offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    dev_major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    dev_minor: u64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    xattrs: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    digest: String,
    #[serde(skip_serializing_if = "is_zero")]
    chunk_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    chunk_size: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    chunk_digest: String,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[derive(Serialize)]
struct Toc {
    version: u32,
    entries: Vec<TocEntry>,
}

/// A gzip member in work.
struct Pending {
    bytes: Receiver<io::Result<Vec<u8>>>,
    /// The entry of the table whose content begins here.
    entry: Option<usize>,
}

struct Writer<W> {
    out: W,
    level: u32,
    /// Bytes written to `out`.
    offset: u64,
    /// Hashes the plain tar.
    plain: HashedOut<io::Sink>,
    /// What will be the next gzip member, and the entry whose content begins it.
    member: Vec<u8>,
    starts: Option<usize>,
    pending: VecDeque<Pending>,
    most_pending: usize,
    entries: Vec<TocEntry>,
    file: Option<OpenFile>,
}

/// The file that is being written.
struct OpenFile {
    /// Its first entry.
    first: usize,
    size: u64,
    done: u64,
    /// Left of the current piece.
    chunk_left: u64,
    whole: Sha256Writer<io::Sink>,
    chunk: Sha256Writer<io::Sink>,
    /// Left out of the layer.
    skipped: bool,
}

impl<W: Write> Writer<W> {
    fn new(out: W, level: u32) -> Self {
        Self {
            out,
            level: level.min(9),
            offset: 0,
            plain: HashedOut::new(io::sink()),
            member: Vec::new(),
            starts: None,
            pending: VecDeque::new(),
            most_pending: rayon::current_num_threads() * 2,
            entries: Vec::new(),
            file: None,
        }
    }

    fn landmark(&mut self) -> io::Result<()> {
        let none = Xattrs::new();
        let header = regular(LANDMARK, LANDMARK_BYTES.len() as u64, &none);
        self.begin(&header)?;
        self.content(LANDMARK_BYTES)?;
        self.end()
    }

    /// Adds to the current gzip member.
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.member.extend_from_slice(bytes);
        self.plain.write_all(bytes)
    }

    /// Hands the current gzip member to the pool.
    fn close_member(&mut self) -> io::Result<()> {
        if self.member.is_empty() {
            return Ok(());
        }
        while self.pending.len() >= self.most_pending {
            self.collect()?;
        }
        let (piece, level) = (std::mem::take(&mut self.member), self.level);
        let bytes = in_pool(move || member(&piece, level));
        self.pending.push_back(Pending { bytes, entry: self.starts.take() });
        Ok(())
    }

    fn collect(&mut self) -> io::Result<()> {
        let Some(Pending { bytes, entry }) = self.pending.pop_front() else { return Ok(()) };
        let bytes = wait(&bytes)??;
        if let Some(entry) = entry {
            self.entries[entry].offset = self.offset;
        }
        self.offset += bytes.len() as u64;
        self.out.write_all(&bytes)
    }

    fn finish(mut self) -> io::Result<Estargz> {
        self.close_member()?;
        while !self.pending.is_empty() {
            self.collect()?;
        }
        let toc = Toc { version: 1, entries: std::mem::take(&mut self.entries) };
        let json = serde_json::to_vec(&toc).map_err(io::Error::other)?;
        let none = Xattrs::new();
        let mut last = Vec::new();
        write_header(&mut last, &regular(TOC_NAME, json.len() as u64, &none))?;
        last.extend_from_slice(&json);
        write_padding(&mut last, json.len() as u64)?;
        last.extend_from_slice(&[0; 2 * BLOCK]);
        self.plain.write_all(&last)?;
        self.out.write_all(&member(&last, self.level)?)?;
        self.out.write_all(&footer(self.offset))?;
        self.out.flush()?;
        let (digest, tar_size_bytes) = self.plain.finish()?;
        Ok(Estargz { diff_id: DiffId(digest), tar_size_bytes, toc: Digest::of(&json) })
    }
}

impl<W: Write> Members for Writer<W> {
    fn begin(&mut self, header: &Header<'_>) -> io::Result<()> {
        let name = header.path.strip_prefix(b"./").unwrap_or(header.path);
        let own = OWN_NAMES.contains(&name) && !(self.entries.is_empty() && name == LANDMARK);
        let hash = || Sha256Writer::new(io::sink());
        self.file = (header.flag == b'0' || own).then(|| OpenFile {
            first: self.entries.len(),
            size: header.size,
            done: 0,
            chunk_left: 0,
            whole: hash(),
            chunk: hash(),
            skipped: own,
        });
        if own {
            return Ok(());
        }
        let mut bytes = Vec::new();
        write_header(&mut bytes, header)?;
        self.put(&bytes)?;
        self.entries.push(entry(header));
        Ok(())
    }

    fn content(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        while !bytes.is_empty() && !file.skipped {
            if file.chunk_left == 0 {
                self.start_chunk(&mut file)?;
            }
            let length = bytes.len().min(usize::try_from(file.chunk_left).unwrap_or(usize::MAX));
            let (now, later) = bytes.split_at(length);
            file.whole.write_all(now)?;
            file.chunk.write_all(now)?;
            self.put(now)?;
            file.done += length as u64;
            file.chunk_left -= length as u64;
            if file.chunk_left == 0 {
                let hash = std::mem::replace(&mut file.chunk, Sha256Writer::new(io::sink()));
                let (_, digest, _) = hash.finish();
                if let Some(last) = self.entries.last_mut() {
                    last.chunk_digest = digest.to_string();
                }
            }
            bytes = later;
        }
        self.file = Some(file);
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(file) = self.file.take().filter(|file| !file.skipped) else { return Ok(()) };
        let (_, digest, _) = file.whole.finish();
        self.entries[file.first].digest = digest.to_string();
        let mut padding = Vec::new();
        write_padding(&mut padding, file.size)?;
        self.put(&padding)
    }
}

impl<W: Write> Writer<W> {
    /// The next piece of a file begins a gzip member.
    fn start_chunk(&mut self, file: &mut OpenFile) -> io::Result<()> {
        self.close_member()?;
        let left = file.size - file.done;
        file.chunk_left = left.min(CHUNK_BYTES);
        if file.done > 0 {
            let name = self.entries[file.first].name.clone();
            self.entries.push(TocEntry { name, kind: "chunk", ..TocEntry::default() });
        }
        self.starts = Some(self.entries.len() - 1);
        if let Some(entry) = self.entries.last_mut() {
            entry.chunk_offset = file.done;
            // The size of the last piece is what is left.
            entry.chunk_size = if left > CHUNK_BYTES { CHUNK_BYTES } else { 0 };
        }
        Ok(())
    }
}

fn regular<'a>(path: &'a [u8], size: u64, xattrs: &'a Xattrs) -> Header<'a> {
    Header {
        path,
        flag: b'0',
        link: b"",
        mode: 0o644,
        uid: 0,
        gid: 0,
        size,
        mtime: Timestamp::default(),
        device: (0, 0),
        xattrs,
    }
}

fn entry(header: &Header<'_>) -> TocEntry {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    TocEntry {
        name: text(header.path),
        kind: match header.flag {
            b'1' => "hardlink",
            b'2' => "symlink",
            b'3' => "char",
            b'4' => "block",
            b'5' => "dir",
            b'6' => "fifo",
            _ => "reg",
        },
        size: header.size,
        modtime: rfc3339(header.mtime),
        link_name: text(header.link),
        mode: header.mode.into(),
        uid: header.uid.into(),
        gid: header.gid.into(),
        dev_major: header.device.0.into(),
        dev_minor: header.device.1.into(),
        xattrs: header.xattrs.iter().map(|(key, value)| (text(key), STANDARD.encode(value))).collect(),
        ..TocEntry::default()
    }
}

/// To the second; nothing for 1970, which stands for no time.
fn rfc3339(time: Timestamp) -> String {
    match jiff::Timestamp::from_second(time.secs) {
        Ok(at) if time.secs != 0 => at.to_string(),
        _ => String::new(),
    }
}

/// An empty gzip member of 51 bytes that says where the table is.
fn footer(toc_offset: u64) -> Vec<u8> {
    // As far as the length of the extra field (RFC 1952): two letters and a length, then the text.
    let mut bytes = HEADER[..10].to_vec();
    let text = format!("{toc_offset:016x}STARGZ");
    bytes.extend_from_slice(&[26, 0, b'S', b'G', 22, 0]);
    bytes.extend_from_slice(text.as_bytes());
    // A stored block of nothing, the last one; checksum and size of nothing.
    bytes.extend_from_slice(&[1, 0, 0, 0xff, 0xff]);
    bytes.extend_from_slice(&[0; 8]);
    bytes
}

#[cfg(test)]
#[path = "estargz/tests.rs"]
mod tests;
