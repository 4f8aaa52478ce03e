//! A stream in large pieces, read by a thread of its own when there is much of it.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread::{Builder, Scope};

use crate::hashing::PIECE;

/// Pieces that are read before anybody asks for them: two mebibytes.
const AHEAD: usize = 8;
/// What is read in place: for most layers a thread costs more than it saves.
const IN_PLACE: u64 = 1 << 20;

/// A stream that comes in pieces.
pub(crate) trait Pieces {
    /// The next [`PIECE`] bytes, in `room` or in memory that was handed over before; fewer at the end of the
    /// stream or before an error, and none behind it.
    ///
    /// # Errors
    /// The reader's, once all that stands before it was handed out.
    fn next(&mut self, room: Vec<u8>) -> io::Result<Vec<u8>>;
}

/// Reads when it is asked.
pub(crate) struct InPlace<R> {
    inner: R,
    error: Option<io::Error>,
}

impl<R: Read> InPlace<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, error: None }
    }
}

impl<R: Read> Pieces for InPlace<R> {
    fn next(&mut self, mut room: Vec<u8>) -> io::Result<Vec<u8>> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        room.resize(PIECE, 0);
        let mut filled = 0;
        // Decompressors give little at a time.
        while filled < PIECE {
            match self.inner.read(&mut room[filled..]) {
                Ok(0) => break,
                Ok(length) => filled += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if filled == 0 => return Err(error),
                Err(error) => {
                    self.error = Some(error);
                    break;
                }
            }
        }
        room.truncate(filled);
        Ok(room)
    }
}

/// Reads ahead of who asks, from the second mebibyte on: what decompresses and what writes are different threads then.
///
/// Dropped before its end, it lets the thread finish the read that it is in; the scope waits for that. So it is not for
/// what may stall.
pub(crate) struct Ahead<'scope, 'env, R> {
    scope: &'scope Scope<'scope, 'env>,
    source: Source<R>,
    in_place_bytes: u64,
    is_dropped: Arc<AtomicBool>,
}

enum Source<R> {
    Here(InPlace<Wanted<R>>),
    Thread {
        rooms: Sender<Vec<u8>>,
        filled: Receiver<io::Result<Vec<u8>>>,
    },
    /// At its end.
    Nothing,
}

impl<'scope, 'env, R: Read + Send + 'scope> Ahead<'scope, 'env, R> {
    pub(crate) fn new(scope: &'scope Scope<'scope, 'env>, inner: R) -> Self {
        let is_dropped = Arc::<AtomicBool>::default();
        let inner = Wanted { inner, is_dropped: is_dropped.clone() };
        Self { scope, source: Source::Here(InPlace::new(inner)), in_place_bytes: 0, is_dropped }
    }

    /// Moves the reader to a thread of its own, if one can be had.
    fn go_ahead(&mut self) {
        let Source::Here(reader) = std::mem::replace(&mut self.source, Source::Nothing) else { return };
        let (rooms, empty) = channel::<Vec<u8>>();
        let (full, filled) = channel();
        // Handed over as a message: when there is no thread, it is still ours.
        let (hand_over, handed) = sync_channel::<InPlace<Wanted<R>>>(1);
        let run = move || {
            let Ok(mut reader) = handed.recv() else { return };
            // As many rooms are about as pieces may be: who waits for one holds none.
            for room in empty {
                let piece = reader.next(room);
                let is_last = !matches!(&piece, Ok(piece) if !piece.is_empty());
                if full.send(piece).is_err() || is_last {
                    return;
                }
            }
        };
        match Builder::new().name("layer-read".to_owned()).spawn_scoped(self.scope, run) {
            Ok(_) => {
                let _ = hand_over.send(reader);
                (0..AHEAD).for_each(|_| drop(rooms.send(Vec::new())));
                self.source = Source::Thread { rooms, filled };
            }
            // No more threads: it takes longer then.
            Err(_) => self.source = Source::Here(reader),
        }
    }
}

impl<R> Drop for Ahead<'_, '_, R> {
    fn drop(&mut self) {
        self.is_dropped.store(true, Ordering::Relaxed);
    }
}

/// A reader that fails once nobody wants what it reads.
struct Wanted<R> {
    inner: R,
    is_dropped: Arc<AtomicBool>,
}

impl<R: Read> Read for Wanted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_dropped.load(Ordering::Relaxed) {
            return Err(io::Error::other("nobody wants it any more"));
        }
        self.inner.read(buffer)
    }
}

impl<'scope, R: Read + Send + 'scope> Pieces for Ahead<'scope, '_, R> {
    fn next(&mut self, room: Vec<u8>) -> io::Result<Vec<u8>> {
        if self.in_place_bytes >= IN_PLACE {
            // When there is no thread: in another mebibyte.
            self.in_place_bytes = 0;
            self.go_ahead();
        }
        let piece = match &mut self.source {
            Source::Here(reader) => {
                let piece = reader.next(room)?;
                self.in_place_bytes += piece.len() as u64;
                return Ok(piece);
            }
            Source::Thread { rooms, filled } => {
                // An error: it has read all there is.
                let _ = rooms.send(room);
                let panicked = |_| Err(io::Error::other("the thread that reads ahead panicked"));
                filled.recv().unwrap_or_else(panicked)
            }
            Source::Nothing => return Ok(Vec::new()),
        };
        if !matches!(&piece, Ok(piece) if !piece.is_empty()) {
            self.source = Source::Nothing;
        }
        piece
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    /// Gives `size` bytes, little at a time, then an error if there is one.
    struct Given<'a> {
        at: usize,
        size: usize,
        error: Option<&'a str>,
        /// How much was read.
        read: &'a AtomicUsize,
        threads: &'a mut HashSet<thread::ThreadId>,
    }

