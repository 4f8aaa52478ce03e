//! Reads a tar stream, trusting nothing in it.
//!
//! The `tar` crate reads extension members of any size into memory, so the framing is done here.

use std::io::Read;
use std::sync::Arc;
use std::thread::Scope;

use kiln_oci::Digest;

use crate::ahead::{Ahead, InPlace, Pieces};
use crate::apply::{ApplyError, CONTENT_BYTES, Defect, Limits, TAR_BYTES};
use crate::hashing::Hashing;
use crate::path::EntryPath;
use crate::shape::{Shape, ShapeHasher};
use crate::tar_header::{Extensions, Member, checksum_holds, member, raw_path, unsigned, until_nul};
use crate::tar_sparse::{self, MapRest, MapText, SparseHeader, SparseMap};
use crate::tar_write::BLOCK;

pub(crate) struct TarReader<'a> {
    source: Source<'a>,
    limits: Limits,
    /// Unread content of the current member, and the padding behind it.
    content_left: u64,
    padding: u64,
    consumed: u64,
    /// Bytes of the files that are not in the tar.
    holes: u64,
    shape: ShapeHasher,
}

/// A stream in large pieces, hashed as they come.
struct Source<'a> {
    pieces: Box<dyn Pieces + 'a>,
    hashing: Hashing,
    piece: Arc<Vec<u8>>,
    /// How much of the piece is used.
    at: usize,
}

impl<'a> Source<'a> {
    fn new(pieces: Box<dyn Pieces + 'a>) -> Self {
        Self { pieces, hashing: Hashing::new(), piece: Arc::default(), at: 0 }
    }

    /// What comes next; empty at the end of the stream.
    fn fill(&mut self) -> Result<&[u8], ApplyError> {
        if self.at == self.piece.len() {
            self.next_piece()?;
        }
        Ok(&self.piece[self.at..])
    }

    fn next_piece(&mut self) -> Result<(), ApplyError> {
        let old = std::mem::take(&mut self.piece);
        if old.capacity() > 0 {
            self.hashing.give_back(old);
        }
        self.at = 0;
        let room = self.hashing.room();
        self.piece = Arc::new(self.pieces.next(room).map_err(ApplyError::input)?);
        self.hashing.hash(&self.piece);
        Ok(())
    }

    fn consume(&mut self, length: usize) {
        self.at += length;
    }

    fn finish(self) -> (Digest, u64) {
        self.hashing.finish()
    }
}

impl<'a> TarReader<'a> {
    /// Reads `inner` when something is asked for.
    pub(crate) fn new(inner: impl Read + 'a, limits: Limits) -> Self {
        Self::of(Box::new(InPlace::new(inner)), limits)
    }

    /// Reads a long `inner` ahead, in a thread of `scope`.
    pub(crate) fn ahead<'scope: 'a>(
        scope: &'scope Scope<'scope, '_>,
        inner: impl Read + Send + 'scope,
        limits: Limits,
    ) -> Self {
        Self::of(Box::new(Ahead::new(scope, inner)), limits)
    }

    fn of(pieces: Box<dyn Pieces + 'a>, limits: Limits) -> Self {
        Self {
            source: Source::new(pieces),
            limits,
            content_left: 0,
            padding: 0,
            consumed: 0,
            holes: 0,
            shape: ShapeHasher::new(),
        }
    }

    /// The next member; `None` at the end of the archive.
    pub(crate) fn next(&mut self) -> Result<Option<Member>, ApplyError> {
        self.skip_content()?;
        let mut extensions = Extensions::default();
        loop {
            let Some(block) = self.header_block()? else { return Ok(None) };
            let raw_path = raw_path(&block);
            let fault = |defect| ApplyError::Broken { entry: raw_path.as_slice().into(), defect };
            let size =
                unsigned(&block[124..136], u64::MAX >> 1).ok_or_else(|| fault(Defect::Number("size")))?;
            match block[156] {
                b'x' => extensions.pax = Some(self.extension(size, &raw_path)?),
                b'L' => extensions.gnu_path = Some(until_nul(self.extension(size, &raw_path)?)),
                b'K' => extensions.gnu_link = Some(until_nul(self.extension(size, &raw_path)?)),
                // Global records, as `git archive` writes them, do not apply to layers (as in Go).
                b'g' => drop(self.extension(size, &raw_path)?),
                flag => {
                    let (mut member, sparse) = member(&block, flag, raw_path, size, extensions)?;
                    match sparse {
                        Some(sparse) => member.sparse = Some(self.sparse_map(sparse, &member)?),
                        None => self.start_content(member.size, &member.path)?,
                    }
                    return Ok(Some(member));
                }
            }
        }
    }

