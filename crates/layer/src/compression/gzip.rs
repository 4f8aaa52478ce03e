//! Gzip on several cores, with the same bytes whatever their number.
//!
//! The input is cut into blocks of fixed size, and each becomes a gzip member of its own (RFC 1952,
//! section 2.2: a file is any number of them), or several where parts of it do not compress: those are
//! stored. Where the cuts are depends on the input alone. Each member says how long it is, so that
//! [`super::gunzip`] can inflate several at once.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

use libdeflater::{CompressionLvl, Compressor};

use super::noise::{GRAIN_BYTES, is_noise};

/// Input that is compressed as one. A larger one hides the cuts better, a smaller one starts the cores sooner.
pub(super) const BLOCK_BYTES: usize = 1 << 20;
/// What stands before the length of a member: deflate, a field of extra data, no time, no operating
/// system named (same input, same bytes), then eight bytes of that field: `KL`, and four that follow.
pub(super) const HEADER: [u8; 16] = [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, 8, 0, b'K', b'L', 4, 0];
/// A header with the length of its member, which counts the header and the trailer.
pub(super) const HEADER_BYTES: usize = HEADER.len() + 4;
/// Checksum and length of what was compressed.
pub(super) const TRAILER_BYTES: usize = 8;

/// Compresses what is written to it into `out`, on all threads of rayon's pool.
///
/// Holds at most two blocks a thread, and as many compressed ones. Dropping it without
/// [`Self::finish`] leaves a stream that may miss its last blocks.
pub(super) struct GzipEncoder<W> {
    out: W,
    level: u32,
    /// What will be the next members.
    block: Vec<u8>,
    /// Blocks in work, oldest first.
    pending: VecDeque<Receiver<io::Result<Vec<u8>>>>,
    most_pending: usize,
    started: bool,
}

impl<W: Write> GzipEncoder<W> {
    /// `level` from 0 (stored) to 9.
    pub(super) fn new(out: W, level: u32) -> Self {
        let most_pending = rayon::current_num_threads() * 2;
        Self { out, level, block: Vec::new(), pending: VecDeque::new(), most_pending, started: false }
    }

    /// Hands the collected block to the pool.
    fn dispatch(&mut self) -> io::Result<()> {
        if self.pending.len() >= self.most_pending {
            self.collect()?;
        }
        self.started = true;
        let (block, level) = (std::mem::take(&mut self.block), self.level);
        self.pending.push_back(in_pool(move || members(&block, level)));
        Ok(())
    }

    /// Writes the oldest block in work.
    fn collect(&mut self) -> io::Result<()> {
        let Some(receiver) = self.pending.pop_front() else { return Ok(()) };
        self.out.write_all(&wait(&receiver)??)
    }

    /// Ends the stream; `out` again.
    pub(super) fn finish(mut self) -> io::Result<W> {
        // Of nothing there is one member, too: no bytes at all are no gzip.
        if !self.block.is_empty() || !self.started {
            self.dispatch()?;
        }
        while !self.pending.is_empty() {
            self.collect()?;
        }
        Ok(self.out)
    }
}

impl<W: Write> Write for GzipEncoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.block.capacity() == 0 {
            self.block.reserve_exact(BLOCK_BYTES);
        }
        let taken = bytes.len().min(BLOCK_BYTES - self.block.len());
        self.block.extend_from_slice(&bytes[..taken]);
        if self.block.len() == BLOCK_BYTES {
            self.dispatch()?;
        }
        Ok(taken)
    }

    /// Does nothing: an early flush would move the cuts.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has the pool do `work`. Nobody need wait for it: a stream may be given up.
pub(super) fn in_pool<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = sync_channel(1);
    rayon::spawn(move || {
        let _ = sender.send(work());
    });
    receiver
}

/// Waits for a block. A thread of the pool works meanwhile: it may be the only one.
pub(super) fn wait<T>(receiver: &Receiver<T>) -> io::Result<T> {
    let panicked = |_| io::Error::other("a thread that packs or unpacks a block panicked");
    loop {
        match receiver.try_recv() {
            Ok(value) => return Ok(value),
            Err(TryRecvError::Empty) if rayon::yield_now() == Some(rayon::Yield::Executed) => {}
            Err(_) => return receiver.recv().map_err(panicked),
        }
    }
}

