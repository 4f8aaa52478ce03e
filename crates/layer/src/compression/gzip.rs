//! Gzip on several cores, with the same bytes whatever their number.
//!
//! The input is cut into blocks of fixed size. Each is deflated on its own, with the 32 KiB before it
//! as dictionary, and ends at a byte; joined they are one member (RFC 1952). Where the cuts are depends
//! on the input alone.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

use flate2::{Compress, Crc, FlushCompress, Status};

/// Input of one block. A larger one hides the cuts better, a smaller one starts the cores sooner.
const BLOCK_BYTES: usize = 512 << 10;
/// How far back deflate looks.
const WINDOW_BYTES: usize = 32 << 10;
/// No flags, no time, no extra, no operating system named: same input, same bytes.
pub(super) const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];

/// Compresses what is written to it into `out`, on all threads of rayon's pool.
///
/// Holds at most two blocks a thread, and as many compressed ones. Dropping it without
/// [`Self::finish`] leaves a stream without an end.
pub(super) struct GzipEncoder<W> {
    out: W,
    level: u32,
    /// What will be the next block.
    block: Vec<u8>,
    /// The end of the block before.
    window: Vec<u8>,
    /// Blocks in work, oldest first.
    pending: VecDeque<Receiver<io::Result<Deflated>>>,
    most_pending: usize,
    crc: Crc,
    started: bool,
}

pub(super) struct Deflated {
    pub(super) bytes: Vec<u8>,
    pub(super) crc: Crc,
}

impl<W: Write> GzipEncoder<W> {
    /// `level` from 0 (stored) to 9.
    pub(super) fn new(out: W, level: u32) -> Self {
        let most_pending = rayon::current_num_threads() * 2;
        Self {
            out,
            level: level.min(9),
            block: Vec::new(),
            window: Vec::new(),
            pending: VecDeque::new(),
            most_pending,
            crc: Crc::new(),
            started: false,
        }
    }

    /// Hands the collected block to the pool.
    fn dispatch(&mut self, last: bool) -> io::Result<()> {
        if self.pending.len() >= self.most_pending {
            self.collect()?;
        }
        let block = std::mem::take(&mut self.block);
        let tail = &block[block.len().saturating_sub(WINDOW_BYTES)..];
        let window = std::mem::replace(&mut self.window, tail.to_vec());
        let level = self.level;
        let (sender, receiver) = sync_channel(1);
        rayon::spawn(move || {
            // Nobody waits for it any more when the stream was given up.
            let _ = sender.send(deflate(&block, &window, level, last));
        });
        self.pending.push_back(receiver);
        Ok(())
    }

    /// Writes the oldest block in work.
    fn collect(&mut self) -> io::Result<()> {
        let Some(receiver) = self.pending.pop_front() else { return Ok(()) };
        let deflated = wait(&receiver)??;
        if !self.started {
            self.out.write_all(&HEADER)?;
            self.started = true;
        }
        self.crc.combine(&deflated.crc);
        self.out.write_all(&deflated.bytes)
    }

    /// Ends the stream; `out` again.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.dispatch(true)?;
        while !self.pending.is_empty() {
            self.collect()?;
        }
        self.out.write_all(&self.crc.sum().to_le_bytes())?;
        self.out.write_all(&self.crc.amount().to_le_bytes())?;
        Ok(self.out)
    }
}

impl<W: Write> Write for GzipEncoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full block waits until more comes, so that the last one is known to be the last.
        if self.block.len() == BLOCK_BYTES {
            self.dispatch(false)?;
        }
        if self.block.capacity() == 0 {
            self.block.reserve_exact(BLOCK_BYTES);
        }
        let taken = bytes.len().min(BLOCK_BYTES - self.block.len());
        self.block.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    /// Does nothing: an early flush would move the cuts.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits for a block. A thread of the pool works meanwhile: it may be the only one.
pub(super) fn wait<T>(receiver: &Receiver<T>) -> io::Result<T> {
    let panicked = |_| io::Error::other("compressing a block panicked");
    loop {
        match receiver.try_recv() {
            Ok(value) => return Ok(value),
            Err(TryRecvError::Empty) if rayon::yield_now() == Some(rayon::Yield::Executed) => {}
            Err(_) => return receiver.recv().map_err(panicked),
        }
    }
}

/// One block, ended at a byte; `last`: the stream ends with it.
pub(super) fn deflate(block: &[u8], window: &[u8], level: u32, last: bool) -> io::Result<Deflated> {
    let mut crc = Crc::new();
    crc.update(block);
    let mut deflater = Compress::new(flate2::Compression::new(level), false);
    if !window.is_empty() {
        deflater.set_dictionary(window).map_err(io::Error::other)?;
    }
    let flush = if last { FlushCompress::Finish } else { FlushCompress::Sync };
    // What deflate makes of what it cannot compress, and the marks of the cut.
    let mut bytes = Vec::with_capacity(block.len() / 2 + 1024);
    loop {
        let done = usize::try_from(deflater.total_in()).unwrap_or(usize::MAX);
        let status = deflater.compress_vec(&block[done..], &mut bytes, flush).map_err(io::Error::other)?;
        let all_in = deflater.total_in() == block.len() as u64;
        let room_left = bytes.len() < bytes.capacity();
        // A flush is complete when it leaves room; with none left it may have more to say.
        if status == Status::StreamEnd || (!last && all_in && room_left) {
            return Ok(Deflated { bytes, crc });
        }
        bytes.reserve(bytes.capacity() / 2 + 1024);
    }
}