    /// Up to `max` bytes of the current member's content; empty at its end.
    pub(crate) fn chunk(&mut self, entry: &[u8], max: usize) -> Result<&[u8], ApplyError> {
        if self.content_left == 0 {
            return Ok(&[]);
        }
        let left = usize::try_from(self.content_left).unwrap_or(usize::MAX).min(max);
        let bytes = self.source.fill()?;
        if bytes.is_empty() {
            return Err(ApplyError::Broken { entry: entry.into(), defect: Defect::Truncated });
        }
        Ok(&bytes[..bytes.len().min(left)])
    }

    /// Marks `length` bytes of the last [`Self::chunk`] as used.
    pub(crate) fn consume(&mut self, length: usize) {
        self.source.consume(length);
        self.content_left -= length as u64;
    }

    /// Reads to the end of the stream, which the diff ID covers, and returns digest, size and shape.
    pub(crate) fn finish(mut self) -> Result<(Digest, u64, Shape), ApplyError> {
        loop {
            let rest = self.source.fill()?;
            let length = rest.len();
            if length == 0 {
                break;
            }
            self.shape.update(rest);
            self.source.consume(length);
            self.count(length as u64)?;
        }
        let (digest, size_bytes) = self.source.finish();
        Ok((digest, size_bytes, self.shape.finish()))
    }

    fn count(&mut self, bytes: u64) -> Result<(), ApplyError> {
        self.consumed = self.consumed.saturating_add(bytes);
        if self.consumed > self.limits.tar_size_bytes {
            let limit = self.limits.tar_size_bytes;
            return Err(ApplyError::Limit { what: TAR_BYTES, limit, actual: self.consumed });
        }
        Ok(())
    }

    fn start_content(&mut self, size: u64, path: &[u8]) -> Result<(), ApplyError> {
        let padded = size
            .checked_next_multiple_of(BLOCK as u64)
            .ok_or_else(|| ApplyError::Broken { entry: path.into(), defect: Defect::Number("size") })?;
        // Counted when announced: nobody fills the disk up to the limit first.
        self.count(padded)?;
        (self.content_left, self.padding) = (size, padded - size);
        Ok(())
    }

    fn skip_content(&mut self) -> Result<(), ApplyError> {
        let mut left = self.content_left + self.padding;
        while left > 0 {
            let bytes = self.source.fill()?;
            let mut length = bytes.len();
            if length == 0 {
                // Go takes a last member without its padding, too.
                let torn = left > self.padding;
                (self.content_left, self.padding) = (0, 0);
                let error = ApplyError::Broken { entry: EntryPath(Vec::new()), defect: Defect::Truncated };
                return if torn { Err(error) } else { Ok(()) };
            }
            length = length.min(usize::try_from(left).unwrap_or(usize::MAX));
            // Content that nobody took counts, too: such a tar is not what its tree gives.
            self.shape.update(&bytes[..length]);
            self.source.consume(length);
            left -= length as u64;
        }
        (self.content_left, self.padding) = (0, 0);
        Ok(())
    }