thread_local! {
    /// Tables of a compressor, which are large, and the level they are for.
    static COMPRESSOR: RefCell<Option<(i32, Compressor)>> = const { RefCell::new(None) };
}

/// A block as gzip members: what does not compress is stored, in members of its own, with a look at each
/// [`GRAIN_BYTES`].
fn members(block: &[u8], level: u32) -> io::Result<Vec<u8>> {
    let grains: Vec<_> =
        block.chunks(GRAIN_BYTES).map(|grain| (grain.len(), is_left(grain, level))).collect();
    let (mut bytes, mut rest) = (Vec::new(), block);
    for run in grains.chunk_by(|(_, before), (_, after)| before == after) {
        let length = run.iter().map(|(length, _)| length).sum();
        let (part, behind) = rest.split_at(length);
        let made = if run[0].1 { stored(part)? } else { deflated(part, level)? };
        rest = behind;
        match bytes.is_empty() {
            true => bytes = made,
            false => bytes.extend_from_slice(&made),
        }
    }
    match block.is_empty() {
        true => deflated(block, level),
        false => Ok(bytes),
    }
}

/// A block as one gzip member, stored when nothing in it compresses.
///
/// # Errors
/// A member that would be longer than its header can say.
pub(super) fn member(block: &[u8], level: u32) -> io::Result<Vec<u8>> {
    match !block.is_empty() && block.chunks(GRAIN_BYTES).all(|grain| is_left(grain, level)) {
        true => stored(block),
        false => deflated(block, level),
    }
}

/// Whether it is not worth compressing. Whoever asks for more than level 6 wants the last percent, too.
fn is_left(grain: &[u8], level: u32) -> bool {
    level <= 6 && is_noise(grain)
}

/// A member of stored blocks (RFC 1951, section 3.2.4).
fn stored(block: &[u8]) -> io::Result<Vec<u8>> {
    let pieces = block.chunks(u16::MAX.into());
    let last = pieces.len() - 1;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + block.len() + pieces.len() * 5 + TRAILER_BYTES);
    bytes.resize(HEADER_BYTES, 0);
    for (nth, piece) in pieces.enumerate() {
        let length = piece.len() as u16;
        bytes.push(u8::from(nth == last));
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&(!length).to_le_bytes());
        bytes.extend_from_slice(piece);
    }
    close(bytes, block)
}

fn deflated(block: &[u8], level: u32) -> io::Result<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|compressor| {
        let level = i32::try_from(level.min(9)).map_err(io::Error::other)?;
        if compressor.as_ref().is_none_or(|(of, _)| *of != level) {
            let made = CompressionLvl::new(level).map_err(|_| io::Error::other("no such level"))?;
            *compressor = Some((level, Compressor::new(made)));
        }
        let Some((_, compressor)) = compressor else { return Err(io::Error::other("no compressor")) };
        let most = HEADER_BYTES + compressor.deflate_compress_bound(block.len()) + TRAILER_BYTES;
        let mut bytes = vec![0; most];
        let deflated =
            compressor.deflate_compress(block, &mut bytes[HEADER_BYTES..]).map_err(io::Error::other)?;
        bytes.truncate(HEADER_BYTES + deflated);
        close(bytes, block)
    })
}

/// Puts the header of a member into the room before its deflate stream, and the trailer behind it.
fn close(mut bytes: Vec<u8>, block: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(bytes.len() + TRAILER_BYTES).map_err(io::Error::other)?;
    bytes[..HEADER.len()].copy_from_slice(&HEADER);
    bytes[HEADER.len()..HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&libdeflater::crc32(block).to_le_bytes());
    // RFC 1952: the length modulo 2^32.
    bytes.extend_from_slice(&(block.len() as u32).to_le_bytes());
    Ok(bytes)
}
