//! Gzip on several cores, with the same bytes whatever their number.
//!
//! The input is cut into blocks of fixed size, and each becomes a gzip member of its own (RFC 1952,
//! section 2.2: a file is any number of them). Where the cuts are depends on the input alone. Each
//! member says how long it is, so that [`super::gunzip`] can inflate several at once.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

use libdeflater::{CompressionLvl, Compressor};

/// Input of one member. A larger one hides the cuts better, a smaller one starts the cores sooner.
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
    /// What will be the next member.
    block: Vec<u8>,
    /// Members in work, oldest first.
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
        self.pending.push_back(compress(std::mem::take(&mut self.block), self.level));
        Ok(())
    }

    /// Writes the oldest member in work.
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

/// Has the pool make a gzip member of a block.
pub(super) fn compress(block: Vec<u8>, level: u32) -> Receiver<io::Result<Vec<u8>>> {
    in_pool(move || member(&block, level))
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

/// A block as a gzip member.
///
/// # Errors
/// A member that would be longer than its header can say.
pub(super) fn member(block: &[u8], level: u32) -> io::Result<Vec<u8>> {
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
        let length = u32::try_from(bytes.len() + TRAILER_BYTES).map_err(io::Error::other)?;
        bytes[..HEADER.len()].copy_from_slice(&HEADER);
        bytes[HEADER.len()..HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&libdeflater::crc32(block).to_le_bytes());
        // RFC 1952: the length modulo 2^32.
        bytes.extend_from_slice(&(block.len() as u32).to_le_bytes());
        Ok(bytes)
    })
}