    /// Reads the map of a sparse file, wherever it stands, and goes to the content it speaks of.
    fn sparse_map(&mut self, header: SparseHeader, member: &Member) -> Result<SparseMap, ApplyError> {
        let fault = |defect| ApplyError::Broken { entry: member.path.as_slice().into(), defect };
        let mut numbers = header.numbers;
        match header.rest {
            MapRest::Nothing => self.start_content(member.size, &member.path)?,
            MapRest::Blocks => {
                let mut size_bytes = 0;
                let mut extended = true;
                while extended {
                    self.check_map_size(&mut size_bytes)?;
                    let block = self.block()?.ok_or_else(|| fault(Defect::Truncated))?;
                    extended = tar_sparse::add_old_block(&block, &mut numbers).map_err(fault)?;
                }
                self.start_content(member.size, &member.path)?;
            }
            MapRest::Content => {
                self.start_content(member.size, &member.path)?;
                let mut size_bytes = 0;
                let mut text = MapText::default();
                while !text.is_complete() {
                    // The map is part of what the header announced: it cannot reach behind that.
                    if self.content_left < BLOCK as u64 {
                        return Err(fault(Defect::SparseMap));
                    }
                    self.check_map_size(&mut size_bytes)?;
                    let mut block_left = BLOCK;
                    while block_left > 0 {
                        let chunk = self.chunk(&member.path, block_left)?;
                        text.add(chunk).map_err(fault)?;
                        let length = chunk.len();
                        self.consume(length);
                        block_left -= length;
                    }
                }
                numbers = text.into_numbers();
            }
        }
        let map = SparseMap::new(header.size, &numbers, self.content_left).map_err(fault)?;
        // A hole is nothing on disk, but every byte of it is hashed and is in the layer made of it.
        self.count_copy(map.size - self.content_left)?;
        Ok(map)
    }

    /// Counts bytes of files that are not in the tar: holes, or another file's content once more.
    pub(crate) fn count_copy(&mut self, bytes: u64) -> Result<(), ApplyError> {
        let limit = self.limits.tar_size_bytes;
        self.holes = self.holes.saturating_add(bytes);
        let actual = self.consumed.saturating_add(self.holes);
        if actual > limit {
            return Err(ApplyError::Limit { what: CONTENT_BYTES, limit, actual });
        }
        Ok(())
    }

    /// Counts one more block of a sparse file's map, which is held in memory.
    fn check_map_size(&self, size_bytes: &mut u64) -> Result<(), ApplyError> {
        *size_bytes += BLOCK as u64;
        let limit = self.limits.pax_size_bytes;
        if *size_bytes > limit {
            return Err(ApplyError::Limit { what: "bytes of sparse map", limit, actual: *size_bytes });
        }
        Ok(())
    }

    /// The content of an extension member, which is held in memory.
    fn extension(&mut self, size: u64, path: &[u8]) -> Result<Vec<u8>, ApplyError> {
        if size > self.limits.pax_size_bytes {
            let limit = self.limits.pax_size_bytes;
            return Err(ApplyError::Limit { what: "bytes of tar extension header", limit, actual: size });
        }
        self.start_content(size, path)?;
        let mut bytes = Vec::new();
        while self.content_left > 0 {
            let chunk = self.chunk(path, usize::MAX)?;
            bytes.extend_from_slice(chunk);
            let length = chunk.len();
            self.consume(length);
        }
        self.shape.update(&bytes);
        self.skip_content()?;
        Ok(bytes)
    }

    /// The next header with its checksum verified; `None` at the end.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, ApplyError> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block != [0; BLOCK] {
            let fault =
                ApplyError::Broken { entry: raw_path(&block).as_slice().into(), defect: Defect::Checksum };
            return if checksum_holds(&block) { Ok(Some(block)) } else { Err(fault) };
        }
        // Two zero blocks are the end; so is one at the end of the stream.
        match self.block()? {
            None => Ok(None),
            Some(second) if second == [0; BLOCK] => Ok(None),
            Some(_) => {
                Err(ApplyError::Broken { entry: EntryPath(Vec::new()), defect: Defect::LoneZeroBlock })
            }
        }
    }

    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, ApplyError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let bytes = self.source.fill()?;
            if bytes.is_empty() && filled == 0 {
                return Ok(None);
            }
            if bytes.is_empty() {
                return Err(ApplyError::Broken { entry: EntryPath(Vec::new()), defect: Defect::Truncated });
            }
            let length = bytes.len().min(BLOCK - filled);
            block[filled..filled + length].copy_from_slice(&bytes[..length]);
            self.source.consume(length);
            filled += length;
        }
        self.shape.update(&block);
        self.count(BLOCK as u64)?;
        Ok(Some(block))
    }
}