    fn byte(at: usize) -> u8 {
        (at % 251) as u8
    }

    impl Read for Given<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.threads.insert(thread::current().id());
            if self.at == self.size
                && let Some(error) = self.error.take()
            {
                return Err(io::Error::other(error));
            }
            let length = buffer.len().min(self.size - self.at).min(60_000);
            for (nth, out) in buffer[..length].iter_mut().enumerate() {
                *out = byte(self.at + nth);
            }
            self.at += length;
            self.read.fetch_add(length, Ordering::Relaxed);
            Ok(length)
        }
    }

    /// Reads `size` bytes; how many threads read, and the error behind them.
    fn check(size: usize, error: Option<&str>) -> (usize, Option<String>) {
        let (read, mut threads) = (AtomicUsize::new(0), HashSet::new());
        let ended = thread::scope(|scope| {
            let given = Given { at: 0, size, error, read: &read, threads: &mut threads };
            let mut pieces = Ahead::new(scope, given);
            let (mut at, mut room) = (0, Vec::new());
            loop {
                let piece = match pieces.next(room) {
                    Ok(piece) if piece.is_empty() => break None,
                    Ok(piece) => piece,
                    Err(error) => break Some(error.to_string()),
                };
                assert!(piece.len() == PIECE || at + piece.len() == size, "{} at {at}", piece.len());
                assert!(piece.iter().enumerate().all(|(nth, is)| *is == byte(at + nth)), "at {at}");
                at += piece.len();
                assert!(read.load(Ordering::Relaxed) <= at + (AHEAD + 1) * PIECE);
                room = piece;
            }
        });
        assert_eq!(read.load(Ordering::Relaxed), size);
        (threads.len(), ended)
    }

    #[test]
    fn all_comes_in_order_and_errors_behind_it() {
        let in_place = IN_PLACE as usize;
        let sizes = [0, 1, PIECE, in_place - 1, in_place, in_place + 1, 3 << 20, (5 << 20) + 77];
        for size in sizes {
            let threads = if size < in_place { 1 } else { 2 };
            assert_eq!(check(size, None), (threads, None), "{size}");
            assert_eq!(check(size, Some("broken")), (threads, Some("broken".to_owned())), "{size}");
        }
    }

    #[test]
    fn whoever_stops_asking_ends_the_thread() {
        let (read, mut threads) = (AtomicUsize::new(0), HashSet::new());
        let size = 1 << 40;
        thread::scope(|scope| {
            let given = Given { at: 0, size, error: None, read: &read, threads: &mut threads };
            let mut pieces = Ahead::new(scope, given);
            let mut room = Vec::new();
            for _ in 0..10 {
                room = pieces.next(room).unwrap();
            }
        });
        assert!(read.load(Ordering::Relaxed) <= (10 + AHEAD + 1) * PIECE);
    }

    #[test]
    fn a_panic_is_told_and_not_the_end_of_the_stream() {
        struct Panics(usize);
        impl Read for Panics {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.0 += buffer.len();
                assert!(self.0 < 2 << 20, "as it should");
                Ok(buffer.len())
            }
        }
        let mut said = None;
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            thread::scope(|scope| {
                let mut pieces = Ahead::new(scope, Panics(0));
                said = loop {
                    match pieces.next(Vec::new()) {
                        Ok(piece) if piece.is_empty() => break None,
                        Ok(_) => {}
                        Err(error) => break Some(error.to_string()),
                    }
                };
            });
        }));
        assert_eq!(said.as_deref(), Some("the thread that reads ahead panicked"));
        assert!(ended.is_err());
    }

    #[test]
    fn the_end_waits_for_one_read() {
        /// Gives a byte at a time once the thread has begun; the second of them takes until somebody has let go.
        struct Slow<'a> {
            given: usize,
            begun: &'a AtomicUsize,
            has_let_go: &'a AtomicUsize,
        }
        impl Read for Slow<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                if self.given < IN_PLACE as usize {
                    self.given += buffer.len();
                    return Ok(buffer.len());
                }
                if self.begun.fetch_add(1, Ordering::SeqCst) == 1 {
                    while self.has_let_go.load(Ordering::SeqCst) == 0 {
                        thread::yield_now();
                    }
                }
                Ok(1)
            }
        }
        let (begun, has_let_go) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            let mut pieces = Ahead::new(scope, Slow { given: 0, begun: &begun, has_let_go: &has_let_go });
            (0..4).for_each(|_| drop(pieces.next(Vec::new())));
            pieces.go_ahead();
            while begun.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
            drop(pieces);
            has_let_go.store(1, Ordering::SeqCst);
        });
        assert_eq!(begun.load(Ordering::SeqCst), 2);
    }
}
